"""Draws, votes and intervals are the known ones."""

import pytest
import torch
from torch import nn

from atoplib.verdicts import Verdict, draw_logits, full_float32, is_random, judge, predict, reseed, right_by, wilson_interval


def images_of(count):
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))


def test_float32_is_float32_within_the_block_and_as_before_after_it():
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    with torch.autocast("cpu", dtype=torch.bfloat16), full_float32(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(KeyError), full_float32(torch.device("cuda")):  # settings alone: no GPU is asked
        assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
        raise KeyError
    assert [setting.fp32_precision for setting in settings] == before


def calm(images):
    return images.mean(dim=(2, 3)) @ torch.arange(12.0).view(3, 4)


def noisy(images):
    return calm(images + torch.randn_like(images))


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (41, 64, 0.518, 0.747),  # 64.06 % of 64 images, METHOD.md
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 1, 0.0, 0.7935),
        (500, 1000, 0.4691, 0.5309),
    ],
)
def test_the_interval_agrees_with_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-4 if trials == 64 else 6e-5)


@pytest.mark.parametrize("trials", [1, 7, 200, 10_000])
def test_the_interval_holds_the_share_mirrors_it_and_stays_within_0_and_1(trials):
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        low, high = wilson_interval(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1 and low < high
        mirrored = wilson_interval(trials - successes, trials)
        assert (1 - high, 1 - low) == pytest.approx(mirrored)


@pytest.mark.parametrize("successes, trials", [(0, 0), (-1, 5), (6, 5), (0, -1)])
def test_an_impossible_count_is_refused(successes, trials):
    with pytest.raises(ValueError, match=f"got {successes} of {trials}"):
        wilson_interval(successes, trials)


class Planted(nn.Module):
    """A random model whose draws are known: logits (draws, images, classes), handed out image by image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits.flatten(0, 1)
        self.batches = []

    def forward(self, images):
        first = sum(self.batches)
        self.batches.append(len(images))
        return self.logits[first : first + len(images)]


# Three draws of three images: the vote and the mean softmax of the first differ, the second ties.
PLANTED = torch.tensor(
    [
        [[1.0, 0.0, -9.0], [0.0, 2.0, 0.0], [0.0, 0.0, 5.0]],
        [[1.0, 0.0, -9.0], [0.0, 0.0, 3.0], [9.0, 0.0, 0.0]],
        [[0.0, 9.0, -9.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
    ]
)


@pytest.mark.parametrize("max_batch", [1, 2, 4, 100])
def test_a_majority_vote_counts_draws_and_a_mean_softmax_weighs_them(max_batch):
    images = images_of(3)
    assert predict(Planted(PLANTED), images, num_draws=3, max_batch=max_batch).tolist() == [0, 0, 2]
    mean = predict(Planted(PLANTED), images, num_draws=3, vote="mean_softmax", max_batch=max_batch)
    assert mean.tolist() == PLANTED.softmax(dim=2).mean(dim=0).argmax(dim=1).tolist() == [1, 2, 2]
    assert predict(Planted(PLANTED), images, max_batch=max_batch).tolist() == [0, 1, 2]


@pytest.mark.parametrize("max_batch", [1, 2, 4, 100])
def test_draws_and_images_share_batches_no_larger_than_asked(max_batch):
    model = Planted(PLANTED)
    assert torch.equal(draw_logits(model, images_of(3), num_draws=3, max_batch=max_batch), PLANTED)
    assert max(model.batches) <= max_batch and sum(model.batches) == 9


def test_draws_of_a_deterministic_model_are_alike_and_of_a_random_one_are_not():
    images = images_of(3)
    same = draw_logits(calm, images, num_draws=3, max_batch=2)
    for draw in same:
        torch.testing.assert_close(draw, calm(images))
    logits = draw_logits(noisy, images.requires_grad_(), num_draws=3)
    assert logits.shape == (3, 3, 4) and not logits.requires_grad
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])


def test_a_random_model_is_told_from_a_deterministic_one():
    assert is_random(noisy, images_of(1)) and not is_random(calm, images_of(1))


def test_a_model_of_few_possible_draws_is_told_from_a_deterministic_one_even_by_one_image():
    coin = torch.Generator().manual_seed(0)

    def rarely(images):  # one image of two gets the other answer
        return calm(images) + torch.randint(2, (len(images), 1), generator=coin)

    assert sum(is_random(rarely, images_of(1)) for _ in range(50)) >= 49, "two images would be found half of the time"


def test_an_unknown_vote_or_no_draws_are_refused():
    with pytest.raises(ValueError, match="unknown vote 'median'; allowed: one_shot, majority, mean_softmax"):
        predict(Planted(PLANTED), images_of(3), vote="median")
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        predict(Planted(PLANTED), images_of(3), num_draws=0)


# Five images of class 0, three draws: each verdict calls another set of them right.
RIGHT, WRONG, VERY_WRONG = [1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 9.0, 0.0]
LOGITS = torch.tensor(
    [
        [RIGHT, RIGHT, RIGHT, WRONG, WRONG],
        [RIGHT, RIGHT, WRONG, RIGHT, [0.0, 0.0, 0.5]],
        [RIGHT, VERY_WRONG, WRONG, RIGHT, WRONG],
    ]
)
EXPECTED = {
    "one_shot": [True, True, True, False, False],
    "majority": [True, True, False, True, False],
    "mean_softmax": [True, False, True, True, False],
    "worst_of_n": [True, False, False, False, False],
    "best_of_n": [True, True, True, True, False],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_verdict_calls_right_what_its_name_says(name):
    labels = torch.zeros(5, dtype=torch.int64)
    assert right_by(LOGITS, labels, name).tolist() == EXPECTED[name]
    assert judge(Planted(LOGITS), images_of(5), labels, Verdict(name, 3), max_batch=4).tolist() == EXPECTED[name]


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"name": "nearly_all"},
            "unknown verdict .nearly_all.; allowed: one_shot, majority, mean_softmax, worst_of_n, best_of_n",
        ),
        ({"num_draws": 0}, "num_draws must be at least 1, got 0"),
    ],
    ids=str,
)
def test_an_impossible_verdict_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Verdict(**settings)


def test_reseeding_reaches_a_model_that_has_dice_and_leaves_others_alone():
    seen = []
    reseed(calm, 3)
    dice = nn.Identity()
    dice.reseed = seen.append
    reseed(dice, 3)
    assert seen == [3]


def test_verdicts_are_float32_whatever_an_attack_computes_in():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = draw_logits(model, images_of(2))[0]
        assert model(images_of(2)).dtype == torch.bfloat16
    assert torch.equal(found, draw_logits(model, images_of(2))[0])


def test_logits_that_are_not_finite_are_found_in_every_image():
    logits = torch.zeros(3, 5, 4)
    logits[1, 3, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite for 1 of 5 images .the first is number 3 of the batch"):
        draw_logits(Planted(logits), images_of(5), num_draws=3)
