"""What a batch leaves: an index, results to hand on, tables of pandas, and room on the disk."""

import os
import re
import subprocess
from itertools import product
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from atoplib.batch import pages, tables
from atoplib.batch.recipe import Job, make_plan
from atoplib.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
FIRST = "01_train_classifier"
CHAIN = "notebooks: {01_train_classifier: , 02_pretrain_purifier: , 03_finetune_atop: , 04_attack: }"


@pytest.fixture
def complete(notebooks, tmp_path):
    """Makes the directories that the runs of a recipe leave."""

    def made(text: str) -> list[Job]:
        write_text(notebooks / "recipe.yaml", text)
        jobs = make_plan(notebooks / "recipe.yaml", notebooks, {"workspace": str(tmp_path / "workspace")})
        for number, job in enumerate(jobs, start=1):
            manifest = {
                "stage": job.stage,
                "status": "complete",
                "ended": f"2030-01-0{number}T12:00:00",
                "number": number,
                "seconds": 3,
                "hardware": "a device",
                "inputs": {need.name: {"file": f"{need.name}/purifier.safetensors"} for need in job.needs},
                "where": str(job.run_dir),
            }
            accuracy = {} if job.stage == "04_attack" else {"test_accuracy": 0.5}
            write_json(job.run_dir / "manifest.json", manifest)
            write_json(job.run_dir / "parameters.json", dict(job.parameters))
            write_json(
                job.run_dir / "metrics.json", {"costs": {"AToP": 3}, "history": [{"loss": 1}]} | accuracy
            )
            for name in ("classifier.safetensors", "figures/plot.png", "pictures/digits.png", "table.md"):
                write_text(job.run_dir / name, "x" * 1000)
            outputs = [
                v4.new_output("display_data", {"image/png": "cGljdHVyZQ=="}),
                v4.new_output("stream", text=str(job.run_dir)),
            ]
            cells = [v4.new_code_cell(outputs=outputs, metadata={"tags": t}) for t in ([], ["pictures"])]
            nbformat.write(v4.new_notebook(cells=cells), job.executed)
        return jobs

    return made


def test_the_index_lists_complete_runs_with_what_tells_them_apart_a_number_and_links(complete):
    jobs = complete(f"notebooks: {{{FIRST}: }}\ngrid: {{seed: [0, 1, 2]}}")
    write_json(jobs[2].run_dir / "manifest.json", {"stage": FIRST, "status": "failed", "ended": "now"})
    index = pages.write_index(jobs[0].run_dir.parent).read_text()
    rows = [re.sub("<.*?>", "", row).split() for row in index.split("<tr")]
    assert [row[1] for row in rows if "clean" in row] == ["1", "0"]
    assert "50.0 %" in index and "2030-01-02 12:00" in index
    assert f"<a href='{jobs[0].run_dir.name}/figures/plot.png'>plot.png</a>" in index


def test_a_page_draws_its_formulas_and_leaves_what_cannot_be_drawn(tmp_path):
    cell = v4.new_markdown_cell("# Title\n\n$x^2$ and $$\\sum_i x_i$$ and $\\underbrace{x}$")
    nbformat.write(v4.new_notebook(cells=[cell]), tmp_path / "notebook.ipynb")
    pages.write_page(tmp_path / "notebook.ipynb")
    text = (tmp_path / "notebook.html").read_text()
    assert "<title>Title</title>" in text and "$\\underbrace{x}$" in text
    assert text.count('style="vertical-align: -') == 2


def test_results_hold_numbers_plots_and_notebooks_and_no_weights_pictures_or_folders_of_ones_own(
    tmp_path, complete
):
    (job,) = complete(f"notebooks: {{{FIRST}: }}")
    pages.write_results(tmp_path / "results", [job], "# mine")
    there = {path.name: path.read_text() for path in (tmp_path / "results" / job.run_dir.name).iterdir()}
    named = {"table.md", "plot.png", "manifest.json", "metrics.json", "parameters.json", "notebook.ipynb"}
    assert there.keys() == named and not any(str(tmp_path) in text for text in there.values())
    notebook = there["notebook.ipynb"]
    assert notebook.count("cGljdHVyZQ==") == 1 and pages.IN_PLACE_OF_PICTURES in notebook
    assert "WORKSPACE/runs" in notebook and "WORKSPACE/runs" in there["manifest.json"]
    readme = (tmp_path / "results/README.md").read_text()
    assert readme.startswith("# mine") and "3 s on a device" in readme


def test_make_clean_runs_removes_what_was_replaced_or_left_half_written_an_hour_ago(tmp_path, complete):
    (job,) = complete(f"notebooks: {{{FIRST}: }}")
    before = {path.name for path in job.run_dir.iterdir()}
    for name in ("superseded-1/.state.pt", ".old.part", ".new.part"):
        write_text(job.run_dir / name, "x")
    os.utime(job.run_dir / ".old.part", (0, 0))
    command = ["make", "-s", "-C", str(ROOT), "clean-runs", f"WORKSPACE={tmp_path / 'workspace'}"]
    subprocess.run(command, check=True, capture_output=True)
    assert {path.name for path in job.run_dir.iterdir()} == before | {".new.part"}


def test_tables_hold_parameters_of_a_run_and_of_all_it_was_computed_from_and_compare_what_is_comparable(
    complete,
):
    grid = "{03_finetune_atop: {variant: [ft_adv, ft_clean]}, 04_attack: {protocol: [demo, quick]}}"
    jobs = complete(f"{CHAIN}\ngrid: {grid}")
    attacks = [job for job in jobs if job.stage == "04_attack"]
    for accuracy, job in enumerate(attacks):
        names = product(("AP", "AToP"), ("single", "vote"))
        rows = [f"{name},PGD,white-box,{rule},{accuracy},100" for name, rule in names]
        heads = "defence,attack,threat_model,rule,accuracy,images"
        write_text(job.run_dir / "frame.csv", "\n".join([heads, *rows]))
    frame = tables.runs_frame(job.run_dir for job in jobs)
    assert len(frame) == 8 and frame.columns[0] == "run" and frame["metrics.costs.AToP"].eq(3).all()
    assert set(frame["03_finetune_atop.variant"].dropna()) == {"ft_adv", "ft_clean"}
    assert "metrics.history" not in frame
    scores = tables.scores_frame(job.run_dir for job in jobs)
    assert len(scores) == 8 and set(scores["rule"]) == {"single"}
    groups = dict(tuple(scores.groupby("measured")))
    assert list(groups) == [f"100 images of mnist5k by protocol {name}" for name in ("demo", "quick")]
    for group in groups.values():
        assert tables.varied(group) == ["03_finetune_atop.variant"]
        assert list(tables.trained_with(group, "variant")) == ["none (AP)", "ft_adv", "none (AP)", "ft_clean"]
    write_text(job.run_dir / "frame.csv", "\n".join([heads, *rows, "AP,fixed,known sample,single,0,100"]))
    assert tables.headline(attacks[3].run_dir) == "under the strongest attack: AP 3.0 %, AToP 3.0 %"
    assert len(tables.scores_frame([jobs[0].run_dir])) == 0
