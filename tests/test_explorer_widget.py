"""The explorer's worker, widget and pictures: the last wish wins, nothing stale is shown."""

import base64
import io
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from atoplib import explorer as package
from atoplib.explorer import Explorer, attack, compute, explore, make_explorer, page, still
from atoplib.explorer.controls import PRESETS, changed, from_yaml
from atoplib.explorer.widget import Worker
from tests.test_explorer import (
    CLASSES,
    SIZE,
    VALUES,
    make_classifier,
    make_images,
    make_pipeline,
    tensors,
    views,
)


class SlowClassifier(nn.Module):
    """A classifier that waits until it is let go, so that a test can act while an attack runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.entered, self.go = make_classifier(), threading.Event(), threading.Event()
        self.go.set()

    def forward(self, images):
        self.entered.set()
        assert self.go.wait(120)
        return self.inner(images)


def make(defences: dict | None = None, **start) -> Explorer:
    """An explorer that has computed its first picture."""
    defences = defences or {"pipeline": make_pipeline(), "bare": make_classifier()}
    start = {"steps": 3, "eps": 0.1, "votes": 4, **start}
    names = [f"class {number}" for number in range(CLASSES)]
    explorer = make_explorer(defences, *make_images(), classes=names, **start)
    explorer.refresh()
    assert explorer.worker.wait(120)
    return explorer


def ask(explorer: Explorer, do: str, **wish) -> compute.View:
    """The view after a wish."""
    explorer.handle({"do": do, **wish})
    assert explorer.worker.wait(120)
    assert explorer.view is not None, explorer.shown
    assert explorer.view.values == explorer.values and explorer.view.complete
    return explorer.view


def opened(address: str) -> np.ndarray:
    """The pixels of a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))


# the worker


def late_picture(worker: Worker, number: int) -> None:
    worker.publish(number, lambda: pytest.fail("shown after a later request"))


def late_error(_worker: Worker, _number: int) -> None:
    raise RuntimeError("reported after a later request")


@pytest.mark.parametrize("first", [late_picture, late_error])
def test_the_last_request_wins_the_ones_between_never_run_and_its_error_is_reported(first: Callable) -> None:
    errors, shown, go, entered = [], [], threading.Event(), threading.Event()
    worker = Worker(errors.append, lambda: shown.append("idle"))
    worker.submit(lambda number: (entered.set(), go.wait(10), first(worker, number)))
    assert entered.wait(10)
    for each in range(10):
        worker.submit(lambda number, each=each: worker.publish(number, lambda: shown.append(each)) or [][0])
    go.set()
    assert worker.wait(60) and shown == [9, "idle"]
    assert [str(error) for error in errors] == ["list index out of range"]


def test_a_cancelled_job_stops_at_its_next_check() -> None:
    worker, entered = Worker(print, lambda: None), threading.Event()

    def endless(number: int) -> None:
        while True:
            entered.set()
            time.sleep(0.001)
            worker.check(number)

    worker.submit(endless)
    assert entered.wait(10) and not worker.wait(0) and worker.cancel()
    assert worker.wait(60) and not worker.cancel()


# the widget


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", 0.2), ("transform", "rt3"), ("attack", "none"), ("steps", 7), ("rows", ["bare"]), ("image", 3)],
)  # fmt: skip
def test_a_wish_sets_its_value_and_the_picture(name: str, value) -> None:
    explorer = make()
    before = explorer.values
    after = ask(explorer, "set", values={name: value}, number=4).values
    assert after == changed(before, {name: value}, explorer.scene, before) and after[name] == value
    assert explorer.state["heard"] == 4 and from_yaml(explorer.shown["yaml"]) == after


def test_ten_quick_moves_end_in_the_picture_of_the_last() -> None:
    explorer = make()
    for number, value in enumerate((5, 90, 10, 80, 15, 70, 20, 60, 25)):
        wish = {"do": "set", "values": {"missing_rate": value / 100}, "number": number, "dragging": True}
        explorer.handle(wish)
    view = ask(explorer, "set", values={"missing_rate": 0.5}, number=9)
    assert view.values["missing_rate"] == 0.5 and explorer.state["heard"] == 9 and not explorer.state["stale"]
    expected = views(explorer.values, explorer.scene)[-1]
    for a, b in zip(tensors(view), tensors(expected), strict=True):
        assert torch.equal(a, b)
    assert explorer.shown["rows"] == page.content(expected, [])["rows"]


def test_walking_along_the_path_computes_nothing() -> None:
    explorer = make()
    before, shown, jobs = explorer.view, explorer.shown, []
    explorer.worker.submit = jobs.append
    after = ask(explorer, "set", values={"shown_step": 1})
    assert jobs == [] and after.rows is before.rows and explorer.shown["rows"] != shown["rows"]


