"""The explorer: what is on screen equals a library call, nothing stale is shown, knobs survive a trip through YAML."""

import base64
import io
import re
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from atoplib import attacks, verdicts
from atoplib.attacks.foreign_names import FOREIGN
from atoplib.data import Dataset, Split, to_float
from atoplib.evaluation import evaluate
from atoplib.explorer import compute, draw, page
from atoplib.explorer.knobs import NO_ATTACK, Knobs, applicable, from_yaml, presets, to_yaml
from atoplib.explorer.still import still
from atoplib.explorer.suite import ATTACKS, AttackEntry, is_foreign
from atoplib.explorer.widgets import Explorer, explore, make_explorer, save_view
from atoplib.explorer.worker import Superseded, Worker
from atoplib.figures import save_figure
from atoplib.parameters import NOTEBOOKS, Attack
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import TransformSettings

SIZE, CLASSES = 16, 4
KNOBS = Knobs(dataset="squares", defence="pipeline")


class SlowClassifier(nn.Module):
    """A classifier that waits until it is let go, so that a test can act while an attack runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.entered, self.go = inner, threading.Event(), threading.Event()

    def forward(self, images):
        self.entered.set()
        assert self.go.wait(120)
        return self.inner(images)


def make_dataset(count: int = 12, size: int = SIZE) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(count) % CLASSES)
    return Dataset("squares", split, split, tuple(f"class {number}" for number in range(CLASSES)))


def make_classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    parts = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8 * (SIZE // 4) ** 2, CLASSES)
    return nn.Sequential(*parts).eval()


def make_pipeline(transform: TransformSettings | None = None, seed: int = 0) -> AToPPipeline:
    torch.manual_seed(seed + 10)
    purifier = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1), nn.Tanh())
    transform = transform or TransformSettings("rt2", missing_rate=0.25, noise_std=0.2)
    return AToPPipeline(transform, purifier, make_classifier(seed)).eval()


def make_scene(**defences: nn.Module) -> compute.Scene:
    defences = defences or {"pipeline": make_pipeline(), "bare": make_classifier()}
    return compute.Scene({"squares": make_dataset()}, defences, ATTACKS)


def final(knobs: Knobs, scene: compute.Scene, memory: compute.Memory | None = None) -> compute.View:
    return list(compute.views(knobs, scene, memory or compute.Memory()))[-1]


def make(**start) -> Explorer:
    defences = {"pipeline": make_pipeline(), "bare": make_classifier()}
    return make_explorer(defences, make_dataset(), **{"steps": 3, "eps": 0.1, "num_draws": 4, **start})


def settled(explorer: Explorer) -> compute.View:
    assert explorer.worker.wait(120)
    assert explorer.view is not None, explorer.pictures.value
    assert explorer.view.knobs == explorer.knobs and explorer.view.adapted
    return explorer.view


def text_of(html: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", html).split())


# knobs


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"norm": "l1"}, "unknown norm 'l1'; allowed: linf, l2"),
        ({"attack_sees": "all"}, "unknown attack_sees 'all'"),
        ({"transform": "rt4"}, "unknown transform 'rt4'"),
        ({"eps": -0.1}, "eps must be 0 or above"),
        ({"eps": 8.0}, "eps of the linf norm must be at most 1"),
        ({"eps": float("nan")}, "eps must be 0 or above"),
        ({"norm": "flow", "eps": 3.0}, "eps of a flow must be at most 2"),
        ({"queries": 0}, "queries must lie in 1..10000"),
        ({"steps": 0}, "steps must lie in 1..1000, got 0"),
        ({"num_draws": 0}, "num_draws must lie in 1..200"),
        ({"missing_rate": 1.0}, "missing_rate must lie in"),
        ({"noise_std": -1.0}, "noise_std must lie in"),
        ({"image": -1}, "image must lie in 0.."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_knob_beyond_its_range_is_refused_with_a_sentence(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(KNOBS, **wrong)


@pytest.mark.parametrize("name", ["dataset", "defence", "attack"])
def test_a_name_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ValueError, match=f"there is no {name} 'pipelin'.*allowed: "):
        final(replace(KNOBS, **{name: "pipelin"}), make_scene())


CHANGES = {
    "image": 3,
    "attack_sees": "classifier",
    "norm": "l2",
    "eps": 0.25,
    "steps": 4,
    "eot_samples": 3,
    "queries": 9,
    "missing_rate": 0.5,
    "noise_std": 0.4,
    "num_masks": 6,
    "seed": 5,
    "num_draws": 7,
    "draw": 2,
    "shown_step": 0,
}
CASES = {
    "pgd through rt2": {},
    "pgd through rt1": {"transform": "rt1"},
    "pgd through rt3": {"transform": "rt3"},
    "pgd without a transform": {"transform": "none"},
    "pgd on the classifier": {"attack_sees": "classifier"},
    "pgd by bpda": {"attack_sees": "bpda"},
    "pgd with several draws": {"eot_samples": 2},
    "fgsm": {"attack": "fgsm"},
    "no attack": {"attack": NO_ATTACK},
    "eps 0": {"eps": 0.0},
    "a bare classifier": {"defence": "bare"},
    "a bare classifier, no attack": {"defence": "bare", "attack": NO_ATTACK},
}


@pytest.mark.parametrize("case", CASES)
def test_the_knobs_that_are_disabled_change_nothing_and_the_others_do(case: str) -> None:
    scene = make_scene()
    knobs = replace(KNOBS, **{"eps": 0.2, "steps": 3, "num_draws": 4, **CASES[case]})
    before = final(knobs, scene)
    shown = ("clean", "adversarial", "path_losses", "votes")

    def differ(view: compute.View) -> bool:
        parts = [(getattr(before, name), getattr(view, name)) for name in shown]
        if before.pictured is not None:
            parts += [(before.pictured.purified, view.pictured.purified), (before.pictured.masks, view.pictured.masks)]
        return not all(a.shape == b.shape and torch.equal(a, b) for a, b in parts)

    for name, value in CHANGES.items():
        if getattr(knobs, name) == value:
            continue
        changed = replace(knobs, **{name: value}, **({"eps": 2.0} if name == "norm" and knobs.attacks else {}))
        assert differ(final(changed, scene)) == (name in before.used), f"{name} in {case}"


def test_knobs_survive_the_way_to_a_yaml_file_and_back() -> None:
    other = Knobs(dataset="other", defence="another")
    for case in CASES.values():
        knobs = replace(KNOBS, **{**CHANGES, **case})
        assert from_yaml(to_yaml(knobs, {"experiment": "mnist", "eps": 0.9, "rows": 3}, max_batch=256), other) == knobs


def test_the_yaml_is_accepted_by_the_attack_notebook_and_holds_its_parameters() -> None:
    knobs = replace(KNOBS, dataset="mnist5k", eps=0.25, steps=17, eot_samples=3, seed=4, num_draws=5, norm="l2")
    written = yaml.safe_load(to_yaml(knobs, {"experiment": "mine", "show": "ap", "max_test": 30}, max_batch=64))
    accepted = Attack.from_mapping(written)
    assert (accepted.experiment, accepted.max_test, accepted.max_batch) == ("mine", 30, 64)
    assert (accepted.eps, accepted.steps, accepted.eot_samples) == (0.25, 17, 3)
    assert (accepted.seed, accepted.num_draws, accepted.norm) == (4, 5, "l2")
    (alone,) = accepted.plan.attacks
    assert (alone.attack, alone.norm, alone.sees) == ("pgd", "l2", "defence")
    built = alone.build(accepted.budget, random=True, verdict=accepted.plan.verdict)
    assert (built.eps, built.steps, built.step_size, built.eot_samples, built.stop_after) == (0.25, 17, 0.25 / 3, 3, 0)


def test_a_value_edited_by_hand_wins_over_the_explorers_own_line() -> None:
    text = to_yaml(replace(KNOBS, steps=10), {}, max_batch=1)
    assert from_yaml(text.replace("\nsteps: 10", "\nsteps: 30"), KNOBS).steps == 30
    assert from_yaml("eps: 8/255\nattack: fgsm", KNOBS) == replace(KNOBS, eps=8 / 255, attack="fgsm")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("eps: [", "cannot be read as YAML"),
        ("a: &a [1]\nb: *a", "an alias (*a) is not allowed"),
        ("eps: 0.1\neps: 0.2", "'eps' stands twice"),
        ("", "the YAML is empty"),
        ("- 1", "must be a mapping"),
        ("epss: 1", "there is no knob 'epss' (did you mean 'eps'?)"),
        ("steps: many", "parameter 'steps' must be of type int, got 'many'"),
        ("steps: 0", "steps must lie in 1..1000"),
        ("# explorer: [1]", "must be a mapping"),
    ],
)
def test_a_yaml_that_cannot_be_read_is_refused_with_a_sentence(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        from_yaml(text, KNOBS)


def test_every_preset_keeps_image_and_eps_and_strict_is_the_strongest() -> None:
    start = replace(KNOBS, eps=0.2, image=3, seed=7)
    made = presets(start)
    assert all((knobs.eps, knobs.image, knobs.seed) == (0.2, 3, 7) for knobs in made.values())
    assert not made["clean"].attacks
    assert made["paper"].attack_sees == "classifier" and made["strict"].attack_sees == "pipeline"
    assert made["strict"].steps > made["paper"].steps and made["strict"].eot_samples > made["paper"].eot_samples


OWN = tuple(name for name in ATTACKS if not is_foreign(name))


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_every_attack_uses_knobs_that_exist_and_reads_its_own_settings(name: str, random: bool) -> None:
    entry = ATTACKS[name]
    assert set(entry.uses) <= {item.name for item in fields(Knobs)}
    norm = entry.norms[-1]
    wanted = {"eps": 0.125, "steps": 7, "eot_samples": 3, "queries": 11}
    settings = entry.settings(replace(KNOBS, attack=name, norm=norm, **wanted), random)
    settings = settings.base if name == "adaptive" else settings
    wanted["bound" if norm == "flow" else "eps"] = wanted.pop("eps")
    read = {knob for knob in wanted if knob in {item.name for item in fields(settings)}}
    read -= {"steps"} if name == "fgsm" else set()
    assert {knob for knob in entry.uses if knob in wanted} | {"eps"} == read - {"bound"} | {"eps"}
    for knob in read:
        assert getattr(settings, knob) == (1 if knob == "eot_samples" and not random else wanted[knob])


def test_the_attacks_of_torchattacks_are_all_there_and_have_their_own_knobs() -> None:
    names = [name for name in ATTACKS if is_foreign(name)]
    assert len(names) == len(FOREIGN) and names == list(ATTACKS)[-len(names) :]
    assert set(ATTACKS["torchattacks:PGD"].uses) == {"eps", "steps", "eot_samples", "seed"}
    assert set(ATTACKS["torchattacks:FGSM"].uses) == {"eps", "eot_samples"}
    assert set(ATTACKS["torchattacks:Square"].uses) == {"eps", "norm", "queries", "eot_samples", "seed"}
    assert ATTACKS["torchattacks:CW"].norms == ("l2",)
    for name in names:
        knobs = replace(KNOBS, attack=name, norm=ATTACKS[name].norms[-1], steps=7, queries=11)
        settings = ATTACKS[name].settings(knobs, True)
        known = FOREIGN[settings.name]
        assert settings.options.get(known.steps, 7) == 7 and settings.options.get(known.queries, 11) == 11
        assert "torchattacks" in page.title(name)


def test_an_attack_of_torchattacks_can_be_cancelled_on_its_way() -> None:
    explorer = make(attack="torchattacks:PGD", steps=1000)
    explorer.refresh()
    seen = threading.Event()
    explorer.status.observe(lambda change: seen.set() if "forward passes" in change["new"] else None, "value")
    assert seen.wait(120)
    explorer.cancel()
    assert explorer.worker.wait(120) and explorer.view is None and "Cancelled" in explorer.status.value
    explorer.request(steps=2)
    view = settled(explorer)
    assert view.path_steps == (0, 1) and "no step on the way" in page.path(view)


def test_an_attack_of_one_step_has_no_steps_to_set() -> None:
    assert applicable(KNOBS, ATTACKS["fgsm"].uses, purifies=True, random=True) & {"steps"} == set()


# what is computed


@pytest.mark.parametrize("transform", ["none", "rt1", "rt2", "rt3"])
@pytest.mark.parametrize("sees", ["classifier", "pipeline", "bpda"])
def test_what_is_shown_equals_a_library_call_with_the_same_seed(transform: str, sees: str) -> None:
    scene = make_scene()
    knobs = replace(KNOBS, image=5, eps=0.1, steps=4, eot_samples=3, seed=9, num_draws=6, draw=2)
    knobs = replace(knobs, transform=transform, attack_sees=sees, noise_std=0.3, missing_rate=0.5)
    view = final(knobs, scene)

    settings = TransformSettings(transform, missing_rate=0.5, noise_std=0.3, num_masks=4)
    defence = make_pipeline(settings)
    images, labels = to_float(make_dataset().test.images[5:6]), torch.tensor([5 % CLASSES])
    random = transform != "none"
    verdicts.reseed(defence, 9)
    adversarial = attacks.pgd(
        {"pipeline": defence, "bpda": attacks.BPDA(defence), "classifier": defence.classifier}[sees],
        images,
        labels,
        attacks.PGDSettings(eps=0.1, steps=4, eot_samples=3 if random and sees != "classifier" else 1),
        generator=torch.Generator().manual_seed(9),
    )
    verdicts.reseed(defence, 10)
    logits = verdicts.draw_logits(defence, adversarial, num_draws=6 if random else 1)[:, 0]
    torch.testing.assert_close(view.adversarial, adversarial[0])
    torch.testing.assert_close(view.probabilities["purified"], logits[2 if random else 0].softmax(dim=0))
    torch.testing.assert_close(view.probabilities["adversarial"], defence.classifier(adversarial)[0].softmax(dim=0))
    torch.testing.assert_close(view.probabilities["clean"], defence.classifier(images)[0].softmax(dim=0))
    assert view.votes.tolist() == logits.argmax(dim=1).tolist()
    verdicts.reseed(defence, 10)
    shown = defence.draw(images.expand(6 if random else 1, -1, -1, -1))
    torch.testing.assert_close(view.pictured.masks, shown.masks[:, 2 if random else 0])
    assert len(view.pictured.transformed) == len(shown.masks)


@pytest.mark.parametrize(("sees", "column"), [("pipeline", "white-box"), ("bpda", "BPDA"), ("classifier", "transfer")])
def test_the_attack_notebooks_evaluation_with_the_yaml_gives_what_is_on_screen(sees: str, column: str) -> None:
    knobs = replace(KNOBS, image=7, eps=0.1, steps=4, eot_samples=2, seed=3, num_draws=9, attack_sees=sees)
    knobs = replace(knobs, transform="rt3", noise_std=0.35, num_masks=3)
    view = final(knobs, make_scene())
    parameters = Attack.from_mapping(yaml.safe_load(to_yaml(knobs, {}, max_batch=view.max_batch)))
    defence, test = make_pipeline(), make_dataset().test
    defence.transform = replace(defence.transform, **parameters.transform_changes)
    measured = evaluate(
        {"it": defence},
        to_float(test.images[parameters.image : parameters.image + 1]),
        test.labels[parameters.image : parameters.image + 1],
        parameters.plan,
        parameters.budget,
        classifier=defence.classifier,
        seeds=parameters.seeds,
        max_batch=parameters.max_batch,
        keep_images=True,
    )
    (score,) = (score for score in measured.scores if score.attack == column)
    torch.testing.assert_close(measured.adversarial["it", column, 3][0], view.adversarial)
    assert bool(score.one_shot) == (int(view.votes[0]) == view.label)
    assert bool(score.majority) == (view.majority == view.label)
    assert bool(score.worst_of_n) == (view.right_draws == 9)


def is_read_right(knobs: Knobs) -> bool:
    """Whether what the attack sees reads the clean image correctly, in every draw."""
    view = final(replace(knobs, attack=NO_ATTACK, num_draws=20), make_scene())
    right = int(view.probabilities["clean"].argmax()) == view.label
    return right if knobs.attack_sees == "classifier" else view.right_draws == 20


@pytest.mark.parametrize("name", [*OWN, *(f"torchattacks:{name}" for name in ("FFGSM", "MIFGSM", "VMIFGSM", "PIFGSM"))])
def test_every_attack_of_the_suite_is_shown_as_the_attack_notebook_measures_it(name: str) -> None:
    radius = {"norm": "flow", "eps": 0.2} if name == "stadv" else {"eps": 0.05}
    knobs = replace(KNOBS, attack=name, steps=3, eot_samples=2, queries=5, num_draws=4, seed=2, noise_std=0.02, **radius)
    knobs = replace(knobs, attack_sees="classifier" if name == "fab" else "pipeline")
    images = (number for number in range(12) if is_read_right(replace(knobs, image=number)))
    image = next(images)  # some attacks leave the others as they are
    knobs = replace(knobs, image=image)
    view = final(knobs, make_scene())
    assert not torch.equal(view.adversarial, view.clean)
    assert view.path_steps[0] == 0 and len(view.path_steps) > 1
    assert name != "stadv" or "flow 0.2" in page.attack_text(view)
    parameters = Attack.from_mapping(yaml.safe_load(to_yaml(knobs, {}, max_batch=view.max_batch)))
    assert parameters.attack_dtype == torch.float32
    defence, test = make_pipeline(), make_dataset().test
    defence.transform = replace(defence.transform, **parameters.transform_changes)
    (column,) = (planned.heading for planned in parameters.plan.attacks)
    measured = evaluate(
        {"it": defence},
        to_float(test.images[image : image + 1]),
        test.labels[image : image + 1],
        parameters.plan,
        parameters.budget,
        classifier=defence.classifier,
        seeds=parameters.seeds,
        max_batch=parameters.max_batch,
        keep_images=True,
    )
    torch.testing.assert_close(measured.adversarial["it", column, 2][0], view.adversarial)


def test_an_attack_that_cannot_be_made_on_what_it_sees_is_a_sentence() -> None:
    for name, defence, said in (
        ("fab", "pipeline", "FAB needs a deterministic model"),
        ("adaptive", "bare", "needs an AToP"),
    ):
        with pytest.raises(ValueError, match=said):
            final(replace(KNOBS, attack=name, defence=defence, steps=2), make_scene())
    with pytest.raises(ValueError, match="stadv knows no norm 'linf'; allowed: flow"):
        final(replace(KNOBS, attack="stadv"), make_scene())


def test_draws_in_several_batches_are_those_of_draw_logits_in_such_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "PIXELS_A_BATCH", 4 * SIZE**2)
    scene = make_scene()
    view = final(replace(KNOBS, attack=NO_ATTACK, num_draws=10, draw=6), scene)
    defence = make_pipeline(TransformSettings("rt2"))
    verdicts.reseed(defence, 1)
    logits = verdicts.draw_logits(defence, view.clean[None], num_draws=10, max_batch=view.max_batch)[:, 0]
    assert view.max_batch == 4
    assert view.votes.tolist() == logits.argmax(dim=1).tolist()
    torch.testing.assert_close(view.probabilities["purified"], logits[6].softmax(dim=0))
    torch.testing.assert_close(defence.classifier(view.pictured.purified[None])[0], logits[6])


def test_the_pipeline_that_was_given_stays_as_it_is() -> None:
    defence = make_pipeline()
    before, transform = defence.draw(torch.zeros(1, 3, SIZE, SIZE)), defence.transform
    verdicts.reseed(defence, 0)
    final(replace(KNOBS, transform="rt3", seed=4), make_scene(pipeline=defence))
    assert defence.transform == transform and defence.seed == 0 and not defence.training
    torch.testing.assert_close(defence.draw(torch.zeros(1, 3, SIZE, SIZE)).noise, before.noise)


def test_a_transfer_attack_is_not_repeated_for_another_transform_and_an_adapted_one_is() -> None:
    calls = []

    def counted(*arguments, **named):
        calls.append(1)
        return attacks.pgd(*arguments, **named)

    entry = AttackEntry(counted, ATTACKS["pgd"].settings, ATTACKS["pgd"].uses)
    scene = compute.Scene({"squares": make_dataset()}, {"pipeline": make_pipeline()}, {"pgd": entry})
    memory = compute.Memory()
    for sees, expected in (("classifier", 1), ("pipeline", 3)):
        for noise in (0.1, 0.2, 0.1):
            final(replace(KNOBS, attack_sees=sees, noise_std=noise, steps=2), scene, memory)
        assert len(calls) == expected, sees  # the third is remembered in both cases
    final(replace(KNOBS, attack_sees="pipeline", noise_std=0.1, steps=2, draw=3, num_draws=5, shown_step=1), scene, memory)
    assert len(calls) == 3


def test_a_preview_comes_before_an_attack_is_adapted_and_says_so() -> None:
    scene, memory = make_scene(), compute.Memory()
    first = final(replace(KNOBS, steps=3), scene, memory)
    preview, adapted = compute.views(replace(KNOBS, steps=3, noise_std=0.5), scene, memory)
    assert not preview.adapted and adapted.adapted
    assert torch.equal(preview.adversarial, first.adversarial)
    assert not torch.equal(preview.adversarial, adapted.adversarial)
    assert "preview" in page.summary(preview) and "preview" not in page.summary(adapted)
    assert len(preview.path_losses) == 0 and "the attack to come" in page.path(preview)
    assert len(list(compute.views(replace(KNOBS, steps=3, image=1), scene, memory))) == 1


def test_the_path_starts_clean_ends_at_the_result_and_can_be_walked() -> None:
    scene, memory = make_scene(), compute.Memory()
    knobs = replace(KNOBS, attack_sees="classifier", steps=6, eps=0.1)
    end = final(knobs, scene, memory)
    assert end.path_steps == tuple(range(7)) and end.step == 6
    start = final(replace(knobs, shown_step=0), scene, memory)
    assert torch.equal(start.adversarial, start.clean)
    classifier = make_classifier()
    for step in (0, 3, 6):
        view = final(replace(knobs, shown_step=step), scene, memory)
        logits = classifier(view.adversarial[None])
        loss = nn.functional.cross_entropy(logits, torch.tensor([view.label]))
        torch.testing.assert_close(view.path_losses[step], loss)
        assert int(view.path_classes[step]) == int(logits.argmax())


def test_a_turned_transform_costs_no_pass_but_those_of_the_vote() -> None:
    pipeline, memory = make_pipeline(), compute.Memory()
    read, purified = [], []
    pipeline.classifier.register_forward_hook(lambda _module, images, _logits: read.append(len(images[0])))
    pipeline.purifier.register_forward_hook(lambda _module, images, _made: purified.append(len(images[0])))
    scene = make_scene(pipeline=pipeline)
    for sees, reads in (("classifier", [10]), ("pipeline", [10, 2])):  # the latter: clean and adversarial
        knobs = replace(KNOBS, attack_sees=sees, steps=6, num_draws=10)
        final(knobs, scene, memory)
        read.clear(), purified.clear()
        view = next(compute.views(replace(knobs, noise_std=0.5), scene, memory))
        assert read == reads and purified == [10] and view.adapted == (sees == "classifier")


def test_under_a_pipeline_the_path_ends_in_the_decision_that_is_pictured() -> None:
    for transform in ("rt1", "rt2", "rt3"):
        view = final(replace(KNOBS, transform=transform, eps=0.2, steps=3, draw=1), make_scene())
        loss = -view.probabilities["purified"][view.label].log()
        torch.testing.assert_close(view.path_losses[-1], loss, atol=1e-5, rtol=1e-4)


def test_a_long_attack_keeps_a_bounded_number_of_steps_and_its_last() -> None:
    view = final(replace(KNOBS, defence="bare", steps=200, eps=0.05), make_scene())
    assert len(view.path_steps) <= compute.MAX_PATH + 2
    assert view.path_steps[0] == 0 and view.path_steps[-1] == 200
    assert np.all(np.diff(view.path_steps) > 0)


def test_memory_forgets_the_oldest_attacks() -> None:
    memory = compute.Memory()
    for number in range(compute.KEPT_PATHS + 5):
        memory.keep(((number,), ()), compute.AttackPath((0,), torch.zeros(1, 3, 2, 2)))
    assert len(memory.paths) == compute.KEPT_PATHS and ((4,), ()) not in memory.paths


def test_eps_0_shows_the_clean_image_and_no_path() -> None:
    view = final(replace(KNOBS, eps=0.0), make_scene())
    assert torch.equal(view.clean, view.adversarial) and view.path_steps == (0,)
    assert "Eps 0: no attack" in page.path(view)


def test_a_random_module_of_another_kind_gets_its_votes_and_no_transform() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.generator = make_classifier(), torch.Generator()

        def reseed(self, seed: int) -> None:
            self.generator.manual_seed(seed)

        def forward(self, images):
            return self.inner(images + torch.randn(images.shape, generator=self.generator))

    view = final(replace(KNOBS, attack=NO_ATTACK, defence="noisy", num_draws=8), make_scene(noisy=Noisy().eval()))
    assert len(view.votes) == 8 and view.pictured is None
    assert {"num_draws", "draw"} <= view.used and "transform" not in view.used


def test_the_next_misread_image_is_the_first_one_that_the_defence_misreads() -> None:
    scene, knobs = make_scene(), replace(KNOBS, defence="bare")
    images = to_float(make_dataset().test.images)
    wrong = (make_classifier()(images).argmax(dim=1) != make_dataset().test.labels).nonzero()[:, 0].tolist()
    assert wrong, "the test needs an image that is misread"
    order = torch.arange(12).roll(-4)
    expected = next(number for number in order.tolist() if number in wrong)
    assert compute.next_misclassified(knobs, scene, compute.Memory(), order) == expected
    right = torch.tensor([number for number in range(12) if number not in wrong], dtype=torch.int64)
    assert compute.next_misclassified(knobs, scene, compute.Memory(), right) is None


def test_the_curve_counts_what_the_defence_reads_at_each_eps() -> None:
    scene = make_scene()
    knobs = replace(KNOBS, defence="bare", eps=0.1, steps=3, image=2)
    curve = compute.robust_curve(knobs, scene, compute.Memory())
    images, labels = to_float(make_dataset().test.images.roll(-2, 0)), make_dataset().test.labels.roll(-2, 0)
    assert curve.images == 12 and curve.eps[0] == 0.0 and 0.1 in curve.eps
    classifier = make_classifier()
    assert curve.right[0] == int((classifier(images).argmax(dim=1) == labels).sum())
    generator = torch.Generator().manual_seed(0)
    broken = attacks.pgd(classifier, images, labels, attacks.PGDSettings(eps=0.1, steps=3), generator=generator)
    assert curve.right[curve.eps.index(0.1)] == int((classifier(broken).argmax(dim=1) == labels).sum())
    with pytest.raises(ValueError, match="needs an attack"):
        compute.robust_curve(replace(knobs, attack=NO_ATTACK), scene, compute.Memory())


# pictures


def test_a_picture_has_the_pixels_of_the_image() -> None:
    image = to_float(make_dataset().test.images[0])
    shown = np.asarray(Image.open(io.BytesIO(draw.picture(image))))
    assert np.array_equal(shown, make_dataset().test.images[0].permute(1, 2, 0).numpy())


def test_a_map_is_white_at_zero_red_above_blue_below_and_symmetric() -> None:
    change = torch.tensor([[-9.0, -4.0, 0.0, 4.0, 8.0]])
    red, _, blue = np.asarray(Image.open(io.BytesIO(draw.change_map(change, 8.0)))).astype(int)[0].T
    assert min(red[2], blue[2]) > 240 and red[4] > blue[4] + 50 and blue[0] > red[0] + 50
    assert red[3] > blue[3] and blue[1] > red[1]
    saturated = np.asarray(Image.open(io.BytesIO(draw.change_map(torch.tensor([[-8.0]]), 8.0))))
    assert np.array_equal(saturated[0, 0], np.array([red[0], *saturated[0, 0, 1:2], blue[0]]))


def test_the_page_shows_the_numbers_and_marks_the_true_class() -> None:
    view = final(replace(KNOBS, eps=0.3, steps=5, num_draws=6), make_scene())
    shown = text_of(page.pictures(view))
    for stage in ("clean", "adversarial", "purified"):
        for share in view.probabilities[stage].tolist():
            assert f"{100 * share:.1f}" in shown
    assert f"({view.right_draws} of 6 draws right)" in shown
    for bars in re.findall(r'<div class="atop-bars">.*?</div></div><span[^>]*>[^<]*</span></div>', page.pictures(view)):
        assert bars.count("atop-of-right") == 1 and bars.count("\N{BLACK LEFT-POINTING SMALL TRIANGLE}") == 1
    png = base64.b64decode(re.findall(r"base64,([^\"]*)", page.pictures(view))[1])
    shown = np.asarray(Image.open(io.BytesIO(png))) / 255
    np.testing.assert_allclose(shown, view.adversarial.permute(1, 2, 0), atol=0.5 / 255 + 1e-6)


def test_every_picture_has_a_text_for_those_who_cannot_see_it() -> None:
    for changes in ({}, {"transform": "rt3"}, {"defence": "bare"}):
        view = final(replace(KNOBS, **changes), make_scene())
        html = page.pictures(view) + page.path(view)
        assert html.count("<img") == html.count('alt="') and "<svg" in html and 'aria-label="cross' in html


def test_rt3_shows_each_mask_and_what_was_filled_in_there() -> None:
    view = final(replace(KNOBS, transform="rt3", num_masks=5), make_scene())
    assert all(f"mask {number}<" in page.pictures(view) for number in range(1, 6))
    torch.testing.assert_close(view.pictured.masks.sum(dim=0), torch.ones(1, SIZE, SIZE))


def test_of_many_classes_the_likeliest_and_the_true_one_get_a_bar() -> None:
    view = final(KNOBS, make_scene())
    many = torch.linspace(0, 1, 200)
    probabilities = {stage: many for stage in view.probabilities}
    view = replace(view, classes=tuple(map(str, range(200))), label=3, probabilities=probabilities)
    assert page.shown_classes(view) == [3, *range(191, 200)]


def test_names_of_classes_cannot_break_the_page() -> None:
    view = replace(final(KNOBS, make_scene()), classes=("<b>", "&amp;", '"x"', "</div>"))
    assert "<b>" not in page.pictures(view).replace("<b>&", "") and "</div></span>" not in page.pictures(view)


@pytest.mark.parametrize("changes", [{}, {"defence": "bare"}, {"attack": NO_ATTACK}, {"transform": "rt3"}], ids=str)
def test_the_still_shows_the_same_pictures_and_can_be_saved(changes: dict, tmp_path: Path) -> None:
    view = final(replace(KNOBS, **changes), make_scene())
    figure = still(view)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_allclose(shown[1], view.adversarial.permute(1, 2, 0), atol=1e-6)
    if view.pictured is not None:
        np.testing.assert_allclose(shown[4], view.pictured.purified.clamp(0, 1).permute(1, 2, 0), atol=1e-6)
    save_figure(figure, tmp_path / "still.png")
    assert Image.open(tmp_path / "still.png").width > 1200


# the worker


def quiet() -> None:
    """Nothing happens."""


def test_the_last_request_wins_and_the_ones_between_never_run() -> None:
    worker, shown, go, entered = Worker(print, quiet), [], threading.Event(), threading.Event()

    def first(ticket) -> None:
        entered.set()
        assert go.wait(10)
        ticket.publish(lambda: shown.append("first"))

    worker.submit(first)
    assert entered.wait(10)
    for number in range(10):
        worker.submit(lambda ticket, number=number: ticket.publish(lambda: shown.append(number)))
    go.set()
    assert worker.wait(60) and shown == [9]


def test_a_cancelled_job_stops_at_its_next_check_and_shows_nothing() -> None:
    worker, entered, shown = Worker(print, quiet), threading.Event(), []

    def endless(ticket) -> None:
        while True:
            entered.set()
            ticket.check()
            time.sleep(0.001)

    worker.submit(endless)
    assert entered.wait(10) and not worker.idle
    assert worker.cancel() and worker.wait(60) and worker.idle
    assert not worker.cancel()
    worker.submit(lambda ticket: ticket.publish(lambda: shown.append("next")))
    assert worker.wait(60) and shown == ["next"]


def test_an_error_is_reported_unless_a_later_request_has_come() -> None:
    errors, go, entered = [], threading.Event(), threading.Event()
    worker = Worker(errors.append, quiet)

    def failing(ticket) -> None:
        entered.set()
        assert go.wait(10)
        raise RuntimeError("too late")

    worker.submit(failing)
    assert entered.wait(10)
    worker.submit(lambda ticket: (_ for _ in ()).throw(RuntimeError("in time")))
    go.set()
    assert worker.wait(60) and [str(error) for error in errors] == ["in time"]


def test_a_thread_that_has_nothing_to_do_ends_and_another_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoplib.explorer.worker.IDLE_SECONDS", 0.01)
    worker, threads = Worker(print, quiet), []
    for _ in range(2):
        worker.submit(lambda ticket: threads.append(threading.current_thread()))
        assert worker.wait(60)
        threads[-1].join(10)
        assert not threads[-1].is_alive()
    assert threads[0] is not threads[1]


def test_publishing_after_a_later_request_raises() -> None:
    worker, raised = Worker(print, quiet), []

    def job(ticket) -> None:
        worker.cancel()
        try:
            ticket.publish(lambda: raised.append("shown"))
        except Superseded:
            raised.append("superseded")

    worker.submit(job)
    assert worker.wait(60) and raised == ["superseded"]


# the widget


def test_turning_a_control_changes_the_picture_and_the_yaml() -> None:
    explorer = make()
    explorer.refresh()
    before, written = settled(explorer), explorer.yaml.value
    explorer.controls["eps"].value = 64
    after = settled(explorer)
    assert after.knobs.eps == pytest.approx(64 / 255) and not torch.equal(before.adversarial, after.adversarial)
    assert from_yaml(explorer.yaml.value, KNOBS) == after.knobs and explorer.yaml.value != written


@pytest.mark.parametrize(
    ("control", "value", "knobs"),
    [
        ("missing_rate", 50, {"missing_rate": 0.5}),
        ("noise_std", 0.5, {"noise_std": 0.5}),
        ("transform", "rt3", {"transform": "rt3"}),
        ("attack", NO_ATTACK, {"attack": NO_ATTACK}),
        ("attack_sees", "classifier", {"attack_sees": "classifier"}),
        ("steps", 7, {"steps": 7}),
        ("eot_samples", 3, {"eot_samples": 3}),
        ("num_draws", 9, {"num_draws": 9}),
        ("seed", 11, {"seed": 11}),
        ("defence", "bare", {"defence": "bare"}),
        ("shown_step", 1, {"shown_step": 1}),
    ],
)
def test_each_control_sets_its_knob(control: str, value, knobs: dict) -> None:
    explorer = make()
    explorer.refresh()
    before = settled(explorer).knobs
    explorer.controls[control].value = value
    assert settled(explorer).knobs == replace(before, **knobs)


def test_ten_quick_moves_end_in_the_picture_of_the_last() -> None:
    explorer = make()
    explorer.refresh()
    for value in (5, 90, 10, 80, 15, 70, 20, 60, 25, 50):
        explorer.controls["missing_rate"].value = value
    view = settled(explorer)
    assert view.knobs.missing_rate == 0.5
    expected = final(explorer.knobs, make_scene())
    torch.testing.assert_close(view.pictured.purified, expected.pictured.purified)
    assert explorer.pictures.value == page.pictures(replace(view))
    assert "atop-stale" not in explorer.shown._dom_classes


def test_pictures_are_dimmed_while_others_are_made_and_after_a_cancellation() -> None:
    slow = SlowClassifier(make_classifier())
    explorer = make_explorer({"slow": slow.eval(), "bare": make_classifier()}, make_dataset(), defence="bare", steps=3)
    explorer.refresh()
    settled(explorer)
    explorer.controls["defence"].value = "slow"
    assert slow.entered.wait(120)
    assert "atop-stale" in explorer.shown._dom_classes and not explorer.cancel_button.disabled
    explorer.cancel()
    slow.go.set()
    assert explorer.worker.wait(120)
    assert explorer.view.knobs.defence == "bare" and "atop-stale" in explorer.shown._dom_classes
    assert "Cancelled: the dimmed pictures" in explorer.status.value and not explorer.compute_button.disabled
    explorer.compute_button.click()
    assert settled(explorer).knobs.defence == "slow" and "atop-stale" not in explorer.shown._dom_classes


def test_controls_that_do_not_apply_are_disabled() -> None:
    explorer = make()
    explorer.refresh()
    for changes in (*CASES.values(), {"attack": "pgd", "defence": "pipeline", "transform": "rt2"}):
        explorer.request(**{"defence": "pipeline", **changes})
        view = settled(explorer)
        disabled = {name for name, control in explorer.controls.items() if control.disabled}
        assert disabled == set(explorer.controls) - view.used, changes
        assert explorer.again_button.disabled == ("draw" not in view.used)


def test_the_norm_takes_its_own_radius_along() -> None:
    explorer = make(eps=8 / 255)
    explorer.controls["norm"].value = "l2"
    assert settled(explorer).knobs.eps == pytest.approx(0.5)
    assert "l2" in explorer.controls["eps"].description and explorer.controls["eps"].value == pytest.approx(0.5)
    explorer.controls["norm"].value = "linf"
    assert settled(explorer).knobs.eps == pytest.approx(8 / 255)
    assert explorer.controls["eps"].value == pytest.approx(8)


def test_an_attack_with_a_radius_of_its_own_takes_it_and_gives_it_back() -> None:
    explorer = make(eps=0.2)
    explorer.refresh()
    settled(explorer)
    explorer.controls["attack"].value = "stadv"
    view = settled(explorer)
    assert (view.knobs.norm, view.knobs.eps) == ("flow", 0.05) and explorer.controls["norm"].disabled
    assert explorer.controls["eps"].description == "eps (flow)" and explorer.controls["eps"].value == 0.05
    explorer.controls["attack"].value = "pgd"
    assert (settled(explorer).knobs.norm, explorer.knobs.eps) == ("linf", 0.2)
    assert [value for _, value in explorer.controls["norm"].options] == ["linf", "l2"]


def test_buttons_draw_again_go_on_and_reset() -> None:
    explorer = make(image=1)
    explorer.refresh()
    first = settled(explorer)
    explorer.again_button.click()
    assert not torch.equal(settled(explorer).pictured.masks, first.pictured.masks)
    explorer.next_button.click()
    assert settled(explorer).knobs.image == 2
    explorer.previous_button.click()
    explorer.previous_button.click()
    explorer.previous_button.click()
    assert settled(explorer).knobs.image == 11
    explorer.preset_buttons[0].click()
    assert settled(explorer).knobs.attack == NO_ATTACK and explorer.knobs.image == 11
    explorer.preset_buttons[-1].click()
    assert settled(explorer).knobs == explorer.start


def test_the_class_filter_leaves_one_class_and_the_search_stays_in_it() -> None:
    explorer = make(defence="bare")
    explorer.refresh()
    explorer.class_filter.value = 2
    assert settled(explorer).label == 2 and explorer.image.max == 2
    explorer.image.value = 1
    assert settled(explorer).knobs.image == 6
    explorer.search_button.click()
    assert settled(explorer).label == 2


def test_the_curve_is_drawn_on_demand_and_vanishes_with_other_knobs() -> None:
    explorer = make(defence="bare")
    explorer.refresh()
    settled(explorer)
    explorer.curve_button.click()
    settled(explorer)
    assert "<svg" in explorer.curve.value and "12 images" in explorer.curve.value
    explorer.controls["steps"].value = 2
    settled(explorer)
    assert "<svg" not in explorer.curve.value


def test_a_yaml_sets_the_knobs_and_a_wrong_one_is_a_sentence() -> None:
    explorer = make()
    explorer.refresh()
    settled(explorer)
    explorer.yaml.value = "eps: 0.02\ntransform: rt3\nimage: 4"
    explorer.load_button.click()
    view = settled(explorer)
    assert (view.knobs.eps, view.knobs.transform, view.knobs.image) == (0.02, "rt3", 4)
    explorer.load("image: 400")
    assert "there is no image 400: squares has 12 test images" in explorer.status.value
    assert settled(explorer).knobs.image == 4


def test_saving_writes_png_pdf_and_a_yaml_that_sets_the_same_knobs(tmp_path: Path) -> None:
    explorer = make(folder=tmp_path)
    explorer.save_button.click()
    assert "no picture" in explorer.status.value
    explorer.refresh()
    view = settled(explorer)
    explorer.save_button.click()
    assert explorer.saver.wait(120) and "Saved" in explorer.status.value
    (png,), (pdf,), (text,) = tmp_path.glob("*.png"), tmp_path.glob("*.pdf"), tmp_path.glob("*.yaml")
    assert Image.open(png).format == "PNG" and pdf.read_bytes()[:4] == b"%PDF"
    assert from_yaml(text.read_text(), KNOBS) == view.knobs
    assert save_view(view, {}, tmp_path) and len(list(tmp_path.iterdir())) == 3


def missing_checkpoint() -> nn.Module:
    raise FileNotFoundError("there is no run: run the notebook 03_finetune_atop.ipynb first")


def wrong_type() -> nn.Module:
    return "a name"


class Failing(nn.Module):
    def forward(self, images):
        raise RuntimeError("Expected all tensors to be on the same device,\n but found two")


@pytest.mark.parametrize(
    ("defence", "said"),
    [
        (missing_checkpoint, "there is no run: run the notebook 03_finetune_atop.ipynb first"),
        (wrong_type, "must be a torch.nn.Module, got str"),
        (Failing().eval(), "RuntimeError: Expected all tensors to be on the same device, but found two"),
        (make_pipeline().train(), "the model must be in eval mode to be attacked"),
    ],
    ids=["a missing checkpoint", "no module", "another device", "train mode"],
)
def test_what_goes_wrong_is_a_sentence_in_the_explorer_and_passes(defence, said: str) -> None:
    explorer = make_explorer({"wrong": defence, "right": make_classifier()}, make_dataset())
    explorer.refresh()
    assert explorer.worker.wait(120)
    assert said in text_of(explorer.pictures.value).replace("&#x27;", "'")
    assert "Traceback" not in explorer.pictures.value and explorer.view is None
    explorer.controls["defence"].value = "right"
    assert settled(explorer).knobs.defence == "right"


def test_images_that_the_grid_does_not_divide_are_a_sentence() -> None:
    dataset = make_dataset(size=SIZE - 1)
    explorer = make_explorer(make_pipeline(), dataset)
    explorer.refresh()
    assert explorer.worker.wait(120)
    assert "15 x 15 px cannot be cut into 8 x 8 equal patches" in explorer.pictures.value


def test_an_attack_that_raises_is_a_sentence() -> None:
    def broken(*_arguments, **_named):
        raise AssertionError("the attack left its budget")

    entries = {"pgd": AttackEntry(broken, ATTACKS["pgd"].settings, ATTACKS["pgd"].uses)}
    explorer = make_explorer(make_classifier(), make_dataset(), attacks=entries)
    explorer.refresh()
    assert explorer.worker.wait(120)
    assert "AssertionError: the attack left its budget" in explorer.pictures.value


def test_two_explorers_of_one_pipeline_do_not_disturb_each_other() -> None:
    shared = make_pipeline()
    first = make_explorer(shared, make_dataset(), eps=0.1, steps=8)
    second = make_explorer(shared, make_dataset(), eps=0.2, steps=8, transform="rt3", seed=3)
    for explorer in (first, second):
        explorer.refresh()
    for explorer in (first, second):
        view = settled(explorer)
        alone = final(explorer.knobs, compute.Scene({"squares": make_dataset()}, {"defence": make_pipeline()}, ATTACKS))
        torch.testing.assert_close(view.adversarial, alone.adversarial)
        assert view.votes.tolist() == alone.votes.tolist()
    assert first.name != second.name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (({}, make_dataset()), "nothing to explore"),
        ((make_classifier(), make_dataset(0)), "has no test images"),
        ((make_classifier(), make_dataset(), {"epss": 1}), "no such knob"),
        ((make_classifier(), make_dataset(), {"defence": "AToP"}), "there is no defence 'AToP' here"),
        ((make_classifier(), make_dataset(), {"image": 12}), "there is no image 12"),
    ],
    ids=["no defence", "no images", "unknown knob", "unknown defence", "no such image"],
)
def test_explore_refuses_what_it_cannot_show(arguments: tuple, said: str) -> None:
    *given, start = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=said):
        explore(*given, **start)


def test_without_anyone_watching_a_still_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr("atoplib.explorer.widgets.display", lambda what, raw=False: shown.append(what))
    explore(make_pipeline(), make_dataset(), steps=2)
    panel, bundle = shown
    png = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert png.width > 1200 and 'alt="defence with RT2' in bundle["text/html"]
    name = re.search(r"atop-still-(\w+)", bundle["text/html"])[1]
    assert f".atop-still-{name} {{ display: none }}" in panel.children[0].value


def test_explorer_imports_nothing_that_stands_above_it() -> None:
    folder = Path(compute.__file__).parent
    for path in folder.glob("*.py"):
        assert not re.search(r"atoplib\.(batch|evaluation|training)\b", path.read_text().replace("``evaluation.", "")), path
    assert "04_attack" in NOTEBOOKS
