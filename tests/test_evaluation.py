"""Scores are the known ones; an evaluation can be repeated, interrupted and resumed to the last digit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from atoplib.attacks import PGDSettings, check_budget, pgd
from atoplib.attacks.suite import ATTACKS
from atoplib.evaluation import (
    PROTOCOLS,
    Budget,
    Outcomes,
    PlannedAttack,
    Protocol,
    adjusted,
    evaluate,
    judge_draws,
    masked_gradients,
    score,
    weakest,
    with_seen,
    worst_case,
)
from atoplib.evaluation import measure as measure_module
from atoplib.fingerprints import model_fingerprint
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import TransformSettings
from atoplib.verdicts import VERDICTS, Verdict, judge, reseed, wilson_interval

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
BUDGET = Budget(linf=0.05, l2=0.5)
PGD = {"steps": 3, "eot_samples": 2}
PROTOCOL = Protocol(
    "test",
    "a small one",
    (
        PlannedAttack("transfer", "pgd", sees="classifier", settings=PGD),
        PlannedAttack("white-box", "pgd", settings=PGD),
        PlannedAttack("white-box l2", "pgd", norm="l2", settings=PGD),
    ),
    num_draws=5,
)
COLUMNS = ["clean", "transfer", "white-box", "white-box l2", "worst case linf", "worst case"]


def outcomes_of(one_shot, attack="pgd", norm="linf", defence="a", seconds=1.0, draws=3):
    """Outcomes whose verdicts all agree: a list of lists, seeds and images."""
    right = torch.tensor(one_shot, dtype=torch.bool)
    return Outcomes(defence, attack, norm, draws, dict.fromkeys(VERDICTS, right), right.float(), seconds)


def test_the_draws_of_each_image_are_judged_by_every_verdict():
    logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 9.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    right, average = judge_draws(logits, torch.tensor([0, 0]))
    assert {name: value.tolist() for name, value in right.items()} == {
        "one_shot": [True, True],
        "majority": [True, True],
        "mean_softmax": [False, True],
        "worst_of_n": [False, True],
    }
    assert average.tolist() == pytest.approx([2 / 3, 1])


def test_the_worst_of_the_draws_can_be_that_of_the_first_ones():
    logits = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    (few, _), (whole, average) = (judge_draws(logits, torch.tensor([0]), worst_of=count) for count in (2, None))
    assert few["worst_of_n"].item() and not whole["worst_of_n"].item() and average.item() == pytest.approx(2 / 3)


def test_an_attack_that_is_judged_by_more_draws_breaks_no_more_images_by_the_worst_of_them():
    class Fickle(nn.Module):
        def forward(self, images):
            right = (torch.rand(len(images)) < 0.9).float() + 0 * images.mean(dim=(1, 2, 3))
            return torch.stack([right, 0.5 * torch.ones_like(right)], dim=1)

    nothing = PlannedAttack("as usual", "fgsm")
    protocol = Protocol("a test", "", (nothing, replace(nothing, label="by more draws", num_draws=200)), num_draws=5)
    labels = torch.zeros(40, dtype=torch.int64)
    fickle = Fickle().eval()
    found = evaluate({"a": fickle}, IMAGES, labels, protocol, BUDGET, classifier=fickle)
    by = {item.attack: item for item in found.scores}
    assert by["by more draws"].draws == 200 and by["as usual"].draws == by["worst case"].draws == 5
    for attack in ("clean", "as usual", "by more draws"):
        assert 0.35 < by[attack].worst_of_n < 0.85, "0.9 ** 5 = 0.59, and 0.9 ** 200 would be nothing"


def test_a_score_is_the_mean_over_seeds_with_its_interval_and_spread():
    found = score(outcomes_of([[1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]]))
    assert (found.images, found.draws, found.seeds, found.seconds) == (4, 3, 3, 1.0)
    assert found.one_shot == found.majority == found.average == found.accuracy == pytest.approx(0.5)
    assert found.interval("worst_of_n") == pytest.approx(wilson_interval(2, 4))
    assert (found.low, found.high) == pytest.approx(wilson_interval(2, 4))
    assert found.spread == pytest.approx(0.25)
    assert found.images_per_second == pytest.approx(12)


def test_one_seed_has_no_spread():
    assert score(outcomes_of([[1, 0]])).spread is None


def test_the_worst_case_counts_an_image_only_if_it_survives_every_attack():
    several = [outcomes_of([[1, 1, 0, 1], [1, 1, 1, 1]]), outcomes_of([[0, 1, 1, 1], [1, 0, 1, 1]], "apgd", draws=2)]
    worst = worst_case(several, "all")
    assert worst.right["majority"].tolist() == [[False, True, False, True], [True, False, True, True]]
    assert worst.average.tolist() == [[0, 1, 0, 1], [1, 0, 1, 1]]
    assert (worst.defence, worst.attack, worst.norm, worst.draws, worst.seconds) == ("a", "all", "linf", 2, 2.0)
    assert worst_case([*several, outcomes_of([[1] * 4] * 2, norm="l2")], "all").norm == ""


@pytest.mark.parametrize("several", [[], [outcomes_of([[1]]), outcomes_of([[1]], defence="b")]], ids=["none", "two"])
def test_a_worst_case_of_no_or_several_defences_is_refused(several):
    with pytest.raises(ValueError, match="of a single defence"):
        worst_case(several, "all")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attack": "pdg"}, "unknown attack 'pdg'; allowed: .*pgd"),
        ({"norm": "l7"}, "pgd knows the norms linf, l2, not 'l7'"),
        ({"sees": "nothing"}, "unknown sees 'nothing'; allowed: defence, classifier, bpda"),
    ],
    ids=str,
)
def test_an_attack_that_cannot_be_planned_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PlannedAttack(**{"label": "a", "attack": "pgd"} | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attacks": (PROTOCOL.attacks[0],) * 2}, "two attacks of test have the label 'transfer'"),
        ({"num_images": 0}, "must be at least 1, got 0 and 5"),
        ({"selection": "best"}, "unknown selection 'best'"),
    ],
    ids=str,
)
def test_an_impossible_protocol_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PROTOCOL, **change)


@pytest.mark.parametrize("change, message", [({"linf": 8}, "8/255?"), ({"l2": 0}, "budget l2 must be above 0, got 0")])
def test_an_impossible_budget_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BUDGET, **change)


def test_settings_scale_with_the_budget_and_a_calm_model_needs_one_draw():
    planned = PlannedAttack("a", "pgd", norm="l2", relative_step=0.1, settings=PGD)
    expected = PGDSettings(0.5, "l2", 3, 0.05, 2, verdict=PROTOCOL.verdict)
    assert planned.build(BUDGET, random=True, verdict=PROTOCOL.verdict) == expected
    assert planned.build(BUDGET, random=False, verdict=PROTOCOL.verdict).eot_samples == 1


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)).eval()


class Recolour(nn.Module):
    """A purifier without weights: the visible image, a little brighter."""

    def forward(self, given):
        return (given[:, :3] * 0.9 + 0.05).tanh()


def setting():
    classifier = linear()
    pipeline = AToPPipeline(TransformSettings("rt2", noise_std=0.05, grid_size=4), Recolour(), linear()).eval()
    return classifier, {"undefended": classifier, "other": linear(7), "pipeline": pipeline}


LABELS = linear()(IMAGES).argmax(dim=1)  # so that the undefended classifier is right on all of them


def run(protocol=PROTOCOL, defences=None, **settings):
    classifier, usual = setting()
    settings = {"batch_size": 20, "keep_images": True} | settings
    return evaluate(defences or usual, IMAGES, LABELS, protocol, BUDGET, classifier=classifier, **settings)


def numbers(evaluation):
    return [replace(item, seconds=0) for item in evaluation.scores]


def assert_same(first, second):
    assert numbers(first) == numbers(second)
    for a, b in zip(first.outcomes, second.outcomes, strict=True):
        assert all(torch.equal(a.right[name], b.right[name]) for name in VERDICTS)
    assert first.adversarial.keys() == second.adversarial.keys()
    for key, images in first.adversarial.items():
        assert torch.equal(images, second.adversarial[key]), key


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory that holds a whole evaluation."""
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def result(finished):
    return run(directory=finished)


