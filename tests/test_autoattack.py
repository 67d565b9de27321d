"""AutoAttack is the original for a deterministic model, and is judged by votes for a random one."""

import pytest
import torch
from test_apgd import RADII, Noisy, attacked_set, broken, has_original, seeded
from torch import nn

from atoplib.attacks.apgd import autoattack
from atoplib.attacks.losses import margin
from atoplib.attacks.norms import Ball


@has_original
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_autoattack_of_a_deterministic_model_is_the_original_and_leaves_the_global_generators_alone(norm):
    model, images, labels = attacked_set(12, 6, size=6)
    labels[:2] = (labels[:2] + 1) % 6
    options = {"eps": RADII[norm] / 2, "norm": norm, "steps": 3, "queries": 20, "num_targets": 2}
    before, seen = torch.get_rng_state(), []
    found = autoattack(model, images, labels, **options, callback=lambda *given: seen.append(given[:2]))
    assert torch.equal(torch.get_rng_state(), before) and seen == [(1, 1)]
    assert torch.equal(found, autoattack(model, images, labels, **options))
    Ball(images, options["eps"], norm).check(found)
    assert torch.equal(found[:2], images[:2]) and 2 < broken(model, found, labels).sum() < 12
    assert ((found != images).flatten(1).any(dim=1) == broken(model, found, labels))[2:].all()


def test_autoattack_says_how_many_classes_it_needs():
    for classes, random in ((3, False), (2, True)):
        model, images, labels = attacked_set(4, classes)
        with pytest.raises(
            ValueError, match=f"at least {classes + 1} classes here, but the model has {classes}"
        ):
            autoattack(Noisy(model, 0.1).eval() if random else model, images, labels, eps=0.1)


class Linear(nn.Module):
    """Logits that are linear in the pixels: the distance to every boundary is known."""

    def __init__(self, classes=5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 48, generator=seeded(1)))

    def forward(self, images):
        return (images.flatten(1) - 0.5) @ self.weight.T


@pytest.mark.parametrize("classes", [3, 5])
def test_autoattack_of_a_random_model_breaks_by_votes_what_lies_near_a_boundary(classes):
    plain, images = Linear(classes).eval(), torch.rand(20, 3, 4, 4, generator=seeded(5))
    labels = plain(images).argmax(dim=1)
    normals = plain.weight.detach()[labels][:, None] - plain.weight.detach()[None]
    gaps = (normals * (images.flatten(1)[:, None] - 0.5)).sum(dim=2) / normals.abs().sum(dim=2).clamp_min(
        1e-9
    )
    known = gaps.scatter(1, labels[:, None], torch.inf).amin(dim=1)  # linf distance to the nearest boundary
    eps, seen = 0.05, []
    found = autoattack(
        Noisy(plain, 0.02).eval(),
        images,
        labels,
        eps=eps,
        steps=10,
        queries=10,
        eot_samples=4,
        rule="majority",
        votes=9,
        callback=lambda *given: seen.append(given[:2]),
    )
    Ball(images, eps, "linf").check(found)
    clear = (known - eps).abs() > 0.2 * eps
    assert clear.sum() > 12 and torch.equal(broken(plain, found, labels)[clear], (known < eps)[clear])
    assert {steps for _, steps in seen} == {10 + 10 * (1 if classes == 3 else 3) + 10} and [
        s for s, _ in seen
    ] == sorted(dict(seen))
    assert (margin(plain(found), labels) > margin(plain(images), labels))[~broken(plain, found, labels)].all()
