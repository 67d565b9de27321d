"""Pictures show the numbers they are given: bars, intervals, cells, maps with one symmetric scale; bad input
is refused."""

import math

import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from torch import nn

from atoplib import figures
from atoplib.decisions import fixed_sample
from atoplib.figures.style import DEFENCE_COLOURS, colours_of, eps_text
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform, corrupt

DEFENCES, ATTACKS = ("undefended", "AP", "AToP"), ("clean", "pgd", "flow")


def frame_of(defences=DEFENCES, attacks=ATTACKS, **columns):
    """Accuracies 10, 15, 20, ... in percent, with an interval of -5 and +3."""
    pairs = [(defence, attack) for defence in defences for attack in attacks]
    rows = [
        {"defence": d, "attack": a, "norm": "linf", "eps": 8 / 255, "rule": "single",
         "accuracy": 10.0 + 5 * k, "low": 5.0 + 5 * k, "high": 13.0 + 5 * k, **columns}
        for k, (d, a) in enumerate(pairs)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def drawn(figure):
    figure.draw_without_rendering()
    return figure


def bars_of(axes):
    """The bars of each defence, without the intervals on them."""
    return [each for each in axes.containers if isinstance(each, BarContainer)]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def threshold(level):
    """Class 1 where an image is brighter in the mean than ``level``."""
    return lambda images: (images.mean(dim=(1, 2, 3)) - level)[:, None] * torch.tensor([-1.0, 1.0])


def test_telling_images_are_correct_by_all_of_all_classes_and_held_by_atop_alone():
    brightness, labels = torch.tensor([0.1, 0.2, 0.3, 0.95, 0.8]), torch.tensor([0, 0, 0, 1, 1])
    images = brightness[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    defences = {"AP": threshold(0.25), "AToP": threshold(0.5)}
    assert figures.telling_images(defences, images, labels, 5) == [0, 3, 1, 4, 2]
    assert figures.telling_images(defences, images, labels, 2, eps=0.1) == [1, 3]


# accuracies


def test_bars_have_the_heights_intervals_numbers_and_colours_of_the_frame():
    frame = frame_of()
    figure = drawn(figures.accuracy_bars(frame, "Title", chance=10))
    (axes,) = figure.axes
    heights = [[bar.get_height() for bar in bars] for bars in bars_of(axes)]
    assert np.allclose(heights, frame["accuracy"].to_numpy().reshape(3, 3))
    assert [to_hex(bars[0].get_facecolor()) for bars in bars_of(axes)] == [
        DEFENCE_COLOURS[name] for name in DEFENCES
    ]
    spans = [lines.get_segments() for bars in bars_of(axes) for lines in bars.errorbar.lines[2]]
    assert np.allclose(np.reshape(spans, (9, 2, 2))[:, :, 1], frame[["low", "high"]].to_numpy())
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts, key=float) == [f"{value:.1f}" for value in frame["accuracy"]]
    assert len(set(colours_of(["mine", "AToP", "yours"]).values())) == 3
    assert legend(figure) == ["chance, 10 %", *DEFENCES] and figure.get_suptitle() == "Title"
    assert "%" in axes.get_ylabel() and "95 %" in axes.get_ylabel()


def test_a_missing_combination_leaves_a_gap_and_the_other_bars_their_places():
    (axes,) = drawn(figures.accuracy_bars(frame_of().drop(index=4))).axes  # AP under pgd
    places = [[round(bar.get_x() + bar.get_width() / 2) for bar in bars] for bars in bars_of(axes)]
    assert places == [[0, 1, 2], [0, 2], [0, 1, 2]]


def test_one_rule_is_drawn_the_first_unless_another_is_named():
    frame = pd.concat([frame_of(), frame_of(rule="majority", accuracy=90.0, low=80.0, high=95.0)])
    for rule, expected in ((None, set(frame_of()["accuracy"])), ("majority", {90.0})):
        (axes,) = figures.accuracy_bars(frame, rule=rule).axes
        assert {bar.get_height() for bars in bars_of(axes) for bar in bars} == expected


def test_an_attack_at_several_radii_is_told_apart_by_its_radius():
    frame = pd.concat(
        [frame_of(), frame_of(attacks=["pgd"], eps=0.5, norm="l2"), frame_of(attacks=["pgd"], eps=0.3)]
    )
    labels = [
        tick.get_text().replace("\n", " ") for tick in figures.accuracy_bars(frame).axes[0].get_xticklabels()
    ]
    assert labels == ["clean", "pgd, ℓ∞ ε = 8/255", "flow", "pgd, ℓ2 ε = 0.5", "pgd, ℓ∞ ε = 0.3"]
    assert eps_text(0.2) == "ℓ∞ ε = 0.2" and eps_text(8 / 255, "l2") == "ℓ2 ε = 0.03137"


def test_a_heat_map_has_every_number_with_its_interval_and_a_scale_of_0_to_100():
    frame = frame_of().drop(index=4)
    figure = drawn(figures.attack_heatmap(frame))
    axes = figure.axes[0]
    values = axes.collections[0].get_array().ravel()
    assert list(values.mask.nonzero()[0]) == [4] and values.compressed().tolist() == list(frame["accuracy"])
    assert axes.collections[0].get_clim() == (0, 100)
    assert axes.texts[0].get_text() == "10.0\n[5, 13]" and len(axes.texts) == 8
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(DEFENCES)
    assert figure.axes[1].get_ylabel() == "accuracy (%)"


def test_heat_maps_of_several_columns_and_panels_have_scales_of_their_own_and_numbers_in_order():
    frame = pd.DataFrame(
        [{"defence": d, "num_masks": m, "rate": r, "robust": 10.0 * m, "distance": 2.0 * m}
         for d in ("AP", "AToP") for m in (4, 1, 16) for r in ("10 %", "50 %")]
    )  # fmt: skip
    values = {"robust": "robust accuracy (%)", "distance": "distance, 1/255"}
    figure = drawn(
        figures.attack_heatmap(frame, rows="rate", columns="num_masks", panel="defence", values=values)
    )
    maps = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in maps] == [
        f"{d}: {v}" for d in ("AP", "AToP") for v in values.values()
    ]
    assert [axes.collections[0].get_clim() for axes in maps] == [(0, 100), (0, 32)] * 2
    assert [tick.get_text() for tick in maps[0].get_xticklabels()] == ["1", "4", "16"]


