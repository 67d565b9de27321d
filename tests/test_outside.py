"""The kit's models run unchanged in other attack libraries, none of which beats our PGD at equal passes."""

import numpy as np
import pytest
import torch
from torch import nn

from atoplib.attacks import Ball, EOTWrapper, pgd, pgd_ensemble, third_party
from atoplib.decisions import reseed, sample_logits

STEPS, SAMPLES = 15, 4
BALLS = {"linf": (0.3, 0.1), "l2": (2.0, 0.34)}  # eps, alpha


def by_torchattacks(model, images, labels, norm):
    (eps, alpha), name = BALLS[norm], {"linf": "PGD", "l2": "PGDL2"}[norm]
    return third_party(model, images, labels, name=name, eps=eps, norm=norm, steps=STEPS, alpha=alpha, seed=1)


def by_foolbox(model, images, labels, norm):
    foolbox = pytest.importorskip("foolbox")
    eps, alpha = BALLS[norm]
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return kind(abs_stepsize=alpha, steps=STEPS).run(wrapped, images, labels, epsilon=eps)


def by_art(model, images, labels, norm):
    evasion = pytest.importorskip("art.attacks.evasion")
    classification = pytest.importorskip("art.estimators.classification")
    eps, alpha = BALLS[norm]
    options = {"clip_values": (0.0, 1.0), "device_type": "cpu", "input_shape": (3, 32, 32), "nb_classes": 10}
    wrapped = classification.PyTorchClassifier(model, loss=nn.CrossEntropyLoss(), **options)
    options = {"eps": eps, "eps_step": alpha, "max_iter": STEPS, "num_random_init": 1, "batch_size": 64}
    kind = {"linf": np.inf, "l2": 2}[norm]
    attack = evasion.ProjectedGradientDescentPyTorch(wrapped, norm=kind, verbose=False, **options)
    return torch.from_numpy(attack.generate(images.numpy(), y=labels.numpy()))


@pytest.mark.parametrize("by", [by_torchattacks, by_foolbox, by_art])
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("name, samples", [("AT", 1), pytest.param("AToP", SAMPLES, marks=pytest.mark.long)])
def test_no_other_library_beats_ours_at_equal_passes(by, norm, name, samples, defences, digits):
    model, (images, labels) = defences[name], digits
    reseed(model, 0)
    other = by(EOTWrapper(model, samples).eval(), images, labels, norm).detach()
    eps, alpha = BALLS[norm]
    Ball(images, eps, norm).check(other, tolerance=1e-5)
    assert not any(part.training for part in model.modules()), "it left the model in train mode"
    settings = {"eps": eps, "norm": norm, "steps": STEPS, "eot_samples": samples}
    same, strong = (
        pgd(model, images, labels, alpha=alpha, **settings),
        pgd_ensemble(model, images, labels, restarts=1, **settings),
    )
    votes = 1 if samples == 1 else 20
    left = [
        float((sample_logits(model, x, num_samples=votes).argmax(dim=2) == labels).float().mean())
        for x in (other, same, strong)
    ]
    assert left[0] < 0.95, "it did not attack at all"
    assert left[1] < left[0] + 6 / 64 and left[2] < left[0] + 3 / 64, left
