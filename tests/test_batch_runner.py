"""Notebooks that died are not believed, one that fails stops no other, and what ends a batch ends its notebooks."""

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
import yaml
from PIL import Image

from atoplib.batch import (
    Job,
    NotebookFailed,
    Settings,
    execute,
    main,
    make_plan,
    papermill_process,
    read_recipe,
    run_jobs,
    worker,
)
from atoplib.batch.overview import Overview, format_bytes
from atoplib.batch.worker import Stopped, failing_cell
from atoplib.checkpoints import write_json
from atoplib.runs import locked, read_json

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
FIRST = "01_train_classifier"
CHAIN = "notebooks: {01_train_classifier: , 02_pretrain_purifier: , 03_finetune_atop: , 04_attack: }"


def plan(tmp_path: Path, text: str = CHAIN) -> list[Job]:
    (tmp_path / "recipe.yaml").write_text(text)
    return make_plan(read_recipe(tmp_path / "recipe.yaml"), FOLDER, {"workspace": str(tmp_path)})


def one_job(tmp_path: Path) -> Job:
    return plan(tmp_path, f"notebooks: {{{FIRST}: {{epochs: 2, eps: 8/255}}}}")[0]


# A stand-in for papermill, quick enough for tests: it does to a run's directory what the test says.
PRELUDE = """
import json, os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
def notebook(*outputs):
    cells = [dict(cell_type="code", id="a", execution_count=3, metadata={}, source="1/0", outputs=list(outputs))]
    content = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    (run / "notebook.part.ipynb").write_text(json.dumps(content))
def manifest(status, **more):
    (run / "manifest.json").write_text(json.dumps(dict(status=status, stage=run.name.rpartition("-")[0], **more)))
"""
WELL = 'notebook(); manifest("complete", ended="now")'
ERROR = 'dict(output_type="error", ename="ValueError", evalue="batch_size is too large", traceback=[])'


@pytest.fixture
def papermill(monkeypatch) -> Callable[[str], list[Job]]:
    """Replaces papermill by a script; returns the list of jobs that were started."""

    def install(script: str) -> list[Job]:
        started: list[Job] = []

        def command(job: Job, parameters_file: Path, output: Path, transport: str) -> list[str]:
            started.append(job)
            assert yaml.safe_load(parameters_file.read_text()) == job.values
            assert output == job.run_dir / "notebook.part.ipynb" and not output.exists()
            assert transport in ("ipc", "tcp")
            return [sys.executable, "-I", "-S", "-c", PRELUDE + script, str(job.run_dir)]

        monkeypatch.setattr(worker, "papermill_command", command)
        return started

    return install


@pytest.fixture
def no_pages(monkeypatch):
    """Pages take half a second each; most tests need none."""
    monkeypatch.setattr(worker, "write_page", lambda job: job.page.write_text("<html>"))


def run(jobs: list[Job], /, **settings: object) -> tuple[dict[str, str], str]:
    """Statuses by label, and what was shown."""
    made = Settings(**settings)
    shown = io.StringIO()
    outcomes = run_jobs(jobs, made, Overview(jobs, workers=made.jobs, out=shown, live=False))
    assert [outcome.job for outcome in outcomes] == jobs
    return {outcome.job.label: outcome.status for outcome in outcomes}, shown.getvalue()


@pytest.mark.parametrize("lost", [False, True])
def test_an_executed_notebook_is_kept_with_a_page_of_it(tmp_path, papermill, lost):
    started = papermill(WELL)
    job = one_job(tmp_path)
    assert run([job])[0] == {FIRST: "complete"}
    if lost:  # the call ended before the page was written: the next one makes up for it
        job.page.unlink()
    assert run([job])[0] == {FIRST: "done before"} and len(started) == 1
    assert nbformat.read(job.executed, as_version=4).cells[0].source == "1/0"
    assert "<html" in job.page.read_text()
    assert not (job.run_dir / "notebook.part.ipynb").exists()


