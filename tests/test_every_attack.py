"""What holds for every attack: ball, random numbers, scales of logits, batches, targets, votes, refusals."""

import pytest
import torch
from torch import nn

from atoplib.attacks import ATTACKS, NORMS, Ball, pgd
from atoplib.contract import ContractError
from atoplib.evaluation import single
from atoplib.evaluation.pieces import Piece, try_out
from atoplib.evaluation.protocols import check_protocol, for_classes

SMALL = {"steps": 4, "queries": 20, "samples": 8, "eot_samples": 2, "restarts": 2, "num_targets": 2}
EPS = {"linf": 0.03, "l2": 0.3, "l1": 3.0, "flow": 0.03}
NAMES = ["fgsm", "pgd", "pgd_ensemble", "apgd", "flow", "square", "ddn", "fmn"]
CASES = [(name, norm) for name in NAMES for norm in ATTACKS[name].norms]
STOCHASTIC = [(name, norm) for name, norm in CASES if ATTACKS[name].stochastic]
NOT_RANDOM = {"fgsm", "ddn", "fmn"}  # they draw nothing


def attack(name, norm, model, images, labels, /, **options):
    options = {key: value for key, value in SMALL.items() if key in ATTACKS[name].options} | options
    return ATTACKS[name].function(model, images, labels, **{"eps": EPS[norm], "norm": norm} | options)


class Watched(nn.Module):
    """Logits of another scale, with a constant added, of permuted classes or with noise on every image."""

    def __init__(self, body, factor=1.0, shift=0.0, order=None, noise=0.0):
        super().__init__()
        self.body, self.factor, self.shift, self.order, self.noise = body, factor, shift, order, noise
        self.generator, self.sizes = torch.Generator().manual_seed(0), []

    def forward(self, images):
        self.sizes.append(len(images))
        noise = torch.randn(images.shape, generator=self.generator, dtype=images.dtype)
        logits = self.factor * self.body(images + self.noise * noise) + self.shift
        return logits if self.order is None else logits[:, self.order]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus(beta=4), nn.Flatten(), nn.Linear(8 * 36, 5))
        .double()
        .eval()
    )
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    return model, images, model(images).argmax(dim=1)


@pytest.mark.parametrize("name, norm", CASES)
def test_one_seed_gives_one_result_in_the_ball_and_nothing_else_changes(name, norm, batch):
    model, images, labels = batch
    kept, before = images.clone(), torch.get_rng_state()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = attack(name, norm, model, images, labels, seed=1)
    with torch.no_grad():
        again, other = (attack(name, norm, model, images, labels, seed=seed) for seed in (1, 2))
    assert torch.equal(found, again)
    assert torch.equal(found, other) == (name in NOT_RANDOM)
    assert (
        found.min() >= 0 and found.max() <= 1 and not torch.equal(found, images) and not found.requires_grad
    )
    if norm != "flow":
        Ball(images, EPS[norm], norm).check(found)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(images, kept)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert (model(found).argmax(dim=1) != labels).any() or name == "fgsm"


ORDER = torch.tensor([3, 0, 4, 1, 2])
CHANGES = [(0.0, {"factor": 1e-3}), (0.05, {"factor": 1e2, "shift": 7.0, "order": ORDER})]


@pytest.mark.parametrize("noise, change", CHANGES, ids=["deterministic", "random"])
@pytest.mark.parametrize("name, norm", [case for case in STOCHASTIC if case[0] not in ("fgsm", "pgd")])
def test_scale_shift_order_and_wrapping_of_logits_change_nothing(name, norm, noise, change, batch):
    model, images, labels = batch
    aim = labels if change.get("order") is None else change["order"].argsort()[labels]
    first = attack(name, norm, Watched(model, noise=noise).eval(), images, labels)
    second = attack(name, norm, Watched(model, noise=noise, **change).eval(), images, aim)
    # a rounding may lead an image elsewhere where gradients or margins tie
    assert ((first - second).abs().flatten(1).amax(dim=1) > 1e-6).sum() <= 1
    assert not torch.equal(first, images)


@pytest.mark.parametrize("name, norm", STOCHASTIC)
def test_no_batch_is_larger_than_max_batch_and_parts_give_the_attack_of_the_whole(name, norm, batch):
    model, images, labels = batch
    watched = Watched(model).eval()
    found = attack(name, norm, watched, images, labels, max_batch=5)
    assert max(watched.sizes) <= 8, "5, but for the 8 that tell whether the model is random"
    torch.testing.assert_close(found, attack(name, norm, model, images, labels))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_RANDOM])
def test_a_targeted_attack_reaches_its_targets_and_refuses_what_is_none(name, batch, without_shape_checks):
    model, images, labels = batch
    targets, norm = (labels + 2) % 5, ATTACKS[name].norms[0]
    more = {"steps": 20, "queries": 200, "samples": 32, "learning_rate": 0.1}
    options = {key: value for key, value in more.items() if key in ATTACKS[name].options} | {"eps": 0.5}
    found = attack(name, norm, model, images, labels, targets=targets, **options)
    untargeted = attack(name, norm, model, images, labels, **options)
    reached, by_chance = ((model(x).argmax(dim=1) == targets).double().mean() for x in (found, untargeted))
    assert reached > (0.35 if name == "flow" else 0.6) and reached > by_chance
    for wrong in (labels, targets[:2], targets + 5):
        with pytest.raises(ValueError, match=r"targets must be 12 classes of 0\.\.4, none of them the image"):
            attack(name, norm, model, images, labels, targets=wrong)


