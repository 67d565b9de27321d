"""Notebooks that died are not believed, one that fails stops no other, and what ends a batch ends its
notebooks.
"""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock

from atoplib.batch import __main__ as command
from atoplib.batch import clean, pages, runner, tables, worker
from atoplib.batch.recipe import Job, make_plan, read_recipe
from atoplib.batch.runner import Local, job_state, run_jobs
from atoplib.batch.worker import NotebookFailed, Stopped, execute
from atoplib.files import read_json, write_json
from tests.small_notebooks import write_notebooks

FIRST = "01_train_classifier"
CHAIN = "notebooks: {01_train_classifier: , 02_pretrain_purifier: , 03_finetune_atop: , 04_attack: }"
GRID = f"notebooks: {{{FIRST}: }}\ngrid: {{seed: [0, 1, 2]}}"

# A stand-in for papermill, quick enough for tests: it does to a run's directory what the test says.
PRELUDE = """
import json, os, pathlib, signal, sys, time
run, folder = map(pathlib.Path, sys.argv[1:])
values = json.loads((folder / "parameters.json").read_text())
def notebook(*outputs):
    cell = dict(cell_type="code", id="a", execution_count=3, metadata={}, source="1/0")
    cells = [cell | dict(outputs=list(outputs))]
    content = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    (folder / "notebook.ipynb").write_text(json.dumps(content))
def manifest(status, **more):
    content = dict(status=status, ended=str(time.time()), inputs={}, **more)
    content["stage"] = run.name.rpartition("-")[0]
    (run / "manifest.json").write_text(json.dumps(content))
    (run / "parameters.json").write_text(json.dumps({"dataset": "mnist5k"} | values))
with open(run / "made", "a") as file:
    file.write("i")
"""
WELL = 'notebook(); manifest("complete")'
ERROR = 'dict(output_type="error", ename="ValueError", evalue="batch_size is too large", traceback=[])'
SAVES = 'def save(*_): (run / "saved").touch(); sys.exit(1)\nsignal.signal(signal.SIGTERM, save)\n'
ON_SEED_1 = 'values.get("seed") == 1'


@pytest.fixture
def plan(tmp_path, monkeypatch) -> Callable[..., list[Job]]:
    """Makes jobs of small notebooks; pages, and what a run depends on, are stand-ins."""
    folder = write_notebooks(tmp_path / "notebooks")
    monkeypatch.setattr(command, "NOTEBOOKS", folder)
    monkeypatch.setattr(runner, "write_page", lambda executed, page: page.write_text("<html>"))
    monkeypatch.setattr(
        runner, "difference", lambda run_dir, notebook: (read_json(run_dir / "changed") or {}).get("now", "")
    )

    def made(text: str = CHAIN) -> list[Job]:
        (folder / "recipe.yaml").write_text(text)
        return make_plan(
            read_recipe(folder / "recipe.yaml", folder), folder, {"workspace": str(tmp_path / "workspace")}
        )

    return made


@pytest.fixture
def papermill(monkeypatch) -> Callable[[str], list[str]]:
    """Replaces papermill by a script; returns the list of the names of jobs that were started."""

    def install(script: str) -> list[str]:
        started: list[str] = []

        def papermill_command(job: Job) -> list[str]:
            started.append(job.name)
            assert read_json(job.hidden / "parameters.json") == job.values
            return [sys.executable, "-I", "-S", "-c", PRELUDE + script, str(job.run_dir), str(job.hidden)]

        monkeypatch.setattr(worker, "papermill_command", papermill_command)
        return started

    return install


def run(jobs: list[Job], at_once: int = 1, **options: object) -> tuple[dict[str, str], str]:
    """Statuses by label, and what was shown."""
    shown = io.StringIO()
    outcomes = run_jobs(jobs, Local(at_once), out=shown, **options)
    assert [outcome.job for outcome in outcomes] == jobs
    return {outcome.job.label: outcome.status for outcome in outcomes}, shown.getvalue()


def made(job: Job) -> int:
    """How often a job was begun."""
    path = job.run_dir / "made"
    return len(path.read_text()) if path.exists() else 0


