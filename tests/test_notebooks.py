"""The notebooks themselves, executed: by papermill through the recipe runner, and cell by cell by nbval."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
import yaml
from papermill.parameterize import parameterize_notebook
from safetensors.torch import load_file

from atoplib.batch import main
from atoplib.checkpoints import load_checkpoint, read_header
from atoplib.classifiers import fold_batch_norms
from atoplib.explorer.knobs import to_yaml
from atoplib.explorer.widgets import make_explorer
from atoplib.parameters import NOTEBOOKS, REPORT, Visualize
from atoplib.pipeline import load_pipeline

ROOT = Path(__file__).resolve().parent.parent
DEMO = [*yaml.safe_load((ROOT / "notebooks/recipes/mnist.yaml").read_text())["notebooks"], REPORT]


def scores(workspace: Path) -> list[dict]:
    """What the attack notebook measured in a workspace, without its timings."""
    (path,) = workspace.glob("runs/mnist-smoke/04_attack-*/metrics.json")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads(path.read_text())["scores"]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the recipe mnist ran in smoke size."""
    workspace = tmp_path_factory.mktemp("demo")
    assert main(["mnist", "--smoke", "--report", "--workspace", str(workspace)]) == 0
    return workspace


def test_the_recipe_leaves_executed_notebooks_pages_and_pictures(demo: Path) -> None:
    for stage in DEMO:
        (run,) = demo.glob(f"runs/mnist-smoke/{stage}-*")
        cells = nbformat.read(run / "notebook.ipynb", as_version=4).cells
        assert all(cell.get("execution_count") for cell in cells if cell.cell_type == "code"), stage
        assert "<html" in (run / "notebook.html").read_text()
        assert [*run.glob("figures/*.png"), *run.glob("pictures/*.png")], stage
        assert json.loads((run / "manifest.json").read_text())["status"] == "complete"


def test_every_training_states_the_flops_that_it_took(demo: Path) -> None:
    for stage, file in zip(DEMO, ("classifier", "purifier", "purifier"), strict=False):
        (run,) = demo.glob(f"runs/mnist-smoke/{stage}-*")
        stated = json.loads((run / "metrics.json").read_text())["train_flops"]
        assert stated > 0 and read_header(run / f"{file}.safetensors")["metrics"]["train_flops"] == stated
    assert read_header(run / "purifier.safetensors")["metrics"]["pretrain_flops"] > 0


def test_the_report_names_the_results_it_was_made_from(demo: Path) -> None:
    """So that it is made anew when one of them is."""
    (manifest,) = demo.glob("runs/mnist-smoke/08_report-*/manifest.json")
    inputs = json.loads(manifest.read_text())["inputs"]
    assert [name.rpartition("-")[0] for name in sorted(inputs)] == DEMO[:-1]
    assert all(entry["file"] == f"{name}/metrics.json" for name, entry in inputs.items())