@pytest.mark.parametrize("name", ["pgd", "apgd", "autoattack", "square", "occlusion", "corruption"])
def test_a_random_model_is_not_judged_by_a_single_vote(name, batch):
    model, images, labels = batch
    random, options = Watched(model, noise=0.1).eval(), {"restarts": 2} if name == "pgd" else {}
    for wrong in ({"votes": 1}, {"rule": "single"}):
        with pytest.raises(ValueError, match="the model is random, but rule .* a single sample"):
            ATTACKS[name].function(random, images, labels, eps=1, **options, **wrong)


WRONG = [
    ({"eps": 0.0}, "eps must be above 0"),
    ({"eps": float("nan")}, "eps must be above 0"),
    ({"eps": 8.0}, "at most"),
    ({"norm": "l0"}, "norm must be one of"),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
    ({"eps": "8/255"}, "eps must be above 0.* got '8/255'"),
    ({"queries": 0}, "queries must be at least 1"),
    ({"eot_samples": 0}, "eot_samples must be at least 1"),
    ({"restarts": 0}, "restarts must be at least 1, got 0"),
    ({"rule": "most", "restarts": 2}, "rule must be one of any, single.* got 'most'"),
    ({"loss": "hinge"}, "loss must be one of ce, .* got 'hinge'"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=str)
@pytest.mark.parametrize("name", ["pgd", "apgd", "flow", "square"])
def test_impossible_settings_are_refused(name, wrong, message, batch, without_shape_checks):
    if next(iter(wrong)) in {*ATTACKS[name].options, "eps", "norm"}:
        given = {key: value for key, value in wrong.items() if key in {*ATTACKS[name].options, "eps", "norm"}}
        with pytest.raises(ValueError, match=message):
            attack(name, ATTACKS[name].norms[0], *batch, **given)


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("pgd", {"eps": 8.0}, r"at most 1 \(images lie in \[0, 1\]\), got 8.0; 8/255\?"),
        ("pgd", {"eps": float("inf"), "norm": "l2"}, "eps must be above 0"),
        ("pgd", {"alpha": 0.0}, "alpha must be above 0"),
        ("pgd", {"cycles": -1}, "cycles must be at least 0"),
        ("pgd", {"early_stop": -1}, "early_stop must be at least 0"),
        ("pgd", {"momentum": float("nan")}, "momentum must lie in 0"),
        ("pgd", {"start": "zero"}, "start must be one of random, clean"),
        ("flow", {"control": 1}, "control must be at least 2"),
        ("square", {"schedule": 0}, "schedule must be at least 1"),
        ("square", {"first_share": 0.0}, "first_share must be above 0, at most 1"),
        ("square", {"ask_again": -1}, "ask_again must be at least 0"),
    ],
    ids=str,
)
def test_impossible_settings_of_one_attack_are_refused(name, wrong, message, batch):
    with pytest.raises(ValueError, match=message):
        attack(name, ATTACKS[name].norms[0], *batch, **wrong)


def test_a_generator_continues_and_no_seed_means_the_global_one(batch):
    generator = torch.Generator().manual_seed(1)
    first, given, following = (pgd(*batch, eps=0.1, steps=1, seed=seed) for seed in (1, generator, generator))
    assert torch.equal(first, given) and not torch.equal(first, following)
    torch.manual_seed(3)
    first, following = (pgd(*batch, eps=0.1, steps=1, seed=None) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, pgd(*batch, eps=0.1, steps=1, seed=None)) and not torch.equal(first, following)


SPOILT = {
    "logits that are not finite for": lambda images, logits: logits.masked_fill(
        (images.mean(dim=(1, 2, 3)) > 0.9)[:, None], torch.nan
    ),
    "returns complex logits, but they must be real": lambda _, logits: logits.to(torch.complex128),
    "returns sparse logits, but they must be real": lambda _, logits: logits.to_sparse(),
}


@pytest.mark.parametrize("message", SPOILT)
@pytest.mark.parametrize("name", ATTACKS)
def test_logits_that_are_no_finite_real_numbers_are_refused(name, message, batch):
    if name == "torchattacks:GN" and "finite" in message:
        return  # noise, for which no model is asked
    model, images, labels = batch
    images[3] = 0.95  # not the first, which alone is looked at before an attack
    model.register_forward_hook(lambda _, given, logits: SPOILT[message](given[0], logits))
    options = {key: 2 for key in ("steps", "queries", "eot_samples") if key in ATTACKS[name].options}
    eps = {"occlusion": 1, "rotation": 5, "corruption": 1}.get(ATTACKS[name].norms[0], 0.01)
    with pytest.raises(ContractError, match=message):
        ATTACKS[name].function(model, images, labels, eps=eps, **options)


@pytest.mark.parametrize("name, norm", [(name, norm) for name in ATTACKS for norm in ATTACKS[name].norms])
def test_the_try_out_of_an_evaluation_refuses_no_attack_and_prints_nothing(name, norm, capsys):
    plan = for_classes(check_protocol(single(name, steps=2, queries=2), norm), 5)
    for random in {False, ATTACKS[name].stochastic}:
        piece = Piece(plan.rows[0], (0.1 if norm in NORMS else 1.0,), "f", ("f",), 0, slice(0, 1))
        try_out(piece, plan, torch.rand(1, 3, 8, 8), torch.tensor([1]), 5, random)
    assert capsys.readouterr().out == ""