@pytest.fixture
def directory(result, finished, tmp_path):
    """A copy of that directory."""
    return shutil.copytree(finished, tmp_path / "copy")


def by_name(evaluation):
    return {(item.defence, item.attack): item for item in evaluation.scores}


def test_every_defence_has_every_column_and_its_worst_cases_in_order(result):
    assert [(s.defence, s.attack) for s in result.scores] == [
        (name, column) for name in ("undefended", "other", "pipeline") for column in COLUMNS
    ]
    assert all(s.images == 40 and s.draws == (5 if s.defence == "pipeline" else 1) for s in result.scores)


def test_a_worst_case_is_that_of_its_columns(result):
    outcomes = {(item.defence, item.attack): item.right["one_shot"] for item in result.outcomes}
    for name in ("undefended", "other", "pipeline"):
        both = outcomes[name, "transfer"] & outcomes[name, "white-box"]
        assert torch.equal(outcomes[name, "worst case linf"], both)
        assert torch.equal(outcomes[name, "worst case"], both & outcomes[name, "white-box l2"])


def test_the_transfer_images_are_made_once_against_the_classifier_alone(result):
    shown = result.adversarial
    assert torch.equal(shown["undefended", "clean", 0], IMAGES)
    for defence in ("other", "pipeline"):
        assert torch.equal(shown[defence, "transfer", 0], shown["undefended", "transfer", 0])
        assert not torch.equal(shown[defence, "white-box", 0], shown[defence, "transfer", 0])
    for (_, attack, _), images in shown.items():
        if attack != "clean":
            norm = "l2" if attack.endswith("l2") else "linf"
            check_budget(images, IMAGES, getattr(BUDGET, norm), norm)