def test_cancelling_keeps_the_earlier_picture_and_marks_it_as_stale() -> None:
    slow = SlowClassifier().eval()
    explorer = make({"slow": slow, "bare": make_classifier()}, rows=["bare"])
    slow.go.clear()
    explorer.handle({"do": "set", "values": {"rows": ["slow"]}})
    assert slow.entered.wait(120) and explorer.status["busy"]
    explorer.handle({"do": "cancel"})
    slow.go.set()
    assert explorer.worker.wait(120) and explorer.view.values["rows"] == ["bare"]
    assert explorer.state["stale"] and not explorer.status["busy"]
    assert "earlier values" in explorer.status["text"]
    assert ask(explorer, "compute").values["rows"] == ["slow"] and not explorer.state["stale"]


def test_buttons_go_on_resample_and_set_presets() -> None:
    explorer = make(image=1)
    assert ask(explorer, "move", by=1, label=-1).values["image"] == 2
    assert ask(explorer, "move", by=1, label=1).values["image"] == 5
    assert [ask(explorer, "move", by=-1, label=-1).values["image"] for _ in range(2)] == [4, 3]
    explorer.handle({"do": "curve"})
    assert explorer.worker.wait(120) and len(explorer.shown["curve"]["points"]) == 2 * len(
        attack.CURVE_FACTORS
    )
    first, second = explorer.view.rows[0], ask(explorer, "set", values={"sample": 1}).rows[0]
    assert not torch.equal(first.transformed[0], second.transformed[0])
    assert torch.equal(first.logits, second.logits)
    for _, preset in PRESETS.values():
        chosen = {**explorer.state["start"], **preset, "steps": 2, "eot_samples": 1}
        assert ask(explorer, "set", values=chosen).values == chosen


def test_an_image_of_ones_own_is_fitted_attacked_and_can_be_given_its_class() -> None:
    explorer = make()
    view = ask(explorer, "draw", png=page.source(np.full((50, 40, 3), 200, dtype=np.uint8)))
    assert view.values["image"] == 12 and view.clean.shape == (3, SIZE, SIZE) and explorer.state["own"]
    torch.testing.assert_close(view.clean, torch.full_like(view.clean, 200 / 255))
    assert ask(explorer, "label", label=3).label == 3
    explorer.handle({"do": "draw", "png": "data:," + base64.b64encode(b"no picture").decode()})
    assert "no picture that can be read" in explorer.status["text"]


def test_a_yaml_sets_the_values_and_a_wrong_one_is_a_sentence() -> None:
    explorer = make()
    view = ask(explorer, "yaml", text="eps: 0.02\ntransform: rt3\nimage: 4\nnum_samples: 3")
    assert [view.values[name] for name in ("eps", "transform", "image", "votes")] == [0.02, "rt3", 4, 3]
    assert ask(explorer, "yaml", text="image: 400").values["image"] == 4
    assert "image must lie in 0..11, got 400" in explorer.status["text"]


def test_saving_writes_png_pdf_yaml_and_an_animation_of_the_path(tmp_path: Path) -> None:
    explorer = make(folder=tmp_path)
    explorer.save()
    png, pdf, text = (tmp_path / link["name"] for link in explorer.status["links"])
    assert Image.open(png).format == "PNG" and pdf.read_bytes()[:4] == b"%PDF"
    assert from_yaml(text.read_text()) == explorer.values
    explorer.handle({"do": "save", "kinds": ["gif"]})
    animation = Image.open(next(tmp_path.glob("*.gif")))
    assert animation.n_frames == 4
    animation.seek(1)
    at_one = page.sheet(explorer.view._replace(values={**explorer.values, "shown_step": 1}))
    difference = np.asarray(animation.convert("RGB"), int) - np.asarray(at_one, int)
    assert np.abs(difference).mean() < 6  # 256 colours


class Failing(nn.Module):
    def forward(self, images):
        raise RuntimeError("Expected all tensors to be on the same device,\n but found two")


def missing_checkpoint() -> nn.Module:
    raise FileNotFoundError("there is no run: run the notebook 03_finetune_atop.ipynb first")


@pytest.mark.parametrize(
    ("defence", "message"),
    [
        (missing_checkpoint, "there is no run: run the notebook 03_finetune_atop.ipynb first"),
        (Failing().eval(), "RuntimeError: Expected all tensors to be on the same device, but found two"),
        (make_pipeline().train(), "eval mode"),
    ],
    ids=["a missing checkpoint", "another device", "train mode"],
)
def test_what_goes_wrong_is_a_sentence_in_the_explorer_and_passes(defence, message: str) -> None:
    explorer = make({"right": make_classifier(), "wrong": defence})
    assert message in explorer.shown["problem"] and "Traceback" not in explorer.shown["problem"]
    assert ask(explorer, "set", values={"rows": ["right"]}) and "problem" not in explorer.shown