def test_a_failing_cell_is_reported_with_its_error_and_where_to_look(tmp_path, papermill):
    papermill(f'notebook({ERROR}); manifest("failed", error="less"); sys.exit(1)')
    job = one_job(tmp_path)
    with pytest.raises(NotebookFailed, match=rf"{FIRST} failed: In \[3\]: ValueError: batch_size is too large") as caught:
        execute(job)
    assert str(job.run_dir / "notebook.part.ipynb") in str(caught.value) and "papermill.log" in str(caught.value)
    assert not job.executed.exists()


@pytest.mark.parametrize(
    "script, reason",
    [
        ('notebook(); manifest("running"); os.kill(os.getpid(), signal.SIGKILL)', "failed"),  # the kernel or all was killed
        ('notebook(); manifest("running")', "failed"),  # killed, yet papermill says all is well
        ("notebook()", "failed"),
        ('manifest("complete")', "failed"),
        ('notebook(); manifest("failed", error="OSError: No space left on device")', "failed: OSError: No space left"),
        ('print("no kernel named python3"); sys.exit(1)', "failed: no kernel named python3"),
        ("sys.exit(1)", "failed: "),
    ],
)
def test_a_notebook_that_died_is_never_taken_for_complete(tmp_path, papermill, no_pages, script, reason):
    started = papermill(script)
    job = one_job(tmp_path)
    with pytest.raises(NotebookFailed, match=reason):
        execute(job)
    assert run([job])[0] == {FIRST: "failed"} and len(started) == 2


def test_what_an_earlier_call_left_does_not_hide_a_failure(tmp_path, papermill):
    job = one_job(tmp_path)
    job.run_dir.mkdir(parents=True)
    write_json(job.run_dir / "manifest.json", {"status": "complete"})
    nbformat.write(nbformat.v4.new_notebook(), job.run_dir / "notebook.part.ipynb")
    papermill("sys.exit(1)")
    with pytest.raises(NotebookFailed):
        execute(job)


def test_progress_is_shown_and_an_old_line_is_not(tmp_path, papermill, no_pages):
    job = one_job(tmp_path)
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "progress.txt").write_text("of yesterday")
    papermill(f'(run / "progress.txt").write_text("50 %\\n"); time.sleep(1); {WELL}')
    shown = io.StringIO()
    run_jobs([job], Settings(), Overview([job], out=shown, live=True))
    lines = shown.getvalue().split("\n")
    assert any("50 %" in line for line in lines) and lines[-2].startswith(f"\x1b[1F\x1b[J[1/1] {FIRST}  ")
    assert "of yesterday" not in lines[-3]


def test_a_notebook_has_directories_of_its_own_which_are_gone_afterwards(tmp_path, papermill):
    papermill(f'(run / "seen").write_text(json.dumps(dict(os.environ))); {WELL}')
    job = one_job(tmp_path)
    execute(job, threads=3)
    seen = read_json(job.run_dir / "seen")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        assert Path(seen[name]) != Path.home() / ".ipython" and not Path(seen[name]).exists()
    assert seen["OMP_NUM_THREADS"] == "3" and seen["PATH"] == os.environ["PATH"]


def gone(process: int, seconds: float = 10.0) -> bool:
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
def test_what_is_told_to_stop_is_waited_for_and_leaves_no_process(tmp_path, papermill, monkeypatch, stubborn):
    monkeypatch.setattr(worker, "STOP_SECONDS", 1)
    papermill(
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else "")
        + '(run / "pid").write_text(str(os.getpid())); (run / "progress.txt").write_text("begun"); time.sleep(60)'
    )
    job, stop = one_job(tmp_path), threading.Event()

    def stop_once_begun() -> None:
        while not (job.run_dir / "progress.txt").exists():
            time.sleep(0.01)
        stop.set()

    threading.Thread(target=stop_once_begun).start()
    with pytest.raises(Stopped):
        execute(job, stop=stop)
    assert gone(int((job.run_dir / "pid").read_text()), 1)


