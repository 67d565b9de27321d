"""The explorer's controls, and what it computes: equal to library calls, through YAML and back."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from atoplib import attacks, decisions, parameters
from atoplib.attacks import ATTACKS
from atoplib.explorer import attack, compute, controls
from atoplib.explorer.controls import CONTROLS, changed, from_yaml, to_yaml
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform, corrupt

SIZE, CLASSES = 16, 4
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "04_attack.ipynb"
VALUES = {name: control.default for name, control in CONTROLS.items()} | {
    "rows": ["pipeline"], "eps": 0.1, "steps": 3, "votes": 4, "noise_std": 0.2,
}  # fmt: skip


class Noisy(nn.Module):
    """A random classifier that is no pipeline."""

    def forward(self, images):
        return torch.randn(len(images), CLASSES)


def make_images(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return images.float() / 255, torch.arange(count) % CLASSES


def make_classifier() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Linear(8 * (SIZE // 4) ** 2, CLASSES)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), head).eval()


def make_pipeline(transform: Transform | None = None) -> AToPPipeline:
    torch.manual_seed(10)  # the same network at every call
    layers = nn.Conv2d(5, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1), nn.Tanh()
    transform = transform or Transform("rt2", 0.25, 0.2)
    return AToPPipeline(transform, nn.Sequential(*layers), make_classifier()).eval()


def make_scene(**defences: nn.Module) -> attack.Scene:
    defences = defences or {"pipeline": make_pipeline(), "bare": make_classifier()}
    return attack.Scene(defences, *make_images(), [f"class {number}" for number in range(CLASSES)])


def views(values: dict, scene: attack.Scene | None = None, **options) -> list[compute.View]:
    return list(compute.views(scene or make_scene(), values, **options))


def final(values: dict, scene: attack.Scene | None = None) -> compute.Row:
    """The first row, complete."""
    return views(values, scene)[-1].rows[0]


def tensors(view: compute.View) -> list[torch.Tensor]:
    """Everything that is on screen, and the logits of every step."""
    parts = [view.clean]
    for row in view.rows:
        place = row.place(view.values)
        shown = [row.images, row.transformed, row.purified, row.unpurified]
        parts += [row.logits, *(part[place] for part in shown if part is not None)]
    return parts


# values


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": -0.1}, "eps must lie in 0..1, got -0.1"),
        ({"eps": float("nan")}, "eps must lie in 0..1"),
        ({"eps": 8.0}, "eps must lie in 0..1"),
        ({"steps": 0}, "steps must lie in 1..1000, got 0"),
        ({"missing_rate": 1.0}, "missing_rate must lie in 0..0.99"),
        ({"image": 12}, "image must lie in 0..11, got 12"),
        ({"target": 4}, "target must be one of -1, 0, 1, 2, 3, got 4"),
        ({"attack": "pdg"}, "attack must be one of none, fgsm, pgd"),
        ({"threat_model": "all"}, "threat_model must be one of white-box, bpda, transfer"),
        ({"attacked": "bar"}, "attacked must be one of each, pipeline, bare, got 'bar'"),
        ({"rows": []}, "rows must not be empty"),
        ({"norm": "flow"}, "norm must be one of linf"),
        ({"votes": "many"}, "'votes' must be of type int, got 'many'"),
    ],
    ids=str,
)
def test_a_value_that_is_not_allowed_is_refused_with_a_sentence(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        controls.check({**VALUES, **wrong}, make_scene())


CHANGES = {
    "image": 3, "threat_model": "transfer", "norm": "l2", "eps": 0.25, "steps": 4, "eot_samples": 3,
    "missing_rate": 0.5, "noise_std": 0.4, "num_masks": 6, "votes": 7, "sample": 2, "shown_step": 0,
    "target": 2, "queries": 90, "seed": 5,
}  # fmt: skip
CASES = {
    "through rt2": {},
    "through rt3, eps 0": {"transform": "rt3", "eps": 0.0},
    "on the classifier": {"threat_model": "transfer", "transform": "rt1"},
    "fgsm by bpda": {"attack": "fgsm", "threat_model": "bpda", "transform": "rt3"},
    "no attack": {"attack": attack.NO_ATTACK, "transform": "none"},
    "a bare classifier": {"rows": ["bare"]},
}


@pytest.mark.parametrize("case", CASES)
def test_a_control_that_is_disabled_changes_nothing_and_the_others_do(case: str) -> None:
    scene, values = make_scene(), {**VALUES, "eps": 0.2, **CASES[case]}
    before = tensors(views(values, scene)[-1])
    off = controls.unused(values, scene)
    for name, value in CHANGES.items():
        if values[name] == value or name == "seed":  # the samples and the start may both be unused
            continue
        radius = {"eps": 2.0} if name == "norm" and attack.is_attacking(values) else {}
        after = tensors(views({**values, name: value, **radius}, scene)[-1])
        pairs = zip(before, after, strict=len(after) == len(before))
        same = all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
        assert same == (name in off), f"{name} in {case}"


def test_values_survive_the_way_to_a_yaml_text_and_back_and_edits_by_hand_win() -> None:
    for case in CASES.values():
        values = {**VALUES, **CHANGES, **case, "options": {"restarts": 2}}
        text = to_yaml(values, {"experiment": "mnist", "eps": 0.9})
        assert {**VALUES, **from_yaml(text)} == values
    assert from_yaml(text.replace("\nsteps: 4", "\nsteps: 30"))["steps"] == 30
    assert from_yaml("eps: 8/255\nattack: fgsm\nexperiment: x") == {"eps": 8 / 255, "attack": "fgsm"}


@pytest.mark.parametrize("text", ["eps: [", "", "- 1", "epss: 1", "steps: many", "steps: 1.5", "grey: 3"])
def test_a_yaml_that_cannot_be_used_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        from_yaml(text)


def test_the_attack_notebook_accepts_the_yaml() -> None:
    changes = {"norm": "l2", "eps": 0.25, "steps": 17, "seed": 4, "image": 3, "threat_model": "transfer"}
    text = to_yaml({**VALUES, **changes}, {"dataset": "mnist5k"})
    read = parameters.read(NOTEBOOK, yaml.safe_load(text)).as_dict()
    changes |= {"num_samples": 4, "missing_rate": 0.25, "noise_std": 0.2, "transform": "rt2"}
    assert {name: read[name] for name in changes} == changes


def test_another_attack_or_norm_brings_what_belongs_to_it() -> None:
    scene, start = make_scene(), {**VALUES, "options": {"restarts": 2}, "target": 2, "shown_step": 1}
    flow = changed(start, {"attack": "flow"}, scene, start)
    assert (flow["norm"], flow["eps"], flow["options"], flow["shown_step"]) == ("flow", 0.05, {}, None)
    back = changed(flow, {"attack": "pgd"}, scene, start)
    assert (back["norm"], back["eps"]) == ("linf", 0.1)
    assert changed(start, {"norm": "l2"}, scene, start)["eps"] == 0.5
    assert changed(start, {"noise_std": 0.3}, scene, start)["shown_step"] == 1


@pytest.mark.parametrize("name", [attack.NO_ATTACK, *ATTACKS])
def test_every_attack_of_the_registry_can_be_described_to_the_page(name: str) -> None:
    scene = make_scene()
    values = changed(VALUES, {"attack": name}, scene, VALUES)
    shown = json.loads(json.dumps(controls.described(values, scene)))
    assert name in [value for _, entries in shown["attack"]["entries"] for value, *_ in entries]
    known = ATTACKS[name].options if name in ATTACKS else {}
    plain = {name for name, default in known.items() if not isinstance(default, tuple)}
    assert {option for option, _ in shown["options"]["entries"]} == plain.difference(attack.EFFORT)


def test_attacks_that_refuse_random_models_are_disabled_in_front_of_one() -> None:
    scene, allowed = make_scene(), []
    for case in CASES:
        views({**VALUES, **CASES[case]}, scene)
        shown = controls.described({**VALUES, **CASES[case]}, scene)["attack"]
        allowed += [] if shown["random"] else [case]
    assert allowed == ["on the classifier", "no attack", "a bare classifier"]
    assert [name for _, group in shown["entries"] for name, _, _, *why in group if any(why)] == [
        *("ddn", "fmn", "torchattacks:FAB")
    ]


# what is computed


@pytest.mark.parametrize("transform", ["none", "rt1", "rt2", "rt3"])
@pytest.mark.parametrize("threat_model", ["white-box", "bpda", "transfer"])
def test_what_is_shown_equals_a_library_call_with_the_same_seed(transform: str, threat_model: str) -> None:
    values = {**VALUES, "image": 5, "steps": 4, "eot_samples": 3, "seed": 9, "votes": 6, "sample": 2}
    values |= {"transform": transform, "threat_model": threat_model, "noise_std": 0.3, "missing_rate": 0.5}
    row = final(values)

    defence = make_pipeline(Transform(transform, 0.5, 0.3, 4)).freeze_for_attack()
    images, labels = make_images()
    votes, pictured = (6, 2) if transform != "none" else (1, 0)
    seen = {"white-box": defence, "bpda": attacks.bpda(defence), "transfer": defence.classifier}[threat_model]
    decisions.reseed(defence, 9)
    eot = 3 if votes > 1 and threat_model != "transfer" else 1
    adversarial = attacks.pgd(seen, images[5:6], labels[5:6], eps=0.1, steps=4, eot_samples=eot, seed=9)
    decisions.reseed(defence, 10)
    logits = decisions.sample_logits(defence, adversarial, num_samples=votes)[:, 0]
    assert torch.equal(row.images[-1], adversarial[0])
    torch.testing.assert_close(row.logits[:, -1], logits)
    assert row.unpurified[-1] == defence.classifier(adversarial).argmax()
    torch.testing.assert_close(defence.classifier(row.purified[-1:])[0], logits[pictured])
    decisions.reseed(defence, 10)
    sample = defence.sample(images[:1].expand(votes, -1, -1, -1)).rows(slice(pictured, pictured + 1))
    torch.testing.assert_close(row.transformed[-1], corrupt(adversarial, sample)[0, :3] / 2 + 0.5)


OPTIONS = {name: {} for name in ("fgsm", "apgd", "pgd_ensemble", "flow", "square", "torchattacks:PGD")}
OPTIONS["pgd"] = {"target": 2, "options": {"restarts": 2}}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_attack_of_the_registry_is_run_with_its_own_options(name: str) -> None:
    scene, known, (images, labels) = make_scene(), ATTACKS[name], make_images()
    start = {**VALUES, "attack": "none", "queries": 20, "rows": ["bare"]}
    values = changed(start, {"attack": name, **OPTIONS[name]}, scene, start)
    options = {key: values[key] for key in ("steps", "queries") if key in known.options}
    options |= values["options"] | {"eps": values["eps"], "norm": values["norm"]}
    options |= {"targets": torch.tensor([values["target"]])} if values["target"] >= 0 else {}
    expected = known.function(make_classifier(), images[:1], labels[:1], **options)
    torch.testing.assert_close(final(values, scene).images[-1], expected[0].detach())


def test_one_image_for_all_is_the_one_that_was_made_on_that_defence() -> None:
    values = {**VALUES, "rows": ["bare", "pipeline"]}
    own, other = (row.images[-1] for row in views(values)[-1].rows)
    assert all(torch.equal(row.images[-1], own) for row in views({**values, "attacked": "bare"})[-1].rows)
    assert not torch.equal(other, own)


def test_a_grey_attack_changes_all_channels_alike_and_needs_grey_images() -> None:
    scene = make_scene()
    for expected in (False, True):
        shown = final({**VALUES, "grey": True}, scene).images[-1]
        assert torch.equal(shown[0], shown[1]) == expected
        scene = make_scene()
        scene.images = scene.images[:, :1].expand(-1, 3, -1, -1).contiguous()


def test_votes_in_several_batches_are_those_of_sample_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack, "PIXELS_A_BATCH", 4 * SIZE**2)
    row = final({**VALUES, "attack": attack.NO_ATTACK, "votes": 10, "sample": 6})
    defence = make_pipeline()
    decisions.reseed(defence, 1)
    logits = decisions.sample_logits(defence, make_images()[0][:1], num_samples=10, max_batch=4)
    torch.testing.assert_close(row.logits, logits)
    torch.testing.assert_close(defence.classifier(row.purified)[0], logits[6, 0])


def test_the_path_can_be_walked_without_computing_and_each_step_is_what_it_is_alone() -> None:
    scene, values = make_scene(), {**VALUES, "transform": "rt3", "steps": 6, "eps": 0.2}
    first, last = views(values, scene)
    walked = last.rows[0]
    assert not first.complete and last.complete and walked.steps == list(range(7))
    assert torch.equal(walked.images[0], last.clean)
    for step in (0, 3, None):
        alone = views({**values, "shown_step": step}, scene)[0]
        for a, b in zip(tensors(alone), tensors(last._replace(values=alone.values)), strict=True):
            torch.testing.assert_close(a, b if a.shape == b.shape else b[:, [-1 if step is None else step]])


def test_a_long_attack_keeps_a_bounded_number_of_steps_and_its_last() -> None:
    steps = final({**VALUES, "rows": ["bare"], "steps": 130}).steps
    assert len(steps) <= attack.MAX_PATH + 2 and (steps[0], steps[-1]) == (0, 130)
    assert np.all(np.diff(steps) > 0)


def test_the_pipeline_that_was_given_stays_as_it_is() -> None:
    defence, image = make_pipeline(), torch.zeros(1, 3, SIZE, SIZE)
    transform, noise = defence.transform, make_pipeline().sample(image).noise
    final({**VALUES, "transform": "rt3", "seed": 4}, make_scene(pipeline=defence))
    assert defence.transform == transform and torch.equal(defence.sample(image).noise, noise)


def test_a_transfer_attack_is_not_repeated_for_another_transform_and_a_white_box_one_is(monkeypatch) -> None:
    calls, scene, real = [], make_scene(), attack.run_attack
    monkeypatch.setattr(attack, "run_attack", lambda *arguments: calls.append(1) or real(*arguments))
    for threat_model, expected in (("transfer", 1), ("white-box", 3)):
        for noise in (0.1, 0.2, 0.1):
            final({**VALUES, "threat_model": threat_model, "noise_std": noise}, scene)
        assert len(calls) == expected, threat_model  # the third is remembered in both cases
    final({**VALUES, "noise_std": 0.1, "sample": 3, "votes": 5, "shown_step": 1}, scene)
    assert len(calls) == 3


def test_while_dragging_there_is_a_short_attack_unless_the_whole_one_is_known() -> None:
    scene = make_scene()
    (short,) = views(VALUES, scene, preview=True)
    assert short.preview and not short.done and short.rows[0].steps == [compute.PREVIEW_STEPS]
    views(VALUES, scene)
    assert [view.preview for view in views(VALUES, scene, preview=True)] == [False, False]


def test_a_random_module_of_another_kind_gets_its_votes_and_no_purifier() -> None:
    values = {**VALUES, "attack": attack.NO_ATTACK, "rows": ["noisy"], "votes": 8}
    row, again = (final(values, make_scene(noisy=Noisy().eval())) for _ in range(2))
    assert row.logits.shape == (8, 1, CLASSES) and row.purified is None and row.logits.equal(again.logits)


def test_the_curve_counts_what_is_correct_at_each_eps() -> None:
    values, classifier = {**VALUES, "rows": ["bare"], "image": 2}, make_classifier()
    points = {eps: found for eps, *found in attack.robust_curve(make_scene(), values, "bare", print)}
    images, labels = (part.roll(-2, 0) for part in make_images())
    for eps, shown in ((0, images), (0.1, attacks.pgd(classifier, images, labels, eps=0.1, steps=3))):
        share = float((classifier(shown).argmax(dim=1) == labels).double().mean())
        interval = decisions.wilson_interval(12 * share, 12)
        assert points[eps] == pytest.approx([100 * share, *(100 * end for end in interval)])
    values |= {"attack": "corruption", "norm": "corruption", "eps": 3}
    assert [row[0] for row in attack.robust_curve(make_scene(), values, "bare", print)] == [*range(6)]
