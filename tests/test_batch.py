"""A recipe is checked as a whole before anything runs, goes on where it stopped, and believes no notebook that died."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import yaml

from atoplib import batch
from atoplib.batch import (
    NotebookFailed,
    RecipeError,
    Stage,
    execute,
    failing_cell,
    find_recipe,
    main,
    parse_overrides,
    plan,
    run_recipe,
)
from atoplib.checkpoints import write_json
from atoplib.parameters import NOTEBOOKS
from atoplib.runs import run_name

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
RECIPES = sorted(path.stem for path in (FOLDER / "recipes").glob("*.yaml"))
FIRST = "01_train_classifier"


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def one_stage(tmp_path: Path) -> Stage:
    text = f"notebooks: {{{FIRST}: {{epochs: 2, eps: 8/255}}}}"
    (stage,) = plan(recipe(tmp_path, text), FOLDER, {"workspace": str(tmp_path)})
    return stage


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_whole_and_its_notebooks_use_each_others_runs(name, tmp_path):
    stages = plan(find_recipe(name, FOLDER), FOLDER, {"workspace": str(tmp_path)})
    assert [stage.name for stage in stages] == list(NOTEBOOKS)[:5]
    runs = {stage.name: stage.run_dir.name for stage in stages}
    classifier, pretrained, finetuned, attack, pictures = (stage.parameters for stage in stages)
    assert pretrained.classifier_run == finetuned.classifier_run == runs["01_train_classifier"]
    assert finetuned.purifier_run == runs["02_pretrain_purifier"]
    for judge in (attack, pictures):
        assert judge.classifier_run == runs["01_train_classifier"]
        assert (judge.ap_run, judge.atop_run) == (runs["02_pretrain_purifier"], runs["03_finetune_atop"])
    assert len({(p.dataset, p.image_size, p.experiment) for p in (stage.parameters for stage in stages)}) == 1
    assert pretrained.transform_settings == finetuned.transform_settings
    assert attack.eps == finetuned.eps == pictures.eps and finetuned.norm == pictures.norm


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("smoke", [{}, {"smoke": True}])
def test_a_notebook_names_its_run_as_the_recipe_expects(name, smoke, tmp_path):
    for stage in plan(find_recipe(name, FOLDER), FOLDER, {"workspace": str(tmp_path), **smoke}):
        # What papermill hands on, and the defaults of the notebook's own cell for the rest.
        handed_on = yaml.safe_load(yaml.safe_dump(stage.values))
        cell = f"# Parameters\nworkspace = {str(tmp_path)!r}"
        namespace = {**type(stage.parameters)().as_dict(), **handed_on, "In": [cell]}
        inside = type(stage.parameters).check(namespace)
        assert inside.experiment_dir / run_name(inside.STAGE, inside.as_dict()) == stage.run_dir


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_opens_with_command_cost_and_expected_result(name):
    head = (FOLDER / "recipes" / f"{name}.yaml").read_text().split("shared:")[0]
    command = "make demo" + ("" if name == "mnist" else f" RECIPE={name}")
    assert command in head and "#   cost" in head and "#   expect" in head


def test_own_parameters_win_over_shared_ones_and_overrides_over_both(tmp_path):
    text = f"shared: {{eps: 0.1, epochs: 3, seed: 1}}\nnotebooks: {{{FIRST}: {{epochs: 4, seed: 2}}, 04_attack: }}"
    first, attack = plan(recipe(tmp_path, text), FOLDER, {"seed": 9, "workspace": str(tmp_path)})
    assert (first.parameters.eps, first.parameters.epochs, first.parameters.seed) == (0.1, 4, 9)
    assert (attack.parameters.eps, attack.parameters.seed) == (0.1, 9)
    assert "epochs" not in attack.values
    assert attack.parameters.ap_run == "latest", "a notebook that the recipe leaves out is looked for"


def test_another_setting_of_an_early_notebook_gives_every_later_one_a_new_run(tmp_path):
    path = find_recipe("mnist", FOLDER)
    names = [
        [stage.run_dir.name for stage in plan(path, FOLDER, {"workspace": str(tmp_path), "epochs": epochs})]
        for epochs in (2, 3)
    ]
    assert not set(names[0]) & set(names[1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must hold 'notebooks'"),
        ("- a", "must hold 'notebooks'"),
        ("notebooks: {}", "must hold 'notebooks'"),
        ("notebook: {a: {}}", "must hold 'notebooks'"),
        (f"notebooks: [{FIRST}]", "must be mappings"),
        (f"shared: [1]\nnotebooks: {{{FIRST}: }}", "must be mappings"),
        ("notebooks: {01_train: }", "unknown notebook '01_train'; allowed: 01_train_classifier, 02_pretrain_purifier"),
        ("notebooks: {1: }", "unknown notebook 1; allowed"),
        (f"notebooks: {{{FIRST}: [1]}}", rf"the parameters of {FIRST} must be a mapping, got \[1\]"),
        (f"notebooks: {{{FIRST}: {{epoch: 1}}}}", r"has no parameter 'epoch' \(did you mean 'epochs'\?\)"),
        (f"notebooks: {{{FIRST}: {{1: 1}}}}", "has no parameter 1"),
        (f"notebooks: {{{FIRST}: {{epochs: 1.5}}}}", "parameter 'epochs' must be of type int, got 1.5"),
        (f"notebooks: {{{FIRST}: {{eps: 2024-01-01}}}}", "parameter 'eps' must be of type float"),
        (f"notebooks: {{{FIRST}: {{eps: 8}}}}", "eps of the linf norm must be at most 1"),
        (f"shared: {{ep: 1, 2: 3}}\nnotebooks: {{{FIRST}: }}", "no notebook has the parameter 2, 'ep'"),
        (f"shared: {{variant: ap}}\nnotebooks: {{{FIRST}: }}", "no notebook has the parameter 'variant'"),
        ("notebooks: {02_pretrain_purifier: {purifier: unet}}", "unknown purifier 'unet'"),
        ("notebooks: {", "cannot be read as YAML"),
        ("notebooks: {[1]: 2}", "cannot be read as YAML"),
        ("\x00", "cannot be read as YAML"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        plan(recipe(tmp_path, text), FOLDER, {"workspace": str(tmp_path)})
    assert "recipe.yaml" in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("where", ["recipe", "override"])
def test_yaml_that_would_run_code_is_refused_and_runs_nothing(tmp_path, where):
    tag = f"!!python/object/apply:os.mkdir [{tmp_path / 'it-ran'}]"
    yaml.unsafe_load(tag)
    (tmp_path / "it-ran").rmdir()  # so it could
    with pytest.raises(RecipeError, match="YAML"):
        if where == "recipe":
            plan(recipe(tmp_path, f"notebooks: {{{FIRST}: {{eps: {tag}}}}}"), FOLDER, {})
        else:
            parse_overrides([("eps", tag)])
    assert not (tmp_path / "it-ran").exists()


def test_a_recipe_is_found_by_name_or_path_and_a_missing_one_lists_those_there(tmp_path):
    path = recipe(tmp_path, "")
    assert find_recipe(str(path), FOLDER) == path
    assert find_recipe("mnist", FOLDER) == FOLDER / "recipes" / "mnist.yaml"
    with pytest.raises(RecipeError, match=f"there is no recipe 'mnits'; allowed: {', '.join(RECIPES)}, or the path"):
        find_recipe("mnits", FOLDER)


def test_overrides_are_read_as_yaml():
    pairs = [("a", "true"), ("b", "3"), ("c", "0.5"), ("d", "null"), ("e", "8/255"), ("f", "folder:/a b"), ("g", "{w: 2}")]
    values = {"a": True, "b": 3, "c": 0.5, "d": None, "e": "8/255", "f": "folder:/a b", "g": {"w": 2}}
    assert parse_overrides(pairs) == values and parse_overrides(None) == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nope"], "there is no recipe 'nope'; allowed: "),
        (["mnist", "-p", "epochz", "3"], "no notebook has the parameter 'epochz'"),
        (["mnist", "-p", "eps", "8"], "eps of the linf norm must be at most 1"),
        (["mnist", "-p", "eps", "{"], "a value given by -p cannot be read as YAML"),
    ],
)
def test_a_wrong_call_ends_with_a_sentence_before_anything_runs(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(batch, "run_recipe", lambda stages: pytest.fail("it ran"))
    assert main([*arguments, "--workspace", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_has_the_exit_code_that_shells_expect(tmp_path, monkeypatch, capsys):
    def interrupted(stages):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "run_recipe", interrupted)
    assert main(["mnist", "--workspace", str(tmp_path)]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


# A stand-in for papermill, quick enough for tests: it does to a run's directory what the test says.
PRELUDE = """
import json, os, pathlib, signal, sys, time
run = pathlib.Path(os.environ["ATOP_TEST_RUN"])
def notebook(*outputs):
    cells = [dict(cell_type="code", id="a", execution_count=3, metadata={}, source="1/0", outputs=list(outputs))]
    content = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    (run / "notebook.part.ipynb").write_text(json.dumps(content))