def test_lines_go_through_the_values_and_their_bars_span_the_intervals():
    frames = [
        frame_of(attacks=["pgd"], eps=eps, accuracy=a, low=a - 4, high=a + 2)
        for eps, a in ((0.1, 60.0), (0.2, 30.0))
    ]
    frame = pd.concat(
        [frame_of(attacks=["clean"], eps=math.nan, accuracy=90.0, low=80.0, high=95.0), *frames]
    )
    figure = drawn(figures.accuracy_over_eps(frame))
    (axes,) = figure.axes
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert len(lines) == 3 and all(np.allclose(line.get_xdata(), [0, 0.1, 0.2]) for line in lines)
    assert all(np.allclose(line.get_ydata(), [90, 60, 30]) for line in lines)
    (segments,) = axes.containers[0].lines[2]
    assert np.allclose([segment[:, 1] for segment in segments.get_segments()], [[80, 95], [56, 62], [26, 32]])
    assert axes.get_title(loc="left") == "pgd, ℓ∞" and legend(figure) == list(DEFENCES)


def test_a_parameter_may_be_named_or_logarithmic_and_panels_are_what_is_asked_for():
    frame = pd.concat(
        [
            frame_of(attacks=["pgd", "flow"], variant=name, num_samples=n)
            for name, n in (("ft", 1), ("at", 10))
        ]
    )
    figure = drawn(figures.parameter_lines(frame, "variant"))
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.axison] == ["pgd", "flow"]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["ft", "at"]
    # another run with the same values
    again = frame.assign(accuracy=frame["accuracy"] + 1, high=frame["high"] + 1)
    line = figures.parameter_lines(pd.concat([frame, again]), "num_samples").axes[0].lines
    assert np.allclose([each.get_ydata() for each in line if each.get_linestyle() == "-"][1], [20.5, 20.5])
    figure = drawn(figures.parameter_lines(frame, "num_samples", panel="defence", series="attack", log=True))
    assert figure.axes[0].get_xscale() == "log" and legend(figure) == ["pgd", "flow"]


# curves


def test_curves_have_a_panel_for_every_number_in_percent_where_it_is_an_accuracy():
    history = [
        {"epoch": k, "loss": 1 / k, "test_accuracy": k / 10, "ok": True, "name": "x"} for k in (1, 2, 3)
    ]
    history[2]["gan"] = -0.5
    figure = drawn(figures.training_curves(history))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "test accuracy", "gan"]
    assert [axes.get_title(loc="right") for axes in figure.axes] == ["0.3333", "30.0 %", "−0.5"]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [10, 20, 30]
    assert len({axes.get_xlim() for axes in figure.axes}) == 1 and figure.axes[0].get_xlabel() == "epoch"


# images

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CHANGED = (IMAGES + 0.1 * torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(1)).sign()).clamp(
    0, 1
)


def make_pipeline(name="rt2", copies=1):
    torch.manual_seed(3)
    purifier = nn.Sequential(nn.Conv2d(5, 3, 3, padding=1), nn.Tanh())
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).eval()
    return AToPPipeline(Transform(name), purifier, classifier, copies=copies).eval()


def pixels(axes):
    return np.asarray(axes.images[0].get_array())


