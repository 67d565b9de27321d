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
import psutil
import pytest

from atoplib.batch import __main__ as command
from atoplib.batch import pages, runner
from atoplib.batch.recipe import Job, make_plan
from atoplib.batch.runner import execute, job_state, local
from atoplib.files import read_json, write_json

FIRST = "01_train_classifier"
ONE = f"notebooks: {{{FIRST}: }}"
CHAIN = "notebooks: {01_train_classifier: , 02_pretrain_purifier: , 03_finetune_atop: , 04_attack: }"
GRID = f"{ONE}\ngrid: {{seed: [0, 1, 2]}}"

# A stand-in for papermill, quick enough for tests: it does to a run's directory what the test says.
PRELUDE = """
import json, os, pathlib, signal, sys, time
run, folder = map(pathlib.Path, sys.argv[1:])
values = json.loads((folder / "parameters.json").read_text())
def notebook(*outputs):
    cell = dict(cell_type="code", id="a", execution_count=3, metadata={}, source="1/0", outputs=outputs)
    content = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)
    (folder / "notebook.ipynb").write_text(json.dumps(content))
def manifest(status, **more):
    stage = run.name.partition("-")[0]
    content = dict(status=status, stage=stage, ended=str(time.time()), seconds=1, **more)
    (run / "manifest.json").write_text(json.dumps(content))
    (run / "parameters.json").write_text(json.dumps(values))
with open(run / "made", "a") as file:
    file.write("i")
"""
WELL = 'notebook(); manifest("complete"); (run / "table.md").write_text("| AToP | 73 |")'
ERROR = 'dict(output_type="error", ename="ValueError", evalue="batch_size is too large", traceback=[])'
SAVES = 'def save(*_): (run / "saved").touch(); sys.exit(1)\nsignal.signal(signal.SIGTERM, save)\n'
BEGUN = '(run / "pid").write_text(str(os.getpid())); (run / "begun").touch(); time.sleep(600)'


@pytest.fixture
def plan(notebooks, tmp_path, monkeypatch) -> Callable[..., list[Job]]:
    """Makes jobs of small notebooks; pages, and what a run depends on, are stand-ins."""
    monkeypatch.setattr(runner, "write_page", lambda executed: None)
    monkeypatch.setattr(
        runner.runs, "difference", lambda run_dir, _: (read_json(run_dir / "changed") or {}).get("now", "")
    )

    def made(text: str = ONE) -> list[Job]:
        (notebooks / "recipe.yaml").write_text(text)
        return make_plan(notebooks / "recipe.yaml", notebooks, {"workspace": str(tmp_path / "workspace")})

    return made


@pytest.fixture
def papermill(monkeypatch) -> Callable[[str], list[str]]:
    """Replaces papermill by a script; returns the list of the names of jobs that were started."""

    def install(script: str) -> list[str]:
        started: list[str] = []

        def papermill_command(job: Job) -> list[str]:
            started.append(job.name)
            assert read_json(job.run_dir / ".batch/parameters.json") == job.parameters
            folders = str(job.run_dir), str(job.run_dir / ".batch")
            return [sys.executable, "-I", "-S", "-c", PRELUDE + script, *folders]

        monkeypatch.setattr(runner, "papermill_command", papermill_command)
        return started

    return install


def run(jobs: list[Job], at_once: int = 1, timeout: float | None = None, **options) -> tuple[list[str], str]:
    """How each job ended, and what was shown."""
    out = io.StringIO()
    missing = runner.run_jobs(jobs, local(timeout), at_once, out=out, **options)
    shown = out.getvalue()
    ends = [
        [line.split("  ")[-1] for line in shown.splitlines() if line.startswith(f"[{number}/")][-1]
        for number in range(1, len(jobs) + 1)
    ]
    assert [bool(missing[job.run_dir]) for job in jobs] == [end in ("failed", "not run") for end in ends]
    return [end.partition(", ")[0] for end in ends], shown


def made(job: Job) -> int:
    """How often a job was begun."""
    path = job.run_dir / "made"
    return len(path.read_text()) if path.exists() else 0


# ------------------------------------------------------------------------------------------------- one run


def test_an_executed_notebook_is_kept_with_a_page_of_it(plan, papermill, monkeypatch):
    papermill(WELL)
    monkeypatch.setattr(runner, "write_page", pages.write_page)
    (job,) = plan()
    page = job.run_dir / "notebook.html"
    assert run([job])[0] == ["complete"]
    page.unlink()  # as if the call had ended before the page was written: the next one makes up for it
    assert run([job])[0] == ["done before"] and made(job) == 1
    assert nbformat.read(job.executed, as_version=4).cells[0].source == "1/0"
    assert "<html" in page.read_text() and not (job.run_dir / ".batch").exists()