def manifest(status, **more):
    (run / "manifest.json").write_text(json.dumps(dict(status=status, **more)))
"""
ERROR = 'dict(output_type="error", ename="ValueError", evalue="batch_size is too large", traceback=[])'


@pytest.fixture
def papermill(monkeypatch) -> Callable[[str], list[Stage]]:
    """Replaces papermill by a script; returns the list of stages that were started."""

    def install(script: str) -> list[Stage]:
        started: list[Stage] = []

        def command(stage: Stage, parameters_file: Path, output: Path) -> list[str]:
            started.append(stage)
            assert yaml.safe_load(parameters_file.read_text()) == stage.values
            assert output == stage.run_dir / "notebook.part.ipynb" and not output.exists()
            monkeypatch.setenv("ATOP_TEST_RUN", str(stage.run_dir))
            return [sys.executable, "-c", PRELUDE + script]

        monkeypatch.setattr(batch, "papermill_command", command)
        return started

    return install


@pytest.mark.parametrize("lost", [False, True])
def test_an_executed_notebook_is_kept_with_a_page_of_it(tmp_path, papermill, lost):
    started = papermill('notebook(); manifest("complete")')
    stage = one_stage(tmp_path)
    assert not stage.complete
    run_recipe([stage])
    assert stage.complete
    if lost:  # the call ended before the page was written: the next one makes up for it
        stage.page.unlink()
        run_recipe([stage])
        assert len(started) == 1
    assert nbformat.read(stage.run_dir / "notebook.ipynb", as_version=4).cells[0].source == "1/0"
    assert "<html" in (stage.run_dir / "notebook.html").read_text()
    assert not (stage.run_dir / "notebook.part.ipynb").exists()


def test_a_failing_cell_is_reported_with_its_error_and_where_to_look(tmp_path, papermill):
    papermill(f'notebook({ERROR}); manifest("failed", error="less"); sys.exit(1)')
    stage = one_stage(tmp_path)
    with pytest.raises(NotebookFailed, match=rf"{FIRST} failed: In \[3\]: ValueError: batch_size is too large") as caught:
        execute(stage, lambda line: None)
    assert str(stage.run_dir / "notebook.part.ipynb") in str(caught.value) and "papermill.log" in str(caught.value)
    assert not stage.complete and not (stage.run_dir / "notebook.ipynb").exists()


@pytest.mark.parametrize(
    "script, reason",
    [
        ('notebook(); manifest("running"); os.kill(os.getpid(), signal.SIGKILL)', "failed"),  # the kernel or all was killed
        ('notebook(); manifest("running")', "failed"),  # killed, yet papermill says all is well
        ("notebook()", "failed"),
        ('notebook(); manifest("failed", error="OSError: No space left on device")', "failed: OSError: No space left"),
        ('print("no kernel named python3"); sys.exit(1)', "failed: no kernel named python3"),
        ("sys.exit(1)", "failed: "),
    ],
)
def test_a_notebook_that_died_is_never_taken_for_complete(tmp_path, papermill, script, reason):
    papermill(script)
    stage = one_stage(tmp_path)
    with pytest.raises(NotebookFailed, match=reason):
        execute(stage, lambda line: None)
    assert not stage.complete


def test_what_an_earlier_call_left_does_not_hide_a_failure(tmp_path, papermill):
    stage = one_stage(tmp_path)
    stage.run_dir.mkdir(parents=True)
    write_json(stage.run_dir / "manifest.json", {"status": "complete"})
    nbformat.write(nbformat.v4.new_notebook(), stage.run_dir / "notebook.part.ipynb")
    papermill("sys.exit(1)")
    with pytest.raises(NotebookFailed):
        execute(stage, lambda line: None)
    assert not stage.complete


def test_progress_is_watched_and_an_old_line_is_not_shown(tmp_path, papermill):
    stage = one_stage(tmp_path)
    stage.run_dir.mkdir(parents=True)
    (stage.run_dir / "progress.txt").write_text("of yesterday")
    papermill('(run / "progress.txt").write_text("50 %\\n"); time.sleep(1.2); notebook(); manifest("complete")')
    seen = []
    execute(stage, seen.append)
    assert "50 %" in seen and "of yesterday" not in seen


def test_a_notebook_has_an_ipython_directory_of_its_own(tmp_path, papermill):
    papermill('(run / "seen").write_text(os.environ["IPYTHONDIR"]); notebook(); manifest("complete")')
    stage = one_stage(tmp_path)
    execute(stage, lambda line: None)
    directory = Path((stage.run_dir / "seen").read_text())
    assert directory != Path.home() / ".ipython" and not directory.exists(), "it should be removed when the run ends"


@pytest.mark.parametrize("stubborn", [False, True])
def test_ctrl_c_ends_the_notebook_after_it_has_saved_and_leaves_no_process(tmp_path, papermill, monkeypatch, stubborn):
    monkeypatch.setattr(batch, "STOP_SECONDS", 1)
    papermill(
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else "")
        + '(run / "pid").write_text(str(os.getpid())); (run / "progress.txt").write_text("begun"); time.sleep(60)'
    )
    stage = one_stage(tmp_path)

    def watch(line: str) -> None:
        if line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(stage, watch)
    process = int((stage.run_dir / "pid").read_text())
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_papermill_heeds_our_signal_once_as_a_ctrl_c_and_no_other(tmp_path):
    (tmp_path / "parameters.yaml").write_text("epochs: 3")
    (tmp_path / "papermill.py").write_text(
        "import signal, sys, time\n"
        "def execute_notebook(notebook, output, parameters, **_):\n"
        "    assert (notebook, output, parameters) == ('in', 'out', {'epochs': 3})\n"
        "    print('begun', flush=True)\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        print('saving', flush=True)\n"
        "        time.sleep(0.5)\n"
        "        print('saved', flush=True)\n"
        "        raise\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", batch.PAPERMILL, "in", "out", str(tmp_path / "parameters.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None, "a terminal's Ctrl-C should not reach it"
    process.terminate()
    assert process.stdout.readline() == "saving\n"
    process.terminate()
    assert process.communicate(timeout=30)[0] == "saved\n" and process.returncode != 0


def test_complete_runs_are_skipped_and_a_failure_stops_the_recipe(tmp_path, papermill, capsys):
    stages = plan(find_recipe("mnist", FOLDER), FOLDER, {"workspace": str(tmp_path)})
    started = papermill('notebook(); manifest("complete" if "02_" not in run.name else "failed", error="no luck")')
    for attempt in (1, 2):
        with pytest.raises(NotebookFailed, match="02_pretrain_purifier failed: no luck"):
            run_recipe(stages)
        assert [stage.name for stage in started] == [FIRST, *["02_pretrain_purifier"] * attempt]
    assert "done before" in capsys.readouterr().out
    started = papermill('notebook(); manifest("complete")')
    run_recipe(stages)
    assert [stage.name for stage in started] == list(NOTEBOOKS)[1:5]
    capsys.readouterr()
    run_recipe(stages)
    printed = capsys.readouterr().out
    assert len(started) == 4 and printed.count("done before") == 5
    assert all(str(stage.run_dir / "notebook.html") in printed for stage in stages)


def test_a_run_without_its_executed_notebook_is_done_again(tmp_path, papermill):
    stage = one_stage(tmp_path)
    papermill('notebook(); manifest("complete")')
    execute(stage, lambda line: None)
    (stage.run_dir / "notebook.ipynb").unlink()
    assert not stage.complete


@pytest.mark.parametrize("content", [None, "", "{", '{"cells": [{"cell_type": "markdown"}]}', "[]"])
def test_no_failing_cell_is_found_where_there_is_none(tmp_path, content):
    path = tmp_path / "a.ipynb"
    if content is not None:
        path.write_text(content)
    assert failing_cell(path) is None


def test_a_notebook_that_fails_stops_the_recipe_with_its_own_error(tmp_path, capsys):
    code = main(["mnist", "--smoke", "--workspace", str(tmp_path), "-p", "dataset", f"folder:{tmp_path / 'nowhere'}"])
    assert code == 1
    printed = capsys.readouterr().err
    assert f"{FIRST} failed: In [4]: FileNotFoundError: " in printed and "nowhere" in printed
    (folder,) = (tmp_path / "runs" / "mnist-smoke").iterdir()
    cells = nbformat.read(folder / "notebook.part.ipynb", as_version=4).cells
    assert any(output.output_type == "error" for cell in cells for output in cell.get("outputs", []))
