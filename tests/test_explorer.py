"""The explorer: what is on screen equals a library call, nothing stale is shown, values survive a trip
through YAML."""

import base64
import io
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from atoplib import attacks, decisions, parameters
from atoplib import explorer as package
from atoplib.attacks import ATTACKS
from atoplib.explorer import Explorer, attack, compute, controls, explore, make_explorer, page, still
from atoplib.explorer.attack import NO_ATTACK, Scene
from atoplib.explorer.compute import views
from atoplib.explorer.controls import CONTROLS, changed, check, described, from_yaml, to_yaml
from atoplib.explorer.worker import Superseded, Worker
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform

SIZE, CLASSES = 16, 4
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "04_attack.ipynb"
VALUES = {name: control.default for name, control in CONTROLS.items()} | {
    "rows": ("pipeline",), "eps": 0.1, "steps": 3, "votes": 4, "noise_std": 0.2,
}  # fmt: skip


class SlowClassifier(nn.Module):
    """A classifier that waits until it is let go, so that a test can act while an attack runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.entered, self.go = inner, threading.Event(), threading.Event()

    def forward(self, images):
        self.entered.set()
        assert self.go.wait(120)
        return self.inner(images)


class Noisy(nn.Module):
    """A random classifier that is no pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.generator = make_classifier(), torch.Generator()

    def reseed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def forward(self, images):
        return self.inner(images + torch.randn(images.shape, generator=self.generator))


