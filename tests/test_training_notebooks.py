"""The cells of notebooks 1 to 3: what their steps do, and what makes a run another run. One warm
interpreter executes them."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from atoplib import checkpoints, classifiers, defences, figures, purifiers
from atoplib import losses as loss_functions
from atoplib.attacks import n_fgsm, pgd
from atoplib.data import Split, load_images
from atoplib.pipeline import AToPPipeline, to_unit
from atoplib.training import fit
from atoplib.transforms import Transform

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
STAGES = ("01_train_classifier", "02_pretrain_purifier", "03_finetune_atop")
RT2 = Transform("rt2", missing_rate=0.25, noise_std=0.1, grid_size=4)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    for name in ("image_grid", "purification_grid"):
        monkeypatch.setattr(figures, name, lambda *_, **__: None)


def cells_of(stage):
    cells = json.loads((NOTEBOOKS / f"{stage}.ipynb").read_text())["cells"]
    return {cell["id"]: cell for cell in cells if cell["cell_type"] == "code"}


def execute(stage, folder, edits=(), **parameters):
    """The cells of a notebook up to its training, without pictures; returns what was said, and the
    namespace."""
    said, namespace = [], {"__annotations__": {}}
    for name, cell in cells_of(stage).items():
        source = "\n".join(line for line in "".join(cell["source"]).splitlines() if not line.startswith("%"))
        for old, new in edits:
            source = source.replace(old, new)
        exec(compile(source, name, "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            namespace |= {"smoke": True, "workspace": str(folder), "print": said.append, **parameters}
        if name.endswith("-train"):
            return said, SimpleNamespace(**namespace)


def step_of(stage, **namespace):
    """What the cells of a notebook's step define, in a namespace of a few parameters and networks."""
    namespace |= vars(loss_functions) | dict(torch=torch, partial=partial, pgd=pgd, n_fgsm=n_fgsm, pad=F.pad)
    namespace |= dict(cross_entropy=F.cross_entropy, to_unit=to_unit)
    for name, cell in cells_of(stage).items():
        source = "".join(cell["source"])
        if source.startswith("def ") and not name.endswith("-save"):
            exec(source, namespace)
    return SimpleNamespace(**namespace)


def tiny_classifier():
    torch.manual_seed(100)
    return classifiers.build("small_resnet", num_classes=3, mean=(0.4,) * 3, std=(0.3,) * 3, width=2)