def test_an_executed_notebook_is_kept_with_a_page_of_it(plan, papermill, monkeypatch):
    papermill(WELL)
    monkeypatch.setattr(runner, "write_page", pages.write_page)
    (job,) = plan(f"notebooks: {{{FIRST}: }}")
    assert run([job])[0] == {FIRST: "complete"}
    job.page.unlink()  # as if the call had ended before the page was written: the next one makes up for it
    assert run([job])[0] == {FIRST: "done before"} and made(job) == 1
    assert nbformat.read(job.executed, as_version=4).cells[0].source == "1/0"
    assert "<html" in job.page.read_text() and not job.hidden.exists()


def test_a_failing_cell_is_reported_with_its_error_and_where_to_look(plan, papermill):
    papermill(f'notebook({ERROR}); manifest("failed", error="less"); print("so it ended"); sys.exit(1)')
    (job,) = plan(f"notebooks: {{{FIRST}: }}")
    with pytest.raises(
        NotebookFailed, match=rf"{FIRST} failed: In \[3\]: ValueError: batch_size is too large"
    ) as caught:
        execute(job)
    for name in ("notebook.ipynb", "papermill.log"):
        assert str(job.hidden / name) in str(caught.value)
    assert "so it ended" in (job.hidden / "papermill.log").read_text() and not job.executed.exists()


@pytest.mark.parametrize(
    "script, reason",
    [
        (
            'notebook(); manifest("running"); os.kill(os.getpid(), signal.SIGKILL)',
            "failed",
        ),  # the kernel or all was killed
        ('notebook(); manifest("running")', "failed"),  # killed, yet papermill says all is well
        ("notebook()", "failed"),
        ('manifest("complete")', "failed"),
        (
            'notebook(); manifest("failed", error="OSError: No space left on device")',
            "failed: OSError: No space left",
        ),
        ('print("no kernel named python3"); sys.exit(1)', "failed: no kernel named python3"),
        ("sys.exit(1)", "failed: "),
    ],
)
def test_a_notebook_that_died_is_never_taken_for_complete(plan, papermill, script, reason):
    papermill(script)
    (job,) = plan(f"notebooks: {{{FIRST}: }}")
    with pytest.raises(NotebookFailed, match=reason):
        execute(job)
    assert run([job])[0] == {FIRST: "failed"} and made(job) == 2


def test_what_an_earlier_call_left_does_not_hide_a_failure(plan, papermill):
    (job,) = plan(f"notebooks: {{{FIRST}: }}")
    write_json(job.run_dir / "manifest.json", {"status": "complete"})
    papermill("notebook()")
    with pytest.raises(NotebookFailed):
        execute(job)


def test_a_run_is_done_only_while_code_versions_and_inputs_are_the_same(plan, papermill):
    papermill(WELL)
    (job,) = plan(f"notebooks: {{{FIRST}: }}")
    assert job_state(job) == ("new", "")
    run([job])
    assert job_state(job) == ("done", "")
    write_json(job.run_dir / "changed", {"now": "torch is 3, it was 2"})
    assert job_state(job) == ("changed", "torch is 3, it was 2") and job_state(job, reuse=True) == (
        "done",
        "",
    )
    assert "run again: torch is 3, it was 2" in run([job])[1] and made(job) == 2
    (job.run_dir / "changed").unlink()
    job.executed.unlink()
    assert job_state(job) == ("unfinished", "")


def test_a_notebook_has_folders_of_its_own_which_are_gone_afterwards_and_knows_its_run(plan, papermill):
    papermill(f'(run / "seen").write_text(json.dumps(dict(os.environ))); {WELL}')
    (job,) = plan(f"notebooks: {{{FIRST}: }}")
    execute(job, threads=3)
    seen = read_json(job.run_dir / "seen")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        assert Path(seen[name]) != Path.home() / ".ipython" and not Path(seen[name]).exists()
    assert seen["OMP_NUM_THREADS"] == "3" and seen["ATOPLIB_RUN"] == job.run_dir.name