def make_images(count: int = 12, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return images.float() / 255, torch.arange(count) % CLASSES


def make_classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    parts = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * (SIZE // 4) ** 2, CLASSES),
    )
    return nn.Sequential(*parts).eval()


def make_pipeline(transform: Transform | None = None) -> AToPPipeline:
    torch.manual_seed(10)  # the same network at every call
    purifier = nn.Sequential(
        nn.Conv2d(5, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1), nn.Tanh()
    )
    return AToPPipeline(transform or Transform("rt2", 0.25, 0.2), purifier, make_classifier()).eval()


def make_scene(**defences: nn.Module) -> Scene:
    defences = defences or {"pipeline": make_pipeline(), "bare": make_classifier()}
    images, labels = make_images()
    return Scene(defences, images, labels, tuple(f"class {number}" for number in range(CLASSES)))


def final(values: dict, scene: Scene | None = None) -> compute.View:
    return list(views(scene or make_scene(), values))[-1]


def make(defences: dict | None = None, **start) -> Explorer:
    defences = defences or {"pipeline": make_pipeline(), "bare": make_classifier()}
    start = {"steps": 3, "eps": 0.1, "votes": 4, "rows": list(defences), **start}
    names = [f"class {number}" for number in range(CLASSES)]
    return make_explorer(defences, *make_images(), classes=names, **start)


def settled(explorer: Explorer) -> compute.View:
    assert explorer.worker.wait(120)
    assert explorer.view is not None, explorer.shown
    assert explorer.view.values == explorer.values and explorer.view.done and explorer.view.rows[0].complete
    return explorer.view


def ask(explorer: Explorer, do: str, **wish) -> compute.View:
    explorer.handle({"do": do, **wish})
    return settled(explorer)


def tensors(view: compute.View) -> list[torch.Tensor]:
    """Everything that is on screen."""
    shown = [row.at(view.values) for row in view.rows]
    parts = [part for one in shown for part in one if isinstance(part, torch.Tensor)]
    return [view.clean, *parts, *(row.logits for row in view.rows)]


# values


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": -0.1}, "eps must be 0 or above"),
        ({"eps": float("nan")}, "eps must be 0 or above"),
        ({"eps": 8.0}, "in linf at most 1"),
        ({"steps": 0}, "steps must lie in 1..1000, got 0"),
        ({"votes": 201}, "votes must lie in 1..200"),
        ({"missing_rate": 1.0}, "missing_rate must lie in"),
        ({"image": 12}, "there is no image 12: there are 12"),
        ({"target": 4}, "target must be a class in 0..3"),
        ({"attack": "pdg"}, "there is no attack 'pdg' here (did you mean 'pgd'?)"),
        ({"threat_model": "all"}, "allowed: white-box, bpda, transfer"),
        ({"attacked": "bar"}, "did you mean 'bare'?"),
        ({"rows": ()}, "at least one defence"),
        ({"norm": "flow"}, "pgd has no norm 'flow'; allowed: linf"),
        ({"options": {"speed": 1}}, "pgd has no option 'speed'; allowed:"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_value_that_is_not_allowed_is_refused_with_a_sentence(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check({**VALUES, **wrong}, make_scene())


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
    "no attack": {"attack": NO_ATTACK, "transform": "none"},
    "a bare classifier": {"rows": ("bare",)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_control_that_is_disabled_changes_nothing_and_the_others_do(case: str) -> None:
    scene = make_scene()
    values = {**VALUES, "eps": 0.2, **CASES[case]}
    before = final(values, scene)
    off = controls.unused(values, scene)
    for name, value in CHANGES.items():
        if values[name] == value or name == "seed":  # the samples and the start may both be unused
            continue
        other = {**values, name: value} | (
            {"eps": 2.0} if name == "norm" and attack.is_attacking(values) else {}
        )
        after = tensors(final(other, scene))
        same = len(after) == len(tensors(before)) and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(tensors(before), after, strict=True)
        )
        assert same == (name in off), f"{name} in {case}"


def test_values_survive_the_way_to_a_yaml_text_and_back() -> None:
    for case in CASES.values():
        values = {**VALUES, **CHANGES, **case, "options": {"restarts": 2}}
        assert {**VALUES, **from_yaml(to_yaml(values, {"experiment": "mnist", "eps": 0.9}), VALUES)} == values


def test_a_value_edited_by_hand_wins_and_fractions_can_be_written() -> None:
    text = to_yaml({**VALUES, "steps": 10}, {})
    assert from_yaml(text.replace("\nsteps: 10", "\nsteps: 30"), VALUES)["steps"] == 30
    assert from_yaml("eps: 8/255\nattack: fgsm\nexperiment: x", VALUES) == {"eps": 8 / 255, "attack": "fgsm"}


@pytest.mark.parametrize("text", ["eps: [", "", "- 1", "epss: 1", "steps: many", "steps: 1.5", "grey: 3"])
def test_a_yaml_that_cannot_be_used_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        from_yaml(text, VALUES)


def test_the_attack_notebook_accepts_the_yaml() -> None:
    values = {
        **VALUES,
        "norm": "l2",
        "eps": 0.25,
        "steps": 17,
        "seed": 4,
        "image": 3,
        "threat_model": "transfer",
    }
    p = parameters.read(NOTEBOOK, yaml.safe_load(to_yaml(values, {"dataset": "mnist5k"})))
    assert (p.eps, p.steps, p.seed, p.image, p.norm, p.threat_model) == (0.25, 17, 4, 3, "l2", "transfer")
    assert (p.num_samples, p.missing_rate, p.noise_std, p.transform) == (4, 0.25, 0.2, "rt2")


def test_another_attack_or_norm_brings_what_belongs_to_it() -> None:
    scene, start = make_scene(), {**VALUES, "options": {"restarts": 2}, "target": 2, "shown_step": 1}
    flow = changed(start, {"attack": "flow"}, scene, start)
    assert (flow["norm"], flow["eps"], flow["options"], flow["shown_step"]) == ("flow", 0.05, {}, None)
    back = changed(flow, {"attack": "pgd"}, scene, start)
    assert (back["norm"], back["eps"]) == ("linf", 0.1)
    assert changed(start, {"norm": "l2"}, scene, start)["eps"] == 0.5
    assert changed(start, {"noise_std": 0.3}, scene, start)["shown_step"] == 1


@pytest.mark.parametrize("name", [NO_ATTACK, *ATTACKS])
def test_every_attack_of_the_registry_can_be_described_to_the_page(name: str) -> None:
    scene = make_scene()
    values = changed(VALUES, {"attack": name}, scene, VALUES)
    shown = json.loads(json.dumps([described(values, scene, 3), controls.more_options(values, scene)]))
    assert name in [value for _, entries in shown[0]["attack"]["entries"] for value, _, _ in entries]
    options = {
        k for k, v in (ATTACKS[name].options if name in ATTACKS else {}).items() if not isinstance(v, tuple)
    }
    assert {option["name"] for option in shown[1]} | set(attack.OWN) >= options


# what is computed


@pytest.mark.parametrize("transform", ["none", "rt1", "rt2", "rt3"])
@pytest.mark.parametrize("threat_model", ["white-box", "bpda", "transfer"])
def test_what_is_shown_equals_a_library_call_with_the_same_seed(transform: str, threat_model: str) -> None:
    values = {**VALUES, "image": 5, "steps": 4, "eot_samples": 3, "seed": 9, "votes": 6, "sample": 2}
    values |= {"transform": transform, "threat_model": threat_model, "noise_std": 0.3, "missing_rate": 0.5}
    scene = make_scene()
    row = (view := final(values, scene)).rows[0]
    shown = row.at(values)

    defence = make_pipeline(
        Transform(transform, missing_rate=0.5, noise_std=0.3, num_masks=4)
    ).freeze_for_attack()
    images, labels = make_images()
    random = transform != "none"
    seen = {"white-box": defence, "bpda": attacks.bpda(defence), "transfer": defence.classifier}[threat_model]
    decisions.reseed(defence, 9)
    eot = 3 if random and threat_model != "transfer" else 1
    adversarial = attacks.pgd(seen, images[5:6], labels[5:6], eps=0.1, steps=4, eot_samples=eot, seed=9)
    decisions.reseed(defence, 10)
    logits = decisions.sample_logits(defence, adversarial, num_samples=6 if random else 1)[:, 0]
    assert torch.equal(shown.adversarial, adversarial[0]) and view.label == int(labels[5])
    torch.testing.assert_close(shown.logits, logits)
    assert shown.unpurified == int(defence.classifier(adversarial).argmax())
    torch.testing.assert_close(defence.classifier(shown.purified[None])[0], logits[2 if random else 0])
    decisions.reseed(defence, 10)
    sample = defence.sample(images[:1].expand(6 if random else 1, -1, -1, -1))
    torch.testing.assert_close(row.sample.masks[:, 0], sample.masks[:, 2 if random else 0])


@pytest.mark.parametrize(
    "name", ["fgsm", "apgd", "pgd_ensemble", "flow", "square", "spsa", "torchattacks:PGD"]
)
def test_an_attack_of_the_registry_is_run_with_its_own_options(name: str) -> None:
    scene = make_scene()
    values = changed({**VALUES, "queries": 20, "rows": ("bare",)}, {"attack": name}, scene, VALUES)
    shown = final(values, scene).rows[0].at(values)
    known, (images, labels) = ATTACKS[name], make_images()
    options = {key: values[key] for key in ("steps", "queries") if key in known.options}
    model = make_classifier()
    expected = known.function(
        model, images[:1], labels[:1], eps=values["eps"], norm=values["norm"], **options
    )
    torch.testing.assert_close(shown.adversarial, expected[0].detach())


def test_one_image_for_all_is_the_one_that_was_made_on_that_defence() -> None:
    values = {**VALUES, "rows": ("bare", "pipeline")}
    each, one = final(values), final({**values, "attacked": "bare"})
    own, made = each.rows[0].path.images[-1], [row.path.images[-1] for row in one.rows]
    assert torch.equal(made[0], own) and torch.equal(made[1], own)
    assert not torch.equal(each.rows[1].path.images[-1], own)
    assert [row.attacked for row in one.rows] == [True, False] and all(row.attacked for row in each.rows)


def test_a_targeted_attack_and_an_option_reach_the_attack() -> None:
    values = {**VALUES, "rows": ("bare",), "target": 2, "options": {"restarts": 2}}
    images, labels = make_images()
    target = torch.tensor([2])
    expected = attacks.pgd(
        make_classifier(), images[:1], labels[:1], eps=0.1, steps=3, restarts=2, targets=target
    )
    torch.testing.assert_close(final(values).rows[0].path.images[-1], expected[0])


def test_a_grey_attack_changes_all_channels_alike_and_needs_grey_images() -> None:
    scene = make_scene()
    for expected in (False, True):
        shown = final({**VALUES, "grey": True}, scene).rows[0].path.images[-1]
        assert torch.equal(shown[0], shown[1]) == expected
        scene = make_scene()
        scene.images = scene.images[:, :1].expand(-1, 3, -1, -1).contiguous()


def test_votes_in_several_batches_are_those_of_sample_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack, "PIXELS_A_BATCH", 4 * SIZE**2)
    values = {**VALUES, "attack": NO_ATTACK, "votes": 10, "sample": 6}
    row = final(values).rows[0]
    defence = make_pipeline()
    decisions.reseed(defence, 1)
    logits = decisions.sample_logits(defence, make_images()[0][:1], num_samples=10, max_batch=4)
    torch.testing.assert_close(row.logits, logits)
    torch.testing.assert_close(defence.classifier(row.at(values).purified[None])[0], logits[6, 0])


def test_the_path_ends_in_the_vote_and_can_be_walked_without_computing() -> None:
    scene, values = make_scene(), {**VALUES, "transform": "rt3", "steps": 6, "eps": 0.2}
    first, last = list(views(scene, values))
    assert not first.rows[0].complete and last.rows[0].complete
    assert last.rows[0].path.steps == tuple(range(7))
    torch.testing.assert_close(first.rows[0].at(values).logits, last.rows[0].logits[:, -1])
    torch.testing.assert_close(first.rows[0].at(values).purified, last.rows[0].at(values).purified)
    for step in (0, 3):
        there = {**values, "shown_step": step}
        alone = next(iter(views(scene, there))).rows[0].at(there)
        walked = last.rows[0].at(there)
        torch.testing.assert_close(walked.logits, alone.logits)
        torch.testing.assert_close(walked.transformed, alone.transformed)
    assert torch.equal(last.rows[0].at({**values, "shown_step": 0}).adversarial, last.clean)


def test_a_long_attack_keeps_a_bounded_number_of_steps_and_its_last() -> None:
    steps = final({**VALUES, "rows": ("bare",), "steps": 200}).rows[0].path.steps
    assert (
        len(steps) <= attack.MAX_PATH + 2
        and steps[0] == 0
        and steps[-1] == 200
        and np.all(np.diff(steps) > 0)
    )


def test_the_pipeline_that_was_given_stays_as_it_is() -> None:
    defence = make_pipeline()
    decisions.reseed(defence, 3)
    before, transform = defence.sample(torch.zeros(1, 3, SIZE, SIZE)), defence.transform
    decisions.reseed(defence, 3)
    final({**VALUES, "transform": "rt3", "seed": 4}, make_scene(pipeline=defence))
    assert defence.transform == transform and torch.equal(
        defence.sample(torch.zeros(1, 3, SIZE, SIZE)).noise, before.noise
    )


def test_a_transfer_attack_is_not_repeated_for_another_transform_and_a_white_box_one_is(monkeypatch) -> None:
    calls, scene = [], make_scene()
    monkeypatch.setattr(
        attack, "run_attack", lambda *a, real=attack.run_attack, **k: calls.append(1) or real(*a, **k)
    )
    for threat_model, expected in (("transfer", 1), ("white-box", 3)):
        for noise in (0.1, 0.2, 0.1):
            final({**VALUES, "threat_model": threat_model, "noise_std": noise}, scene)
        assert len(calls) == expected, threat_model  # the third is remembered in both cases
    final({**VALUES, "noise_std": 0.1, "sample": 3, "votes": 5, "shown_step": 1}, scene)
    assert len(calls) == 3


def test_while_dragging_a_preview_comes_first_and_says_so() -> None:
    scene = make_scene()
    first = final(VALUES, scene)
    preview, *_, last = views(scene, {**VALUES, "noise_std": 0.5}, preview=True)
    assert preview.preview and not preview.done and last.done
    assert torch.equal(preview.rows[0].path.images[-1], first.rows[0].path.images[-1])
    shorter, *_ = views(scene, {**VALUES, "eps": 0.3}, preview=True)
    assert shorter.preview and shorter.rows[0].path.steps[-1] == attack.PREVIEW_STEPS
    assert not next(views(scene, VALUES, preview=True)).preview  # it is there already


def test_a_random_module_of_another_kind_gets_its_votes_and_no_purifier() -> None:
    row = final(
        {**VALUES, "attack": NO_ATTACK, "rows": ("noisy",), "votes": 8}, make_scene(noisy=Noisy().eval())
    ).rows[0]
    assert row.logits.shape == (8, 1, CLASSES) and row.random and row.purified is None


def test_the_next_misclassified_image_is_the_first_one() -> None:
    scene, values = make_scene(), {**VALUES, "rows": ("bare",)}
    images, labels = make_images()
    wrong = (make_classifier()(images).argmax(dim=1) != labels).nonzero()[:, 0].tolist()
    order = torch.arange(12).roll(-4).tolist()
    assert wrong and compute.next_misclassified(scene, values, order) == next(n for n in order if n in wrong)
    assert compute.next_misclassified(scene, values, [n for n in order if n not in wrong]) is None


def test_the_curve_counts_what_is_correct_at_each_eps() -> None:
    values = {**VALUES, "rows": ("bare",), "image": 2}
    curve = attack.robust_curve(make_scene(), values, "bare")
    images, labels = (part.roll(-2, 0) for part in make_images())
    classifier = make_classifier()
    assert (
        curve.images == 12
        and curve.eps[0] == 0
        and curve.correct[0] == int((classifier(images).argmax(1) == labels).sum())
    )
    broken = attacks.pgd(classifier, images, labels, eps=0.1, steps=3)
    assert curve.correct[curve.eps.index(0.1)] == int((classifier(broken).argmax(dim=1) == labels).sum())
    with pytest.raises(ValueError, match="needs an attack"):
        attack.robust_curve(make_scene(), {**values, "attack": NO_ATTACK}, "bare")


# pictures


def test_a_picture_has_the_pixels_of_the_image_and_a_map_is_white_at_0_red_above_blue_below() -> None:
    view = final({**VALUES, "eps": 0.3})
    sources = [base64.b64decode(part) for part in re.findall(r"base64,([^\"]*)", page.grid(view))]
    shown = np.asarray(Image.open(io.BytesIO(sources[0]))) / 255
    np.testing.assert_allclose(shown, view.rows[0].path.images[-1].permute(1, 2, 0), atol=0.5 / 255 + 1e-6)
    red, _, blue = page.to_map(torch.tensor([[-9.0, -4.0, 0.0, 4.0, 8.0]]), 8.0).astype(int)[0].T
    assert min(red[2], blue[2]) > 240 and red[4] > blue[4] + 50 and blue[0] > red[0] + 50 and red[3] > blue[3]


def test_a_tie_is_called_a_tie_and_every_picture_has_a_text() -> None:
    view = final({**VALUES, "votes": 4})
    row = view.rows[0]
    logits = torch.eye(CLASSES)[[0, 0, 2, 2]][:, None].expand(-1, len(row.path.steps), -1)
    made = page.decision(view, row._replace(logits=logits))
    assert (
        made.text == "class 0"
        and made.correct
        and "tie of class 0 and class 2: counted as class 0" in made.lines
    )
    assert "2 of 4 votes correct" in made.lines
    html = page.grid(view)
    assert html.count("<img") == html.count("alt=") and "aria-label" in page.path_chart(view)


def test_names_of_classes_cannot_break_the_page() -> None:
    view = final(VALUES)._replace(classes=("<b>", "&amp;", '"x"', "</div>"))
    for html in (page.grid(view), page.clean(view)):
        assert not re.search(r"<b><|[^/]</div></span>|>\"x\"<.*\"x\"\">", html)
    assert "&lt;b&gt;" in page.grid(view)


@pytest.mark.parametrize(
    "changes", [{}, {"rows": ("bare",)}, {"attack": NO_ATTACK}, {"rows": ("bare", "pipeline")}], ids=str
)
def test_the_bitmap_holds_the_same_pictures(changes: dict) -> None:
    view = final({**VALUES, **changes})
    bitmap = np.asarray(Image.open(io.BytesIO(page.encoded([page.sheet(view, "title")], "png"))))
    for row in view.rows:
        for picture in page.pictures(view, row):
            wanted = np.asarray(
                Image.fromarray(picture.pixels).resize((page.CELL, page.CELL), Image.Resampling.NEAREST)
            )
            places = np.argwhere((bitmap[:, :, None] == wanted[0, 0]).all(axis=3)[:, :, 0])
            assert any(
                np.array_equal(bitmap[y : y + page.CELL, x : x + page.CELL], wanted) for y, x in places
            )


# the worker


def test_the_last_request_wins_and_the_ones_between_never_run() -> None:
    worker, shown, go, entered = Worker(print, lambda: None), [], threading.Event(), threading.Event()

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


def test_a_cancelled_job_stops_at_its_next_check_or_pause() -> None:
    for stop in (lambda ticket: (time.sleep(0.001), ticket.check()), lambda ticket: ticket.pause(100)):
        worker, entered = Worker(print, lambda: None), threading.Event()

        def endless(ticket, stop=stop, entered=entered) -> None:
            while True:
                entered.set()
                stop(ticket)

        worker.submit(endless)
        assert entered.wait(10) and not worker.idle and worker.cancel()
        assert worker.wait(60) and worker.idle and not worker.cancel()


def test_an_error_is_reported_unless_a_later_request_has_come() -> None:
    errors, go, entered = [], threading.Event(), threading.Event()
    worker = Worker(errors.append, lambda: None)

    def failing(ticket) -> None:
        entered.set()
        assert go.wait(10)
        raise RuntimeError("too late")

    worker.submit(failing)
    assert entered.wait(10)
    worker.submit(lambda ticket: (_ for _ in ()).throw(RuntimeError("in time")))
    go.set()
    assert worker.wait(60) and [str(error) for error in errors] == ["in time"]


def test_a_thread_with_nothing_to_do_ends_and_another_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoplib.explorer.worker.IDLE_SECONDS", 0.01)
    worker, threads = Worker(print, lambda: None), []
    for _ in range(2):
        worker.submit(lambda ticket: threads.append(threading.current_thread()))
        assert worker.wait(60)
        threads[-1].join(10)
        assert not threads[-1].is_alive()
    assert threads[0] is not threads[1]


def test_publishing_after_a_later_request_raises() -> None:
    worker, raised = Worker(print, lambda: None), []

    def job(ticket) -> None:
        worker.cancel()
        try:
            ticket.publish(lambda: raised.append("shown"))
        except Superseded:
            raised.append("superseded")

    worker.submit(job)
    assert worker.wait(60) and raised == ["superseded"]


# the widget


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", 0.2), ("missing_rate", 0.5), ("transform", "rt3"), ("attack", NO_ATTACK), ("steps", 7),
     ("threat_model", "transfer"), ("rows", ["bare"]), ("shown_step", 1), ("image", 3)],
)  # fmt: skip
def test_a_wish_sets_its_value_and_the_picture(name: str, value) -> None:
    explorer = make()
    explorer.refresh()
    before = settled(explorer).values
    after = ask(explorer, "set", values={name: value}, number=4).values
    value = tuple(value) if isinstance(value, list) else value
    assert after == changed(before, {name: value}, explorer.scene, before) and after[name] == value
    assert explorer.state["heard"] == 4 and from_yaml(explorer.shown["yaml"], VALUES) == after