class Recorder(nn.Module):
    """A classifier that notes in which mode and on which images it was called."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = tiny_classifier(), []

    def forward(self, images):
        self.calls.append((self.training, images.detach().clone()))
        return self.inner(images)


class RecordingPipeline(AToPPipeline):
    """A pipeline that notes the images and the sample of each use of its purifier."""

    def outputs(self, images, sample=None):
        self.__dict__.setdefault("used", []).append(
            (images.detach().clone(), sample, torch.is_grad_enabled())
        )
        return super().outputs(images, sample)


@pytest.fixture
def batch():
    """8 images of 16 px whose class can be seen in their colour."""
    labels = torch.arange(8) % 3
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    images[torch.arange(8), labels] += 0.5
    return images, labels


def recording(transform=RT2, purifier="gated_unet", classifier=None, **options):
    torch.manual_seed(1)
    network = purifiers.build(purifier, **(options or dict(width=4, blocks=0, fold=4)))
    return RecordingPipeline(transform, network, classifier or tiny_classifier(), seed=None)


# --- notebook 1


CLASSIFY = dict(
    adversarial=False, eps=0.1, norm="linf", attack_steps=3, alpha=None, label_smoothing=0.0, noise_std=0.0,
    inner_attack="pgd",
)  # fmt: skip


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0)])
def test_adversarial_training_attacks_in_eval_mode_and_learns_in_train_mode_within_eps(batch, norm, eps):
    network = Recorder().train()
    statistics = network.inner[1].stem[1].running_mean.clone()
    p = SimpleNamespace(**CLASSIFY | dict(adversarial=True, norm=norm, eps=eps))
    losses = step_of(STAGES[0], network=network, purifier=None, p=p).step(*batch, 0.0)
    assert [mode for mode, _ in network.calls] == [False, False, False, True]
    assert all(part.training for part in network.modules())
    assert network.inner[1].stem[1].num_batches_tracked == 1
    assert not torch.equal(network.inner[1].stem[1].running_mean, statistics)
    learned = network.calls[-1][1]
    distance = (learned - batch[0]).flatten(1)
    size = distance.abs().amax(dim=1) if norm == "linf" else distance.norm(dim=1)
    assert size.max() <= eps + 1e-6 and size.min() > eps / 10 and learned.min() >= 0 and learned.max() <= 1
    assert set(losses) == {"loss", "accuracy"}


def test_normal_training_sees_the_images_as_they_are_with_the_label_smoothing_that_is_asked_for(batch):
    network = Recorder().train()
    p = SimpleNamespace(**CLASSIFY | dict(label_smoothing=0.2))
    loss = step_of(STAGES[0], network=network, purifier=None, p=p).step(*batch, 0.0)["loss"]
    ((mode, images),) = network.calls
    assert mode and torch.equal(images, batch[0])
    logs = network.inner(images).log_softmax(dim=1)
    by_hand = -(0.8 * logs[torch.arange(8), batch[1]].mean() + 0.2 * logs.mean())
    assert float(loss.detach()) == pytest.approx(by_hand.item(), rel=1e-4)


def test_a_classifier_behind_a_purifier_is_attacked_and_trained_on_one_sample_of_it(batch):
    pipeline, network = recording(classifier=nn.Identity()).eval(), Recorder().train()
    p = SimpleNamespace(**CLASSIFY | dict(adversarial=True))
    step = step_of(STAGES[0], network=network, purifier=pipeline, p=p).step
    samples = []
    for _ in range(2):
        pipeline.used = []
        network.calls.clear()
        step(*batch, 0.0)
        assert len(pipeline.used) == 4 and all(t is pipeline.used[0][1] for _, t, _ in pipeline.used)
        assert 0.01 < (pipeline.used[-1][0] - batch[0]).abs().max() <= 0.1 + 1e-6
        for (images, t, _), (_, classified) in zip(list(pipeline.used), network.calls, strict=True):
            assert torch.equal(pipeline.purify(images, t), classified)
        samples.append(pipeline.used[0][1])
    assert not torch.equal(samples[0].noise, samples[1].noise), "another step samples anew"


# --- notebook 3


FINETUNE = dict(
    variant="ft_adv", target="clean", threat_model="white-box", eps=0.1, norm="linf", attack_steps=3,
    alpha=None, eot_samples=1, ramp_epochs=0.0, classification_weight=1.0, warmup_epochs=0.0, gan_weight=0.0,
    gan_loss="hinge", inner_attack="pgd", temperature=1.0, shake=0, psnr_weight=0.0, psnr_floor=22.5,
)  # fmt: skip


def finetuning(pipeline, discriminator=None, **changes):
    """The step of notebook 3."""
    names = dict(pipeline=pipeline, discriminator=discriminator, frozen_ones=[pipeline.classifier])
    return step_of(STAGES[2], p=SimpleNamespace(**FINETUNE | changes), **names).step


def finetuned(batch, pipeline, epoch=0.0, discriminator=None, **changes):
    """What one step of notebook 3 returns; how its parts were used is in the pipeline."""
    torch.manual_seed(0)
    return finetuning(pipeline, discriminator, **changes)(*batch, epoch)


def test_the_white_box_attack_hits_the_very_sample_of_the_loss(batch):
    finetuned(batch, pipeline := recording())
    assert len(pipeline.used) == 4 and all(sample is pipeline.used[0][1] for _, sample, _ in pipeline.used)
    assert 0.05 < (pipeline.used[-1][0] - batch[0]).abs().max() <= 0.1 + 1e-6


def test_an_attack_with_eot_averages_over_samples_of_its_own(batch):
    finetuned(batch, pipeline := recording(), eot_samples=4, attack_steps=2)
    assert [sample is None for _, sample, _ in pipeline.used] == [True, True, False]
    assert len(pipeline.used[0][0]) == 4 * len(batch[0])


def test_the_papers_attack_is_fgsm_on_the_classifier_and_never_touches_the_pipeline(batch):
    finetuned(batch, pipeline := recording(), threat_model="transfer", attack_steps=1)
    ((images, _, _),) = pipeline.used
    clean = batch[0].clone().requires_grad_()
    F.cross_entropy(pipeline.classifier(clean), batch[1]).backward()
    assert torch.allclose(images, (batch[0] + 0.1 * clean.grad.sign()).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("ramp, epoch, share", [(4, 0, 0.01), (4, 1, 0.25), (4, 4, 1), (4, 40, 1), (0, 0, 1)])
def test_eps_and_step_size_grow_together_along_the_ramp(batch, ramp, epoch, share):
    for alpha in (None, 0.1):
        finetuned(batch, pipeline := recording(), epoch, ramp_epochs=ramp, eps=0.2, alpha=alpha)
        size = (pipeline.used[-1][0] - batch[0]).abs().max()
        assert 0.5 * share * 0.2 < size <= share * 0.2 + 1e-6


def test_the_classification_term_joins_in_after_the_warm_up_and_what_is_rebuilt_is_the_target(batch):
    pipeline = recording()
    assert set(finetuned(batch, pipeline, 0.9, warmup_epochs=1.0)) == {"loss", "reconstruction", "dB_missing"}
    losses = {target: finetuned(batch, pipeline, 1.0, target=target) for target in ("clean", "adversarial")}
    assert set(losses["clean"]) == {"loss", "reconstruction", "dB_missing", "classification", "accuracy"}
    (x_adv, t, _) = pipeline.used[-1]
    by_hand = loss_functions.reconstruction_loss(AToPPipeline.outputs(pipeline, x_adv, t), 2 * x_adv - 1)
    assert torch.allclose(losses["adversarial"]["reconstruction"], by_hand)
    assert not torch.allclose(losses["clean"]["reconstruction"], by_hand)


@pytest.mark.parametrize("variant, attacked", [("ap", False), ("ft_clean", False), ("ft_adv", True)])
def test_what_goes_in_is_what_the_variant_says(batch, variant, attacked):
    losses = finetuned(batch, pipeline := recording(), variant=variant, classification_weight=2.0)
    assert torch.equal(pipeline.used[-1][0], batch[0]) != attacked and ("classification" in losses) == (
        variant != "ap"
    )
    total = losses["reconstruction"] + 2 * losses.get("classification", 0)
    assert torch.allclose(losses["loss"], total)


@pytest.mark.parametrize("name", ["none", "rt1", "rt2", "rt3"])
@pytest.mark.parametrize("kind", ["hinge", "least_squares"])
def test_the_gan_term_has_a_gradient_at_the_purifier_and_the_discriminator_a_loss_of_its_own(
    batch, name, kind
):
    pipeline = recording(Transform(name, missing_rate=0.25, noise_std=0.1, grid_size=4))
    discriminator = purifiers.PatchDiscriminator(2)
    losses = finetuned(
        batch, pipeline, discriminator=discriminator, variant="ap", gan_weight=0.5, gan_loss=kind
    )
    assert torch.allclose(losses["loss"], losses["reconstruction"] + 0.5 * losses["gan"])
    weights = list(pipeline.purifier.parameters())
    assert any(g.abs().max() > 0 for g in torch.autograd.grad(losses["gan"], weights, retain_graph=True))
    reached = torch.autograd.grad(losses["discriminator"], weights, allow_unused=True, retain_graph=True)
    assert all(gradient is None for gradient in reached)
    own = torch.autograd.grad(losses["discriminator"], list(discriminator.parameters()))
    assert any(gradient.abs().max() > 0 for gradient in own)


DEEPFILL = pytest.param("deepfill_v2", {"width": 8}, marks=pytest.mark.long)


@pytest.mark.parametrize("variant, gan_weight", [("ap", 0.05), ("ft_clean", 0.0), ("ft_adv", 0.05)])
@pytest.mark.parametrize(
    "purifier, options", [("gated_unet", {"width": 4, "blocks": 0, "fold": 4}), DEEPFILL]
)
def test_every_variant_is_learned_on_a_small_fixed_batch_and_the_classifier_stays(
    batch, purifier, options, variant, gan_weight
):
    network, classifier = purifiers.build(purifier, **options), tiny_classifier()
    pipeline = AToPPipeline(Transform("rt2", 0.25, 0.02, grid_size=4), network, classifier)
    discriminator = purifiers.PatchDiscriminator(4)
    networks = {"purifier": network} | ({"discriminator": discriminator} if gan_weight else {})
    changes = dict(gan_weight=gan_weight, classification_weight=0.5, eps=0.05, attack_steps=1)
    step = finetuning(pipeline, discriminator, variant=variant, **changes)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    images = Split((batch[0] * 255).to(torch.uint8), batch[1])
    settings = dict(epochs=36, batch_size=8, learning_rate=0.003, schedule="constant", dtype="float32")
    history = fit(step, networks, images, **settings)
    first, last = (sum(entry["reconstruction"] for entry in part) for part in (history[:3], history[-3:]))
    assert last < 0.95 * first
    assert all(torch.equal(before[name], value) for name, value in classifier.state_dict().items())


# --- the runs


def test_notebooks_find_each_others_runs_and_load_them_however_they_are_named(tmp_path):
    _, first = execute(STAGES[0], tmp_path)
    said, second = execute(STAGES[1], tmp_path)
    assert second.p.classifier_run == first.run.path.name and not said
    _, third = execute(
        STAGES[2], tmp_path, classifier_run=first.run.path.name, purifier_run=second.run.path.name
    )
    said, by_hand = execute(STAGES[2], tmp_path)  # "latest"
    assert said[0].startswith("Loaded, not trained again") and by_hand.run.path == third.run.path
    assert by_hand.metrics == third.metrics
    header = checkpoints.read_header(third.run.path / "purifier.safetensors")
    assert header["classifier"] == first.run.path.name and str(tmp_path) not in json.dumps(header)
    assert header["metrics"]["classifier_flops"] == first.run.metrics["train_flops"] > 0
    manifest = json.loads((third.run.path / "manifest.json").read_text())
    assert manifest["status"] == "complete" and set(manifest["inputs"]) == {"classifier", "purifier"}


@pytest.mark.parametrize(
    "stage, old, new",
    [
        (STAGES[0], "logits = model(x).float()", "logits = 2 * model(x).float()"),
        (STAGES[1], "network = network.to(", "network.front = None; network = network.to("),
        (STAGES[2], 'loss = losses["reconstruction"]', 'loss = 0 * losses["reconstruction"]'),
        (STAGES[2], 'white_box = p.threat_model == "white-box"', "white_box = False"),
    ],
)
def test_an_edit_of_a_step_an_attack_or_a_network_is_another_training(tmp_path, stage, old, new):
    _, first = execute(stage, tmp_path)
    said, _ = execute(stage, tmp_path)
    assert any(sentence.startswith("Loaded") for sentence in said)
    said, second = execute(stage, tmp_path, [(old, new)])
    assert any(sentence.startswith("Trained anew, not loaded (changed:") for sentence in said)
    assert second.run.path == first.run.path and (first.run.path / "superseded-1" / "state.pt").is_file()


def test_a_classifier_starts_from_another_runs_weights_and_owes_its_cost(tmp_path):
    _, first = execute(STAGES[0], tmp_path)
    name, small = first.run.path.name, dict(learning_rate=1e-12, adversarial=True, attack_steps=1)
    _, second = execute(STAGES[0], tmp_path, start_run=name, **small)
    moved = [
        (a - b).abs().max()
        for a, b in zip(second.network.parameters(), first.network.parameters(), strict=True)
    ]
    assert second.run.path != first.run.path and max(moved) < 1e-6, (
        "at no learning rate they stay what they were"
    )
    path = second.run.path / "classifier.safetensors"
    assert defences.training_flops(path) == first.metrics["train_flops"] + second.metrics["train_flops"]
    with pytest.raises(checkpoints.CheckpointError, match="belong to another architecture"):
        execute(STAGES[0], tmp_path, start_run=name, classifier_options={"width": 4})


def test_a_classifier_learns_on_purified_images_and_is_measured_behind_the_purifier(tmp_path):
    _, run = execute(STAGES[0], tmp_path, purifier_run="pretrained", adversarial=True, attack_steps=1)
    header = checkpoints.read_header(run.run.path / "classifier.safetensors")
    assert (
        header["purifier"] == "pretrained"
        and run.history[-1]["test_accuracy"] == run.metrics["test_accuracy"]
    )
    with pytest.raises(FileNotFoundError, match="run the notebook 01_train_classifier"):
        defences.find_weights(run.p, "latest")  # of a classifier that is given images as they are


def test_networks_of_ones_own_are_a_line_each_and_their_files_say_so(tmp_path):
    own = [
        (
            "frozen = defences.load_classifier(p)",
            "frozen = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))",
        ),
        (
            "network, header = defences.load_purifier(p)",
            "network, header = torch.nn.Conv2d(5, 3, 1), {'architecture': 'gated_unet', 'options': {}}",
        ),
    ]
    _, run = execute(STAGES[2], tmp_path, own)
    path = run.run.path / "purifier.safetensors"
    header = checkpoints.read_header(path)
    assert header["architecture"] == "custom: Conv2d" and header["classifier"] == "custom: Sequential"
    again = checkpoints.load(path, kind="purifier", build=lambda: nn.Conv2d(5, 3, 1))[0]
    assert torch.equal(again.weight, run.network.weight)
    p = run.p.replace(purifier_run=run.run.path.name)
    with pytest.raises(checkpoints.CheckpointError, match="custom purifier"):
        defences.load_purifier(p)


def foreign_resnet(planes=4):
    """Somebody's network: images normalised elsewhere."""
    return nn.Sequential(
        nn.Conv2d(3, planes, 3, 4),
        nn.BatchNorm2d(planes),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(planes * 64, 10),
    )


def test_somebodys_weights_need_parameters_alone(tmp_path):
    torch.manual_seed(3)
    network, path = foreign_resnet(), tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    given = dict(
        classifier_run=str(path), mean=[0.1] * 3, std=[0.3] * 3, classifier=f"{__name__}:foreign_resnet"
    )
    _, run = execute(STAGES[2], tmp_path, classifier_options={"planes": 4}, **given)
    images = load_images("mnist5k", 4)[0]
    expected = network.eval()((images - 0.1) / 0.3)
    assert torch.allclose(run.pipeline.classifier(images), expected, atol=1e-4)
    assert checkpoints.read_header(run.run.path / "purifier.safetensors")["classifier"] == str(path)
    for change, message in (
        ({"classifier": ""}, "was not written by atoplib"),
        ({"mean": None, "std": None}, ""),
    ):
        q = run.p.replace(**change)
        if message:
            with pytest.raises(checkpoints.CheckpointError, match=message):
                defences.load_classifier(q)
        else:
            assert torch.allclose(defences.load_classifier(q)(images), network(images), atol=1e-4)
