"""The pipeline runs unchanged in other people's attack libraries, and none of them beats our PGD at an equal budget."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from atoplib import data
from atoplib.attacks import PGDSettings, check_budget, pgd
from atoplib.attacks.foreign import ForeignSettings, MeanLogits, torchattacks_attack
from atoplib.evaluation import PROTOCOLS, Budget, adjusted, compare, evaluate
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import TransformSettings
from atoplib.verdicts import Verdict, judge, reseed

IMAGES, STEPS, DRAWS = 128, 15, 4
BUDGETS = {"linf": (0.15, 0.025), "l2": (1.0, 0.17)}  # eps, alpha
VOTE = Verdict("majority", num_draws=15)
OUTSIDERS = [
    ("torchattacks", "linf"),
    ("torchattacks", "l2"),
    ("foolbox", "linf"),
    ("foolbox", "l2"),
    ("art", "linf"),
    ("art", "l2"),
]


class Visible(nn.Module):
    """The purifier that hands on what it sees: quick, and differentiable."""

    def forward(self, given):
        return given[:, :3]


def small_classifier():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Real digits at 16 px: training images and labels, test images and labels."""
    loaded = data.load_dataset("mnist5k", data_dir=tmp_path_factory.mktemp("data"), max_train=3000, max_test=IMAGES)
    parts = [(F.avg_pool2d(data.to_float(part.images), 2), part.labels) for part in (loaded.train, loaded.test)]
    return parts[0] + parts[1]


@pytest.fixture(scope="module")
def models(digits):
    """A plain classifier, and a random pipeline around it; trained on what the random transform lets through."""
    torch.manual_seed(0)
    images, labels, *test = digits
    pipeline = AToPPipeline(TransformSettings("rt2", 0.1, 0.1, grid_size=8), Visible(), small_classifier()).eval()
    pipeline.classifier.requires_grad_(True)
    optimizer = torch.optim.Adam(pipeline.classifier.parameters(), lr=3e-3)
    for batch in torch.randperm(8 * len(images)).remainder(len(images)).split(100):
        optimizer.zero_grad()
        F.cross_entropy(pipeline(images[batch]), labels[batch]).backward()
        optimizer.step()
    pipeline.classifier.requires_grad_(False)
    for model in (pipeline, pipeline.classifier):
        assert judge(model, *test, VOTE).float().mean() > 0.8
    return {"deterministic": (pipeline.classifier, 1), "random": (pipeline, DRAWS)}


def by_torchattacks(model, images, labels, norm, draws):
    eps, alpha = BUDGETS[norm]
    name = {"linf": "PGD", "l2": "PGDL2"}[norm]
    settings = ForeignSettings(name, eps, norm, draws, {"steps": STEPS, "alpha": alpha})
    return torchattacks_attack(model, images, labels, settings, generator=torch.Generator().manual_seed(1))


def by_foolbox(model, images, labels, norm, draws):
    foolbox = pytest.importorskip("foolbox")
    eps, alpha = BUDGETS[norm]
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    wrapped = foolbox.PyTorchModel(model if draws == 1 else MeanLogits(model, draws), bounds=(0, 1), device="cpu")
    return kind(abs_stepsize=alpha, steps=STEPS).run(wrapped, images, labels, epsilon=eps)


