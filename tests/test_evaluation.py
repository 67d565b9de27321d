"""Numbers are the known ones, whatever ran before."""

import re
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import pairwise

import numpy as np
import pytest
import torch
from small_evaluation import (
    COLUMNS,
    EPS,
    IMAGES,
    LABELS,
    NAMES,
    PGD,
    PROTOCOL,
    ROWS,
    accuracy,
    assert_same,
    linear,
    purifying,
    run,
)
from torch import nn

from atoplib.attacks import ATTACKS, Ball, pgd
from atoplib.decisions import RULES, correct, reseed, sample_logits
from atoplib.evaluation import Row, evaluate


class Flips(nn.Module):
    """Turns the logits of every other image round, at random: a gradient over samples points nowhere."""

    def __init__(self):
        super().__init__()
        self.body, self.known = linear(), None

    @contextmanager
    def fixed_sample(self, seed):
        self.known = seed
        yield
        self.known = None

    def forward(self, images):
        generator = None if self.known is None else torch.Generator().manual_seed(self.known)
        return self.body(images) * (1 - 2 * torch.randint(2, (len(images), 1), generator=generator))


class Noisy(nn.Module):
    """Takes torch's global random numbers."""

    def __init__(self, noise, seed=0):
        super().__init__()
        self.body, self.noise = linear(seed), noise

    def forward(self, images):
        return self.body(images) + self.noise * torch.randn(len(images), 3)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr("atoplib.evaluation.pieces.PIECE", 20)


@pytest.fixture(scope="module")
def result():
    return run()


def test_every_defence_has_every_column_by_every_rule_and_its_worst_cases_last(result):
    frame = result.frame
    rows = [(name, column, rule) for name in NAMES for column in COLUMNS for rule in RULES]
    assert list(zip(frame.defence, frame.attack, frame.rule, strict=True)) == rows
    assert {"norm", "low", "high", "images", "passes", "seconds"} <= set(frame)
    assert (frame.images == 40).all() and (frame.votes == np.where(frame.defence == "pipeline", 5, 1)).all()
    assert frame.accuracy.between(frame.low, frame.high).all() and frame.high.max() == 100
    assert dict(zip(frame.attack, frame.eps, strict=True)) == pytest.approx(
        dict(zip(COLUMNS, (0, 0.05, 0.05, 0.5, 0.05, float("nan")), strict=True)), nan_ok=True
    )


def test_a_worst_case_is_that_of_its_columns_and_of_clean_images_image_by_image(result):
    for name in NAMES:
        right = {column: result.correct[name, column]["single"] for column in COLUMNS}
        both = right["clean"] & right["transfer"] & right["white-box"]
        assert right["worst case linf"].equals(both)
        assert right["worst case"].equals(both & right["white-box l2"])
    found = run({"a": linear()}, labels=(LABELS + 1) % 3, eps={"linf": 0.9, "l2": 9.0})
    assert accuracy(found, "a", "clean") == accuracy(found, "a", "worst case") == 0


def test_transfer_images_are_made_once_on_the_classifier_and_all_stay_within_their_radius(result):
    for name in NAMES:
        shown = {column: result.adversarial(name, column) for column in COLUMNS[:4]}
        assert torch.equal(shown["clean"], IMAGES)
        assert torch.equal(shown["transfer"], result.adversarial("undefended", "transfer"))
        assert torch.equal(shown["transfer"], shown["white-box"]) == (name == "undefended")
        for column in COLUMNS[1:4]:
            norm = "l2" if column.endswith("l2") else "linf"
            Ball(IMAGES, EPS[norm], norm).check(shown[column])


def test_accuracies_are_those_of_the_images_that_come_with_them(result):
    for name, model in (("undefended", linear()), ("other", linear(7))):
        for column in COLUMNS[:4]:
            right = model(result.adversarial(name, column)).argmax(dim=1) == LABELS
            assert accuracy(result, name, column) == pytest.approx(100 * right.float().mean().item())
            assert accuracy(result, name, column, "worst_of_n") == accuracy(result, name, column)
    assert accuracy(result, "other", "white-box") < accuracy(result, "other", "transfer")
    of_n = [accuracy(result, "pipeline", column, "worst_of_n") for column in COLUMNS[:4]]
    assert sum(of_n) < sum(accuracy(result, "pipeline", column) for column in COLUMNS[:4])