def test_a_pipeline_with_another_classifier_meets_the_blind_attack_on_its_own():
    first, other = linear(), linear(7)
    transform = TransformSettings("rt2", noise_std=0.05, grid_size=4)
    ap, atop = (AToPPipeline(transform, Recolour(), classifier).eval() for classifier in (linear(), other))
    protocol = replace(PROTOCOL, attacks=PROTOCOL.attacks[:1])
    shown = run(protocol, {"undefended": first, "AP": ap, "AToP": atop, "other": other}).adversarial
    assert torch.equal(shown["AP", "transfer", 0], shown["undefended", "transfer", 0])
    assert torch.equal(shown["other", "transfer", 0], shown["undefended", "transfer", 0]), "no pipeline: nothing to see"
    alone = evaluate(
        {"its": other}, IMAGES, LABELS, protocol, BUDGET, classifier=other, batch_size=20, keep_images=True
    ).adversarial
    assert torch.equal(shown["AToP", "transfer", 0], alone["its", "transfer", 0])
    assert not torch.equal(shown["AToP", "transfer", 0], shown["AP", "transfer", 0])


def test_the_white_box_attack_on_the_classifier_is_the_transfer_attack(result):
    shown = result.adversarial
    assert torch.equal(shown["undefended", "white-box", 0], shown["undefended", "transfer", 0])
    scores = by_name(result)
    assert scores["undefended", "clean"].one_shot == 1
    assert scores["undefended", "white-box"].one_shot == scores["undefended", "transfer"].one_shot < 0.5


def test_the_white_box_attack_is_the_stronger_one_on_what_the_transfer_attack_does_not_know(result):
    scores = by_name(result)
    assert scores["other", "white-box"].one_shot < scores["other", "transfer"].one_shot


