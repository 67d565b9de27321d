"""The notebooks themselves: each executed once by a kernel (by papermill through a recipe, or by nbval); what
has to run again runs its cells in this interpreter.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas
import papermill
import pytest
import yaml

from atoplib.batch import __main__ as command
from atoplib.files import read_json

ROOT = Path(__file__).resolve().parents[1]
STAGES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
DEMO = [*yaml.safe_load((ROOT / "notebooks/recipes/mnist.yaml").read_text())["notebooks"], "08_report"]
OTHERS = [stage for stage in STAGES if stage not in DEMO]


def cells_of(stage: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]


def is_parameters(cell: dict[str, Any]) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


# ----------------------------------------------------------------------------------------------- by kernels


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the recipe mnist ran in smoke size."""
    workspace = tmp_path_factory.mktemp("demo")
    assert command.main(["mnist", "--smoke", "--report", "--workspace", str(workspace)]) == 0
    return workspace


def run_of(workspace: Path, stage: str) -> Path:
    (run,) = workspace.glob(f"runs/mnist-smoke/{stage}-*")
    return run


def test_the_recipe_leaves_executed_notebooks_pages_pictures_and_an_index(demo: Path) -> None:
    index = (demo / "runs/mnist-smoke/index.html").read_text()
    for stage in DEMO:
        run = run_of(demo, stage)
        cells = nbformat.read(run / "notebook.ipynb", as_version=4).cells
        assert all(cell.get("execution_count") for cell in cells if cell.cell_type == "code"), stage
        assert "<html" in (run / "notebook.html").read_text() and f"{run.name}/notebook.html" in index
        assert [*run.glob("figures/*.png"), *run.glob("pictures/*.png")], stage
        manifest = read_json(run / "manifest.json")
        assert manifest["status"] == "complete" and manifest["code"] and manifest["versions"]["torch"], stage
    for stage in DEMO[:3]:
        assert read_json(run_of(demo, stage) / "metrics.json")["train_flops"] > 0, stage