def shown(image):
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name, copies", [("rt1", 1), ("rt3", 1), ("rt2", 2)])
def test_stages_belong_to_one_sample(name, copies):
    pipeline = make_pipeline(name, copies)
    stages = figures.purification_stages(pipeline, IMAGES, CHANGED, seed=5)
    with torch.no_grad(), fixed_sample(pipeline, 5):
        sample = pipeline.sample(CHANGED)
        torch.testing.assert_close(stages["p(adversarial)"], pipeline(CHANGED).softmax(dim=1))
        torch.testing.assert_close(stages["purified"], pipeline.purify(CHANGED, sample).clamp(0, 1))
        given = corrupt(CHANGED.repeat(copies, 1, 1, 1), sample)
    torch.testing.assert_close(stages["transformed"], (given[:2, :3] + 1) / 2)


def test_the_grid_shows_the_pixels_and_maps_with_one_symmetric_scale_a_column():
    pipeline = make_pipeline()
    stages = figures.purification_stages(pipeline, IMAGES, CHANGED)
    right = stages["p(clean)"].argmax(dim=1)
    figure = drawn(figures.purification_grid(pipeline, IMAGES, CHANGED, right, classes=list("abcd"), eps=0.1))
    rows = np.array(figure.axes[:12]).reshape(2, 6)
    for number in range(2):
        for column, image in ((0, IMAGES), (1, CHANGED), (3, stages["transformed"]), (4, stages["purified"])):
            np.testing.assert_allclose(pixels(rows[number, column]), shown(image[number]), atol=1e-6)
        change = 255 * (CHANGED - IMAGES)[number].mean(dim=0)
        np.testing.assert_allclose(pixels(rows[number, 2]), change, atol=1e-3)
        assert {rows[number, column].images[0].get_clim() for column in (2, 5)} == {(-25.5, 25.5)}
        assert rows[number, 0].get_xlabel().startswith(f"✓ {'abcd'[right[number]]}")
        alone = int(pipeline.classifier(CHANGED)[number].argmax())
        assert (
            rows[number, 1].get_xlabel()[:12]
            == f"f alone: {'✓' if alone == right[number] else '✗'} {'abcd'[alone]}"
        )
    wrong = figures.purification_grid(pipeline, IMAGES, CHANGED, (right + 1) % 4)
    largest = float(255 * (stages["purified"] - IMAGES).mean(dim=1).abs().max())
    for row in np.array(wrong.axes[:12]).reshape(2, 6):
        assert row[0].get_xlabel()[0] == "✗" and row[5].images[0].get_clim()[1] == pytest.approx(largest)


def test_defences_without_a_purifier_show_what_they_have_and_each_defence_its_own_attack():
    bare = make_pipeline().classifier
    grid = figures.purification_grid(
        {"AT": bare, "AToP": make_pipeline()}, IMAGES, {"AT": IMAGES.flip(3), "AToP": CHANGED}
    )
    rows = np.array(drawn(grid).axes[:24]).reshape(4, 6)
    assert [[bool(a.images) for a in row] for row in rows] == [[True] * 3 + [False] * 3, [True] * 6] * 2
    np.testing.assert_allclose(pixels(rows[0, 1]), shown(IMAGES[0].flip(2)), atol=1e-6)
    assert [row[0].get_ylabel() for row in rows] == ["AT", "AToP"] * 2
    assert len([axes for axes in figures.purification_grid(bare, IMAGES, CHANGED).axes if axes.images]) == 6


def test_an_image_grid_has_its_headings():
    grid = figures.image_grid({"input": IMAGES, "a $name$": CHANGED}, names=["one", "two"])
    assert [axes.get_title() for axes in drawn(grid).axes[:2]] == ["input", r"a \$name\$"]
    assert [grid.axes[place].get_ylabel() for place in (0, 2)] == ["one", "two"]


# what cannot be drawn


@pytest.mark.parametrize(
    "draw, given, message",
    [
        (figures.accuracy_bars, [frame_of().iloc[:0]], "no row"),
        (figures.accuracy_bars, [pd.concat([frame_of(), frame_of()])], "are there twice"),
        (figures.attack_heatmap, [pd.concat([frame_of(), frame_of()])], "duplicate entries"),
        (figures.save_figure, [Figure(), "figure.jpg"], "suffix must be one of png, pdf"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(draw, given, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        draw(*given)


# files


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_equal_figures_give_equal_files_and_a_failure_leaves_the_earlier_one(suffix, tmp_path, monkeypatch):
    paths = [tmp_path / "new" / f"{k}{suffix}" for k in "ab"]
    for path in paths:
        figures.save_figure(figures.accuracy_bars(frame_of()), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    before = paths[0].read_bytes()
    figure = figures.accuracy_bars(frame_of())
    monkeypatch.setattr(
        figure, "savefig", lambda *_args, **_options: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        figures.save_figure(figure, paths[0])
    assert paths[0].read_bytes() == before and len(list(paths[0].parent.iterdir())) == 2
    assert matplotlib.pyplot.get_fignums() == [], "no figure is one of pyplot's"