def gone(process: int, seconds: float = 30.0) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stubborn", [False, True])
def test_what_is_told_to_stop_is_waited_for_and_leaves_no_process(plan, papermill, monkeypatch, stubborn):
    monkeypatch.setattr(worker, "STOP_SECONDS", 1)
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    papermill(f'{ignore}(run / "pid").write_text(str(os.getpid())); (run / "begun").touch(); time.sleep(600)')
    (job,) = plan(f"notebooks: {{{FIRST}: }}")
    stop = threading.Event()

    def stop_once_begun() -> None:
        while not (job.run_dir / "begun").exists():
            time.sleep(0.01)
        stop.set()

    threading.Thread(target=stop_once_begun).start()
    with pytest.raises(Stopped):
        execute(job, stop=stop)
    assert gone(int((job.run_dir / "pid").read_text()))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_ends_a_batch_stops_all_that_run_and_starts_nothing_more(plan, papermill, error):
    papermill(SAVES + '(run / "pid").write_text(str(os.getpid())); (run / "begun").touch(); time.sleep(600)')
    jobs = plan(GRID)

    def look() -> None:
        if sum((job.run_dir / "begun").exists() for job in jobs) == 2:
            raise error

    with pytest.raises(error):
        run(jobs, 2, look=look)
    assert [(job.run_dir / "saved").exists() for job in jobs] == [True, True, False] and not made(jobs[2])
    assert all(gone(int((job.run_dir / "pid").read_text())) for job in jobs[:2])


def test_a_run_that_takes_too_long_is_stopped_and_the_others_go_on(plan, papermill):
    papermill(f"time.sleep(600 if {ON_SEED_1} else 0); {WELL}")
    outcomes = run_jobs(plan(GRID), Local(timeout=3), out=io.StringIO())
    assert [outcome.status for outcome in outcomes] == ["complete", "failed", "complete"]
    assert "ran longer than the 3 s of --timeout and was stopped" in outcomes[1].reason


def test_what_needs_a_failed_run_is_not_run_all_else_goes_on_and_the_same_call_does_only_what_is_missing(
    plan, papermill
):
    papermill(f'manifest("failed", error="no luck") if "02_" in run.name else ({WELL.replace("; ", ", ")})')
    jobs = plan(CHAIN + "\ngrid: {02_pretrain_purifier: {seed: [0, 1]}, 04_attack: {steps: [1, 2]}}")
    statuses, shown = run(jobs)
    assert list(statuses.values()).count("failed") == 2 and list(statuses.values()).count("not run") == 6
    assert shown.count("started") == 3 and len(jobs) == 9
    started = papermill(WELL)
    assert set(run(jobs)[0].values()) == {"done before", "complete"}
    assert len(started) == 8 and FIRST not in started


@pytest.mark.parametrize(
    "retries, status, attempts", [(0, "failed", 1), (1, "failed", 2), (2, "complete", 3), (5, "complete", 3)]
)
def test_a_failed_run_is_tried_again_as_often_as_asked_for(plan, papermill, retries, status, attempts):
    papermill(f'len((run / "made").read_text()) < 3 and sys.exit(1); {WELL}')
    (job,) = plan(f"notebooks: {{{FIRST}: }}")
    statuses, shown = run([job], retries=retries)
    assert statuses == {FIRST: status} and made(job) == attempts == 1 + shown.count("trying again")


@pytest.mark.parametrize("at_once", [1, 3])
def test_so_many_run_at_once_as_asked_for_and_never_before_what_they_need(plan, papermill, at_once):
    wait = (
        "until = time.monotonic() + 20 * ('02_' in run.name)\n"
        f"while len(list(run.parent.glob('02_*/from'))) < {at_once} and time.monotonic() < until:\n"
        "    time.sleep(0.01)\n"
    )
    note = '(run / "{}").write_text(str(time.monotonic()))\n'
    papermill(f"{note.format('from')}{wait}{WELL}\n{note.format('to')}")
    jobs = plan(CHAIN + "\ngrid: {02_pretrain_purifier: {seed: [0, 1, 2]}}")
    run(jobs, at_once)
    times = {
        job.run_dir: [float((job.run_dir / name).read_text()) for name in ("from", "to")] for job in jobs
    }
    assert all(times[need][1] <= times[job.run_dir][0] for job in jobs for need in job.needs)
    assert (
        max(sum(begin <= moment < end for begin, end in times.values()) for moment, _ in times.values())
        == at_once
    )