def test_a_pipeline_with_another_classifier_meets_the_transfer_attack_on_its_own():
    defences = {"undefended": linear(), "AP": purifying(), "AToP": purifying(linear(7)), "other": linear(7)}
    plan = PROTOCOL._replace(rows=ROWS[:1])
    shown = {name: run(defences, protocol=plan).adversarial(name, "transfer") for name in defences}
    assert torch.equal(shown["AP"], shown["undefended"]) and torch.equal(shown["other"], shown["undefended"])
    alone = run({"undefended": linear(7)}, protocol=plan)
    assert torch.equal(shown["AToP"], alone.adversarial("undefended", "transfer"))
    assert not torch.equal(shown["AToP"], shown["AP"])
    found = run(linear(7))
    assert set(found.frame.defence) == {"defence"}, "one module needs no name"
    assert "transfer" not in set(found.frame.attack), "nor is there another model"


def test_a_sister_s_images_are_shown_to_its_defence_alone():
    row = Row("pgd", "sister", threat_model="sister", options=PGD)
    plan, defences = PROTOCOL._replace(rows=(*ROWS[1:2], row)), {"a": linear(), "b": linear(7)}
    assert "sister" not in set(run(defences, protocol=plan).frame.attack)
    found = run(defences, protocol=plan, sisters={"a": linear(3), "unknown": linear(4)})
    assert set(found.frame[found.frame.attack == "sister"].defence) == {"a"}
    alone = run({"its": linear(3)}, protocol=plan).adversarial("its", "white-box")
    assert torch.equal(found.adversarial("a", "sister"), alone)


def test_an_attack_counts_by_as_many_votes_as_its_row_has_at_the_end(monkeypatch):
    asked, attack = [], ATTACKS["pgd"]
    seen = wraps(attack.function)(lambda *a, **k: asked.append(k["votes"]) or attack.function(*a, **k))
    monkeypatch.setitem(ATTACKS, "pgd", replace(attack, function=seen))
    rows = (Row("pgd", "few", options=PGD), Row("pgd", "many", votes=7, options=PGD))
    found = run({"noisy": Noisy(0.5).eval()}, protocol=PROTOCOL._replace(rows=rows, votes=3))
    assert asked[-2:] == [3, 7] and {3, 7} <= set(found.frame.votes)


def test_a_second_evaluation_gives_the_same_whatever_was_drawn_before():
    defences, found = {"pipeline": purifying(), "noisy": Noisy(0.5).eval()}, []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the global generator plays no part
        found.append(run(defences))
    assert_same(*found)
    other = run(defences, seed=1).adversarial("noisy", "white-box")
    assert not torch.equal(found[0].adversarial("noisy", "white-box"), other)


def test_attack_and_decision_have_separate_seeds_in_every_piece(small_pieces):
    pipeline, seen = purifying(), []
    begin = pipeline.reseed
    pipeline.reseed = lambda seed: (seen.append(seed), begin(seed))
    run({"pipeline": pipeline})
    assert len(set(seen)) == 4, "two batches, each with one seed of attacks and another of decisions"
    assert {0, 1} < set(seen), "those of the first batch are seed and seed + 1"


def test_one_batch_is_what_a_call_by_hand_gives():
    found, pipeline = run(seed=5), purifying()
    reseed(pipeline, 5)
    by_hand = pgd(pipeline, IMAGES, LABELS, eps=0.05, seed=5, max_batch=256, **PGD)
    assert torch.equal(by_hand, found.adversarial("pipeline", "white-box"))
    reseed(pipeline, 6)
    right = correct(sample_logits(pipeline, by_hand, num_samples=5), LABELS, "majority")
    assert found.correct["pipeline", "white-box"]["majority"].tolist() == right.tolist()


