"""Numbers are the known ones; an evaluation can be repeated, interrupted and resumed to the last digit."""

import json
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from atoplib import evaluation
from atoplib.attacks import ATTACKS, Ball, pgd
from atoplib.decisions import RULES, correct, reseed, sample_logits
from atoplib.evaluation import PROTOCOLS, Protocol, Row, evaluate, measure, single
from atoplib.evaluation.protocols import check_protocol, images_of, lee_kim_indices, radii
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
EPS = {"linf": 0.05, "l2": 0.5}
PGD = {"steps": 3, "eot_samples": 2}
ROWS = (
    Row("pgd", "transfer", threat_model="transfer", options=PGD),
    Row("pgd", "white-box", options=PGD),
    Row("pgd", "white-box l2", "l2", options=PGD),
)
PROTOCOL = Protocol("test", "a small one", ROWS, votes=5)
COLUMNS = ["clean", "transfer", "white-box", "white-box l2", "worst case linf", "worst case"]
NAMES = ["undefended", "other", "pipeline"]


def linear(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes)).eval()


LABELS = linear()(IMAGES).argmax(dim=1)  # so that the undefended classifier is correct on all of them


class Recolour(nn.Module):
    """A purifier without weights: the visible image, a little brighter."""

    def forward(self, given):
        return (given[:, :3] * 0.9 + 0.05).tanh()


class Rounded(nn.Module):
    """A purifier without gradient."""

    def forward(self, given):
        return (given[:, :3] * 64).round() / 64


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


def purifying(classifier=None, purifier=None, noise=0.05, name="rt2"):
    transform = Transform(name, noise_std=noise, grid_size=4)
    return AToPPipeline(transform, purifier or Recolour(), classifier or linear()).eval()


def setting():
    return dict(zip(NAMES, (linear(), linear(7), purifying()), strict=True))


def run(defences=None, images=IMAGES, labels=LABELS, **options):
    options = {"protocol": PROTOCOL, "eps": EPS, "keep_images": True} | options
    return evaluate(defences or setting(), images, labels, **options)


