"""DiffPure: its steps are those of the literature, its noise the pipeline's, its gradient the true one."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from atoplib.checkpoints import load, save
from atoplib.decisions import is_random
from atoplib.pipeline import AToPPipeline
from atoplib.purifiers import build, load_diffusers
from atoplib.purifiers.diffusion import noised, reverse_step, signal_levels
from atoplib.transforms import Transform, corrupt, sample_transform

NONE = Transform("none", grid_size=4)
UNET = {"block_out_channels": [8, 8], "norm_num_groups": 4}
TINY = {"unet": UNET, "fold": 2, "steps": 3, "t_star": 0.2}
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_without_diffusers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for make in (lambda: build("diffusion"), lambda: load_diffusers("somewhere")):
        with pytest.raises(ImportError, match="needs: pip install 'diffusers>="):
            make()


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers, an optional extra, is not installed")


@pytest.fixture(scope="module")
def purifier(diffusers):
    torch.manual_seed(0)
    return build("diffusion", **TINY).eval()


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)).eval()


def pipeline_of(purifier, transform=NONE):
    return AToPPipeline(transform, purifier, classifier()).eval()


# the equations


def test_the_way_there_and_a_step_back_are_those_of_diffusers_own_schedulers(diffusers):
    """DDIM's for any eta and any two levels; DDPM's from a level to the one before it."""
    x, e, n = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = signal_levels({}).tolist()
    times = torch.tensor([1, 700])
    there = noised(x, n, signal_levels({})[times].view(-1, 1, 1, 1))
    torch.testing.assert_close(
        there, diffusers.DDPMScheduler().add_noise(x, n, times - 1), rtol=1e-5, atol=1e-6
    )
    ddim = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    ddim.set_timesteps(50)
    for eta in (0.0, 0.5, 1.0):
        expected = ddim.step(e, 400, x, eta=eta, variance_noise=n).prev_sample
        found = reverse_step(x, e, levels[401], levels[381], eta=eta, noise=n)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # their levels are float32
    ddpm = diffusers.DDPMScheduler(clip_sample=False)
    generator = torch.Generator().manual_seed(5)
    expected = ddpm.step(e, 300, x, generator=generator).prev_sample
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    torch.testing.assert_close(
        reverse_step(x, e, levels[301], levels[300], noise=noise), expected, rtol=1e-4, atol=1e-5
    )


def test_an_oracle_of_the_noise_purifies_to_the_clean_image_whatever_the_noise(purifier, monkeypatch):
    """The whole way, there and back in random steps, with a network that knows where it should arrive."""
    target = torch.rand(2, 1, 16, 16) * 2 - 1

    def predict(noisy, times):
        level = purifier.levels[times].view(-1, 1, 1, 1)
        return (noisy - level.sqrt() * target) / (1 - level).sqrt()

    monkeypatch.setattr(purifier, "predict", predict)
    result = purifier(torch.zeros(2, 5, 16, 16), torch.randn(2, purifier.noise_planes, 16, 16))
    torch.testing.assert_close(result, target.expand(-1, 3, -1, -1), rtol=1e-4, atol=1e-4)


def test_the_way_back_begins_at_t_star_and_ends_at_the_image(diffusers):
    model = build("diffusion", unet=UNET, fold=2, t_star=0.1, steps=4)
    assert model.times == [100, 75, 50, 25, 0] and model.path[-1] == 1.0
    assert model.path[0] == pytest.approx(
        float((1 - torch.linspace(1e-4, 0.02, 1000).double())[:100].prod()), rel=1e-6
    )
    assert model.noise_planes == 4
    assert build("diffusion", unet=UNET, fold=2, t_star=0.1, steps=4, eta=0).noise_planes == 1
    assert build("diffusion", unet=UNET, fold=2, channels=3, steps=2).noise_planes == 6


# images, random numbers


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["none", "rt2", "rt3"])
def test_it_purifies_images_behind_every_transform(diffusers, channels, name):
    pipeline = pipeline_of(build("diffusion", **TINY, channels=channels), replace(NONE, name=name))
    result = pipeline.purify(IMAGES)
    assert result.shape == IMAGES.shape and result.isfinite().all()
    assert (result.std(dim=1).max() < 1e-6) == (channels == 1), "grey in, grey out"


def test_its_noise_is_part_of_the_sample_each_image_has_its_own_and_a_seed_gives_it_again(purifier):
    pipeline = pipeline_of(purifier)
    state = torch.get_rng_state()
    same = IMAGES[:1].expand(3, -1, -1, -1)
    first, second = pipeline.purify(same), pipeline.purify(same)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    pipeline.reseed(0)
    assert torch.equal(pipeline.purify(same), first)
    sample = pipeline.sample(same)
    purified = pipeline.purify(same, sample)
    assert torch.equal(pipeline.purify(same, sample), purified)
    torch.testing.assert_close(pipeline.purify(same[1:2], sample.rows(slice(1, 2))), purified[1:2])
    with pipeline.fixed_sample(7):
        fixed = pipeline.purify(same)
        assert torch.equal(pipeline.purify(same), fixed)
    assert is_random(pipeline, IMAGES)


# gradients


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_through_all_steps_is_that_of_finite_differences(diffusers, checkpointing, eta):
    torch.manual_seed(0)
    unet = {"block_out_channels": [4], "norm_num_groups": 2}
    model = build("diffusion", unet=unet, fold=2, t_star=0.5, steps=3, eta=eta, checkpointing=checkpointing)
    model = model.double().eval()
    noise = torch.randn(1, model.noise_planes, 4, 4, dtype=torch.float64)
    given = torch.rand(1, 5, 4, 4, dtype=torch.float64) * 2 - 1
    given.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, noise), given, fast_mode=True)
    (found,) = torch.autograd.grad(model(given, noise).sum(), given)
    assert found[:, :3].abs().min() > 0 and found[:, 3:].abs().max() == 0


def test_its_loss_is_the_mean_squared_error_of_the_noise(purifier, monkeypatch):
    monkeypatch.setattr(purifier, "predict", lambda noisy, times: torch.zeros_like(noisy))
    noise = torch.randn(64, 3, 16, 16)
    loss = purifier.pretraining_loss(torch.zeros(64, 3, 16, 16), torch.rand(64), noise)
    assert float(loss) == pytest.approx(float(noise[:, :1].square().mean()))
    steps = []
    monkeypatch.setattr(purifier, "predict", lambda noisy, times: steps.append(times) or noisy)
    purifier.pretraining_loss(torch.zeros(2, 3, 16, 16), torch.tensor([0.0, 0.9999]), noise[:2])
    assert steps[0].tolist() == [1, 1000]


# checkpoints, options


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["pipeline", "flat"])
def test_a_model_that_diffusers_saved_is_loaded_from_its_folder(diffusers, tmp_path, layout, channels):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_end=0.1)
    folders = ("unet", "scheduler") if layout == "pipeline" else ("", "")
    unet.save_pretrained(tmp_path / folders[0])
    scheduler.save_pretrained(tmp_path / folders[1])
    model = load_diffusers(tmp_path, t_star=0.2, steps=2)
    assert model.times == [20, 10, 0] and not model.training
    noisy, times = torch.randn(2, channels, 16, 16), torch.tensor([20, 10])
    torch.testing.assert_close(model.predict(noisy, times), unet.eval()(noisy, times - 1).sample)
    torch.testing.assert_close(model.levels[1:], scheduler.alphas_cumprod)
    path = tmp_path / "purifier.safetensors"
    save(path, model, kind="purifier", architecture="diffusion", options=model.options)
    again, _ = load(path, kind="purifier")
    noise, given = (
        torch.randn(3, model.noise_planes, 16, 16),
        corrupt(IMAGES, sample_transform(NONE, IMAGES.shape)),
    )
    torch.testing.assert_close(again(given, noise), model(given, noise))


def test_a_folder_that_is_none_is_refused_without_a_download(diffusers, tmp_path, monkeypatch):
    with pytest.raises(OSError):
        load_diffusers(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it went to the network"))
    with pytest.raises(OSError):
        load_diffusers("somebody/a-model-that-is-not-here")


def test_a_model_that_predicts_something_else_is_refused(diffusers, tmp_path):
    unet = diffusers.UNet2DModel(
        in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4,), norm_num_groups=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    unet.save_pretrained(tmp_path)
    diffusers.DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="predicts 'v_prediction' with 1 channels in and 1 out; allowed: 'epsilon'"
    ):
        load_diffusers(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 2}, "channels must be one of 1, 3, got 2"),
        ({"fold": 0}, "fold must be at least 1, got 0"),
        ({"t_star": 0}, "t_star must be above 0, at most 1, got 0"),
        ({"eta": -1}, "eta must lie in 0..1, got -1"),
        ({"steps": 0}, "steps must lie in 1..250, got 0"),
        ({"steps": 251}, "steps must lie in 1..250"),
        ({"unet": {"depth": 3}}, "does not take the options .*'depth'"),
        ({"unet": {"block_out_channels": []}}, "does not take the options .*out of range"),
        ({"unet": {"block_out_channels": [9]}}, "norm_num_groups|num_channels|divisible"),
        ({"schedule": {"beta_schedule": "steep"}}, "does not take the options .*steep is not implemented"),
        (
            {"schedule": {"num_train_timesteps": 10**9}},
            "num_train_timesteps must lie in 1..100000, got 1000000000",
        ),
        ({"width": 3}, "purifier 'diffusion' does not take the options {'width': 3}"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(diffusers, options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build("diffusion", **options)


def test_a_wrong_size_is_refused(purifier):
    with pytest.raises(ValueError, match="divisible by 4, got 16 x 18"):
        purifier(torch.zeros(1, 5, 16, 18), torch.zeros(1, purifier.noise_planes, 16, 18))
