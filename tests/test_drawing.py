"""What pictures have in common: a defence's colour, which colour-blind eyes tell from the others, and one way downwards."""

import re
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from atoplib import drawing, figures, heatmaps
from atoplib.drawing import DEFENCE_COLOURS, GUEST_COLOURS, RIGHT_COLOUR, SERIES, WRONG_COLOUR, colours_of
from tests.test_heatmaps import cell

ROOT = Path(drawing.__file__).parent
# Linear RGB as people see it who lack a kind of cone (Machado, Oliveira and Fernandes 2009, severity 1).
EYES = {
    "all cones": np.eye(3),
    "no long": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "no middle": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "no short": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def lab(colour: str, eyes: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as these eyes see it."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    xyz = to_xyz @ np.clip(eyes @ linear, 0, 1) / np.array([0.9505, 1.0, 1.0888])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize(
    ("colours", "least"),
    [
        (tuple(DEFENCE_COLOURS.values()), 24),
        ((*DEFENCE_COLOURS.values(), *GUEST_COLOURS), 15),
        (SERIES, 16),
        ((RIGHT_COLOUR, WRONG_COLOUR), 50),
    ],
    ids=["our defences", "all defences", "series", "right and wrong"],
)
def test_colours_are_told_apart_by_eyes_that_lack_a_kind_of_cone(colours, least, eyes):
    nearest = min(
        (float(np.linalg.norm(lab(one, EYES[eyes]) - lab(other, EYES[eyes]))), one, other)
        for one, other in combinations(colours, 2)
    )
    assert nearest[0] >= least, nearest


def test_our_defences_keep_their_colours_whoever_stands_beside_them():
    for names in (["AToP"], ["AToP", "mine", "undefended"], ["mine", "yours", "AT", "AP", "AToP", "undefended", "theirs"]):
        given = colours_of(names)
        assert list(given) == names and len(set(given.values())) == len(names)
        assert all(given[name] == DEFENCE_COLOURS[name] for name in names if name in DEFENCE_COLOURS)
    assert len(set(colours_of([f"defence {number}" for number in range(7)]).values())) == 7


def test_a_defence_has_one_colour_in_bars_against_a_parameter_and_along_a_setting():
    rows = [{"defence": name, "attack": "clean", "accuracy": 0.5, "low": 0.4, "high": 0.6} for name in ("AP", "AToP")]
    bars = figures.accuracy_bars(rows).axes[0]
    against = figures.accuracy_against([row | {"value": 1.0} for row in rows], name="seed").axes[0]
    points = {name: [cell(noise_std=level) for level in (0.0, 0.1)] for name in ("AP", "AToP")}
    along = heatmaps.metric_lines(points, value="noise_std", label="sigma").axes[0]
    expected = [to_rgb(DEFENCE_COLOURS[name]) for name in ("AP", "AToP")]
    drawn = [bar.patches[0].get_facecolor()[:3] for bar in bars.containers if hasattr(bar, "patches")]
    assert drawn == expected
    assert [to_rgb(line.get_color()) for line in against.lines if line.get_label() in ("AP", "AToP")] == expected
    assert [to_rgb(group.lines[0].get_color()) for group in along.containers] == expected


def test_a_figure_is_unknown_to_pyplot_and_a_long_title_is_wrapped():
    figure = drawing.new_figure(4.0, 2.0, "a title of many words " * 5)
    assert plt.get_fignums() == [] and figure.get_figheight() == pytest.approx(2.4)
    assert "\n" in figure.get_suptitle()


def test_pictures_import_downwards_only():
    order = ["drawing", "figures.tables", "figures.image_grid", "figures.curves", "figures.accuracies"]
    order += ["figures.certificate", "figures.images", "figures", "heatmaps"]
    for place, name in enumerate(order):
        stem = ROOT.joinpath(*name.split("."))
        path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
        imported = re.findall(r"^from atoplib\.(\w+(?:\.\w+)?) import", path.read_text(), flags=re.MULTILINE)
        assert set(imported) <= {*order[:place], "checkpoints"}, f"{name} imports {imported}"
    assert {f"figures.{path.stem}" for path in (ROOT / "figures").glob("[!_]*.py")} <= set(order)
