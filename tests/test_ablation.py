"""Ablation: an average is one pipeline that is attacked as such, and a cell says what a call by hand would."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from atoplib.attacks import PGDSettings, pgd
from atoplib.evaluation import Setting, ablate, ablation, mask_surface, noise_sweep
from atoplib.evaluation.ablation import attack_on, measure_cell, purified_distance, vote_curve
from atoplib.pipeline import AToPPipeline, AveragedPipeline
from atoplib.transforms import TransformSettings
from atoplib.verdicts import draw_logits, reseed, wilson_interval

RT2 = TransformSettings("rt2", missing_rate=0.25, noise_std=0.2)
ATTACK = PGDSettings(0.1, steps=3, eot_samples=4, stop_after=3)


class Identity(nn.Module):
    """A purifier that hands on what it sees."""

    def forward(self, inputs):
        return inputs[:, :3]


def make_pipeline(transform: TransformSettings = RT2, *, purifier: nn.Module | None = None) -> AToPPipeline:
    torch.manual_seed(1)
    classifier = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4))
    purifier = purifier or nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh())
    return AToPPipeline(transform, purifier, classifier).eval()


def averaged(copies: int, **options) -> AveragedPipeline:
    plain = make_pipeline()
    return AveragedPipeline(RT2, plain.purifier, plain.classifier, copies=copies, **options).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(6) % 4


# the average


@pytest.mark.parametrize("average", ["images", "logits"])
def test_an_average_over_one_draw_is_the_pipeline_itself(images, average):
    torch.testing.assert_close(averaged(1, average=average)(images), make_pipeline()(images))


def each_of(plain: AToPPipeline, copies: torch.Tensor) -> torch.Tensor:
    """Three copies of six images purified with the dice of seed 5, (3, 6, ...)."""
    with plain.fixed_draws(5):
        return plain.purify(copies).unflatten(0, (3, 6))


def test_the_average_is_the_mean_over_draws_of_their_own(images):
    model, plain = averaged(3), make_pipeline()
    each = each_of(plain, images.repeat(3, 1, 1, 1))
    assert not torch.equal(each[0], each[1])
    with model.fixed_draws(5):
        torch.testing.assert_close(model.purify(images), each.mean(dim=0))
        torch.testing.assert_close(model(images), plain.classifier(each.mean(dim=0)))
    model = averaged(3, average="logits")
    with model.fixed_draws(5):
        expected = plain.classifier(each.flatten(0, 1)).unflatten(0, (3, 6)).mean(dim=0)
        torch.testing.assert_close(model(images), expected)


def test_a_draw_that_is_given_is_used_alone(images):
    model, plain = averaged(3, average="logits"), make_pipeline()
    draw = plain.draw(images)
    torch.testing.assert_close(model(images, draw), plain(images, draw))
    torch.testing.assert_close(model.purify(images, draw), plain.purify(images, draw))


@pytest.mark.parametrize("average", ["images", "logits"])
def test_gradients_flow_through_every_copy(images, average):
    model, plain = averaged(3, average=average), make_pipeline()
    shown = images.clone().requires_grad_()
    with model.fixed_draws(5):
        (found,) = torch.autograd.grad(model(shown).square().sum(), shown)
    copies = images.repeat(3, 1, 1, 1).requires_grad_()
    each = each_of(plain, copies)
    read = plain.classifier
    logits = read(each.mean(dim=0)) if average == "images" else read(each.flatten(0, 1)).unflatten(0, (3, 6)).mean(dim=0)
    (parts,) = torch.autograd.grad(logits.square().sum(), copies)
    assert all(float(part.abs().sum()) > 0 for part in parts.unflatten(0, (3, 6)))
    torch.testing.assert_close(found, parts.unflatten(0, (3, 6)).sum(dim=0))


def test_an_average_varies_less_and_repeats_itself_from_its_seed(images):
    def spread(model: nn.Module) -> float:
        return float(draw_logits(model, images, num_draws=32).std(dim=0).mean())

    assert spread(averaged(16)) < 0.5 * spread(averaged(1))
    model = averaged(4)
    first = model(images)
    assert not torch.equal(first, model(images))
    reseed(model, 0)
    assert torch.equal(first, model(images))


@pytest.mark.parametrize(
    "wrong, said",
    [({"copies": 0}, "copies must be at least 1, got 0"), ({"copies": 2, "average": "masks"}, "allowed: images, logits")],
)
def test_an_average_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        averaged(**wrong)


# settings


def test_the_surface_crosses_rates_and_masks_and_ends_with_the_partitions():
    surface = mask_surface(RT2, missing_rates=[0.1, 0.5], mask_counts=[1, 4], partitions=[2, 8])
    assert [(s.transform.name, s.missing_rate, s.num_masks) for s in surface] == [
        ("rt2", 0.1, 1),
        ("rt2", 0.1, 4),
        ("rt2", 0.5, 1),
        ("rt2", 0.5, 4),
        ("rt3", 1 / 2, 2),
        ("rt3", 1 / 8, 8),
    ]
    assert {s.noise_std for s in surface} == {0.2}
    assert [s.noise_std for s in noise_sweep(RT2, [0.0, 0.3])] == [0.0, 0.3]
    assert Setting(replace(RT2, name="rt1")).noise_std == 0 and Setting(TransformSettings("none")).missing_rate == 0


def test_masks_are_averaged_where_there_are_masks():
    with pytest.raises(ValueError, match="for rt1 and rt2, not for 'none'"):
        mask_surface(replace(RT2, name="none"), missing_rates=[0.1], mask_counts=[1], partitions=[])


@pytest.mark.parametrize(
    "copies, samples, patience",
    [(1, 8, 3), (2, 4, 6), (4, 2, 12), (8, 2, 12)],
)
def test_an_average_gets_fewer_draws_and_as_much_patience(copies, samples, patience):
    chosen = attack_on(Setting(RT2, copies), PGDSettings(0.3, eot_samples=8, stop_after=3))
    assert (chosen.eot_samples, chosen.stop_after) == (samples, patience)
    assert chosen.eot_samples * copies >= 8


def test_an_attack_that_never_stops_does_not_stop_and_one_draw_stays_one():
    assert attack_on(Setting(RT2, 4), PGDSettings(0.3, eot_samples=8)).stop_after == 0
    assert attack_on(Setting(RT2, 4), PGDSettings(0.3, eot_samples=1)).eot_samples == 1


# numbers


def test_the_distance_is_that_of_the_perturbation_where_nothing_is_purified(images):
    pipeline = make_pipeline(TransformSettings("none"), purifier=Identity())
    moved = (images + 3 / 255).where(images < 0.5, images - 3 / 255)
    assert purified_distance(pipeline, images, moved, max_batch=4) == pytest.approx(3, rel=1e-4)


def test_the_distance_compares_under_the_same_dice(images):
    assert purified_distance(make_pipeline(), images, images) == 0
    assert purified_distance(averaged(3), images, images) == 0


def test_votes_are_counted_over_every_group_of_draws():
    right, wrong = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 9.0])
    logits = torch.stack([right, wrong, right, right, wrong, right]).unsqueeze(1)  # 6 draws of one image
    votes = vote_curve(logits, torch.tensor([0]), [1, 3], attack="clean")
    found = {(vote.verdict, vote.draws): vote.accuracy for vote in votes}
    assert found["majority", 1] == found["worst_of_n", 1] == pytest.approx(4 / 6)
    assert (found["majority", 3], found["worst_of_n", 3]) == (1.0, 0.0)
    assert (votes[0].low, votes[0].high) == wilson_interval(4 / 6, 1)
    with pytest.raises(ValueError, match="a vote takes 1 to 6 draws here, got 7"):
        vote_curve(logits, torch.tensor([0]), [7], attack="clean")


def test_a_cell_says_what_a_call_by_hand_says(images, labels):
    pipeline, setting = make_pipeline(), Setting(RT2, 2)
    cell = measure_cell("mine", pipeline, setting, images, labels, ATTACK, num_draws=3, max_batch=1000)
    model = averaged(2)
    generator = torch.Generator().manual_seed(0)
    reseed(model, 0)
    adversarial = pgd(model, images, labels, attack_on(setting, ATTACK), generator=generator, max_batch=500)
    for shown, share in ((images, cell.clean), (adversarial, cell.robust)):
        reseed(model, 1)
        right = draw_logits(model, shown, num_draws=3, max_batch=500).argmax(dim=2) == labels
        assert share == pytest.approx(float(right.float().mean()))
    assert (cell.robust_low, cell.robust_high) == wilson_interval(cell.robust * 6, 6)
    assert cell.input_distance == pytest.approx(255 * float((adversarial - images).abs().mean()), rel=1e-5)
    assert cell.distance == pytest.approx(purified_distance(model, images, adversarial))
    assert (cell.defence, cell.num_masks, cell.eot_samples, cell.draws, cell.images) == ("mine", 2, 2, 3, 6)


def test_a_setting_without_dice_needs_one_draw(images, labels):
    cell = measure_cell(
        "bare", make_pipeline(), Setting(TransformSettings("none")), images, labels, ATTACK, vote_counts=[1, 9]
    )
    assert (cell.draws, cell.eot_samples) == (1, 1)
    assert {vote.draws for vote in cell.votes} == {1}


def test_the_pipeline_that_was_given_stays_as_it_is(images, labels):
    pipeline = make_pipeline()
    before = pipeline(images)
    reseed(pipeline, 0)
    measure_cell("mine", pipeline, Setting(replace(RT2, noise_std=0.9), 2), images, labels, ATTACK)
    assert pipeline.transform == RT2 and torch.equal(pipeline(images), before)


# many cells


def run(images, labels, folder: Path | None = None, pipeline: AToPPipeline | None = None, **options):
    settings = [Setting(RT2), Setting(RT2, 2), Setting(RT2, 2)]
    pipelines = {"mine": pipeline or make_pipeline()}
    return ablate(pipelines, settings, images, labels, ATTACK, vote_counts=(1, 5), directory=folder, **options)


def test_a_setting_is_measured_once_and_that_of_the_training_has_its_votes(images, labels):
    seen = []
    cells = run(images, labels, progress=lambda done, total, unit, numbers: seen.append((done, total)))
    assert list(cells) == [("mine", Setting(RT2)), ("mine", Setting(RT2, 2))]
    assert {vote.draws for vote in cells["mine", Setting(RT2)].votes} == {1, 5}
    assert cells["mine", Setting(RT2, 2)].votes == ()
    assert seen == sorted(seen) and seen[-1] == (6, 6)


def test_what_is_done_is_not_done_again_and_a_damaged_file_is(images, labels, tmp_path, monkeypatch):
    first = run(images, labels, tmp_path)
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 2
    measured = []

    def measure(*arguments, **options):
        measured.append(arguments[2])
        return measure_cell(*arguments, **options)

    monkeypatch.setattr(ablation, "measure_cell", measure)
    assert run(images, labels, tmp_path) == first and measured == []
    files[0].write_text('{"defence": ')
    again = run(images, labels, tmp_path)
    assert len(measured) == 1
    assert {key: replace(cell, seconds=0) for key, cell in again.items()} == {
        key: replace(cell, seconds=0) for key, cell in first.items()
    }


def test_another_purifier_other_images_and_another_attack_are_measured_anew(images, labels, tmp_path):
    run(images, labels, tmp_path)
    other = make_pipeline()
    with torch.no_grad():
        other.purifier[0].weight.mul_(1.5)
    run(images, labels, tmp_path, other)
    run(images.flip(3), labels, tmp_path)
    run(images, labels, tmp_path, seed=1)
    assert len(list(tmp_path.glob("*.json"))) == 8
