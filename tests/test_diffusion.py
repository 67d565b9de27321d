"""DiffPure: its steps are those of the literature, its dice those of the pipeline, its gradient the true one."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from atoplib.attacks import BPDA, PGDSettings, pgd
from atoplib.attacks.eot import input_gradient
from atoplib.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from atoplib.data import Split
from atoplib.fingerprints import model_fingerprint
from atoplib.losses import Objective
from atoplib.parameters import ParameterError, PretrainPurifier
from atoplib.pipeline import AToPPipeline, load_pipeline
from atoplib.purifiers import MissingDiffusers, build_purifier, load_diffusers
from atoplib.purifiers.diffusion import noised, reverse_step, signal_levels
from atoplib.shares import Share
from atoplib.training import fit, purifier_step
from atoplib.training.loop import TrainingSettings
from atoplib.transforms import TransformSettings, corrupt, sample_draw
from atoplib.verdicts import is_random

NONE = TransformSettings("none", grid_size=4)
UNET = {"block_out_channels": [8, 8], "norm_num_groups": 4}
TINY = {"unet": UNET, "fold": 2, "steps": 3, "t_star": 0.2}
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_without_diffusers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDiffusers, match=r"needs the library diffusers, an optional extra.*pip install 'diffusers>="):
        build_purifier("diffusion")
    with pytest.raises(MissingDiffusers, match="optional extra"):
        load_diffusers("somewhere")
    with pytest.raises(ParameterError, match=r"02_pretrain_purifier: .*pip install 'diffusers>="):
        PretrainPurifier.from_mapping({"purifier": "diffusion", "purifier_options": {}})


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers, an optional extra, is not installed")


@pytest.fixture(scope="module")
def purifier(diffusers):
    torch.manual_seed(0)
    return build_purifier("diffusion", **TINY).eval()


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)).eval()


def pipeline_of(purifier, transform=NONE):
    return AToPPipeline(transform, purifier, classifier()).eval()


# the equations


def test_a_step_is_that_of_diffusers_own_schedulers(diffusers):
    """DDIM's for any eta and any two levels; DDPM's from a level to the one before it."""
    x, e, n = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = signal_levels({}).tolist()
    ddim = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    ddim.set_timesteps(50)
    for eta in (0.0, 0.5, 1.0):
        expected = ddim.step(e, 400, x, eta=eta, variance_noise=n).prev_sample
        found = reverse_step(x, e, levels[401], levels[381], eta=eta, noise=n)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # their levels are float32
    ddpm = diffusers.DDPMScheduler(clip_sample=False)
    dice = torch.Generator().manual_seed(5)
    expected = ddpm.step(e, 300, x, generator=dice).prev_sample
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    torch.testing.assert_close(reverse_step(x, e, levels[301], levels[300], noise=noise), expected, rtol=1e-4, atol=1e-5)


def test_the_way_there_is_that_of_diffusers(diffusers):
    x, n = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([1, 700])
    expected = diffusers.DDPMScheduler().add_noise(x, n, times - 1)
    torch.testing.assert_close(noised(x, n, signal_levels({}).float()[times]), expected)


def test_the_last_step_arrives_at_the_clean_image_when_the_noise_is_known(diffusers):
    x, n = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    levels = signal_levels({}).tolist()
    torch.testing.assert_close(reverse_step(noised(x, n, levels[250]), n, levels[250], 1.0), x, rtol=1e-4, atol=1e-5)


def test_an_oracle_of_the_noise_purifies_to_the_clean_image_whatever_the_dice(purifier, monkeypatch):
    """The whole way, there and back in random steps, with a network that knows where it should arrive."""
    target = torch.rand(2, 1, 16, 16) * 2 - 1

    def predict(noisy, times):
        level = purifier.levels[times].view(-1, 1, 1, 1)
        return (noisy - level.sqrt() * target) / (1 - level).sqrt()

    monkeypatch.setattr(purifier, "predict", predict)
    noise = torch.randn(2, purifier.noise_planes, 16, 16)
    result = purifier(torch.zeros(2, 5, 16, 16), noise)
    torch.testing.assert_close(result, target.expand(-1, 3, -1, -1), rtol=1e-4, atol=1e-4)


def test_the_way_back_begins_at_t_star_and_ends_at_the_image(diffusers):
    model = build_purifier("diffusion", unet=UNET, fold=2, t_star=0.1, steps=4)
    assert model.times == [100, 75, 50, 25, 0] and model.path[-1] == 1.0
    assert model.path[0] == pytest.approx(float((1 - torch.linspace(1e-4, 0.02, 1000).double())[:100].prod()), rel=1e-6)
    assert model.noise_planes == 4
    assert build_purifier("diffusion", unet=UNET, fold=2, t_star=0.1, steps=4, eta=0).noise_planes == 1
    assert build_purifier("diffusion", unet=UNET, fold=2, channels=3, steps=2).noise_planes == 6


# images, dice


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["none", "rt2", "rt3"])
def test_it_purifies_images_behind_every_transform(diffusers, channels, name):
    pipeline = pipeline_of(build_purifier("diffusion", **TINY, channels=channels), replace(NONE, name=name))
    result = pipeline.purify(IMAGES)
    assert result.shape == IMAGES.shape and result.isfinite().all()
    assert (result.std(dim=1).max() < 1e-6) == (channels == 1), "grey in, grey out"


def test_dice_are_the_pipelines_each_image_has_its_own_and_a_seed_gives_them_again(purifier):
    pipeline = pipeline_of(purifier)
    state = torch.get_rng_state()
    same = IMAGES[:1].expand(3, -1, -1, -1)
    first, second = pipeline.purify(same), pipeline.purify(same)
    assert torch.equal(torch.get_rng_state(), state), "the global dice were thrown"
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    pipeline.reseed(0)
    assert torch.equal(pipeline.purify(same), first)
    draw = pipeline.draw(same)
    assert torch.equal(pipeline.purify(same, draw), pipeline.purify(same, draw))
    torch.testing.assert_close(pipeline.purify(same[1:2], draw.of(slice(1, 2))), pipeline.purify(same, draw)[1:2])
    one = draw.of(slice(2, 3))
    torch.testing.assert_close(pipeline.purify(same, one.repeated(3))[0], pipeline.purify(same, draw)[2])
    with pipeline.fixed_draws(7):
        fixed = pipeline.purify(same)
        assert torch.equal(pipeline.purify(same), fixed)
    assert is_random(pipeline, IMAGES)


def test_the_dice_of_other_purifiers_are_what_they_were():
    transform = replace(NONE, name="rt2")
    pipeline = pipeline_of(build_purifier("gated_unet", width=2, fold=1), transform)
    expected = sample_draw(transform, IMAGES.shape, generator=torch.Generator().manual_seed(0))
    found = [pipeline.draw(IMAGES) for _ in range(2)][0]
    assert found.inner is None and torch.equal(found.noise, expected.noise) and torch.equal(found.masks, expected.masks)


def test_processes_that_share_a_batch_throw_the_dice_of_one(purifier):
    pipeline, images = pipeline_of(purifier), IMAGES[:2]
    whole = pipeline.draw(images).inner
    for rank in range(2):
        pipeline.reseed(0, Share(rank, 2, 1))
        assert torch.equal(pipeline.draw(images[rank : rank + 1]).inner, whole[:, rank : rank + 1])
    pipeline.reseed(0)


def test_more_noise_leaves_less_of_the_image(diffusers):
    """An untrained U-Net: what is left depends on the image the less the further the noise went."""
    torch.manual_seed(0)
    differences = []
    for t_star in (0.05, 0.9):
        model = build_purifier("diffusion", **{**TINY, "t_star": t_star}).eval()
        state = [noised(torch.full((1, 1, 8, 8), value), torch.zeros(1, 1, 8, 8), model.path[0]) for value in (-1.0, 1.0)]
        differences.append(float((state[1] - state[0]).mean()))
    assert differences[0] > 1.8 and differences[1] < 0.5


# gradients


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_through_all_steps_is_that_of_finite_differences(diffusers, checkpointing, eta):
    torch.manual_seed(0)
    unet = {"block_out_channels": [4], "norm_num_groups": 2}
    model = build_purifier("diffusion", unet=unet, fold=2, t_star=0.5, steps=3, eta=eta, checkpointing=checkpointing)
    model = model.double().eval()
    noise = torch.randn(1, model.noise_planes, 4, 4, dtype=torch.float64)
    given = torch.rand(1, 5, 4, 4, dtype=torch.float64) * 2 - 1
    weights = torch.randn(1, 3, 4, 4, dtype=torch.float64)

    def scalar(values):
        return (model(values, noise) * weights).sum()

    (found,) = torch.autograd.grad(scalar(given.requires_grad_()), given)
    step, given = 1e-6, given.detach()
    for place in [(0, 0, 0), (1, 2, 3), (2, 3, 1)]:
        shifted = [given.clone(), given.clone()]
        shifted[0][0][place] += step
        shifted[1][0][place] -= step
        expected = (scalar(shifted[0]) - scalar(shifted[1])) / (2 * step)
        assert float(found[0][place]) == pytest.approx(float(expected.detach()), rel=1e-4), place
    assert found[:, :3].abs().min() > 0 and found[:, 3:].abs().max() == 0


def test_checkpointing_changes_no_gradient(purifier):
    pipeline = pipeline_of(purifier)
    draw, found = pipeline.draw(IMAGES), []
    for purifier.checkpointing in (False, True):
        images = IMAGES.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(pipeline(images, draw)[:, 1].sum(), images)
        found.append(gradient)
    purifier.checkpointing = False
    torch.testing.assert_close(*found)


def test_eot_averages_over_draws_and_an_attack_uses_the_gradient(purifier):
    pipeline, labels = pipeline_of(purifier), torch.tensor([0, 1, 2])
    pipeline.reseed(3)
    averaged = input_gradient(pipeline, IMAGES, labels, eot_samples=2, max_batch=4).gradient
    pipeline.reseed(3)
    again = input_gradient(pipeline, IMAGES, labels, eot_samples=2, max_batch=4).gradient
    single = input_gradient(pipeline, IMAGES, labels).gradient
    assert torch.equal(averaged, again) and not torch.allclose(averaged, single)
    adversarial = pgd(pipeline, IMAGES, labels, PGDSettings(0.2, steps=3, eot_samples=2), generator=torch.Generator())
    with torch.no_grad(), pipeline.fixed_draws(1):
        before, after = (nn.functional.cross_entropy(pipeline(x), labels) for x in (IMAGES, adversarial))
    assert after > before and (adversarial - IMAGES).abs().max() <= 0.2 + 1e-6


@pytest.mark.parametrize("through", ["both", "transform", "purifier"])
def test_bpda_has_its_logits_and_dice(purifier, through):
    pipeline = pipeline_of(purifier)
    pipeline.reseed(0)
    expected = pipeline(IMAGES)
    pipeline.reseed(0)
    torch.testing.assert_close(BPDA(pipeline, through)(IMAGES), expected)


# training


def trained(purifier, epochs, path=None, progress=None):
    images = (torch.arange(32) % 2 > 0).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).to(torch.uint8) * 255
    split = Split(images, torch.zeros(32, dtype=torch.int64))
    step = purifier_step(pipeline_of(purifier).train(), Objective("ap"))
    settings = TrainingSettings(
        epochs=epochs, batch_size=16, learning_rate=0.01, schedule="constant", padding=0, flip=False, dtype="float32"
    )
    return fit(step, {"purifier": purifier}, split, settings, state_path=path, progress=progress)


def test_it_is_pretrained_to_predict_the_noise_and_goes_on_where_it_was_cut_off(diffusers, tmp_path):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build_purifier("diffusion", **TINY))
    model, again = models
    history = trained(model, 8)
    assert set(history[0]) == {"epoch", "loss", "seconds"}
    assert history[0]["loss"] > 0.7 and history[-1]["loss"] < 0.8 * history[0]["loss"]

    def interrupt(done, total, unit, numbers):
        if done >= 5 * 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(again, 8, tmp_path / "state.pt", progress=interrupt)
    assert (tmp_path / "state.pt").exists()
    trained(again, 8, tmp_path / "state.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_its_loss_is_the_mean_squared_error_of_the_noise(purifier, monkeypatch):
    monkeypatch.setattr(purifier, "predict", lambda noisy, times: torch.zeros_like(noisy))
    noise = torch.randn(64, 3, 16, 16)
    loss = purifier.pretraining_loss(torch.zeros(64, 3, 16, 16), torch.rand(64), noise)
    assert float(loss) == pytest.approx(float(noise[:, :1].square().mean()))
    seen = []
    monkeypatch.setattr(purifier, "predict", lambda noisy, times: seen.append(times) or noisy)
    purifier.pretraining_loss(torch.zeros(2, 3, 16, 16), torch.tensor([0.0, 0.9999]), noise[:2])
    assert seen[0].tolist() == [1, 1000]


def test_a_gan_term_is_refused(purifier):
    with pytest.raises(ValueError, match="gan_weight must be 0 for a purifier with a loss of its own, got 0.1"):
        purifier_step(pipeline_of(purifier), Objective("ap", gan_weight=0.1), discriminator=nn.Identity())


# checkpoints, options


def test_a_checkpoint_gives_the_same_images_again(purifier, tmp_path):
    path = tmp_path / "purifier.safetensors"
    facts = {"transform": {"name": "none", "grid_size": 4}}
    save_checkpoint(path, purifier, kind="purifier", architecture="diffusion", options=purifier.options, **facts)
    loaded = load_pipeline(path, classifier())
    pipeline = pipeline_of(purifier)
    torch.testing.assert_close(loaded.purify(IMAGES), pipeline.purify(IMAGES))
    assert loaded.purifier.options == purifier.options
    weaker = build_purifier("diffusion", **{**TINY, "t_star": 0.1})
    weaker.load_state_dict(purifier.state_dict())
    assert model_fingerprint(pipeline_of(weaker)) != model_fingerprint(pipeline), "the same weights, another defence"


def test_without_diffusers_a_checkpoint_says_what_is_missing(purifier, tmp_path, monkeypatch):
    path = tmp_path / "purifier.safetensors"
    save_checkpoint(path, purifier, kind="purifier", architecture="diffusion", options=purifier.options)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CheckpointError, match=r"cannot be built: .*pip install 'diffusers>="):
        load_checkpoint(path, kind="purifier")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["pipeline", "flat"])
def test_a_model_that_diffusers_saved_is_loaded_from_its_folder(diffusers, tmp_path, layout, channels):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DModel(
        sample_size=16, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, **blocks,
    )  # fmt: skip
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
    save_checkpoint(path, model, kind="purifier", architecture="diffusion", options=model.options)
    again, _ = load_checkpoint(path, kind="purifier")
    noise, given = torch.randn(3, model.noise_planes, 16, 16), corrupt(IMAGES, sample_draw(NONE, IMAGES.shape))
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
    with pytest.raises(ValueError, match="predicts 'v_prediction' with 1 channels in and 1 out; allowed: 'epsilon'"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 2}, "channels must be 1 or 3 and fold at least 1, got channels=2"),
        ({"fold": 0}, "fold at least 1, got channels=1, fold=0"),
        ({"t_star": 0}, r"t_star must lie in \(0, 1\].*got t_star=0"),
        ({"t_star": 1.5}, "got t_star=1.5"),
        ({"eta": -1}, r"eta in \[0, 1\], got t_star=0.25, eta=-1"),
        ({"steps": 0}, "steps must lie in 1..250, the noise levels up to t_star=0.25 of 1000; got 0"),
        ({"steps": 251}, "steps must lie in 1..250"),
        ({"unet": {"in_channels": 3}}, r"must be channels \* fold\*\*2 = 16, got {'in_channels': 3}"),
        ({"unet": {"depth": 3}}, "UNet2DModel cannot be built with unet = .*'depth': 3"),
        ({"unet": {"block_out_channels": []}}, "needs block_out_channels, a list of 1..100 numbers"),
        ({"unet": {"layers_per_block": 10**9}}, "layers_per_block in 1..100; got .* 1000000000"),
        ({"unet": {"block_out_channels": [9]}}, "cannot be built with unet"),
        ({"schedule": {"beta_schedule": "steep"}}, "cannot be built with schedule = {'beta_schedule': 'steep'}"),
        ({"schedule": {"num_train_timesteps": 10**9}}, "num_train_timesteps must lie in 1..100000, got 1000000000"),
        ({"width": 3}, "purifier 'diffusion' does not take the options {'width': 3}"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(diffusers, options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_purifier("diffusion", **options)


def test_wrong_sizes_and_wrong_noise_are_refused(purifier):
    with pytest.raises(ValueError, match="divisible by 4, got 16 x 18"):
        purifier(torch.zeros(1, 5, 16, 18), torch.zeros(1, purifier.noise_planes, 16, 18))
    with pytest.raises(ValueError, match="needs 3 planes of noise an image, got 1"):
        purifier(torch.zeros(1, 5, 16, 16), torch.zeros(1, 1, 16, 16))