def test_two_explorers_of_one_pipeline_do_not_disturb_each_other() -> None:
    shared = make_pipeline()
    both = [make({"pipeline": shared}), make({"pipeline": shared}, eps=0.2, transform="rt3", seed=3)]
    for explorer in both:
        explorer.handle({"do": "set", "values": {"steps": 8}})
    for explorer in both:
        view, alone = ask(explorer, "compute"), views(explorer.values)[-1]
        assert all(torch.equal(a, b) for a, b in zip(tensors(view), tensors(alone), strict=True))
    assert both[0].state["name"] != both[1].state["name"]


# pictures


def test_pictures_have_the_pixels_of_the_images_and_a_map_is_white_at_0_red_above_blue_below() -> None:
    (view,) = views({**VALUES, "eps": 0.3})[-1:]
    cells = page.content(view, [])["rows"][0]["cells"]
    image = view.rows[0].images[-1].permute(1, 2, 0)
    np.testing.assert_allclose(opened(cells[0][1]) / 255, image, atol=0.5 / 255 + 1e-6)
    red, _, blue = page.to_map(torch.tensor([[-9.0, -4.0, 0.0, 4.0, 8.0]]), 8.0).astype(int)[0].T
    assert min(red[2], blue[2]) > 240 and red[4] > blue[4] + 50 and blue[0] > red[0] + 50 and red[3] > blue[3]


def test_a_tie_is_called_a_tie_and_counted_as_the_vote_counts_it() -> None:
    (view,) = views({**VALUES, "votes": 4})[-1:]
    row = view.rows[0]
    logits = torch.eye(CLASSES)[[0, 0, 2, 2]][:, None].expand(-1, len(row.steps), -1)
    made = page.decision(view, row._replace(logits=logits))
    assert made["text"] == "class 0" and made["correct"] and "2 of 4 votes correct" in made["lines"]
    assert "tie of class 0 and class 2: counted as class 0" in made["lines"]


@pytest.mark.parametrize("rows", [["pipeline"], ["bare"], ["bare", "pipeline"]], ids=str)
def test_the_bitmap_holds_the_same_pictures(rows: list[str]) -> None:
    (view,) = views({**VALUES, "rows": rows})[-1:]
    bitmap = np.asarray(page.sheet(view))
    for row in view.rows:
        for pixels, _ in page.pictures(view, row).values():
            wanted = np.asarray(Image.fromarray(pixels).resize([page.CELL] * 2, Image.Resampling.BOX))
            places = np.argwhere((bitmap == wanted[0, 0]).all(axis=2))
            parts = (bitmap[y : y + page.CELL, x : x + page.CELL] for y, x in places)
            assert any(np.array_equal(part, wanted) for part in parts)


# explore


@pytest.mark.parametrize(
    ("arguments", "start", "message"),
    [
        (({}, *make_images()), {}, "nothing to explore"),
        ((make_classifier(),), {}, "nothing to explore"),
        ((make_classifier(), *make_images(0)), {}, "nothing to explore"),
        ((make_classifier(), *make_images()), {"epss": 1}, "must be one of image, rows, .*, got 'epss'"),
        ((make_classifier(), *make_images()), {"rows": ["AToP"]}, "rows must be one of model"),
        ((make_classifier(), *make_images()), {"norm": "max"}, "must be one of linf, l2"),
    ],
    ids=["no defence", "no images", "none of them", "unknown value", "unknown defence", "unknown norm"],
)
def test_explore_refuses_what_it_cannot_show(arguments: tuple, start: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explore(*arguments, **start)


def test_any_module_can_be_explored_without_labels_or_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, images = [], make_images()[0][:, :1]
    monkeypatch.setattr(package, "display", lambda what, raw=False: outputs.append(what))
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, 3)).eval()
    explore(model, images, steps=2)
    explorer, bundle = outputs
    assert explorer.values["eps"] == 0.3
    assert explorer.state["classes"] == ["0", "1", "2"]
    assert torch.equal(explorer.scene.labels, model(images).argmax(dim=1))
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width > 400
    assert f"atop-still-{explorer.model_id}" in bundle["text/html"] and "PGD" in bundle["text/html"]


def test_the_kits_defences_are_explored_without_arguments_and_the_first_image_tells_ap_from_atop() -> None:
    explorer = make_explorer()
    explorer.refresh()
    assert explorer.worker.wait(120)
    correct = {row["name"]: row["correct"] for row in explorer.shown["rows"]}
    assert correct == {"undefended": False, "AT": True, "AP": False, "AToP": True}
    assert [len(row["cells"]) for row in explorer.shown["rows"]] == [2, 2, 4, 4]
    assert "image/png" in still(explorer)