def test_what_a_notebook_tells_of_itself_is_told_where_no_terminal_is(plan, papermill, monkeypatch):
    monkeypatch.setattr(runner, "SAY_SECONDS", 0.0)
    papermill(f'(run / "progress.txt").write_text("50 %, 3 s left\\n"); time.sleep(2); {WELL}')
    (job,) = plan(f"notebooks: {{{FIRST}: }}")
    (job.run_dir).mkdir(parents=True)
    (job.run_dir / "progress.txt").write_text("of yesterday")
    lines = run([job])[1].splitlines()
    assert lines[0] == f"[1/1] {FIRST}  started" and lines[-1].startswith(f"[1/1] {FIRST}  complete, ")
    assert any(line.endswith("50 %, 3 s left") for line in lines) and "yesterday" not in "".join(lines)


def test_a_workspace_that_cannot_be_written_fails_its_runs_with_a_sentence(plan, papermill):
    (job,) = plan(f"notebooks: {{{FIRST}: }}")
    job.run_dir.parent.parent.mkdir(parents=True)
    job.run_dir.parent.write_text("a file where a folder should be")
    papermill("")
    assert run([job])[0] == {FIRST: "failed"}


# -------------------------------------------------------------------------------------- papermill's process


def papermill_itself(tmp_path: Path, body: str) -> "subprocess.Popen[str]":
    """The process that a worker starts, with a papermill that only does what the test says."""
    (tmp_path / "parameters.json").write_text('{"epochs": 3}')
    (tmp_path / "papermill.py").write_text(
        "import signal, sys, time\n"
        "def execute_notebook(notebook, output, parameters, **options):\n"
        f"    assert (notebook, output) == ('in', {str(tmp_path / 'notebook.ipynb')!r})\n"
        "    assert parameters == {'epochs': 3}\n"
        "    assert options['kernel_name'] == 'python3'\n"
        "    begun = lambda: print('begun', flush=True)\n" + body
    )
    program = [sys.executable, "-P", "-m", "atoplib.batch.worker", "in", str(tmp_path / "run"), str(tmp_path)]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": path, "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    process = subprocess.Popen(program, **pipes, text=True, env=environment)
    assert process.stdout.readline() == "begun\n"
    return process


SAVING = """    try:
        begun()
        time.sleep(600)
    except KeyboardInterrupt:
        print('saving', flush=True)
        time.sleep(0.5)
        print('saved', flush=True)
        raise
"""


def test_papermill_heeds_our_signal_once_as_a_ctrl_c_and_no_other(tmp_path):
    with papermill_itself(tmp_path, SAVING) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None, "a terminal's Ctrl-C should not reach it"
        process.terminate()
        assert process.stdout.readline() == "saving\n"
        process.terminate()
        assert process.communicate(timeout=60)[0] == "saved\n" and process.returncode != 0


def test_papermill_saves_and_ends_when_the_batch_is_killed_and_ends_well_while_it_goes_on(tmp_path):
    with papermill_itself(tmp_path, SAVING) as process:
        process.stdin.close()  # what the system does for a process that is killed
        assert process.stdout.read() == "saving\nsaved\n" and process.wait(60) != 0
    with papermill_itself(tmp_path, "    begun()\n") as process:
        assert process.wait(60) == 0 and process.stderr.read() == ""


def test_a_real_kernel_that_is_told_to_stop_saves_and_the_next_call_goes_on_from_there(plan):
    (job,) = plan(f"notebooks: {{{FIRST}: {{epochs: 6}}}}")
    stop, epochs = threading.Event(), job.run_dir / "epochs"

    def stop_in_the_third_epoch() -> None:
        while not epochs.exists() or len(epochs.read_text()) < 2:
            time.sleep(0.05)
        stop.set()

    threading.Thread(target=stop_in_the_third_epoch, daemon=True).start()
    with pytest.raises(Stopped):
        execute(job, stop=stop)
    manifest, done = read_json(job.run_dir / "manifest.json"), len(epochs.read_text())
    assert manifest["status"] == "interrupted" and 2 <= done < 6 and job_state(job)[0] == "unfinished"
    assert run([job])[0] == {FIRST: "complete"}
    assert epochs.read_text() == "iiiiii" and read_json(job.run_dir / "manifest.json")["attempts"] == 2


# --------------------------------------------------------------------------------------------- what is left


def call(tmp_path: Path, text: str, *arguments: str) -> int:
    (tmp_path / "recipe.yaml").write_text(text)
    return command.main(
        [str(tmp_path / "recipe.yaml"), "--workspace", str(tmp_path / "workspace"), *arguments]
    )