def test_ten_quick_moves_end_in_the_picture_of_the_last() -> None:
    explorer = make()
    explorer.refresh()
    for number, value in enumerate((5, 90, 10, 80, 15, 70, 20, 60, 25, 50)):
        explorer.handle(
            {"do": "set", "values": {"missing_rate": value / 100}, "number": number, "dragging": number < 9}
        )
    view = settled(explorer)
    assert view.values["missing_rate"] == 0.5 and explorer.state["heard"] == 9 and not explorer.state["stale"]
    expected = final(explorer.values)
    for a, b in zip(tensors(view), tensors(expected), strict=True):
        assert torch.equal(a, b)
    assert explorer.shown["grid"] == page.grid(expected)


def test_an_answer_to_an_earlier_wish_says_so_that_the_page_leaves_its_sliders_alone() -> None:
    explorer = make()
    explorer.refresh()
    settled(explorer)
    heard = []
    explorer.observe(
        lambda change: heard.append((change["new"]["heard"], change["new"]["controls"]["eps"]["value"])),
        "state",
    )
    for number, eps in enumerate((0.2, 0.3), start=1):
        ask(explorer, "set", values={"eps": eps}, number=number)
    assert {(number, eps) for number, eps in heard} == {(1, 0.2), (2, 0.3)}


