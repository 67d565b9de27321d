"""Scores are the known ones, and an evaluation can be repeated to the last digit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from atoplib.attacks import PGDSettings, check_budget, pgd
from atoplib.evaluation import Score, evaluate, score
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import TransformSettings
from atoplib.verdicts import wilson_interval

# Five images of class 0, three draws; each row of logits is one draw of one image.
RIGHT, WRONG, VERY_WRONG = [1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 9.0, 0.0]
LOGITS = torch.tensor(
    [
        [RIGHT, RIGHT, RIGHT, WRONG, WRONG],
        [RIGHT, RIGHT, WRONG, RIGHT, [0.0, 0.0, 0.5]],
        [RIGHT, VERY_WRONG, WRONG, RIGHT, WRONG],
    ]
)


def test_each_verdict_counts_what_its_name_says():
    result = score(LOGITS, torch.zeros(5, dtype=torch.int64), defence="a", attack="b", seconds=2.5)
    right = LOGITS.softmax(dim=2).mean(dim=0).argmax(dim=1) == 0
    assert right.tolist() == [True, False, True, True, False], "the votes by softmax and by majority should differ"
    low, high = wilson_interval(3, 5)
    expected = Score("a", "b", 5, 3, 3 / 5, low, high, majority=3 / 5, mean_softmax=3 / 5, worst_of_n=1 / 5, seconds=2.5)
    for name, value in vars(expected).items():
        assert getattr(result, name) == pytest.approx(value), name
    assert result.accuracy == result.one_shot


def test_with_one_draw_all_verdicts_agree():
    logits = torch.randn(1, 50, 4)
    labels = torch.randint(4, (50,))
    result = score(logits, labels)
    share = (logits[0].argmax(dim=1) == labels).float().mean().item()
    assert result.one_shot == result.majority == result.mean_softmax == result.worst_of_n == pytest.approx(share)


IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
ATTACK = PGDSettings(eps=0.05, steps=4, eot_samples=3)


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


def run(**settings):
    classifier, defences = setting()
    settings = {"attack": ATTACK, "num_draws": 5} | settings
    return evaluate(defences, IMAGES, LABELS, classifier=classifier, **settings)


@pytest.fixture(scope="module")
def result():
    return run()


def test_every_defence_is_scored_clean_under_transfer_and_white_box_in_order(result):
    columns = ["clean", "transfer", "white-box"]
    expected = [(defence, attack) for defence in ("undefended", "other", "pipeline") for attack in columns]
    assert [(s.defence, s.attack) for s in result.scores] == expected
    assert list(result.adversarial) == expected
    assert all(s.images == 40 and s.draws == 5 and s.low <= s.one_shot <= s.high for s in result.scores)


def by_name(result):
    return {(s.defence, s.attack): s for s in result.scores}


def test_the_transfer_images_are_made_once_against_the_classifier_alone(result):
    shown = result.adversarial
    assert torch.equal(shown["undefended", "clean"], IMAGES)
    for defence in ("other", "pipeline"):
        assert torch.equal(shown[defence, "transfer"], shown["undefended", "transfer"])
        assert not torch.equal(shown[defence, "white-box"], shown[defence, "transfer"])
    alone = pgd(linear(), IMAGES, LABELS, replace(ATTACK, eot_samples=1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(shown["undefended", "transfer"], alone)
    for images in shown.values():
        check_budget(images, IMAGES, ATTACK.eps, ATTACK.norm)


def test_the_white_box_attack_on_the_classifier_is_the_transfer_attack(result):
    assert torch.equal(result.adversarial["undefended", "white-box"], result.adversarial["undefended", "transfer"])
    scores = by_name(result)
    assert scores["undefended", "clean"].one_shot == 1
    assert scores["undefended", "white-box"].one_shot == scores["undefended", "transfer"].one_shot < 0.5


def test_the_white_box_attack_is_the_stronger_one_on_what_the_transfer_attack_does_not_know(result):
    scores = by_name(result)
    for defence in ("other", "pipeline"):
        assert scores[defence, "white-box"].one_shot < scores[defence, "transfer"].one_shot
    losses = {
        attack: nn.functional.cross_entropy(linear(7)(result.adversarial["other", attack]), LABELS).item()
        for attack in ("clean", "transfer", "white-box")
    }
    assert losses["white-box"] > max(losses["clean"], losses["transfer"])


def test_the_scores_are_those_of_the_images_that_come_with_them(result):
    for defence, model in (("undefended", linear()), ("other", linear(7))):
        for attack in ("clean", "transfer", "white-box"):
            right = model(result.adversarial[defence, attack]).argmax(dim=1) == LABELS
            found = by_name(result)[defence, attack]
            assert found.one_shot == found.majority == found.worst_of_n == pytest.approx(right.float().mean().item())


def test_a_random_defence_has_verdicts_that_differ(result):
    scores = by_name(result)
    assert any(
        scores["pipeline", attack].worst_of_n < scores["pipeline", attack].one_shot for attack in ("clean", "transfer")
    )


@pytest.mark.parametrize("max_batch", [256, 25])
def test_a_second_evaluation_gives_the_same_numbers_and_images(result, max_batch):
    first = result if max_batch == 256 else run(max_batch=max_batch)
    torch.manual_seed(99)  # the global generator plays no part
    second = run(max_batch=max_batch)
    assert [replace(s, seconds=0) for s in first.scores] == [replace(s, seconds=0) for s in second.scores]
    for key, images in first.adversarial.items():
        assert torch.equal(images, second.adversarial[key]), key


def test_a_used_up_sequence_of_dice_does_not_change_an_evaluation(result):
    classifier, defences = setting()
    for _ in range(3):
        defences["pipeline"](IMAGES)
    again = evaluate(defences, IMAGES, LABELS, classifier=classifier, attack=ATTACK, num_draws=5)
    assert [replace(s, seconds=0) for s in again.scores] == [replace(s, seconds=0) for s in result.scores]


def test_another_seed_gives_other_random_starts_and_dice(result):
    other = run(seed=1)
    for defence in ("undefended", "pipeline"):
        assert not torch.equal(other.adversarial[defence, "white-box"], result.adversarial[defence, "white-box"])


def test_attack_and_verdict_use_different_dice():
    classifier, defences = setting()
    pipeline, seen = defences["pipeline"], []
    reseed = pipeline.reseed
    pipeline.reseed = lambda seed: (seen.append(seed), reseed(seed))
    evaluate({"pipeline": pipeline}, IMAGES, LABELS, classifier=classifier, attack=ATTACK, num_draws=1, seed=5)
    assert set(seen) == {5, 6}


def test_only_a_random_defence_costs_eot_draws():
    classifier, defences = setting()
    copies = dict.fromkeys(("other", "pipeline"), 0)
    for name in copies:

        def count(_model, given, name=name):
            copies[name] += len(given[0]) if torch.is_grad_enabled() else 0

        defences[name].register_forward_pre_hook(count)
    evaluate({n: defences[n] for n in copies}, IMAGES, LABELS, classifier=classifier, attack=ATTACK, num_draws=2)
    assert copies == {"other": 4 * 40, "pipeline": 4 * 40 * 3}


def test_progress_counts_every_gradient_step_of_every_attack():
    calls = []
    run(progress=lambda done, total, unit, numbers: calls.append((done, total, unit)))
    assert calls == [(done, 16, "steps") for done in range(1, 17)]


@pytest.mark.parametrize("place", ["defence", "classifier"])
def test_a_model_in_train_mode_is_refused_before_its_statistics_move(place):
    norm = nn.BatchNorm2d(3)
    wrong = nn.Sequential(norm, linear())
    wrong.eval()
    norm.train()
    classifier = wrong if place == "classifier" else linear()
    defences = {"wrong": wrong} if place == "defence" else {"right": linear()}
    with pytest.raises(ValueError, match="is in train mode"):
        evaluate(defences, IMAGES, LABELS, classifier=classifier, attack=ATTACK)
    assert norm.num_batches_tracked == 0 and (norm.running_mean == 0).all()


def test_images_outside_0_to_1_and_labels_without_a_logit_are_refused():
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        evaluate({"a": linear()}, IMAGES * 255, LABELS, classifier=linear(), attack=ATTACK)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        evaluate({"a": linear()}, IMAGES, LABELS + 1, classifier=linear(), attack=ATTACK)
