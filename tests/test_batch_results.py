"""The small folder of results: numbers, plots and notebooks; no weights, no picture of the data, nobody's folders."""

import json
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from atoplib.batch import cli, main, make_plan, read_recipe
from atoplib.batch.results import IN_PLACE_OF_PICTURES, places_of, without_pictures, without_places

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The workspace of a recipe with a notebook that shows images and one that does not, and the folder of its results."""
    workspace = tmp_path_factory.mktemp("results")
    recipe = workspace / "two.yaml"
    recipe.write_text("shared: {experiment: two}\nnotebooks: {01_train_classifier: {}, 02_pretrain_purifier: {}}")
    folder = workspace / "given" / "away"
    assert main([str(recipe), "--smoke", "--workspace", str(workspace), "--results", str(folder)]) == 0
    return workspace, folder


def test_numbers_plots_and_notebooks_are_there_and_weights_and_pictures_are_not(written: tuple[Path, Path]) -> None:
    workspace, folder = written
    (classifier,), (purifier,) = folder.glob("01_*"), folder.glob("02_*")
    names = {"manifest.json", "metrics.json", "notebook.ipynb", "parameters.json", "training.png"}
    assert {path.name for path in classifier.iterdir()} == {path.name for path in purifier.iterdir()} == names
    assert {path.name for path in workspace.glob("runs/*/02_*/pictures/*")} == {"transforms.png", "purified.png"}
    assert {path.name for path in folder.iterdir()} == {classifier.name, purifier.name, "README.md", "table.csv"}
    (run,) = workspace.glob("runs/*/02_*")
    assert json.loads((purifier / "metrics.json").read_text()) == json.loads((run / "metrics.json").read_text())
    assert f"{classifier.name}/notebook.ipynb" in (folder / "README.md").read_text()


def test_the_notebook_keeps_its_plots_and_shows_no_image_of_the_data(written: tuple[Path, Path]) -> None:
    _, folder = written
    (path,) = folder.glob("02_*/notebook.ipynb")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    shown = [
        (cell.source, output.data)
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type in ("display_data", "execute_result")
    ]
    with_image = [source for source, data in shown if "image/png" in data]
    assert len(with_image) == 1 and 'figure_path("training")' in with_image[0]
    assert [data["text/plain"] for _, data in shown].count(IN_PLACE_OF_PICTURES) == 2


def test_no_file_names_the_workspace(written: tuple[Path, Path]) -> None:
    workspace, folder = written
    for path in folder.rglob("*"):
        assert path.is_dir() or str(workspace).encode() not in path.read_bytes(), path


def test_every_cell_that_shows_images_of_the_data_says_so() -> None:
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            draws = any(call in cell.source for call in ("display(inputs_figure)", "picture_path(", "shown[", "explore("))
            shows = cell.cell_type == "code" and draws and ("display(" in cell.source or "explore(" in cell.source)
            saves_only = "Image(pictured)" in cell.source
            assert not shows or saves_only or "pictures" in cell.metadata.get("tags", ()), (path.name, cell.source)


def test_text_is_kept_where_pictures_are_left_out() -> None:
    printed = {"output_type": "stream", "name": "stdout", "text": ["98 %"]}
    picture = {"output_type": "display_data", "data": {"image/png": "iVBOR"}, "metadata": {}}
    cell = {"cell_type": "code", "metadata": {"tags": ["pictures"]}, "source": [], "outputs": [printed, picture]}
    plot = {**cell, "metadata": {}}
    metadata = {"widgets": {"state": "images"}, "kernelspec": {}, "papermill": {"input_path": "/home/me/a", "version": 2}}
    changed = without_pictures({"cells": [cell, plot], "metadata": metadata})
    first, second = changed["cells"]
    assert first["outputs"] == [printed, {**picture, "data": {"text/plain": [IN_PLACE_OF_PICTURES]}}]
    assert second == plot and changed["metadata"] == {"kernelspec": {}, "papermill": {"version": 2}}
    assert cell["outputs"] == [printed, picture], "the notebook that was given stays as it was"


def test_folders_of_ones_own_are_left_out_of_every_value() -> None:
    places = {"/w/s": "WORKSPACE", "/w/s/data/digits": "digits"}
    assert without_places({"a": ["/w/s/runs", 1, None], "b": {"c": "x of folder:/w/s/data/digits"}}, places) == {
        "a": ["WORKSPACE/runs", 1, None],
        "b": {"c": "x of folder:digits"},
    }


def test_a_folder_given_as_a_dot_leaves_the_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "one.yaml"
    path.write_text("notebooks: {01_train_classifier: {dataset: 'folder:.'}}")
    (job,) = make_plan(read_recipe(path), ROOT / "notebooks", {"workspace": str(tmp_path / "work")})
    content = {"accuracy": "0.975", "where": str(tmp_path / "train"), "dataset": "folder:."}
    kept = without_places(content, places_of(job))
    assert kept["accuracy"] == "0.975" and str(tmp_path) not in repr(kept)


def test_no_file_names_the_folder_of_the_images(tmp_path: Path) -> None:
    images = tmp_path / "mine" / "squares"
    for index in range(24):
        folder = images / ("train" if index < 16 else "test") / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (10 * index, 5 * index, 250 - 9 * index)).save(folder / f"{index}.png")
    recipe, folder = tmp_path / "one.yaml", tmp_path / "away"
    recipe.write_text(f"shared: {{experiment: one, dataset: 'folder:{images}'}}\nnotebooks: {{01_train_classifier: {{}}}}")
    assert main([str(recipe), "--smoke", "--workspace", str(tmp_path / "work"), "--results", str(folder)]) == 0
    for path in folder.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
    assert "folder:squares" in (folder / "table.csv").read_text()


def test_a_recipe_stops_after_its_minutes_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import time

    recipe = tmp_path / "one.yaml"
    recipe.write_text("shared: {experiment: one}\nnotebooks: {01_train_classifier: {}}")
    arguments = [str(recipe), "--smoke", "--workspace", str(tmp_path)]
    assert main([*arguments, "--minutes", "0.01"]) == 75
    assert "stopped after 0.01 min, as asked; the same command goes on" in capsys.readouterr().err
    assert main(arguments) == 0
    monkeypatch.setattr(cli, "run_plan", lambda *_, **__: time.sleep(0.2) or 0)
    assert main([*arguments, "--minutes", "60"]) == 0, "what ends in time is not stopped, now or later"


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_that_are_no_time_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], minutes: str) -> None:
    assert main(["mnist", "--workspace", str(tmp_path), f"--minutes={minutes}"]) == 1
    assert "--minutes must be a number above 0" in capsys.readouterr().err