@pytest.fixture
def unchecked(monkeypatch):
    """Without the process that looks at data and sizes: it imports torch."""
    monkeypatch.setattr(command.Checking, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(command.Checking, "look", lambda *_, **__: None)


def test_the_command_ends_with_failures_a_table_and_an_index_and_goes_on_next_time(
    tmp_path, plan, papermill, unchecked, capsys
):
    table = '(run / "table.md").write_text("| AToP | 73 |"); (run / "figures").mkdir(exist_ok=True); '
    table += '(run / "figures/a.png").touch()'
    papermill(f'values.get("variant") == "bad" and (notebook({ERROR}), sys.exit(1)); {table}; {WELL}')
    text = CHAIN + "\ngrid: {03_finetune_atop: {variant: [bad, ft_adv]}}"
    assert call(tmp_path, text) == 1
    told = capsys.readouterr()
    assert "03_finetune_atop variant=bad failed: In [3]: ValueError: batch_size is too large" in told.err
    assert (
        "was not run: it needs 03_finetune_atop variant=bad, which failed" in told.err
        and "tries these again" in told.err
    )
    assert told.out.count("| AToP | 73 |") == 1
    index = (tmp_path / "workspace/runs/mnist/index.html").read_text()
    assert index.count("<b>") == 5 and "figures/a.png" in index and "bad" not in index
    papermill(WELL)
    assert call(tmp_path, text) == 0 and capsys.readouterr().out.count("done before") == 4


def test_after_its_minutes_a_recipe_saves_and_the_same_command_goes_on(
    tmp_path, plan, papermill, unchecked, capsys
):
    papermill(SAVES + "time.sleep(600)")
    assert call(tmp_path, f"notebooks: {{{FIRST}: }}", "--minutes", "0.05") == os.EX_TEMPFAIL
    assert "goes on from here" in capsys.readouterr().err
    papermill(WELL)
    assert call(tmp_path, f"notebooks: {{{FIRST}: }}") == 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_ctrl_c_has_the_exit_code_that_shells_expect(tmp_path, plan, unchecked, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_jobs", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert (
        call(tmp_path, f"notebooks: {{{FIRST}: }}") == 130 and "goes on from here" in capsys.readouterr().err
    )


def test_a_refusal_of_the_checks_stops_the_first_notebook(tmp_path, plan, papermill, capsys):
    papermill(SAVES + "time.sleep(600)")
    assert call(tmp_path, f"shared: {{dataset: 'folder:{tmp_path}/nowhere'}}\nnotebooks: {{{FIRST}: }}") == 1
    assert "nowhere" in capsys.readouterr().err and len(list(tmp_path.rglob("saved"))) == 1


def test_results_hold_numbers_plots_and_notebooks_and_no_weights_pictures_or_folders_of_ones_own(
    tmp_path, plan, papermill, unchecked
):
    picture = 'dict(output_type="display_data", metadata={}, data={"image/png": "cGljdHVyZQ=="})'
    text = 'dict(output_type="stream", name="stdout", text=str(run) + name)'
    cells = 'dict(cell_type="code", id=name, execution_count=1, metadata=dict(tags=tags), source="", '
    cells += f"outputs=[{picture}, {text}])"
    files = (
        'for name in ("frame.csv", "classifier.safetensors", "figures/plot.png", "pictures/digits.png"):\n'
        '    (run / name).parent.mkdir(exist_ok=True); (run / name).write_text("x")\n'
    )
    papermill(
        f'manifest("complete", hardware="a device", seconds=3, where=str(run))\n{files}'
        f'cells = [{cells} for name, tags in (("kept", []), ("shown", ["pictures"]))]\n'
        "content = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)\n"
        '(folder / "notebook.ipynb").write_text(json.dumps(content))'
    )
    assert call(tmp_path, f"notebooks: {{{FIRST}: }}", "--results", str(tmp_path / "results")) == 0
    (folder,) = (path for path in (tmp_path / "results").iterdir() if path.is_dir())
    there = {path.name for path in folder.iterdir()}
    assert there == {"frame.csv", "plot.png", "manifest.json", "parameters.json", "notebook.ipynb"}
    text = (folder / "notebook.ipynb").read_text()
    assert text.count("cGljdHVyZQ==") == 1 and pages.IN_PLACE_OF_PICTURES in text and "WORKSPACE/runs" in text
    assert not any(str(tmp_path) in path.read_text() for path in folder.iterdir())
    assert "3 s on a device" in (tmp_path / "results/README.md").read_text()


def test_clean_removes_what_no_result_needs_and_leaves_a_run_in_use_alone(tmp_path, plan, papermill, capsys):
    papermill(WELL)
    jobs = plan(GRID)
    run(jobs)
    for job in jobs:
        for name in (
            "superseded-1/state.pt",
            ".x.part",
            ".batch/papermill.log",
            "state.pt",
            "state.pt.previous",
        ):
            (job.run_dir / name).parent.mkdir(exist_ok=True)
            (job.run_dir / name).write_text("x" * 1000)
    with FileLock(jobs[0].run_dir / "run.lock", is_singleton=False):
        holder = os.fork()  # a lock is another's only in another process
        if holder == 0:
            os._exit(clean.main(["--workspace", str(tmp_path / "workspace")]))
        assert os.waitstatus_to_exitcode(os.waitpid(holder, 0)[1]) == 0
    left = [{path.name for path in job.run_dir.iterdir()} for job in jobs]
    assert "superseded-1" in left[0] and ".x.part" in left[0]
    assert (
        left[1]
        == left[2]
        == {"made", "manifest.json", "parameters.json", "notebook.ipynb", "notebook.html", "state.pt"}
    )
    assert clean.main(["--workspace", str(tmp_path / "workspace"), "--all"]) == 0
    assert not any(job.run_dir.exists() for job in jobs) and "GB are free" in capsys.readouterr().out


def test_tables_hold_parameters_of_a_run_and_of_all_it_was_computed_from_and_compare_what_is_comparable(
    plan, papermill
):
    papermill(WELL)
    jobs = plan(
        CHAIN
        + "\ngrid: {03_finetune_atop: {variant: [ft_adv, ft_clean]}, 04_attack: {protocol: [demo, quick]}}"
    )
    run(jobs)
    for job in jobs:
        needs = {
            f"input{i}": {"file": f"{need.name}/purifier.safetensors"} for i, need in enumerate(job.needs)
        }
        write_json(
            job.run_dir / "manifest.json",
            {"stage": job.stage, "status": "complete", "inputs": needs, "seconds": 2},
        )
        trained = {} if job.stage == "04_attack" else {"test_accuracy": 0.5}
        write_json(job.run_dir / "metrics.json", {"costs": {"AToP": 3}, "history": [{"loss": 1}], **trained})
    attacks = [job for job in jobs if job.stage == "04_attack"]
    for accuracy, job in enumerate(attacks):
        rows = [
            f"{name},PGD,{rule},{accuracy},100" for name in ("AP", "AToP") for rule in ("single", "majority")
        ]
        (job.run_dir / "frame.csv").write_text("\n".join(["defence,attack,rule,accuracy,images", *rows]))
    frame = tables.runs_frame(job.run_dir for job in jobs)
    assert len(frame) == 8 and frame.columns[0] == "run" and frame["metrics.costs.AToP"].eq(3).all()
    assert (
        set(frame["03_finetune_atop.variant"].dropna()) == {"ft_adv", "ft_clean"}
        and "metrics.history" not in frame
    )
    scores = tables.scores_frame(job.run_dir for job in jobs)
    assert len(scores) == 8 and set(scores["rule"]) == {"single"}
    groups = dict(tuple(scores.groupby("measured")))
    assert list(groups) == [
        "100 images of mnist5k by protocol demo",
        "100 images of mnist5k by protocol quick",
    ]
    for group in groups.values():
        assert tables.varied(group) == ["03_finetune_atop.variant"]
        assert list(tables.trained_with(group, "variant")) == ["none (AP)", "ft_adv", "none (AP)", "ft_clean"]
    assert pages.headline(jobs[0].run_dir) == "clean accuracy 50.0 %"
    assert pages.headline(attacks[3].run_dir) == "under the strongest attack: AP 3.0 %, AToP 3.0 %"
    assert len(tables.scores_frame([jobs[0].run_dir])) == 0