@pytest.mark.parametrize(
    "script, reason",
    [
        (
            f'notebook({ERROR}); manifest("failed", error="less"); sys.exit(1)',
            "In [3]: ValueError: batch_size is too large",
        ),
        ('notebook(); manifest("running"); os.kill(os.getpid(), signal.SIGKILL)', ""),
        ('notebook(); manifest("running")', ""),  # the kernel was killed, yet papermill says that all is well
        ("notebook()", ""),
        ('manifest("complete")', "notebook.ipynb"),
        (
            'notebook(); manifest("failed", error="OSError: No space left on device")',
            "OSError: No space left",
        ),
        ('print("no kernel named python3"); sys.exit(1)', "no kernel named python3"),
    ],
)
def test_a_notebook_that_died_is_never_taken_for_complete_and_told_with_where_to_look(
    plan, papermill, script, reason
):
    papermill(script)
    (job,) = plan()
    write_json(job.run_dir / "manifest.json", {"status": "complete"})  # of an earlier call
    missing = runner.run_jobs([job], local(), out=io.StringIO())[job.run_dir]
    assert missing.startswith(f"{FIRST} failed: ") and reason in missing and str(job.run_dir) in missing
    assert not job.executed.exists() and made(job) == 1


def test_a_run_is_done_only_while_code_versions_and_inputs_are_the_same(plan, papermill):
    papermill(WELL)
    (job,) = plan()
    assert job_state(job) == ("new", "")
    run([job])
    assert job_state(job) == ("done", "")
    write_json(job.run_dir / "changed", {"now": "torch is 3, it was 2"})
    assert job_state(job, reuse=True) == ("done", "")
    assert "run again: torch is 3, it was 2" in run([job])[1] and made(job) == 2
    (job.run_dir / "changed").unlink()
    job.executed.unlink()
    assert job_state(job) == ("unfinished", "")


def test_a_notebook_has_folders_of_its_own_which_are_gone_afterwards_and_knows_its_run(plan, papermill):
    papermill(f'(run / "seen").write_text(json.dumps(dict(os.environ))); {WELL}')
    (job,) = plan()
    assert execute(job, threads=3) == ""
    seen = read_json(job.run_dir / "seen")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        assert Path(seen[name]) != Path.home() / ".ipython" and not Path(seen[name]).exists()
    assert seen["OMP_NUM_THREADS"] == "3" and seen["ATOPLIB_RUN"] == job.run_dir.name