def assert_same(first, second):
    assert first.frame.drop(columns="seconds").equals(second.frame.drop(columns="seconds"))
    for one, other in zip(first.outcomes, second.outcomes, strict=True):
        assert np.array_equal(one.correct, other.correct) and np.array_equal(
            one.sample_mean, other.sample_mean
        )
        assert (one.images is None) == (other.images is None)
        assert one.images is None or torch.equal(one.images, other.images), one.attack


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(measure, "PIECE", 20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory that holds a whole evaluation, and its result."""
    folder = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "PIECE", 20)
        return folder, run(run_dir=folder)


@pytest.fixture
def result(finished):
    return finished[1]


@pytest.fixture
def directory(finished, tmp_path, small_pieces):
    return shutil.copytree(finished[0], tmp_path / "copy")


def accuracy(result, defence, attack, rule="single"):
    frame = result.frame
    return frame[(frame.defence == defence) & (frame.attack == attack) & (frame.rule == rule)].accuracy.item()


# what is measured


def test_every_defence_has_every_column_by_every_rule_and_its_worst_cases_last(result):
    frame = result.frame
    rows = [(name, column, rule) for name in NAMES for column in COLUMNS for rule in RULES]
    assert list(zip(frame.defence, frame.attack, frame.rule, strict=True)) == rows
    asked = [
        "defence",
        "attack",
        "norm",
        "eps",
        "rule",
        "accuracy",
        "low",
        "high",
        "images",
        "passes",
        "seconds",
    ]
    assert set(asked) <= set(frame)
    assert (frame.images == 40).all() and (frame.votes == np.where(frame.defence == "pipeline", 5, 1)).all()
    assert frame.accuracy.between(frame.low, frame.high).all() and frame.high.max() == 100
    assert dict(zip(frame.attack, frame.eps, strict=True)) == pytest.approx(
        dict(zip(COLUMNS, (0, 0.05, 0.05, 0.5, 0.05, float("nan")), strict=True)), nan_ok=True
    )


def test_a_worst_case_is_that_of_its_columns_image_by_image(result):
    for name in NAMES:
        right = {column: result.correct[name, column]["single"] for column in COLUMNS}
        both = right["clean"] & right["transfer"] & right["white-box"]
        assert right["worst case linf"].equals(both)
        assert right["worst case"].equals(both & right["white-box l2"])


def test_the_worst_case_holds_the_clean_images():
    wrong = (LABELS + 1) % 3
    found = run({"a": linear()}, labels=wrong, eps={"linf": 0.9, "l2": 9.0})
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
    alone = run({"its": linear(7)}, protocol=plan, classifier=linear(7))
    assert torch.equal(shown["AToP"], alone.adversarial("its", "transfer"))
    assert not torch.equal(shown["AToP"], shown["AP"])


def test_one_module_needs_no_name_and_without_another_model_there_is_no_transfer_attack():
    found = run(linear(7))
    assert list(dict.fromkeys(found.frame.defence)) == ["defence"]
    assert "transfer" not in set(found.frame.attack)
    sister = run(purifying(), classifier=purifying(linear(7)))
    assert accuracy(sister, "defence", "transfer") > accuracy(sister, "defence", "white-box")


def test_a_second_evaluation_gives_the_same_whatever_was_drawn_before(result, small_pieces):
    torch.manual_seed(99)  # the global generator plays no part
    defences = setting()
    for _ in range(3):
        defences["pipeline"](IMAGES)
    assert_same(result, run(defences))


def test_global_random_numbers_are_seeded_for_every_piece():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(run({"a": Noisy(0.5).eval()}))
    assert_same(*found)
    other = run({"a": Noisy(0.5).eval()}, seed=1)
    assert not torch.equal(found[0].adversarial("a", "white-box"), other.adversarial("a", "white-box"))


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


def test_bpda_is_attacked_and_the_defence_itself_decides():
    defence = purifying(purifier=Rounded(), name="none")
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
    assert "worst case" not in set(found.frame.attack), "one attack is its own worst case"
    assert "known" not in set(found.frame[found.frame.defence == "undefended"].attack)


def test_accuracy_over_eps_falls_and_what_is_broken_stays_broken():
    sizes = [0.002, 0.005, 0.01, 0.02]
    plan = PROTOCOL._replace(rows=(Row("pgd", "white-box", options={"steps": 5}),))
    found = run({"f": linear(7)}, labels=linear(7)(IMAGES).argmax(dim=1), protocol=plan, eps=sizes)
    rows = [item for item in found.outcomes if item.attack == "white-box"]
    assert [item.eps for item in rows] == sizes
    for smaller, larger in zip(rows, rows[1:], strict=False):
        assert not (larger.correct & ~smaller.correct).any()
        broken = torch.from_numpy(~smaller.correct[0])
        assert torch.equal(larger.images[broken], smaller.images[broken])
        assert larger.passes == pytest.approx(1 + 5 * smaller.correct[0].mean(), abs=0.05), (
            "the rest alone is attacked"
        )
    assert rows[0].correct.mean() > rows[-1].correct.mean()
    assert torch.equal(found.adversarial("f", "white-box"), rows[-1].images)
    assert torch.equal(found.adversarial("f", "white-box", 0.002), rows[0].images)
    assert list(found.table().columns) == ["clean", *(f"white-box, ε = {eps:.3g}" for eps in sizes)]


def test_progress_never_falls_says_what_runs_and_ends_at_the_total(small_pieces):
    calls = []
    run(progress=lambda done, total, unit, message: calls.append((done, total, message)))
    done, totals, messages = zip(*calls, strict=True)
    assert list(done) == sorted(done) and len(set(totals)) == 1 and done[-1] == totals[0]
    assert "pipeline, white-box" in messages
    assert any(re.match(r"undefended, white-box: \d of 40 correct so far", message) for message in messages)


LONG = ("compare", "cpu", "lee-kim", "standard")  # whose rows those of strict and quick are, too


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in PROTOCOLS]
)
def test_every_protocol_runs_and_its_attacks_stay_within_their_radii(name):
    classifier = linear(classes=5)
    defences = {"undefended": classifier, "pipeline": purifying(classifier)}
    wanted = {"steps": 2, "eot_samples": 2, "queries": 5, "votes": 3}
    known = {"votes"}.union(*(row.options for row in PROTOCOLS[name].rows))
    wanted = {key: value for key, value in wanted.items() if key in known}
    images, labels = IMAGES[:2], classifier(IMAGES[:2]).argmax(dim=1)
    found = run(defences, images, labels, protocol=name, **wanted)
    for row in check_protocol(name, **wanted).rows:
        columns = {who for who, attack in found.correct if attack == row.heading}
        assert columns == ({"pipeline"} if row.random_only or row.threat_model == "bpda" else set(defences))
        if row.norm in ("linf", "l2", "l1"):
            Ball(images, found.facts["eps"][row.norm][0], row.norm).check(
                found.adversarial("pipeline", row.heading)
            )


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


# what is refused


@pytest.mark.parametrize("place", ["defence", "classifier"])
def test_a_model_in_train_mode_is_refused_before_its_statistics_move(place):
    norm = nn.BatchNorm2d(3)
    wrong = nn.Sequential(norm, linear()).eval()
    norm.train()
    with pytest.raises(ValueError, match="is in train mode"):
        run(
            {"a": wrong if place == "defence" else linear()},
            classifier=wrong if place == "classifier" else None,
        )
    assert norm.num_batches_tracked == 0 and (norm.running_mean == 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": IMAGES * 255}, r"\[0, 1\]"),
        ({"labels": LABELS + 1}, r"labels must lie in 0\.\.2"),
        ({"max_batch": 0}, "max_batch >= 1"),
        ({"protocol": "demmo"}, "unknown protocol 'demmo'; allowed: demo, quick"),
        ({"protocol": single("pdg")}, "unknown attack 'pdg'; allowed: .*pgd"),
        ({"protocol": single("square"), "norm": "l1"}, "unknown norm of square 'l1'; allowed: .*linf"),
        (
            {"protocol": single("pgd", threat_model="blind")},
            "unknown threat_model 'blind'; allowed: white-box",
        ),
        (
            {"protocol": PROTOCOL._replace(rows=(Row("pgd", options={"queries": 3}),))},
            "unknown option of pgd 'queries'",
        ),
        ({"protocol": PROTOCOL._replace(rows=(Row("pgd"), Row("pgd", step=1.0)))}, "have the same name"),
        ({"steps": 0}, "numbers of at least 1 .*not steps=0"),
        ({"queries": 9}, "protocol 'test' takes the options eot_samples, steps, votes"),
        ({"eps": 8.0}, "eps of linf .*at most 1.* got 8.0"),
        ({"eps": -0.1}, "eps of linf must be above 0"),
        ({"eps": []}, "ascending list of at least one"),
        ({"eps": [0.2, 0.1]}, "ascending list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        run({"a": linear()}, **change)


# protocols are data


def test_options_scale_with_eps_and_a_deterministic_model_needs_no_eot():
    row = Row("pgd", step=0.1, options=PGD, equal_passes=True)
    random, calm = (row.keywords(0.5, random=value, rule="any", votes=5) for value in (True, False))
    assert random == PGD | {"alpha": 0.05, "rule": "any", "votes": 5}
    assert calm == {"steps": 3, "eot_samples": 1, "restarts": 2, "alpha": 0.05, "rule": "any", "votes": 1}
    assert (
        row._replace(equal_passes=False).keywords(1, random=False, rule="any", votes=5).get("restarts")
        is None
    )


def test_a_deterministic_model_gets_the_passes_of_a_long_run_as_more_starts():
    for name, protocol in PROTOCOLS.items():
        for row in (row for row in protocol.rows if row.equal_passes):
            random, calm = (row.keywords(1.0, random=value, rule="any", votes=5) for value in (True, False))
            passes = [given["steps"] * given["eot_samples"] * given["restarts"] for given in (random, calm)]
            assert passes[0] == passes[1] and calm["eot_samples"] == 1 and calm["steps"] < 80, name


def test_a_changed_protocol_says_so_and_its_columns_what_was_run():
    changed = check_protocol("compare", steps=2, eot_samples=3, votes=4)
    assert changed.name == "compare (steps 2, eot_samples 3, votes 4)" and changed.num_votes == 4
    heads = [row.heading for row in changed.rows]
    assert heads[:4] == ["transfer", "PGD-2 + EOT-3 linf", "PGD-2 + EOT-3 l2", "flow + EOT-3"]
    assert [row.votes for row in check_protocol("strict", votes=3).rows if row.threat_model == "bpda"] == [
        None
    ]
    assert check_protocol("demo", steps=None) == check_protocol("demo")


def test_the_norm_asked_for_is_that_of_all_rows_that_name_none():
    rows = check_protocol("quick", "l2").rows
    assert [row.norm for row in rows] == ["l2", "l2", "l2", "l2", "flow", "l2"]
    assert len(rows) == len(PROTOCOLS["quick"].rows) - 1, "what l2 has anyhow is not run twice"


def test_published_protocols_have_their_published_numbers():
    steps = {
        row.norm or "linf": row.step for row in PROTOCOLS["lee-kim"].rows if row.threat_model == "white-box"
    }
    assert steps == {"linf": pytest.approx(0.007 / (8 / 255)), "l2": pytest.approx(0.005 / 0.5)}
    assert [row.votes for row in PROTOCOLS["strict"].rows if row.threat_model == "bpda"] == [150], (
        "Hill et al."
    )
    assert all(protocol.num_votes >= 10 for name, protocol in PROTOCOLS.items() if name != "authors-log")
    assert PROTOCOLS["strict"].num_votes == 20, "as many as EOT samples"
    assert lee_kim_indices()[:3] == np.random.RandomState(0).permutation(10_000)[:3].tolist()
    assert images_of(PROTOCOLS["lee-kim"], "cifar10", 5) == lee_kim_indices()[:5]
    assert images_of(PROTOCOLS["lee-kim"], "mnist") == 512 and images_of(PROTOCOLS["demo"], "cifar10") == 200


def test_usual_radii_depend_on_whether_images_are_grey():
    grey = IMAGES[:, :1].expand(-1, 3, -1, -1)
    assert radii(grey)["linf"] == (0.3,) and radii(IMAGES)["linf"] == (8 / 255,)
    assert radii(grey)["l2"] == (2.0,) and radii(IMAGES, 1.0, "l2")["l2"] == (1.0,)
    assert radii(IMAGES, [0.1, 0.2]) == {"linf": (0.1, 0.2)}, "a list is of one norm alone"
    assert radii(IMAGES, {"l2": [0.1, 1]})["l2"] == (0.1, 1) and radii(IMAGES, {"l2": 1})["linf"] == (
        8 / 255,
    )


# what is kept


def stopped_after(share, folder):
    """An evaluation that Ctrl-C ends once this share is done."""

    def stop(done, total, *_):
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(run_dir=folder, progress=stop)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_an_interrupted_evaluation_goes_on_and_ends_the_same(
    result, tmp_path, monkeypatch, small_pieces, share
):
    stopped_after(share, tmp_path)
    kept = len(list(tmp_path.glob("pieces/*.safetensors")))
    assert 0 < kept < 16
    calls, one = [], measure._measure
    monkeypatch.setattr(measure, "_measure", lambda *given: (calls.append(given), one(*given))[1])
    assert_same(result, run(run_dir=tmp_path))
    assert len(calls) == 2 * (1 + 1 + 3 + 3) - kept, "what was finished is not done again"


def test_a_finished_evaluation_is_only_read_and_a_damaged_piece_measured_again(
    result, directory, monkeypatch
):
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_measure", None)
        again = run(run_dir=directory, notify=said.append)
    assert again.frame.equals(result.frame)
    assert len(said) == 1 and said[0].startswith("Loaded, not measured again")
    for path in sorted(directory.glob("pieces/*.safetensors"))[::3]:
        path.write_bytes(path.read_bytes()[:-20])
    assert_same(result, run(run_dir=directory, notify=lambda sentence: pytest.fail(sentence)))


def another(defences):
    with torch.no_grad():
        defences["other"][1].bias[0] += 1e-3
    return defences


def wider(defences):
    return defences | {"pipeline": purifying(noise=0.06)}


@pytest.mark.parametrize(
    "change, said, stay",
    [
        ({"defences": another(setting())}, r"defences \(other\)", 8),
        ({"defences": wider(setting())}, r"defences \(pipeline\)", 8),
        ({"images": IMAGES.flip(0)}, "images", 0),
        ({"labels": LABELS.flip(0)}, "labels", 0),
        ({"seed": 3}, r"shared \(seed\)", 0),
        ({"eps": {"linf": 0.05, "l2": 0.6}}, r"eps \(l2\)", 10),
        ({"protocol": PROTOCOL._replace(votes=4)}, "protocol", 0),
        ({"protocol": PROTOCOL._replace(rows=ROWS[:2])}, r"protocol; eps \(l2\)", 10),
    ],
    ids=["weights", "transform", "images", "labels", "seed", "eps", "votes", "rows"],
)
def test_what_changed_is_said_measured_anew_and_the_old_archived(directory, change, said, stay):
    before, notes = (directory / "frame.csv").read_bytes(), []
    pieces = {path.name for path in directory.glob("pieces/*")}
    found = run(run_dir=directory, notify=notes.append, **change)
    assert_same(found, run(**change))
    assert len(notes) == 1
    assert (directory / "superseded-1/frame.csv").read_bytes() == before
    archived = {path.name for path in directory.glob("superseded-1/pieces/*")}
    assert archived | {path.name for path in directory.glob("pieces/*")} >= pieces
    assert re.search(f"because it changed: {said}", notes[0]), notes[0]
    assert len(pieces - archived) >= stay


def test_another_environment_and_other_code_of_an_attack_count(result, directory, monkeypatch):
    notes = []
    monkeypatch.setattr(measure, "environment", lambda device: {"torch": "99", "device": "cuda"})
    run(run_dir=directory, notify=notes.append)
    assert "environment (" in notes[0] and "0 of 16 pieces" in notes[0]
    monkeypatch.setattr(measure, "ATTACKS", {**ATTACKS, "pgd": ATTACKS["pgd_ensemble"]})
    run(run_dir=directory, notify=notes.append)
    assert "attacks (pgd)" in notes[1] and "2 of 16 pieces" in notes[1], "clean images were not attacked"


def test_a_disk_that_fills_up_keeps_what_was_finished(result, tmp_path, monkeypatch, small_pieces):
    write, left = measure.write_atomically, [4]

    def full(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("No space left on device")
        write(*given)

    monkeypatch.setattr(measure, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        run(run_dir=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(measure, "PIECE", 20)
    assert len(list(tmp_path.glob("pieces/*.safetensors"))) == 4
    assert_same(result, run(run_dir=tmp_path))


# tables and files


def test_all_files_can_be_read_back_and_say_the_same(result, tmp_path):
    result.write(tmp_path, caption="a_test & 5 %", indices=range(100, 140), published=True, costs={"a": 1})
    assert pd.read_csv(tmp_path / "frame.csv", keep_default_na=False)[["defence", "attack", "rule"]].equals(
        result.frame[["defence", "attack", "rule"]]
    )
    assert pd.read_csv(tmp_path / "frame.csv").accuracy.to_numpy() == pytest.approx(
        result.frame.accuracy.to_numpy()
    )
    content = json.loads((tmp_path / "results.json").read_text())
    assert (
        content["costs"] == {"a": 1}
        and content["indices"][0] == 100
        and content["protocol"]["name"] == "test"
    )
    assert content["frame"][4]["accuracy"] == result.frame.accuracy[4]
    images = pd.read_csv(tmp_path / "images.csv")
    assert len(images) == len(result.outcomes) * 40 and images["index"].between(100, 139).all()
    one = images[(images.defence == "pipeline") & (images.attack == "white-box")]
    assert one.majority.tolist() == result.correct["pipeline", "white-box"]["majority"].astype(int).tolist()
    assert one.label.tolist() == LABELS.tolist()
    markdown, latex = ((tmp_path / name).read_text() for name in ("table.md", "table.tex"))
    assert "72.85" in markdown and "72.85" in latex and "worst of N" in markdown
    assert r"a\_test \& 5 \%" in latex and latex.count(r"\begin{table}") == 4


def test_the_table_marks_the_best_and_what_is_missing(result):
    bold = result.table(bold=True)
    assert list(bold.columns) == COLUMNS and list(bold.index) == NAMES
    assert bold.loc["undefended", "clean"].startswith("**100.0**\N{NO-BREAK SPACE}[91.2,")
    assert "**" not in bold.loc["other", "clean"]
    assert "| undefended | **100.0**" in result._repr_markdown_()
    alone = evaluation.Evaluation(
        tuple(item for item in result.outcomes[:7] if item.attack != "transfer"), LABELS.numpy()
    )
    assert alone.table().loc["other", "white-box"] == "–"
    table = evaluation.markdown_table(pd.DataFrame({"a|b": ["c"], "n": [1 / 3], "none": [None]}), index=False)
    assert table.splitlines() == ["| a\\|b | n | none |", "| --- | ---: | --- |", "| c | 0.333 | – |"]


def test_a_further_worst_case_is_of_the_attacks_that_are_chosen(result):
    found = result.with_worst("worst unseen", lambda item: item.norm == "l2")
    assert [item.attack for item in found.outcomes[:7]] == [*COLUMNS, "worst unseen"]
    right = found.correct["other", "clean"] & found.correct["other", "white-box l2"]
    assert found.correct["other", "worst unseen"].equals(right)
    with pytest.raises(ValueError, match="of a single defence, got 0"):
        evaluation.worst_case([])
    with pytest.raises(KeyError, match="keep_images=True"):
        found.adversarial("other", "worst case")