def test_a_second_call_loads_what_is_done_and_a_dry_run_says_so(
    demo: Path, capsys: pytest.CaptureFixture[str], without_shape_checks: None
) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("notebook.ipynb")}
    assert command.main(["mnist", "--smoke", "--report", "--workspace", str(demo)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == len(DEMO) and "AToP" in printed and "index.html" in printed
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("notebook.ipynb")} == before


def test_the_other_notebooks_pass_nbval_on_the_runs_of_the_demo(demo: Path, tmp_path: Path) -> None:
    copies = []
    for stage in OTHERS:
        notebook = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4)
        first = next(i for i, cell in enumerate(notebook.cells) if is_parameters(cell))
        lines = [
            f"{name} = {value!r}"
            for name, value in (("smoke", True), ("workspace", str(demo)))
            if f"\n{name}: " in notebook.cells[first].source
        ]
        notebook.cells.insert(first + 1, nbformat.v4.new_code_cell("\n".join(lines)))
        copies.append(tmp_path / f"{stage}.ipynb")
        nbformat.write(notebook, copies[-1])
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", "-c", os.devnull),
            *("--rootdir", str(tmp_path), *map(str, copies)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ended.returncode == 0, ended.stdout[-5000:]
    code = [cell for stage in OTHERS for cell in cells_of(stage) if cell["cell_type"] == "code"]
    assert f"{len(code) + len(OTHERS)} passed" in ended.stdout


# -------------------------------------------------------------------------------------- in this interpreter


def run_cells(stage: str, capsys: pytest.CaptureFixture[str], **given: object) -> tuple[dict[str, Any], str]:
    """Execute a notebook's code cells here; returns its names, and what it printed or displayed as text."""
    namespace: dict[str, Any] = {"__name__": "__main__", "__annotations__": {}}
    capsys.readouterr()
    for cell in (cell for cell in cells_of(stage) if cell["cell_type"] == "code"):
        code = "\n".join(line for line in source(cell).splitlines() if not line.startswith("%"))
        exec(compile(code, f"<{stage}>", "exec"), namespace)
        if is_parameters(cell):
            namespace |= given
    return namespace, capsys.readouterr().out


@pytest.mark.parametrize("stage", DEMO[:5])
def test_by_hand_after_the_demo_nothing_is_computed_again(
    stage: str, demo: Path, capsys: pytest.CaptureFixture[str], without_shape_checks: None
) -> None:
    run = run_of(demo, stage)
    weights = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    metrics = read_json(run / "metrics.json")
    _, printed = run_cells(stage, capsys, smoke=True, workspace=str(demo))
    assert run_of(demo, stage) == run, "another run was made"
    assert {path.name: path.read_bytes() for path in run.glob("*.safetensors")} == weights
    if stage < "05":
        assert re.search(r"[Ll]oaded", printed), printed[-2000:]
        assert read_json(run / "metrics.json") == metrics


def test_a_fresh_directory_gives_the_same_numbers(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_shape_checks: None
) -> None:
    for stage in DEMO[:4]:
        run_cells(stage, capsys, smoke=True, workspace=str(tmp_path), **demo_parameters(demo, stage))
    first, second = (
        pandas.read_csv(run_of(workspace, "04_attack") / "frame.csv") for workspace in (demo, tmp_path)
    )
    pandas.testing.assert_frame_equal(first.drop(columns="seconds"), second.drop(columns="seconds"))


def demo_parameters(demo: Path, stage: str) -> dict[str, object]:
    """What the recipe gives a notebook beside its defaults."""
    return yaml.safe_load((ROOT / "notebooks/recipes/mnist.yaml").read_text())["notebooks"][stage]


@pytest.mark.parametrize("stage", ["04_attack", "05_visualize", "06_compare", "07_ablate"])
def test_before_anything_is_trained_the_weights_of_the_kit_are_used_and_it_is_said(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_shape_checks: None
) -> None:
    _, printed = run_cells(stage, capsys, smoke=True, workspace=str(tmp_path))
    assert "kit" in printed
    assert read_json(run_of(tmp_path, stage) / "manifest.json")["status"] == "complete"


def test_a_mistyped_parameter_stops_a_notebook_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"no parameter 'epochz' \(did you mean 'epochs'\?\)"):
        run_cells("01_train_classifier", capsys, In=["# Parameters\nepochz = 3"])


# ----------------------------------------------------------------------------------------------- their form


@pytest.mark.parametrize("stage", STAGES)
def test_a_notebook_is_committed_without_outputs_its_cells_fit_a_screen_and_it_ends_with_three_exercises(
    stage: str,
) -> None:
    cells = cells_of(stage)
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        lines = [
            line
            for line in source(cell).splitlines()  # papermill reads no parameter of two lines
            if not (is_parameters(cell) and line.startswith("purifier_options: dict = {"))
        ]
        assert max(map(len, lines)) < 90 and (len(lines) <= 20 or is_parameters(cell)), source(cell)
        text = re.sub(
            r"^ *figures\.save_figure\(.*$", "", source(cell), flags=re.MULTILINE
        )  # kept, not shown
        shown = "display(" in text or re.search(
            r"^(figures\.purification_grid|explore)\(", text, re.MULTILINE
        )
        of_images = re.search(r"picture_path|purification_grid|explore\(", text)
        assert not (shown and of_images) or "pictures" in cell["metadata"].get("tags", []), text
    names = [re.findall(r"^(\w+):", source(cell), re.M) for cell in cells if is_parameters(cell)]
    assert [[*papermill.inspect_notebook(ROOT / f"notebooks/{stage}.ipynb")]] == names  # in one cell
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert [line[:2] for line in source(cells[-1]).splitlines() if re.match(r"\d\.", line)] == [
        "1.",
        "2.",
        "3.",
    ]