# ------------------------------------------------------------------------------------------------ many runs


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_ends_a_batch_has_all_that_run_save_starts_nothing_more_and_leaves_no_process(
    plan, papermill, monkeypatch, error, stubborn
):
    monkeypatch.setattr(runner, "STOP_SECONDS", 1 if stubborn else 60)
    papermill(("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else SAVES) + BEGUN)
    jobs = plan(GRID)

    def look() -> None:
        if sum((job.run_dir / "begun").exists() for job in jobs) == 2:
            raise error

    with pytest.raises(error):
        run(jobs, 2, look=look)
    assert [(job.run_dir / "saved").exists() for job in jobs[:2]] == [not stubborn] * 2
    pids = [int((job.run_dir / "pid").read_text()) for job in jobs[:2]]
    assert not made(jobs[2]) and not any(map(psutil.pid_exists, pids))


def test_a_run_that_takes_too_long_is_stopped_and_the_others_go_on(plan, papermill):
    papermill(f'time.sleep(600 if values["seed"] == 1 else 0); {WELL}')
    jobs = plan(GRID)
    missing = runner.run_jobs(jobs, local(timeout=3), out=io.StringIO())
    assert [bool(missing[job.run_dir]) for job in jobs] == [False, True, False]
    assert "ran longer than the 3 s of --timeout" in missing[jobs[1].run_dir]


@pytest.mark.parametrize("retries, end, attempts", [(0, "failed", 1), (1, "failed", 2), (5, "complete", 3)])
def test_a_failed_run_is_tried_again_as_often_as_asked_for(plan, papermill, retries, end, attempts):
    papermill(f'len((run / "made").read_text()) < 3 and sys.exit(1); {WELL}')
    (job,) = plan()
    ends, shown = run([job], retries=retries)
    assert ends == [end] and made(job) == attempts == 1 + shown.count("trying again")


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
    most = max(sum(begin <= moment < end for begin, end in times.values()) for moment, _ in times.values())
    assert most == at_once


def test_what_a_notebook_tells_of_itself_is_told_where_no_terminal_is(plan, papermill, monkeypatch):
    monkeypatch.setattr(runner, "SAY_SECONDS", 0.0)
    papermill(f'(run / ".progress.txt").write_text("50 %, 3 s left\\n"); time.sleep(2); {WELL}')
    (job,) = plan()
    job.run_dir.mkdir(parents=True)
    (job.run_dir / ".progress.txt").write_text("of yesterday")
    lines = run([job])[1].splitlines()
    assert lines[0] == f"[1/1] {FIRST}  started" and lines[-1].startswith(f"[1/1] {FIRST}  complete, ")
    assert any(line.endswith("50 %, 3 s left") for line in lines) and "yesterday" not in "".join(lines)


def test_a_workspace_that_cannot_be_written_fails_its_runs_with_a_sentence(plan, papermill):
    (job,) = plan()
    job.run_dir.parent.parent.mkdir(parents=True)
    job.run_dir.parent.write_text("a file where a folder should be")
    papermill("")
    assert "could not write" in runner.run_jobs([job], local(), out=io.StringIO())[job.run_dir]


# -------------------------------------------------------------------------------------- papermill's process


def papermill_itself(tmp_path: Path, body: str) -> "subprocess.Popen[str]":
    """The process that a batch starts, with a papermill that only does what the test says."""
    (tmp_path / "parameters.json").write_text('{"epochs": 3}')
    (tmp_path / "papermill.py").write_text(
        "import signal, sys, time\n"
        "def execute_notebook(notebook, output, parameters, **options):\n"
        f"    assert (notebook, output) == ('in', {str(tmp_path / 'notebook.ipynb')!r})\n"
        "    assert parameters == {'epochs': 3} and options['kernel_name'] == 'python3'\n"
        "    begun = lambda: print('begun', flush=True)\n" + body
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "atoplib.batch.worker", "in", str(tmp_path / "run"), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}", "JUPYTER_RUNTIME_DIR": str(tmp_path)},
    )
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
    (job,) = plan(f"notebooks: {{{FIRST}: {{epochs: 4}}}}")
    stop, epochs = threading.Event(), job.run_dir / "epochs"

    def stop_in_the_third_epoch() -> None:
        while not epochs.exists() or len(epochs.read_text()) < 2:
            time.sleep(0.05)
        stop.set()

    threading.Thread(target=stop_in_the_third_epoch, daemon=True).start()
    assert "KeyboardInterrupt" in execute(job, stop=stop)
    manifest, done = read_json(job.run_dir / "manifest.json"), len(epochs.read_text())
    assert manifest["status"] == "interrupted" and 2 <= done < 4 and job_state(job)[0] == "unfinished"
    assert run([job])[0] == ["complete"]
    assert epochs.read_text() == "iiii" and read_json(job.run_dir / "manifest.json")["attempts"] == 2


# --------------------------------------------------------------------------------------------- the command


def call(tmp_path: Path, text: str, *arguments: str) -> int:
    (tmp_path / "recipe.yaml").write_text(text)
    return command.main(
        [f"{tmp_path}/recipe.yaml", "--workspace", f"{tmp_path}/workspace", "--no-report", *arguments]
    )


@pytest.fixture
def unchecked(monkeypatch):
    """Without the process that looks at data and sizes: it imports torch."""
    checked = runner.Future()
    checked.set_result(None)
    monkeypatch.setattr(command.checks, "begin_checks", lambda *_, **__: checked)


def test_what_needs_a_failed_run_is_not_run_and_the_same_command_does_only_what_is_missing(
    tmp_path, plan, papermill, unchecked, capsys
):
    papermill(f'values.get("variant") == "bad" and (notebook({ERROR}), sys.exit(1)); {WELL}')
    text = CHAIN + "\ngrid: {03_finetune_atop: {variant: [bad, ft_adv]}}"
    assert call(tmp_path, text) == 1
    told = capsys.readouterr()
    assert "03_finetune_atop variant=bad failed: In [3]: ValueError: batch_size is too large" in told.err
    assert "was not run: it needs 03_finetune_atop variant=bad" in told.err and told.out.count("started") == 5
    assert "tries these again" in told.err and "index.html" in told.out
    started = papermill(WELL)
    assert call(tmp_path, text) == 0 and capsys.readouterr().out.count("done before") == 4
    assert started == ["03_finetune_atop", "04_attack"]
    assert call(tmp_path, CHAIN) == 0 and capsys.readouterr().out.count("| AToP | 73 |") == 1


def test_after_its_minutes_a_recipe_saves_and_the_same_command_goes_on(
    tmp_path, plan, papermill, unchecked, capsys
):
    papermill(SAVES + "time.sleep(600)")
    assert call(tmp_path, ONE, "--minutes", "0.05") == os.EX_TEMPFAIL
    assert "goes on from here" in capsys.readouterr().err
    papermill(WELL)
    assert call(tmp_path, ONE) == 0 and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_ctrl_c_has_the_exit_code_that_shells_expect(tmp_path, plan, unchecked, monkeypatch, capsys):
    monkeypatch.setattr(runner, "run_jobs", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert call(tmp_path, ONE) == 130 and "goes on from here" in capsys.readouterr().err


def test_a_refusal_of_the_checks_stops_the_first_notebook(tmp_path, plan, papermill, capsys):
    papermill(SAVES + "time.sleep(600)")
    assert call(tmp_path, f"shared: {{dataset: 'folder:{tmp_path}/nowhere'}}\n{ONE}") == 1
    assert "nowhere" in capsys.readouterr().err and len(list(tmp_path.rglob("saved"))) == 1