def test_ctrl_c_stops_all_that_run_and_starts_nothing_more(tmp_path, papermill, no_pages, monkeypatch):
    save = 'def save(*_): (run / "saved").touch(); sys.exit(1)\nsignal.signal(signal.SIGTERM, save)\n'
    started = papermill(save + '(run / "pid").write_text(str(os.getpid())); time.sleep(60)')
    jobs = plan(tmp_path, f"notebooks: {{{FIRST}: }}\ngrid: {{seed: [0, 1, 2]}}")
    overview = Overview(jobs, out=io.StringIO(), live=False)

    def pressed() -> None:
        if len(list(tmp_path.rglob("pid"))) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(overview, "show", pressed)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, Settings(jobs=2), overview)
    assert len(started) == 2 == len(list(tmp_path.rglob("saved")))
    assert all(gone(int(path.read_text()), 1) for path in tmp_path.rglob("pid"))


def test_a_run_that_takes_too_long_is_stopped_and_the_others_go_on(tmp_path, papermill, no_pages):
    papermill(f'"seed: 1\\n" in (run / "papermill.yaml").read_text() and time.sleep(60); {WELL}')
    jobs = plan(tmp_path, f"notebooks: {{{FIRST}: }}\ngrid: {{seed: [0, 1, 2]}}")
    outcomes = run_jobs(jobs, Settings(timeout=2), Overview(jobs, out=io.StringIO(), live=False))
    assert [outcome.status for outcome in outcomes] == ["complete", "failed", "complete"]
    assert "ran longer than the 2 s of --timeout and was stopped" in outcomes[1].reason


