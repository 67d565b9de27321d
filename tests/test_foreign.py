"""The attacks of torchattacks run by name on any module, with EOT, in our ball, and leave no trace."""

import inspect
import random
import sys
import threading
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
import torchattacks
from torch import nn

from atoplib.attacks import check_budget
from atoplib.attacks.eot import cross_entropy
from atoplib.attacks.foreign import ForeignSettings, MeanLogits, torchattacks_attack
from atoplib.attacks.foreign_names import FOREIGN
from atoplib.attacks.suite import ATTACKS

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


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(count=4):
    return torch.rand(count, 3, 8, 8, generator=seeded(count))


def small_model(classes=4):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(144, classes)).eval()


class Noisy(nn.Module):
    """A random model with dice of its own; it remembers the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.body, self.generator, self.sizes = small_model(), seeded(), []

    def reseed(self, seed):
        self.generator.manual_seed(seed)

    def forward(self, images):
        self.sizes.append(len(images))
        return self.body(images + 0.05 * torch.randn(images.shape, generator=self.generator))


def quick(name, norm, draws=2):
    return ForeignSettings(name, 0.1 if norm == "linf" else 1.0, norm, draws, QUICK.get(name, {}))


ALL = [(name, norm) for name, known in FOREIGN.items() for norm in known.norms]


@pytest.mark.parametrize("name, norm", ALL)
def test_every_attack_that_is_listed_works_on_a_random_model_and_leaves_no_trace(name, norm):
    model, images = Noisy().eval(), images_of()
    labels = model.body(images).argmax(dim=1)
    kept, state = images.clone(), {key: value.clone() for key, value in model.state_dict().items()}
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    results = []
    for _ in range(2):
        model.reseed(1)
        results.append(torchattacks_attack(model, images, labels, quick(name, norm), generator=seeded(3), max_batch=8))
    assert torch.equal(*results), "one generator, one result"
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()
    assert torch.equal(images, kept)
    assert not any(part.training for part in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    check_budget(results[0], images, quick(name, norm).eps, norm)
    gained = cross_entropy(model.body(results[0]), labels) - cross_entropy(model.body(images), labels)
    assert name in WEAK or gained.mean() > 0
    assert name in OWN_BATCHES or max(model.sizes) <= 8


def test_the_list_is_all_of_torchattacks_but_for_other_norms_and_what_needs_more_than_a_model():
    other_norms = {"JSMA", "SparseFool", "OnePixel", "Pixle", "EADL1", "EADEN"}
    assert set(torchattacks.__all__) - set(FOREIGN) == other_norms | {"VANILA", "MultiAttack", "LGV"}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_the_list_says_of_an_attack_is_true(name):
    known, attack, own = (
        FOREIGN[name],
        ATTACKS[f"torchattacks:{name}"],
        set(inspect.signature(getattr(torchattacks, name)).parameters),
    )
    assert {known.steps, known.queries} - {""} <= own and (not known.alpha or "alpha" in own)
    assert ("steps" in attack.options) == bool(own & {"steps", "num_iter_set", "nb_iter"})
    model, images = small_model(), images_of(6)
    labels = model(images).argmax(dim=1)
    settings = [quick(name, norm, 1) for norm in known.norms]
    differs = [
        not torch.equal(*(torchattacks_attack(model, images, labels, each, generator=seeded(dice)) for dice in (1, 2)))
        for each in settings
    ]
    assert any(differs) == known.dice


def test_an_attack_by_name_has_its_number_of_steps_and_the_step_size_of_our_pgd():
    made = ATTACKS["torchattacks:MIFGSM"].settings(0.3, steps=20)
    assert (made.name, made.norm, made.eps, dict(made.options)) == ("MIFGSM", "linf", 0.3, {"steps": 20, "alpha": 0.3 / 3})
    assert ATTACKS["torchattacks:PGDL2"].settings(1.0).options == {"alpha": 1.0 / 3}
    assert ATTACKS["torchattacks:PIFGSM"].settings(0.1, steps=4).options == {"num_iter_set": 4}
    assert ATTACKS["torchattacks:Square"].settings(0.1, "l2", queries=50).options == {"n_queries": 50}
    assert ATTACKS["torchattacks:AutoAttack"].settings(0.1, version="rand").options == {"version": "rand"}


def test_an_attack_can_be_stopped_at_any_forward_pass_and_leaves_no_trace():
    model, images, passes = small_model(), images_of(2), []

    def on_pass(number):
        passes.append(number)
        if number == 3:
            raise KeyError("enough")

    dice = torch.get_rng_state()
    settings = ForeignSettings("PGD", 0.1, options={"steps": 10})
    with pytest.raises(KeyError, match="enough"):
        torchattacks_attack(model, images, torch.tensor([0, 1]), settings, generator=seeded(), on_pass=on_pass)
    assert passes == [1, 2, 3] and torch.equal(dice, torch.get_rng_state())
    assert all(weight.requires_grad for weight in model.parameters())
    torchattacks_attack(model, images, torch.tensor([0, 1]), settings, generator=seeded())  # nothing is locked


def test_the_result_does_not_depend_on_the_order_of_the_memory():
    model, images = small_model(), images_of()
    settings = ForeignSettings("FFGSM", 0.1)
    results = [
        torchattacks_attack(model, given, torch.tensor([0, 1, 2, 3]), settings, generator=seeded())
        for given in (images, images.contiguous(memory_format=torch.channels_last))
    ]
    torch.testing.assert_close(*results)


def test_other_threads_may_print_while_an_attack_is_kept_quiet(capsys):
    from atoplib.attacks.foreign import Silence

    with redirect_stdout(Silence(sys.stdout)):
        print("mine")
        other = threading.Thread(target=print, args=("another's",))
        other.start()
        other.join()
    assert capsys.readouterr().out == "another's\n"


def test_the_options_radius_norm_and_classes_reach_the_attack(monkeypatch):
    given = []
    original = torchattacks.APGDT.__init__

    def spy(self, model, **options):
        given.append(options)
        original(self, model, **options)

    monkeypatch.setattr(torchattacks.APGDT, "__init__", spy)
    monkeypatch.setattr("atoplib.attacks.foreign._parameters", lambda name: {"eps", "norm", "n_classes", "steps"})
    model, images = small_model(classes=6), images_of(2)
    settings = ForeignSettings("APGDT", 0.7, "l2", options={"steps": 3})
    torchattacks_attack(model, images, torch.tensor([0, 5]), settings)
    assert given == [{"eps": 0.7, "norm": "L2", "n_classes": 6, "steps": 3}]  # no seed, where the attack takes none


def test_an_attack_without_a_radius_is_projected_into_ours():
    model, images = small_model(), images_of()
    labels = model(images).argmax(dim=1)
    free = torchattacks.DeepFool(model)(images, labels)
    assert ((free - images).flatten(1).norm(dim=1) > 0.01).any()
    found = torchattacks_attack(model, images, labels, ForeignSettings("DeepFool", 0.01, "l2"))
    check_budget(found, images, 0.01, "l2")


def test_on_a_deterministic_model_it_is_torchattacks_own_result():
    model, images = small_model(), images_of()
    labels = model(images).argmax(dim=1)
    found = torchattacks_attack(model, images, labels, ForeignSettings("MIFGSM", 0.1, options={"steps": 5}))
    torch.testing.assert_close(found, torchattacks.MIFGSM(model, eps=0.1, steps=5)(images, labels), atol=1e-6, rtol=0)


def test_a_random_model_with_global_dice_repeats_too():
    model, images = nn.Sequential(small_model(), GlobalNoise()).eval(), images_of()
    labels = model[0](images).argmax(dim=1)
    settings = ForeignSettings("PGD", 0.1, eot_samples=3)
    first, again, other = (torchattacks_attack(model, images, labels, settings, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


class GlobalNoise(nn.Module):
    def forward(self, logits):
        return logits + 0.1 * torch.randn_like(logits)


def test_mean_logits_are_those_of_as_many_draws_in_one_batch():
    model, images = Noisy().eval(), images_of(3)
    found = MeanLogits(model, 4)(images)
    assert model.sizes == [12]
    model.reseed(0)
    torch.testing.assert_close(found, model(images.repeat(4, 1, 1, 1)).unflatten(0, (4, 3)).mean(dim=0))
    wrapper = MeanLogits(model, 500)
    wrapper.reseed(0)
    torch.testing.assert_close(wrapper(images), wrapper(images), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        MeanLogits(model, 0)


def test_the_callback_counts_images_and_may_print(capsys):
    seen = []

    def callback(done, total, adversarial, losses):
        print("so far", done)
        seen.append((done, total, int((losses > 0).sum())))
        assert adversarial.shape == images.shape

    images = images_of(5)
    settings = ForeignSettings("FGSM", 0.1, eot_samples=2)
    torchattacks_attack(small_model(), images, torch.tensor([0, 1, 2, 3, 0]), settings, max_batch=4, callback=callback)
    assert seen == [(2, 5, 2), (4, 5, 4), (5, 5, 5)]
    assert capsys.readouterr().out == "so far 2\nso far 4\nso far 5\n"


class Bare(nn.Module):
    """No weights at all: torchattacks finds no device, and says so on the standard output."""

    def forward(self, images):
        return images.mean(dim=(2, 3)) * 5


def test_a_model_without_weights_is_attacked_in_silence(capsys):
    images = images_of(3)
    found = torchattacks_attack(Bare().eval(), images, torch.tensor([0, 1, 2]), ForeignSettings("PGD", 0.1))
    assert (found - images).abs().max() > 0.05
    assert capsys.readouterr().out == ""


def test_the_attack_works_inside_no_grad():
    with torch.no_grad():
        found = torchattacks_attack(small_model(), images_of(2), torch.tensor([0, 1]), ForeignSettings("FGSM", 0.1))
    assert not found.requires_grad


def test_weights_ask_for_gradients_again_after_an_attack_that_failed(monkeypatch):
    model = small_model()
    model[0].weight.requires_grad_(False)
    asked = [weight.requires_grad for weight in model.parameters()]

    def fail(*_):
        raise RuntimeError("planned")

    monkeypatch.setattr(torchattacks.FGSM, "forward", fail)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="planned"):
        torchattacks_attack(model, images_of(2), torch.tensor([0, 1]), ForeignSettings("FGSM", 0.1), generator=seeded())
    assert [weight.requires_grad for weight in model.parameters()] == asked
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_in_train_mode_is_refused_and_left_as_it_was():
    model = small_model().train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        torchattacks_attack(model, images_of(2), torch.tensor([0, 1]), ForeignSettings("FGSM", 0.1))
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"name": "fgsm"}, "unknown attack 'fgsm' of torchattacks; allowed: GN, FGSM"),
        ({"name": "LGV"}, "unknown attack 'LGV'"),
        ({"norm": "l1"}, "unknown norm 'l1'; allowed: linf, l2"),
        ({"norm": "l2"}, "PGD is no attack for l2, but for linf"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"eps": 8.0}, r"at most 1 \(images lie in \[0, 1\]\), got 8.0; 8/255\?"),
        ({"eot_samples": 0}, "eot_samples must be at least 1, got 0"),
        ({"options": {"step": 3}}, "PGD does not take step; allowed: alpha, eps, random_start, steps"),
        ({"options": {"model": None}}, "PGD does not take model"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ForeignSettings(**{"name": "PGD", "eps": 0.1} | wrong)