def test_passes_are_counted_and_a_deterministic_defence_gets_as_many_by_restarts(result):
    passes = result.frame[result.frame.attack == "white-box"].groupby("defence").passes.first()
    assert passes["pipeline"] == pytest.approx(6, abs=0.1), "3 steps of 2 EOT samples, and one image to check"
    assert passes["other"] == pytest.approx(3, abs=0.1), "which need no EOT"
    equal = Row("pgd_ensemble", "equal", options=PGD | {"restarts": 1, "early_stop": 0}, equal_passes=True)
    found = run(protocol=PROTOCOL._replace(rows=(equal,)), eps={"linf": 1e-4, "l2": 1.0})
    passes = found.frame[found.frame.attack == "equal"].groupby("defence").passes.first()
    assert 6 <= passes["undefended"] <= 6 + 2 + 3 and 6 <= passes["pipeline"] <= 7, (
        "decisions between restarts"
    )


def test_the_worst_of_n_rests_on_as_many_samples_after_every_attack():
    rows = (Row("fgsm", "as usual"), Row("fgsm", "by more votes", votes=100))
    found = run({"a": Noisy(0.3).eval()}, protocol=PROTOCOL._replace(rows=rows), eps=1e-6)
    votes = found.frame.groupby("attack").votes.first()
    assert votes["by more votes"] == 100 and votes["as usual"] == votes["worst case"] == 5
    of_n = [accuracy(found, "a", name, "worst_of_n") for name in ("clean", "as usual", "by more votes")]
    assert max(of_n) - min(of_n) < 25 and max(of_n) < 90


@pytest.mark.parametrize("hooked", [False, True])  # what makes an adapter of a pipeline necessary
def test_bpda_is_attacked_and_the_defence_itself_decides(hooked):
    rounding = nn.Identity()
    rounding.forward = lambda given: (given[:, :3] * 64).round() / 64  # without a gradient
    defence = purifying(purifier=rounding, name="none")
    if hooked:
        defence.register_forward_hook(lambda *_: None)
    rows = tuple(Row("pgd", name, threat_model=name, options={"steps": 5}) for name in ("white-box", "bpda"))
    found = run({"rounded": defence, "f": linear()}, protocol=PROTOCOL._replace(rows=rows))
    assert accuracy(found, "rounded", "bpda") < 50 < accuracy(found, "rounded", "white-box")
    assert "bpda" not in set(found.frame[found.frame.defence == "f"].attack), "nothing purifies there"


def test_who_knows_the_sample_breaks_what_randomness_hides_and_that_is_no_worst_case():
    known = Row("pgd", "known", options={"steps": 10}, random_only=True, known_sample=True)
    rows = (Row("pgd", "EOT", options={"steps": 10, "eot_samples": 4}), known)
    found = run(
        {"undefended": linear(), "flips": Flips().eval()}, protocol=PROTOCOL._replace(rows=rows), eps=0.03
    )
    assert accuracy(found, "flips", "known") < accuracy(found, "flips", "EOT") - 20
    assert set(found.frame[found.frame.attack == "known"].threat_model) == {"known sample"}
    assert "worst case" not in set(found.frame.attack), "one attack is its own worst case"
    assert "known" not in set(found.frame[found.frame.defence == "undefended"].attack)