def test_a_second_call_reuses_what_is_done(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("notebook.ipynb")}
    assert main(["mnist", "--smoke", "--report", "--workspace", str(demo)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == len(DEMO)
    assert "| AToP" in printed and "notebook.html" in printed
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("notebook.ipynb")} == before


def test_every_notebook_passes_nbval_and_a_fresh_directory_gives_the_same_numbers(demo: Path, tmp_path: Path) -> None:
    copies = []
    for stage in NOTEBOOKS:
        notebook = papermill.iorw.load_notebook_node(str(ROOT / "notebooks" / f"{stage}.ipynb"))
        notebook = parameterize_notebook(notebook, {"smoke": True, "workspace": str(tmp_path)})
        for cell in notebook.cells:  # papermill's marks are not part of the format that nbval reads
            cell.metadata.pop("papermill", None)
        copies.append(tmp_path / f"{stage}.ipynb")
        nbformat.write(notebook, copies[-1])
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir"]
    command += [str(tmp_path), *map(str, copies)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert scores(tmp_path) == scores(demo)


def test_a_mistyped_parameter_stops_a_notebook_with_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks/01_train_classifier.ipynb")]
    command += [str(tmp_path / "out.ipynb"), "-k", "python3", "--no-progress-bar"]
    command += ["-p", "epochz", "3", "-p", "workspace", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "no parameter 'epochz' (did you mean 'epochs'?)" in ended.stderr
    assert not (tmp_path / "runs").exists()


def run_notebook(stage: str, folder: Path, *options: str) -> nbformat.NotebookNode:
    """A notebook executed by papermill's own command."""
    out = folder / f"{stage}.ipynb"
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / f"{stage}.ipynb"), str(out), "-k", "python3"]
    command += ["--no-progress-bar", "-p", "workspace", str(folder), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return nbformat.read(out, as_version=4)


@pytest.mark.parametrize("stage", ["05_visualize", "07_ablate"])
def test_before_anything_is_trained_the_explorer_shows_the_weights_of_the_kit(stage: str, tmp_path: Path) -> None:
    executed = run_notebook(stage, tmp_path, "-p", "smoke", "True")
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert any("those that come with the kit" in output.get("text", "") for output in outputs)
    stills = [output.data for output in outputs if "atop-still" in output.get("data", {}).get("text/html", "")]
    assert len(stills) == 1 and stills[0]["image/png"]


def test_before_anything_is_trained_the_weights_of_the_kit_are_compared(tmp_path: Path) -> None:
    executed = run_notebook("06_compare", tmp_path, "-p", "smoke", "True")
    shown = [
        output.get("data", {}).get("text/markdown", "") for cell in executed.cells for output in cell.get("outputs", [])
    ]
    (table,) = (text for text in shown if text.startswith("One-shot"))
    assert [line.split()[1] for line in table.splitlines()[4:]] == ["undefended", "AT", "AP", "AToP"]
    assert "known: PGD" in table and "unseen: worst case" in table
    (run,) = tmp_path.glob("runs/mnist-smoke/06_compare-*")
    metrics = json.loads((run / "metrics.json").read_text())
    assert {row["attack"] for row in metrics["scores"]} >= {"clean", "blind: transfer", "unseen: worst case", "worst case"}
    assert metrics["costs"]["AT"]["training"] > 1e12 and metrics["costs"]["AToP"]["passes"] == 3
    assert (run / "figures" / "accuracy.png").is_file() and (run / "figures" / "accuracy-against-flops.png").is_file()


def test_the_attack_notebook_measures_what_the_explorer_copied(tmp_path: Path) -> None:
    source = Visualize(workspace=str(tmp_path), max_test=20).or_pretrained()
    classifier, _ = load_checkpoint(source.weights("undefended"), kind="classifier")
    classifier = fold_batch_norms(classifier).to(memory_format=torch.channels_last)
    knobs = {"eps": 0.3, "steps": 4, "eot_samples": 2, "num_draws": 5, "image": 3, "seed": 2, "noise_std": 0.25}
    explorer = make_explorer(load_pipeline(source.purifiers["AToP"], classifier), source.load_data(), **knobs)
    explorer.refresh()
    assert explorer.worker.wait(300)
    view = explorer.view
    copied = tmp_path / "copied.yaml"
    copied.write_text(to_yaml(view.knobs, source.as_dict(), max_batch=view.max_batch))
    run_notebook("04_attack", tmp_path, "-f", str(copied), "-p", "keep_images", "True")
    (run,) = tmp_path.glob("runs/mnist/04_attack-*")
    (piece,) = run.glob("pieces/*/white-box-atop-*.safetensors")
    torch.testing.assert_close(load_file(piece)["adversarial"][0], view.adversarial, atol=1e-5, rtol=0)
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    (score,) = (row for row in scores if (row["defence"], row["attack"]) == ("AToP", "white-box"))
    assert score["one_shot"] == float(int(view.votes[0]) == view.label)
    assert score["majority"] == float(view.majority == view.label)
    assert score["worst_of_n"] == float(view.right_draws == 5)