def test_the_scores_are_those_of_the_images_that_come_with_them(result):
    for defence, model in (("undefended", linear()), ("other", linear(7))):
        for attack in ("clean", "transfer", "white-box"):
            right = model(result.adversarial[defence, attack, 0]).argmax(dim=1) == LABELS
            found = by_name(result)[defence, attack]
            assert found.one_shot == found.majority == found.worst_of_n == pytest.approx(right.float().mean().item())


def test_a_random_defence_has_verdicts_that_differ(result):
    scores = by_name(result)
    assert any(
        scores["pipeline", attack].worst_of_n < scores["pipeline", attack].one_shot for attack in ("clean", "transfer")
    )


def test_a_second_evaluation_gives_the_same_numbers_and_images(result):
    torch.manual_seed(99)  # the global generator plays no part
    assert_same(result, run())


def test_a_used_up_sequence_of_dice_does_not_change_an_evaluation(result):
    classifier, defences = setting()
    for _ in range(3):
        defences["pipeline"](IMAGES)
    again = evaluate(defences, IMAGES, LABELS, PROTOCOL, BUDGET, classifier=classifier, batch_size=20, keep_images=True)
    assert_same(result, again)


def test_seeds_are_repetitions_with_other_random_starts_and_dice(result):
    both = run(seeds=(0, 1))
    for defence in ("undefended", "pipeline"):
        first, second = (both.adversarial[defence, "white-box", seed] for seed in (0, 1))
        assert torch.equal(first, result.adversarial[defence, "white-box", 0]) and not torch.equal(first, second)
    assert all(item.seeds == 2 and item.spread is not None for item in both.scores)
    assert both.outcomes[0].right["one_shot"].shape == (2, 40)


def test_attack_and_verdict_use_different_dice_in_every_piece():
    classifier, defences = setting()
    pipeline, seen = defences["pipeline"], []
    reseed = pipeline.reseed
    pipeline.reseed = lambda seed: (seen.append(seed), reseed(seed))
    evaluate({"pipeline": pipeline}, IMAGES, LABELS, PROTOCOL, BUDGET, classifier=classifier, batch_size=20)
    assert len(set(seen)) == 4, "two batches, each with dice for attacks and others for verdicts"
    assert {0, 1} < set(seen), "those of the first batch are seed and seed + 1"


def test_a_single_batch_is_what_a_call_by_hand_gives(result):
    classifier, defences = setting()
    found = evaluate(defences, IMAGES, LABELS, PROTOCOL, BUDGET, classifier=classifier, seeds=(5,), keep_images=True)
    pipeline, settings = defences["pipeline"], PGDSettings(BUDGET.linf, **PGD)
    reseed(pipeline, 5)
    by_hand = pgd(pipeline, IMAGES, LABELS, settings, generator=torch.Generator().manual_seed(5), max_batch=256)
    assert torch.equal(by_hand, found.adversarial["pipeline", "white-box", 5])
    reseed(pipeline, 6)
    right = judge(pipeline, by_hand, LABELS, Verdict("majority", 5), max_batch=256)
    assert float(right.float().mean()) == pytest.approx(by_name(found)["pipeline", "white-box"].majority)


def test_only_a_random_defence_costs_eot_draws():
    classifier, defences = setting()
    copies = dict.fromkeys(("other", "pipeline"), 0)
    for name in copies:

        def count(_model, given, name=name):
            copies[name] += len(given[0]) if torch.is_grad_enabled() else 0

        defences[name].register_forward_pre_hook(count)
    one = replace(PROTOCOL, attacks=PROTOCOL.attacks[1:2])
    evaluate({n: defences[n] for n in copies}, IMAGES, LABELS, one, BUDGET, classifier=classifier)
    assert copies == {"other": 3 * 40, "pipeline": 3 * 40 * 2}


def test_progress_counts_the_images_of_every_attack_and_target():
    calls = []
    run(progress=lambda done, total, unit, numbers: calls.append((done, total, unit)))
    counts = [done for done, _, _ in calls]
    assert counts == sorted(counts) and counts[-1] == 40 * (1 + 1 + 3 + 3)
    assert {call[1:] for call in calls} == {(320, "images")}
    assert {46, 53, 60} <= set(counts), "within a piece of 20 images progress follows the attack's 3 steps"