def test_accuracy_over_eps_falls_and_what_is_broken_stays_broken():
    sizes = [0.002, 0.005, 0.01, 0.02]
    plan = PROTOCOL._replace(rows=(Row("pgd", "white-box", options={"steps": 5}),))
    found = run({"f": linear(7)}, labels=linear(7)(IMAGES).argmax(dim=1), protocol=plan, eps=sizes)
    rows = found.by_image[found.by_image.attack == "white-box"]
    right = rows.pivot(index="image", columns="eps", values="single")
    assert list(right) == sizes and right[sizes[0]].sum() > right[sizes[-1]].sum()
    for smaller, larger in pairwise(sizes):
        assert not (right[larger] & ~right[smaller]).any()
        broken = torch.from_numpy(~right[smaller].to_numpy())
        shown = [found.adversarial("f", "white-box", eps)[broken] for eps in (smaller, larger)]
        assert torch.equal(*shown)
        passes = rows[rows.eps == larger].passes.mean()
        assert passes == pytest.approx(1 + 5 * right[smaller].mean(), abs=0.05), "the rest alone is attacked"
    assert torch.equal(found.adversarial("f", "white-box"), found.adversarial("f", "white-box", sizes[-1]))
    assert list(found.table().index) == ["clean", *(f"white-box, ε = {eps:.3g}" for eps in sizes)]


class Detached(nn.Sequential):
    def forward(self, images):
        return super().forward(images).detach()


@pytest.mark.parametrize(
    "defence, row, change, message",
    [
        (
            linear(),
            Row("corruption", norm="corruption"),
            {"eps": {"corruption": 6}},
            "severity must be one of",
        ),
        (linear(), Row("occlusion", norm="occlusion", options={"grid_size": 9}), {}, "grid_size must lie in"),
        (purifying(), Row("ddn", norm="l2"), {}, "the model is random"),
        (Detached(*linear()).eval(), Row("pgd"), {}, "no gradient arrives"),
    ],
    ids=lambda value: getattr(value, "attack", None),
)
def test_what_cannot_run_is_said_before_anything_is_measured(defence, row, change, message):
    calls, rows = [], (Row("fgsm", "first"), row)
    with pytest.raises(ValueError, match=message):
        run(
            {"f": linear(), "g": defence}, protocol=PROTOCOL._replace(rows=rows),
            progress=lambda *call: calls.append(call), **change,
        )  # fmt: skip
    assert not calls


def test_progress_never_falls_says_what_runs_and_ends_at_the_total(small_pieces):
    calls = []
    run(progress=lambda done, total, unit, message: calls.append((done, total, message)))
    done, totals, messages = zip(*calls, strict=True)
    assert list(done) == sorted(done) and len(set(totals)) == 1 and done[-1] == totals[0]
    assert "pipeline, white-box" in messages
    assert any(re.match(r"undefended, white-box: \d of 20 correct", message) for message in messages)


def test_the_attack_may_compute_in_bfloat16_but_decisions_are_float32():
    classifier, seen = linear(), {True: set(), False: set()}
    classifier.register_forward_hook(
        lambda _module, _given, output: seen[torch.is_grad_enabled() and len(output) > 1].add(output.dtype)
    )
    run({"a": classifier}, dtype=torch.bfloat16)
    assert seen[True] == {torch.bfloat16} and torch.float32 in seen[False]


@pytest.mark.parametrize("name, options", [("apgd", {"steps": 10}), ("square", {"queries": 100})])
def test_an_attack_in_bfloat16_believes_in_no_error_that_float32_does_not_make(name, options):
    """Most images lie at their boundary afterwards, where half of the digits decide."""
    torch.manual_seed(3)
    classifier = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(6 * 36, 5)).eval()
    images = torch.rand(100, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    labels = classifier(images).argmax(dim=1)
    plan = PROTOCOL._replace(rows=(Row(name, "it", options=options),))
    left = [
        accuracy(run({"a": classifier}, images, labels, protocol=plan, eps=0.02, dtype=dtype), "a", "it")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert left[0] < 90 and left[1] <= left[0] + 3


def test_the_kits_defences_fall_as_they_are_known_to(defences, digits):
    images, labels = (tensor[:16] for tensor in digits)
    found = evaluate(defences, images, labels, protocol="demo", steps=6, eot_samples=2)
    assert found.facts["eps"] == {"linf": [0.3]}, "the usual radius of grey images"
    left = {name: accuracy(found, name, "white-box") for name in defences}
    assert left["undefended"] == 0 and left["AP"] < 20 and left["AToP"] > 50 and left["AT"] > 50
    assert accuracy(found, "AToP", "transfer") > left["AToP"]