def test_walking_along_the_path_computes_nothing() -> None:
    explorer = make()
    explorer.refresh()
    before = settled(explorer)
    jobs, submit = [], explorer.worker.submit
    explorer.worker.submit = lambda job: jobs.append(job) or submit(job)
    after = ask(explorer, "set", values={"shown_step": 1})
    assert jobs == [] and after.rows is before.rows and page.grid(after) != page.grid(before)


def test_cancelling_keeps_the_earlier_picture_and_marks_it_as_stale() -> None:
    slow = SlowClassifier(make_classifier()).eval()
    slow.go.set()
    explorer = make({"slow": slow, "bare": make_classifier()}, rows=["bare"])
    explorer.refresh()
    settled(explorer)
    slow.go.clear(), slow.entered.clear()
    explorer.handle({"do": "set", "values": {"rows": ["slow"]}})
    assert slow.entered.wait(120) and explorer.status["busy"]
    explorer.handle({"do": "cancel"})
    slow.go.set()
    assert explorer.worker.wait(120) and explorer.view.values["rows"] == ("bare",)
    assert (
        explorer.state["stale"]
        and "earlier values" in explorer.status["text"]
        and not explorer.status["busy"]
    )
    assert ask(explorer, "compute").values["rows"] == ("slow",) and not explorer.state["stale"]