def by_art(model, images, labels, norm, draws):
    evasion = pytest.importorskip("art.attacks.evasion")
    classification = pytest.importorskip("art.estimators.classification")
    eps, alpha = BUDGETS[norm]
    wrapped = classification.PyTorchClassifier(
        model if draws == 1 else MeanLogits(model, draws),
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = evasion.ProjectedGradientDescentPyTorch(
        wrapped,
        norm={"linf": np.inf, "l2": 2}[norm],
        eps=eps,
        eps_step=alpha,
        max_iter=STEPS,
        num_random_init=1,
        batch_size=len(images),
        verbose=False,
    )
    return torch.from_numpy(attack.generate(images.numpy(), y=labels.numpy()))


BY = {"torchattacks": by_torchattacks, "foolbox": by_foolbox, "art": by_art}


@pytest.fixture(scope="module")
def ours(models, digits):
    """Which test images stand after our own PGD, by model and norm."""
    images, labels = digits[2:]
    standing = {}
    for kind, (model, draws) in models.items():
        for norm, (eps, alpha) in BUDGETS.items():
            reseed(model, 0)
            settings = PGDSettings(eps, norm, STEPS, alpha, draws)
            found = pgd(model, images, labels, settings, generator=torch.Generator().manual_seed(1))
            reseed(model, 2)
            standing[kind, norm] = judge(model, found, labels, VOTE)
            assert 0 < standing[kind, norm].float().mean() < 0.8, "a test with nothing to win or lose"
    return standing


@pytest.mark.parametrize("kind", ["deterministic", "random"])
@pytest.mark.parametrize("library, norm", OUTSIDERS)
def test_no_outsider_beats_pgd_at_an_equal_budget(library, norm, kind, models, ours, digits):
    model, draws = models[kind]
    images, labels = digits[2:]
    reseed(model, 0)
    found = BY[library](model, images, labels, norm, draws).detach()
    check_budget(found, images, BUDGETS[norm][0], norm, tolerance=1e-5)
    assert not any(part.training for part in model.modules()), "the outsider left the model in train mode"
    reseed(model, 2)
    standing = judge(model, found, labels, VOTE)
    assert standing.float().mean() < 0.9, "the outsider did not attack at all"
    found = compare(library, standing, ours[kind, norm])
    assert not found.beaten, found
    assert abs(int(standing.sum()) - int(ours[kind, norm].sum())) < 0.15 * IMAGES, "the budgets are not equal"


@pytest.fixture(scope="module")
def printed(models, digits):
    """The standing images behind the number that notebook 4 prints by default: protocol ``demo`` with its own step size."""
    protocol = adjusted(PROTOCOLS["demo"], steps=2 * STEPS, eot_samples=DRAWS, num_draws=VOTE.num_draws)
    pipeline, _ = models["random"]
    eps, _ = BUDGETS["linf"]
    found = evaluate({"it": pipeline}, *digits[2:], protocol, Budget(eps, 1.0), classifier=pipeline.classifier)
    (white_box,) = (item for item in found.outcomes if item.attack == "white-box")
    return white_box.right["majority"][0]


def by_original_autoattack(model, images, labels, eps):
    pyautoattack = pytest.importorskip("pyautoattack")
    original = pyautoattack.AutoAttack(model, eps=eps, norm="Linf", seed=0, version="rand", device="cpu")
    original.apgd.n_iter, original.apgd.eot_iter = STEPS, DRAWS
    return original.run_standard_evaluation(images, labels, batch_size=IMAGES)[0]


def by_foreign(name, **options):
    def attack(model, images, labels, eps):
        settings = ForeignSettings(name, eps, "linf", DRAWS, options)
        return torchattacks_attack(model, images, labels, settings, generator=torch.Generator().manual_seed(2))

    return attack


CHALLENGERS = {
    "the original AutoAttack, rand": by_original_autoattack,
    "PGD, small steps": by_foreign("PGD", steps=2 * STEPS, alpha=0.015),
    "PGD, steps of eps": by_foreign("PGD", steps=2 * STEPS, alpha=0.15),
    "momentum": by_foreign("MIFGSM", steps=2 * STEPS, alpha=0.05),
    "Square": by_foreign("Square", n_queries=100),
}


@pytest.mark.parametrize("name", CHALLENGERS)
def test_no_outsider_finds_significantly_more_errors_than_the_number_that_is_printed(name, models, digits, printed):
    pipeline, _ = models["random"]
    images, labels = digits[2:]
    eps, _ = BUDGETS["linf"]
    reseed(pipeline, 0)
    torch.manual_seed(0)
    result = CHALLENGERS[name](pipeline, images, labels, eps).detach()
    check_budget(result, images, eps, "linf", tolerance=1e-5)
    reseed(pipeline, 2)
    standing = judge(pipeline, result, labels, VOTE)
    assert 0.02 < printed.float().mean() < 0.8, "a test with nothing to win or lose"
    assert not compare(name, standing, printed).beaten, (int(standing.sum()), int(printed.sum()))


def test_an_attack_with_the_small_steps_of_old_would_lose(models, digits, printed):
    """The mistake that this kit has made once: the test above must be able to see one like it."""
    pipeline, _ = models["random"]
    images, labels = digits[2:]
    reseed(pipeline, 0)
    weak = pgd(pipeline, images, labels, PGDSettings(BUDGETS["linf"][0], steps=5, alpha=0.01, eot_samples=1))
    reseed(pipeline, 2)
    assert compare("ours", printed, judge(pipeline, weak, labels, VOTE)).beaten