def papermill_itself(tmp_path: Path, body: str) -> "subprocess.Popen[str]":
    """The process that a worker starts, with a papermill that only does what the test says."""
    (tmp_path / "parameters.yaml").write_text("epochs: 3")
    (tmp_path / "papermill.py").write_text(
        "import signal, sys, time\n"
        "def execute_notebook(notebook, output, parameters, **options):\n"
        "    assert (notebook, output, parameters) == ('in', 'out', {'epochs': 3})\n"
        "    assert options['config'].KernelManager.transport == 'ipc'\n"
        "    begun = lambda: print('begun', flush=True)\n" + body
    )
    command = [sys.executable, "-P", papermill_process.__file__, "in", "out", str(tmp_path / "parameters.yaml"), "ipc"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "begun\n"
    return process


SAVING = """    try:
        begun()
        time.sleep(60)
    except KeyboardInterrupt:
        print('saving', flush=True)
        time.sleep(0.5)
        print('saved', flush=True)
        raise
"""


def test_kernels_of_two_runs_share_no_socket(monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", "/somewhere/first")
    assert papermill_process.sockets("ipc") == {"ip": "/somewhere/first/kernel"}
    assert papermill_process.sockets("tcp") == {}


def test_papermill_heeds_our_signal_once_as_a_ctrl_c_and_no_other(tmp_path):
    process = papermill_itself(tmp_path, SAVING)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None, "a terminal's Ctrl-C should not reach it"
    process.terminate()
    assert process.stdout.readline() == "saving\n"
    process.terminate()
    assert process.communicate(timeout=30)[0] == "saved\n" and process.returncode != 0


def test_papermill_saves_and_ends_when_the_batch_is_killed(tmp_path):
    process = papermill_itself(tmp_path, SAVING)
    process.stdin.close()  # what the system does for a process that is killed
    assert process.stdout.read() == "saving\nsaved\n"
    assert process.wait(timeout=30) != 0
    process.stdout.close()
    process.stderr.close()


def test_papermill_ends_well_while_the_batch_goes_on(tmp_path):
    process = papermill_itself(tmp_path, "    begun()\n")
    assert process.wait(timeout=30) == 0 and process.stderr.read() == ""
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()


def test_what_needs_a_failed_run_is_not_run_and_all_else_goes_on(tmp_path, papermill, no_pages):
    started = papermill(f'manifest("failed", error="no luck") if "02_" in run.name else ({WELL.replace("; ", ", ")})')
    jobs = plan(tmp_path, CHAIN + "\ngrid: {02_pretrain_purifier: {seed: [0, 1]}, 04_attack: {steps: [1, 2]}}")
    statuses, shown = run(jobs)
    assert list(statuses.values()).count("failed") == 2 and list(statuses.values()).count("not run") == 6
    assert [job.name for job in started] == [FIRST, "02_pretrain_purifier", "02_pretrain_purifier"]
    assert shown.count("\n") == len(jobs) == 9
    started = papermill(WELL)  # the same call again: only what is missing
    assert set(run(jobs)[0].values()) == {"done before", "complete"}
    assert len(started) == 8 and FIRST not in {job.name for job in started}


def test_independent_runs_go_on_beside_a_failure(tmp_path, papermill, no_pages):
    papermill(f'"seed: 1\\n" in (run / "papermill.yaml").read_text() and sys.exit(1); {WELL}')
    jobs = plan(tmp_path, CHAIN + "\ngrid: {seed: [0, 1, 2]}")
    statuses = list(run(jobs, jobs=2)[0].values())
    assert [statuses.count(status) for status in ("complete", "failed", "not run")] == [8, 1, 3]


@pytest.mark.parametrize(
    "retries, status, attempts", [(0, "failed", 1), (1, "failed", 2), (2, "complete", 3), (5, "complete", 3)]
)
def test_a_failed_run_is_tried_again_as_often_as_asked_for(tmp_path, papermill, no_pages, retries, status, attempts):
    count = 'n = run / "n"; n.write_text(n.read_text() + "i" if n.exists() else "i"); len(n.read_text()) < 3 and sys.exit(1)'
    started = papermill(f"{count}; {WELL}")
    job = one_job(tmp_path)
    statuses, shown = run([job], retries=retries)
    assert statuses == {FIRST: status} and len(started) == attempts
    assert shown.count("trying again") == attempts - 1
    assert read_json(job.run_dir / "batch.json")["attempts"] == attempts


@pytest.mark.parametrize("at_once", [1, 3])
def test_so_many_run_at_once_as_asked_for_and_never_before_what_they_need(tmp_path, papermill, no_pages, at_once):
    papermill(
        f'(run / "from").write_text(str(time.monotonic())); time.sleep(0.3); {WELL}; '
        '(run / "to").write_text(str(time.monotonic()))'
    )
    jobs = plan(tmp_path, CHAIN + "\ngrid: {02_pretrain_purifier: {seed: [0, 1, 2]}}")
    run(jobs, jobs=at_once)
    times = {job.run_dir: [float((job.run_dir / name).read_text()) for name in ("from", "to")] for job in jobs}
    assert all(times[need][1] <= times[job.run_dir][0] for job in jobs for need in job.needs)
    overlap = max(sum(begin <= moment < end for begin, end in times.values()) for moment, _ in times.values())
    assert overlap == at_once


@pytest.mark.parametrize("name", ["run.lock", "batch.lock"])
def test_a_run_that_another_process_works_on_is_left_alone(tmp_path, papermill, name):
    started = papermill(WELL)
    job = one_job(tmp_path)
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "notebook.part.ipynb").write_text("theirs")
    with locked(job.run_dir / name), pytest.raises(NotebookFailed, match=f"in use by process {os.getpid()} on"):
        execute(job)
    assert started == [] and (job.run_dir / "notebook.part.ipynb").read_text() == "theirs"
    execute(job)


def test_a_workspace_that_cannot_be_written_fails_its_runs_with_a_sentence(tmp_path, papermill, no_pages):
    job = one_job(tmp_path)
    job.run_dir.parent.parent.mkdir(parents=True)
    job.run_dir.parent.write_text("a file where a folder should be")
    papermill(WELL)
    with pytest.raises(NotebookFailed, match=f"{FIRST} failed: .*Not a directory|File exists"):
        execute(job)


@pytest.mark.parametrize("content", [None, "", "{", '{"cells": [{"cell_type": "markdown"}]}', "[]"])
def test_no_failing_cell_is_found_where_there_is_none(tmp_path, content):
    path = tmp_path / "a.ipynb"
    if content is not None:
        path.write_text(content)
    assert failing_cell(path) is None


def test_the_command_reports_failures_at_the_end_and_writes_the_table_of_the_rest(tmp_path, papermill, no_pages, capsys):
    papermill(f'"epochs: 1\\n" in (run / "papermill.yaml").read_text() and (notebook({ERROR}), sys.exit(1)); {WELL}')
    (tmp_path / "recipe.yaml").write_text(CHAIN + "\ngrid: {01_train_classifier: {epochs: [1, 2]}}")
    arguments = [str(tmp_path / "recipe.yaml"), "--workspace", str(tmp_path), "--no-report"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert f"{FIRST} epochs=1 failed: In [3]: ValueError: batch_size is too large" in captured.err
    assert captured.err.count("was not run: it needs") == 3 and "the same command tries these again" in captured.err
    table = tmp_path / "runs" / "mnist" / "table.csv"
    assert str(table) in captured.out and table.read_text().count("\n") == 1 + 4
    papermill(WELL)
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("done before") == 4 and table.read_text().count("\n") == 1 + 8


def test_a_notebook_that_fails_stops_the_recipe_with_its_own_error(tmp_path, capsys):
    for split in ("train", "test"):  # of each split the first image alone is one, so that no early check sees what is wrong
        for label in ("a", "b"):
            (folder := tmp_path / "broken" / split / label).mkdir(parents=True)
            for number in range(200):
                (folder / f"{number:03d}.png").write_bytes(b"no image")
        Image.new("RGB", (32, 32)).save(tmp_path / "broken" / split / "a" / "000.png")
    code = main(["mnist", "--smoke", "--workspace", str(tmp_path), "-p", "dataset", f"folder:{tmp_path / 'broken'}"])
    assert code == 1
    printed = capsys.readouterr().err
    assert f"{FIRST} failed: In [4]: ValueError: " in printed and "broken" in printed
    (folder,) = (path for path in (tmp_path / "runs" / "mnist-smoke").iterdir() if path.is_dir())
    cells = nbformat.read(folder / "notebook.part.ipynb", as_version=4).cells
    assert any(output.output_type == "error" for cell in cells for output in cell.get("outputs", []))


def test_the_overview_tells_how_it_stands(tmp_path, papermill, no_pages):
    jobs = plan(tmp_path, CHAIN + "\ngrid: {seed: [0, 1]}")
    papermill(f"{WELL}; time.sleep(0.3)")
    shown = io.StringIO()
    run_jobs(jobs[:4], Settings(), Overview(jobs[:4], out=io.StringIO(), live=False))
    for job in jobs[:4]:  # as the notebooks do
        write_json(job.run_dir / "parameters.json", job.parameters.as_dict())
    overview = Overview(jobs, workers=2, out=shown, live=True)
    for job in jobs[:4]:
        overview.ended(job, "done before", 0.0)
    overview.ended(jobs[4], "failed", 1.0)
    overview.started(jobs[5])
    overview.show()
    last = shown.getvalue().splitlines()[-1]
    assert last.startswith("4 of 8 done · 1 running · 1 failed · about ") and last.endswith("B")
    expected = sum(overview.costs.expected(job) for job in jobs[5:]) / 2
    assert overview.seconds_left(overview.running[jobs[5].run_dir][1]) == pytest.approx(expected) and expected > 0.4


@pytest.mark.parametrize("count, text", [(0, "0 kB"), (999, "1 kB"), (3.4e6, "3.4 MB"), (1.25e9, "1.2 GB")])
def test_sizes_are_told_in_the_unit_that_fits(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    "values", [{"jobs": 0}, {"retries": -1}, {"timeout": 0.0}, {"timeout": float("nan")}, {"threads": 0}]
)
def test_impossible_settings_are_refused(values):
    (name,) = values
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Settings(**values)