def test_buttons_resample_go_on_search_and_reset() -> None:
    explorer = make(image=1)
    explorer.refresh()
    first = settled(explorer)
    second = ask(explorer, "resample")
    assert not torch.equal(second.rows[0].sample.masks, first.rows[0].sample.masks)
    assert ask(explorer, "move", by=1, **{"class": -1}).values["image"] == 2
    assert ask(explorer, "move", by=1, **{"class": 1}).values["image"] == 5
    for image in (4, 3):
        assert ask(explorer, "move", by=-1, **{"class": -1}).values["image"] == image
    assert ask(explorer, "search", **{"class": 2}).label == 2
    assert ask(explorer, "preset", name="clean").values["attack"] == NO_ATTACK
    image = explorer.values["image"]
    assert ask(explorer, "preset", name="reset").values == {**explorer.start, "image": image}
    option = ask(explorer, "option", name="restarts", value=2)
    assert option.values["options"] == {"restarts": 2}


def test_an_image_of_ones_own_is_fitted_attacked_and_can_be_given_its_class() -> None:
    explorer = make()
    explorer.refresh()
    picture = Image.fromarray(np.full((50, 40, 3), 200, dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    view = ask(explorer, "draw", png="data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    assert view.values["image"] == 12 and view.clean.shape == (3, SIZE, SIZE) and explorer.state["own"]
    torch.testing.assert_close(view.clean, torch.full_like(view.clean, 200 / 255))
    assert ask(explorer, "label", label=3).label == 3
    ask(explorer, "set", values={"image": 0})
    explorer.handle({"do": "label", "label": 3})
    assert "is known" in explorer.status["text"]
    explorer.handle({"do": "draw", "png": "data:," + base64.b64encode(b"no picture").decode()})
    assert "no picture that can be read" in explorer.status["text"]


def test_a_yaml_sets_the_values_and_a_wrong_one_is_a_sentence() -> None:
    explorer = make()
    explorer.refresh()
    view = ask(explorer, "yaml", text="eps: 0.02\ntransform: rt3\nimage: 4\nnum_samples: 3")
    assert [view.values[name] for name in ("eps", "transform", "image", "votes")] == [0.02, "rt3", 4, 3]
    explorer.handle({"do": "yaml", "text": "image: 400"})
    assert "there is no image 400" in explorer.status["text"] and settled(explorer).values["image"] == 4


def test_saving_writes_png_pdf_yaml_and_an_animation_of_the_path(tmp_path: Path) -> None:
    explorer = make(folder=tmp_path)
    explorer.handle({"do": "save"})
    assert "no finished picture" in explorer.status["text"]
    explorer.refresh()
    view = settled(explorer)
    explorer.handle({"do": "save"})
    names = [link["name"] for link in explorer.status["links"]]
    png, pdf, text = (tmp_path / name for name in names)
    assert Image.open(png).format == "PNG" and pdf.read_bytes()[:4] == b"%PDF"
    assert from_yaml(text.read_text(), VALUES) == view.values
    explorer.handle({"do": "gif"})
    animation = Image.open(next(tmp_path.glob("*.gif")))
    assert animation.n_frames == 4
    animation.seek(1)
    at_one = page.sheet(view._replace(values={**view.values, "shown_step": 1}), explorer._title(view))
    assert (
        np.abs(np.asarray(animation.convert("RGB"), int) - np.asarray(at_one, int)).mean() < 6
    )  # 256 colours


class Failing(nn.Module):
    def forward(self, images):
        raise RuntimeError("Expected all tensors to be on the same device,\n but found two")


def missing_checkpoint() -> nn.Module:
    raise FileNotFoundError("there is no run: run the notebook 03_finetune_atop.ipynb first")


@pytest.mark.parametrize(
    ("defence", "message"),
    [
        (missing_checkpoint, "there is no run: run the notebook 03_finetune_atop.ipynb first"),
        (lambda: "a name", "must be a torch.nn.Module, got str"),
        (Failing().eval(), "RuntimeError: Expected all tensors to be on the same device, but found two"),
        (make_pipeline().train(), "eval mode"),
    ],
    ids=["a missing checkpoint", "no module", "another device", "train mode"],
)
def test_what_goes_wrong_is_a_sentence_in_the_explorer_and_passes(defence, message: str) -> None:
    explorer = make({"right": make_classifier(), "wrong": defence})
    explorer.refresh()
    assert explorer.worker.wait(120)
    assert (
        message in explorer.shown["problem"].replace("&#x27;", "'")
        and "Traceback" not in explorer.shown["problem"]
    )
    assert ask(explorer, "set", values={"rows": ["right"]}) and not explorer.shown["problem"]


def test_two_explorers_of_one_pipeline_do_not_disturb_each_other() -> None:
    shared = make_pipeline()
    first = make({"pipeline": shared}, eps=0.1, steps=8)
    second = make({"pipeline": shared}, eps=0.2, steps=8, transform="rt3", seed=3)
    for explorer in (first, second):
        explorer.refresh()
    for explorer in (first, second):
        view, alone = settled(explorer), final(explorer.values)
        assert torch.equal(view.rows[0].path.images, alone.rows[0].path.images)
        assert torch.equal(view.rows[0].logits, alone.rows[0].logits)
    assert first.name != second.name


@pytest.mark.parametrize(
    ("arguments", "start", "message"),
    [
        (({}, *make_images()), {}, "nothing to explore"),
        ((make_classifier(),), {}, "nothing to explore"),
        ((make_classifier(), *make_images(0)), {}, "nothing to explore"),
        ((make_classifier(), *make_images()), {"epss": 1}, "no such value: epss"),
        ((make_classifier(), *make_images()), {"rows": ["AToP"]}, "there is no rows 'AToP' here"),
        ((make_classifier(), *make_images()), {"image": 12}, "there is no image 12"),
    ],
    ids=["no defence", "no images", "none of them", "unknown value", "unknown defence", "no such image"],
)
def test_explore_refuses_what_it_cannot_show(arguments: tuple, start: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explore(*arguments, **start)


def test_any_module_can_be_explored_without_labels_or_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, images = [], make_images()[0][:, :1]
    monkeypatch.setattr(package, "display", lambda what, raw=False: shown.append(what))
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, 3)).eval()
    explore(model, images, steps=2)
    explorer, bundle = shown
    assert explorer.values["eps"] == attacks.default_eps("linf", "mnist") and explorer.scene.classes == (
        "0",
        "1",
        "2",
    )
    assert torch.equal(explorer.scene.labels, model(images).argmax(dim=1))
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width > 400
    assert f"atop-still-{explorer.name}" in bundle["text/html"] and "PGD" in bundle["text/html"]


def test_the_kits_defences_are_explored_without_arguments_and_the_first_image_tells_ap_from_atop() -> None:
    explorer = make_explorer()
    explorer.refresh()
    correct = {row.name: page.decision(explorer.view, row).correct for row in settled(explorer).rows}
    assert correct == {"undefended": False, "AT": True, "AP": False, "AToP": True}
    assert still(explorer)["text/html"].count("<figure>") == 2 * 4 + 2 * 2