def stopped_after(images, directory, **settings):
    """An evaluation into ``directory`` that Ctrl-C ends once ``images`` images are done."""

    def stop(done, *_):
        if done >= images:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(directory=directory, progress=stop, **settings)


@pytest.mark.parametrize("images", [60, 150, 300])
def test_an_interrupted_evaluation_goes_on_and_ends_the_same(result, tmp_path, monkeypatch, images):
    stopped_after(images, tmp_path)
    kept = len(list(tmp_path.glob("*.safetensors")))
    assert kept >= 2
    calls = []
    attack = measure_module._attack
    monkeypatch.setattr(measure_module, "_attack", lambda *given: (calls.append(given), attack(*given))[1])
    assert_same(result, run(directory=tmp_path))
    assert len(calls) == 2 * (1 + 1 + 3 + 3) - kept, "what was finished is not done again"


def test_a_finished_evaluation_is_only_read(result, directory, monkeypatch):
    monkeypatch.setattr(measure_module, "_attack", None)
    again = run(directory=directory)
    assert_same(result, again)
    assert [item.seconds for item in again.scores] == [item.seconds for item in result.scores]


def test_a_damaged_piece_is_measured_again(result, directory):
    for path in sorted(directory.glob("*.safetensors"))[::3]:
        path.write_bytes(path.read_bytes()[:-20])
    assert_same(result, run(directory=directory))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"protocol": replace(PROTOCOL, num_draws=4)}, "protocol"),
        ({"seeds": (3,)}, "seeds"),
        ({"batch_size": 8}, "batch_size"),
        ({"keep_images": False}, "images_kept"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_results_of_another_evaluation_are_refused_and_stay(result, directory, change, named):
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(ValueError, match=f"another evaluation.*different: {named}.*another directory"):
        run(directory=directory, **change)
    assert before == {path: path.read_bytes() for path in directory.iterdir()}


def test_results_of_another_kind_of_device_are_refused_because_its_dice_are_others(directory):
    path = directory / "evaluation.json"
    identity = json.loads(path.read_text())
    path.write_text(json.dumps({**identity, "device": "cuda"}))
    with pytest.raises(ValueError, match="different: device"):
        run(directory=directory)


def test_lee_and_kims_steps_are_theirs_in_each_norm():
    steps = {item.norm: item.relative_step for item in PROTOCOLS["lee-kim"].attacks if item.sees == "defence"}
    assert steps == {"linf": pytest.approx(0.007 / (8 / 255)), "l2": pytest.approx(0.005 / 0.5)}


def test_results_of_another_model_or_of_other_images_are_refused(directory):
    classifier, defences = setting()
    with torch.no_grad():
        defences["other"][1].bias[0] += 1e-3
    settings = {"classifier": classifier, "directory": directory, "batch_size": 20, "keep_images": True}
    with pytest.raises(ValueError, match="different: models"):
        evaluate(defences, IMAGES, LABELS, PROTOCOL, BUDGET, **settings)
    _, defences = setting()
    with pytest.raises(ValueError, match="different: images"):
        evaluate(defences, IMAGES.flip(0), LABELS, PROTOCOL, BUDGET, **settings)
    defences["pipeline"].transform = replace(defences["pipeline"].transform, noise_std=0.06)
    with pytest.raises(ValueError, match="different: models"):
        evaluate(defences, IMAGES, LABELS, PROTOCOL, BUDGET, **settings)


def test_pieces_without_a_word_of_what_they_are_stay_unread(directory):
    (directory / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="no evaluation.json that says of what; choose another directory"):
        run(directory=directory)


def test_a_disk_that_fills_up_keeps_what_was_finished(result, tmp_path, monkeypatch):
    write, left = measure_module.Store.save, [4]

    def full(self, *given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("No space left on device")
        write(self, *given)

    monkeypatch.setattr(measure_module.Store, "save", full)
    with pytest.raises(OSError, match="No space"):
        run(directory=tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert_same(result, run(directory=tmp_path))


@pytest.mark.parametrize("place", ["defence", "classifier"])
def test_a_model_in_train_mode_is_refused_before_its_statistics_move(place):
    norm = nn.BatchNorm2d(3)
    wrong = nn.Sequential(norm, linear())
    wrong.eval()
    norm.train()
    classifier = wrong if place == "classifier" else linear()
    defences = {"wrong": wrong} if place == "defence" else {"right": linear()}
    with pytest.raises(ValueError, match="is in train mode"):
        evaluate(defences, IMAGES, LABELS, PROTOCOL, BUDGET, classifier=classifier)
    assert norm.num_batches_tracked == 0 and (norm.running_mean == 0).all()


@pytest.mark.parametrize(
    "images, labels, settings, message",
    [
        (IMAGES * 255, LABELS, {}, r"images must lie in \[0, 1\]"),
        (IMAGES, LABELS + 1, {}, r"labels must lie in 0\.\.2"),
        (IMAGES, LABELS, {"seeds": ()}, "different seeds are needed"),
        (IMAGES, LABELS, {"seeds": (1, 1)}, "different seeds are needed"),
        (IMAGES, LABELS, {"batch_size": 0}, "batch_size and max_batch must be at least 1"),
    ],
    ids=["images", "labels", "no seed", "seed twice", "batch size"],
)
def test_bad_input_is_refused(images, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate({"a": linear()}, images, labels, PROTOCOL, BUDGET, classifier=linear(), **settings)


def test_the_attack_may_compute_in_bfloat16_but_the_verdict_is_float32():
    classifier, seen = linear(), {True: set(), False: set()}

    def see(_module, _inputs, output):
        if len(output) > 1:  # of one image only the form of its logits is looked at
            seen[torch.is_grad_enabled()].add(output.dtype)

    classifier.register_forward_hook(see)
    found = run(defences={"a": classifier}, attack_dtype=torch.bfloat16)
    assert seen[True] == {torch.bfloat16}
    assert seen[False] == {torch.float32}
    for item in found.outcomes[:4]:
        shown = found.adversarial["a", item.attack, 0]
        assert torch.equal(item.right["one_shot"][0], classifier(shown).argmax(dim=1) == LABELS)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_runs_and_its_attacks_stay_within_their_budgets(name):
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).eval()
    purifying = AToPPipeline(TransformSettings("rt2", noise_std=0.05, grid_size=4), Recolour(), classifier).eval()
    protocol = adjusted(PROTOCOLS[name], steps=2, eot_samples=2, queries=5, num_draws=3)
    images = IMAGES[:6]
    labels = classifier(images).argmax(dim=1)
    defences = {"undefended": classifier, "pipeline": purifying}
    found = evaluate(defences, images, labels, protocol, BUDGET, classifier=classifier, keep_images=True)
    columns = {planned.heading for planned in protocol.attacks}
    blind = {planned.heading for planned in protocol.attacks if planned.sees == "bpda"}
    assert columns <= {s.attack for s in found.scores if s.defence == "pipeline"}
    assert columns - blind <= {s.attack for s in found.scores if s.defence == "undefended"}
    assert not blind & {s.attack for s in found.scores if s.defence == "undefended"}, "nothing purifies there"
    for planned in protocol.attacks:
        if planned.norm != "flow":
            shown = found.adversarial["pipeline", planned.heading, 0]
            check_budget(shown, images, getattr(BUDGET, planned.norm), planned.norm)


def test_the_columns_of_a_changed_protocol_say_what_was_run():
    changed = with_seen(adjusted(PROTOCOLS["compare"], steps=2, eot_samples=3), ["linf"])
    assert [planned.heading for planned in changed.attacks] == [
        "blind: transfer",
        "known: PGD-2 + EOT-3 linf",
        "unseen: PGD-2 + EOT-3 l2",
        "unseen: StAdv + EOT-3",
        "unseen: Square linf",
    ]
    for protocol in PROTOCOLS.values():
        assert not any("{" in planned.heading for planned in protocol.attacks)


@pytest.mark.parametrize("label", ["PGD-{steps}", "{queries}, and {steps}", "half a { brace", "{}"])
def test_a_label_names_only_settings_that_the_attack_has(label):
    with pytest.raises(ValueError, match=r"may name the settings \{queries\} in braces, not "):
        PlannedAttack(label, "square", settings={"queries": 3})


def test_an_attack_is_not_planned_with_settings_that_it_does_not_take():
    with pytest.raises(ValueError, match="pgd does not take queries; allowed: .*steps"):
        replace(PROTOCOL, attacks=(PlannedAttack("a", "pgd", settings={"queries": 3}),))


def test_a_random_defence_meets_autoattack_rand_and_a_calm_one_the_standard_version():
    planned = PlannedAttack("AutoAttack", "autoattack", settings={"steps": 3})
    random, calm = (planned.build(BUDGET, random=value, verdict=PROTOCOL.verdict) for value in (True, False))
    assert (random.version, random.verdict) == ("rand", PROTOCOL.verdict) and calm.version == "standard"


class Rounded(nn.Module):
    """A purifier without gradient."""

    def forward(self, given):
        return (given[:, :3] * 64).round() / 64


def test_bpda_is_attacked_and_the_defence_itself_is_judged():
    classifier = linear()
    defence = AToPPipeline(TransformSettings("none", grid_size=4), Rounded(), classifier).eval()
    attacks = tuple(PlannedAttack(sees, "pgd", sees=sees, settings={"steps": 5}) for sees in ("defence", "bpda"))
    protocol = replace(PROTOCOL, attacks=attacks)
    found = by_name(evaluate({"rounded": defence}, IMAGES, LABELS, protocol, BUDGET, classifier=classifier))
    assert found["rounded", "bpda"].one_shot < 0.5 < found["rounded", "defence"].one_shot


@pytest.mark.parametrize("name", ["apgd", "fab", "square", "autoattack"])
def test_an_attack_in_bfloat16_believes_in_no_error_that_float32_does_not_make(name):
    """Most images stand at their boundary afterwards, where half of the digits decide."""
    torch.manual_seed(3)
    classifier = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(6 * 36, 5)).eval()
    images = torch.rand(100, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        labels = classifier(images).argmax(dim=1)
    effort = {"steps": 10, "queries": 100}
    settings = {option: value for option, value in effort.items() if option in ATTACKS[name].options}
    protocol = Protocol("one", "of its own", (PlannedAttack("it", name, settings=settings),), num_draws=1)
    standing = {}
    for dtype in (torch.float32, torch.bfloat16):
        found = evaluate({"a": classifier}, images, labels, protocol, Budget(0.02, 1.0), classifier=classifier,
                         attack_dtype=dtype)  # fmt: skip
        standing[dtype] = int(found.outcomes[1].right["one_shot"].sum())
    assert standing[torch.float32] < 90, "there is something to believe"
    assert standing[torch.bfloat16] <= standing[torch.float32] + 3


def test_the_worst_case_holds_the_clean_images():
    classifier = linear()
    with torch.no_grad():
        wrong = (classifier(IMAGES).argmax(dim=1) + 1) % 3
    found = evaluate({"a": classifier}, IMAGES, wrong, PROTOCOL, Budget(0.9, 9.0), classifier=classifier)
    clean, *_, worst = found.outcomes
    assert not clean.right["one_shot"].any() and not worst.right["one_shot"].any()


class GlobalDice(nn.Module):
    """Throws torch's global dice."""

    def __init__(self, body, noise):
        super().__init__()
        self.body, self.noise = body, noise

    def forward(self, images):
        return self.body(images) + self.noise * torch.randn(len(images), 3)


def test_global_dice_are_seeded_for_every_piece():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(run(defences={"a": GlobalDice(linear(), 0.5).eval()}))
    assert_same(*found)


def test_a_model_is_known_by_the_numbers_that_it_keeps_but_for_its_seed():
    quiet, loud = (GlobalDice(linear(), noise).eval() for noise in (0.1, 0.9))
    assert model_fingerprint(quiet) != model_fingerprint(loud)
    pipeline = AToPPipeline(TransformSettings("rt2", noise_std=0.05, grid_size=4), Recolour(), linear()).eval()
    before = model_fingerprint(pipeline)
    pipeline.reseed(99)
    assert model_fingerprint(pipeline) == before


def test_an_attack_may_have_a_verdict_of_more_draws_than_the_rest():
    pipeline = AToPPipeline(TransformSettings("rt2", noise_std=0.3, grid_size=4), Recolour(), linear()).eval()
    attacks = tuple(replace(item, num_draws=9 if item.norm == "l2" else None) for item in PROTOCOL.attacks)
    found = run(replace(PROTOCOL, attacks=attacks), {"a": pipeline})
    assert [item.draws for item in found.outcomes] == [5, 5, 5, 9, 5, 5]
    bpda = next(item for item in PROTOCOLS["strict"].attacks if item.sees == "bpda")
    assert bpda.num_draws == 150, "as Hill et al. 2021 judge"
    assert all(item.num_draws is None for item in adjusted(PROTOCOLS["strict"], num_draws=3).attacks)


def test_a_weaker_attack_that_wins_is_told():
    attacks = (PlannedAttack("PGD", "pgd"), PlannedAttack("Square", "square"), PlannedAttack("StAdv", "stadv", "flow"))
    protocol = replace(PROTOCOL, attacks=attacks)
    found = [outcomes_of([[1] * 20], "PGD"), outcomes_of([[0] * 6 + [1] * 14], "Square")]
    (said,) = masked_gradients([*found, outcomes_of([[0] * 20], "StAdv", "flow")], protocol)
    assert "a: Square breaks 6 images that the white-box attacks miss, which break 0 that it misses (p 0.016)" in said
    assert masked_gradients([found[0], outcomes_of([[0] * 4 + [1] * 16], "Square")], protocol) == []
    assert masked_gradients([outcomes_of([[0] * 20], "PGD"), found[1]], protocol) == []


def test_evaluations_of_others_are_kept_beside_and_found_again(tmp_path):
    def measured(seed: int, budget: Budget = BUDGET) -> list:
        model = linear(seed)
        return evaluate(
            {"it": model}, IMAGES, LABELS, PROTOCOL, budget, classifier=model, directory=tmp_path, keep_others=True
        ).scores

    first = measured(0)
    measured(1)
    measured(0, Budget(linf=0.02, l2=0.1))
    folders = sorted(path for path in tmp_path.iterdir())
    assert len(folders) == 3 and all(path.is_dir() for path in folders)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = measured(0)
    assert [replace(item, seconds=0) for item in again] == [replace(item, seconds=0) for item in first]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before, "nothing is measured anew"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attacks_in_float32_are_as_exact_as_verdicts(monkeypatch, dtype):
    entered = []

    class Noted:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device.type)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(measure_module, "full_float32", Noted)
    with measure_module._computing_in(dtype, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == (dtype == torch.bfloat16)
    assert entered == (["cpu"] if dtype == torch.float32 else [])


def test_what_a_defence_keeps_in_one_norm_is_not_what_it_keeps_in_all():
    def outcome(defence: str, norm: str, share: float) -> Outcomes:
        right = (torch.arange(20) < 20 * share)[None]
        return Outcomes(defence, norm, norm, 1, dict.fromkeys(VERDICTS, right), right.float())

    found = [outcome("a", "", 0.95), outcome("a", "linf", 0.5), outcome("a", "linf", 0.4), outcome("a", "flow", 0.0)]
    found += [outcome("b", "linf", 0.0), outcome("c", "l2", 0.5)]
    assert weakest(found, "linf") == pytest.approx({"a": 0.4, "b": 0.0, "c": 1.0})
