"""Samples, votes and intervals are the known ones."""

import pytest
import torch
from torch import nn

from atoplib.decisions import (
    correct,
    fixed_sample,
    full_float32,
    is_random,
    pick_device,
    reseed,
    sample_logits,
    supports_fixed_sample,
    vote,
    wilson_interval,
)
from atoplib.pipeline import AToPPipeline, Mixed
from atoplib.purifiers import GatedUNet
from atoplib.transforms import Transform


def images_of(count):
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))


def calm(images):
    return images.mean(dim=(2, 3)) @ torch.arange(12.0).view(3, 4)


def noisy(images):
    return calm(images + torch.randn_like(images))


class Planted(nn.Module):
    """A random model whose samples are known: logits (samples, images, classes), image by image."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.batches = logits.flatten(0, 1), []

    def forward(self, images):
        first = sum(self.batches)
        self.batches.append(len(images))
        return self.logits[first : first + len(images)]


def test_float32_is_float32_within_the_block_and_as_before_after_it():
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    with torch.autocast("cpu", dtype=torch.bfloat16), full_float32(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(KeyError), full_float32(torch.device("cuda")):  # settings alone: no GPU is asked
        assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
        raise KeyError
    first, second = full_float32(torch.device("cuda")), full_float32(torch.device("cuda"))
    first.__enter__(), second.__enter__(), first.__exit__(None, None, None)  # as two threads may
    assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
    second.__exit__(None, None, None)
    assert [setting.fp32_precision for setting in settings] == before


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 1, 0.0, 0.7935),
        (500, 1000, 0.4691, 0.5309),
    ],
)
def test_the_interval_agrees_with_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("trials", [1, 7, 200, 10_000])
def test_the_interval_holds_the_proportion_mirrors_it_and_stays_within_0_and_1(trials):
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        low, high = wilson_interval(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1 and low < high
        assert (1 - high, 1 - low) == pytest.approx(wilson_interval(trials - successes, trials))


@pytest.mark.parametrize("successes, trials", [(0, 0), (-1, 5), (6, 5), (0, -1)])
def test_an_impossible_count_is_refused(successes, trials):
    with pytest.raises(ValueError, match="must "):
        wilson_interval(successes, trials)


# Five images of class 0, three samples: each rule calls another set of them correct.
RIGHT, WRONG, VERY_WRONG = [1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 9.0, 0.0]
LOGITS = torch.tensor(
    [
        [RIGHT, RIGHT, RIGHT, WRONG, WRONG],
        [RIGHT, RIGHT, WRONG, RIGHT, [0.0, 0.0, 0.5]],
        [RIGHT, VERY_WRONG, WRONG, RIGHT, WRONG],
    ]
)
EXPECTED = {
    "single": [True, True, True, False, False],
    "majority": [True, True, False, True, False],
    "mean_softmax": [True, False, True, True, False],
    "worst_of_n": [True, False, False, False, False],
    "any": [True, True, True, True, False],
}


@pytest.mark.parametrize("rule", EXPECTED)
def test_each_rule_calls_correct_what_its_name_says(rule):
    labels = torch.zeros(5, dtype=torch.int64)
    assert correct(LOGITS, labels, rule).tolist() == EXPECTED[rule]
    if rule in ("single", "majority", "mean_softmax"):
        assert (vote(LOGITS, rule) == labels).tolist() == EXPECTED[rule]


def test_ties_of_a_majority_go_to_the_lower_class():
    logits = torch.tensor([[[0.0, 0.0, 5.0]], [[9.0, 0.0, 0.0]], [[0.0, 3.0, 1.0]]])
    assert vote(logits, "majority").tolist() == [0]


@pytest.mark.parametrize("max_batch", [1, 2, 4, 100])
def test_samples_and_images_share_batches_no_larger_than_asked(max_batch):
    model = Planted(LOGITS)
    assert torch.equal(sample_logits(model, images_of(5), num_samples=3, max_batch=max_batch), LOGITS)
    assert max(model.batches) <= max_batch and sum(model.batches) == 15


def test_samples_of_a_deterministic_model_are_alike_and_of_a_random_one_are_not():
    images = images_of(3)
    for logits in sample_logits(calm, images, num_samples=3, max_batch=2):
        torch.testing.assert_close(logits, calm(images))
    logits = sample_logits(noisy, images.requires_grad_(), num_samples=3)
    assert logits.shape == (3, 3, 4) and not logits.requires_grad
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])
    assert is_random(noisy, images_of(1)) and not is_random(calm, images_of(1))


def test_a_model_of_few_possible_samples_is_found_random_even_by_one_image():
    coin = torch.Generator().manual_seed(0)

    def rarely(images):  # one image of two gets the other answer
        return calm(images) + torch.randint(2, (len(images), 1), generator=coin)

    assert sum(is_random(rarely, images_of(1)) for _ in range(50)) >= 49, "two images would not do"


def test_logits_are_float32_whatever_an_attack_computes_in():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = sample_logits(model, images_of(2))
        assert model(images_of(2)).dtype == torch.bfloat16
    assert torch.equal(logits, sample_logits(model, images_of(2)))


def test_logits_that_are_not_finite_are_found_in_every_image():
    logits = torch.zeros(3, 5, 4)
    logits[1, 3, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite for 1 of 5 images .the first is number 3 of the batch"):
        sample_logits(Planted(logits), images_of(5), num_samples=3)


def test_unknown_rules_no_samples_and_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="vote must be one of single, majority, mean_softmax, got 'median'"):
        correct(LOGITS, torch.zeros(5, dtype=torch.int64), "median")
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        sample_logits(calm, images_of(3), num_samples=0)
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda, got 'tpu'"):
        pick_device("tpu")
    with pytest.raises(ValueError, match="'cuda:99' is not available here"):
        pick_device("cuda:99")
    assert pick_device("auto").type in ("cpu", "cuda") and pick_device("cpu") == torch.device("cpu")


def test_random_numbers_are_reseeded_and_fixed_wherever_in_a_model_they_are():
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    pipeline = AToPPipeline(Transform("rt2", grid_size=2), GatedUNet(width=2), classifier).eval()
    images = torch.rand(2, 3, 8, 8)
    for model in (pipeline, Mixed(classifier, pipeline), nn.Sequential(pipeline)):
        assert supports_fixed_sample(model)
        reseed(model, 3)
        first, second = model(images), model(images)
        reseed(model, 3)
        assert torch.equal(model(images), first) and not torch.equal(first, second)
        with fixed_sample(model, 5):
            fixed = model(images)
            assert torch.equal(model(images), fixed)
        assert torch.equal(model(images), second), "the sequence goes on as if nothing had been fixed"
    assert not supports_fixed_sample(classifier) and not supports_fixed_sample(calm)
    reseed(calm, 3)
    with fixed_sample(calm, 3):
        assert torch.equal(calm(images), calm(images))


def test_decisions_are_computed_in_float32_whatever_torch_is_told():
    seen, precision = [], lambda: torch.backends.mkldnn.matmul.fp32_precision
    before = precision()
    sample_logits(lambda x: seen.append(precision()) or x[:, :, 0, 0], torch.rand(2, 3, 1, 1))
    assert seen == ["ieee"] != [precision()] == [before]
