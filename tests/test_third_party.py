"""The attacks of torchattacks run by name on any module, with EOT, in our ball, and leave no trace."""

import inspect

import pytest
import torch
import torchattacks
from test_attacks import seeded
from test_black_box import images_of
from torch import nn

from atoplib.attacks import ATTACKS, Ball, EOTWrapper, third_party
from atoplib.attacks.losses import cross_entropy
from atoplib.attacks.third_party import THIRD_PARTY
from atoplib.decisions import reseed

QUICK = {
    "Square": {"n_queries": 20},
    "CW": {"steps": 10, "c": 10},
    "DeepFool": {"steps": 5},
    "SPSA": {"nb_sample": 8, "nb_iter": 3, "lr": 0.05},
    "FAB": {"steps": 3},
    "AutoAttack": {"version": "rand"},
    "VMIFGSM": {"N": 2},
    "VNIFGSM": {"N": 2},
}
WEAK = {"GN", "SPSA", "Square"}  # noise alone, and searches that were cut short
OWN_BATCHES = {"PGDRS", "PGDRSL2", "SPSA"}  # they repeat the images themselves


def small_model(classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(144, classes)
    ).eval()


class Noisy(nn.Module):
    """A random model with a generator of its own; it remembers the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.body, self.generator, self.sizes = small_model(), seeded(), []

    def reseed(self, seed):
        self.generator.manual_seed(seed)

    def forward(self, images):
        self.sizes.append(len(images))
        return self.body(images + 0.05 * torch.randn(images.shape, generator=self.generator))


def quick(name, norm, samples=2):
    eps = 0.1 if norm == "linf" else 1.0
    return {"name": name, "norm": norm, "eps": eps, "eot_samples": samples, **QUICK.get(name, {})}


ALL = [
    pytest.param(name, norm, marks=[pytest.mark.long] if name == "AutoAttack" else [])
    for name, known in THIRD_PARTY.items()
    for norm in known.norms
]


@pytest.mark.parametrize("name, norm", ALL)
def test_every_attack_that_is_listed_works_on_a_random_model_and_leaves_no_trace(name, norm):
    model, images = Noisy().eval(), images_of(4)
    labels = model.body(images).argmax(dim=1)
    kept, state = images.clone(), {key: value.clone() for key, value in model.state_dict().items()}
    before, results = torch.get_rng_state(), []
    for _ in range(2):
        model.reseed(1)
        results.append(third_party(model, images, labels, **quick(name, norm), seed=3, max_batch=8))
    assert torch.equal(*results), "one seed, one result"
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(images, kept)
    assert not any(part.training for part in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    Ball(images, quick(name, norm)["eps"], norm).check(results[0])
    gained = cross_entropy(model.body(results[0]), labels) - cross_entropy(model.body(images), labels)
    assert name in WEAK or gained.mean() > 0
    assert name in OWN_BATCHES or max(model.sizes) <= 8


def test_the_list_is_all_of_torchattacks_but_for_other_norms_and_what_needs_more_than_a_model():
    other_norms = {"JSMA", "SparseFool", "OnePixel", "Pixle", "EADL1", "EADEN"}
    assert set(torchattacks.__all__) - set(THIRD_PARTY) == other_norms | {"VANILA", "MultiAttack", "LGV"}


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_what_the_list_says_of_an_attack_is_true(name):
    known, attack, own = (
        THIRD_PARTY[name],
        ATTACKS[f"torchattacks:{name}"],
        set(inspect.signature(getattr(torchattacks, name)).parameters),
    )
    assert {known.steps, known.queries} - {""} <= own and (not known.alpha or "alpha" in own)
    assert ("steps" in attack.options) == bool(own & {"steps", "num_iter_set", "nb_iter"})


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("MIFGSM", {"eps": 0.3, "steps": 20}, {"eps": 0.3, "steps": 20, "alpha": 0.3 / 3}),
        ("PGDL2", {"eps": 1.0}, {"eps": 1.0, "alpha": 1.0 / 3}),
        ("PIFGSM", {"eps": 0.1, "steps": 2}, {"max_epsilon": 0.1, "num_iter_set": 2}),
        ("Square", {"eps": 0.1, "norm": "l2", "queries": 5}, {"eps": 0.1, "norm": "L2", "n_queries": 5}),
        ("APGDT", {"eps": 0.7, "steps": 3}, {"eps": 0.7, "norm": "Linf", "n_classes": 6, "steps": 3}),
        ("DeepFool", {"eps": 0.1, "overshoot": 0.1}, {"overshoot": 0.1}),
    ],
)
def test_radius_norm_classes_steps_and_options_reach_the_attack(monkeypatch, name, settings, expected):
    given, original = [], getattr(torchattacks, name).__init__

    def spy(self, model, **options):
        given.append(options)
        original(self, model, **options)

    spy.__signature__ = inspect.signature(original)
    monkeypatch.setattr(getattr(torchattacks, name), "__init__", spy)
    ATTACKS[f"torchattacks:{name}"].function(small_model(6), images_of(2), torch.tensor([0, 5]), **settings)
    (options,) = given
    options.pop("seed", None)
    assert options == expected


def test_an_attack_without_a_radius_is_projected_into_ours():
    model, images = small_model(), images_of(4)
    labels = model(images).argmax(dim=1)
    assert ((torchattacks.DeepFool(model)(images, labels) - images).flatten(1).norm(dim=1) > 0.01).any()
    Ball(images, 0.01, "l2").check(third_party(model, images, labels, name="DeepFool", eps=0.01))


def test_on_a_deterministic_model_it_is_torchattacks_own_result():
    model, images = small_model(), images_of(4)
    labels = model(images).argmax(dim=1)
    found = third_party(model, images, labels, name="MIFGSM", eps=0.1, steps=5, alpha=2 / 255)
    expected = torchattacks.MIFGSM(model, eps=0.1, steps=5)(images, labels)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_wrapper_averages_the_logits_of_as_many_samples_in_one_batch():
    model, images = Noisy().eval(), images_of(3)
    found = EOTWrapper(model, 4)(images)
    assert model.sizes == [12]
    model.reseed(0)
    torch.testing.assert_close(found, model(images.repeat(4, 1, 1, 1)).unflatten(0, (4, 3)).mean(dim=0))
    wrapper = EOTWrapper(model, 500)
    reseed(wrapper, 0)
    torch.testing.assert_close(wrapper(images), wrapper(images), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="eot_samples must be at least 1, got 0"):
        EOTWrapper(model, 0)


def test_the_callback_counts_images():
    seen = []

    def callback(done, total, adversarial, losses):
        seen.append((done, total, int((losses > 0).sum())))
        assert adversarial.shape == images.shape

    images, labels = images_of(5), torch.tensor([0, 1, 2, 3, 0])
    third_party(
        small_model(), images, labels, name="FGSM", eps=0.1, eot_samples=2, max_batch=4, callback=callback
    )
    assert seen == [(2, 5, 2), (4, 5, 4), (5, 5, 5)]


def test_weights_ask_for_gradients_again_after_an_attack_that_failed(monkeypatch):
    model = small_model()
    model[0].weight.requires_grad_(False)
    asked = [weight.requires_grad for weight in model.parameters()]

    def fail(*_):
        raise RuntimeError("planned")

    monkeypatch.setattr(torchattacks.FGSM, "forward", fail)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="planned"):
        third_party(model, images_of(2), torch.tensor([0, 1]), name="FGSM", eps=0.1)
    assert [weight.requires_grad for weight in model.parameters()] == asked
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("classes", [2, 3])
def test_an_attack_whose_loss_needs_four_classes_says_so(classes):
    with pytest.raises(ValueError, match=f"APGDT .*needs at least 4 classes, but the model has {classes}"):
        third_party(small_model(classes), images_of(2), torch.tensor([0, 1]), name="APGDT", eps=0.1)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"name": "fgsm"}, "name must be one of GN, FGSM"),
        ({"name": "LGV"}, "name must be one of .* got 'LGV'"),
        ({"norm": "l1"}, "norm of PGD must be one of linf"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"eps": 8.0}, r"at most 1 \(images lie in \[0, 1\]\), got 8.0; 8/255\?"),
        ({"eot_samples": 0}, "eot_samples must be at least 1, got 0"),
        ({"queries": 50}, "PGD of torchattacks has no queries"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"step": 3}, "option of PGD must be one of alpha, eps, random_start, steps, got 'step'"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        third_party(small_model(), images_of(2), torch.tensor([0, 1]), **{"name": "PGD", "eps": 0.1} | wrong)
