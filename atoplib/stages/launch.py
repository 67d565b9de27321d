"""A stage trained by this process, or by several that torchrun starts (``python -m atoplib.stages``)."""

import os
import subprocess
import sys
from collections.abc import Callable

from atoplib.checkpoints import write_json
from atoplib.data import Dataset
from atoplib.parameters import Training
from atoplib.progress import ProgressLine
from atoplib.runs import latest_line, run_name
from atoplib.stages.build import Stage
from atoplib.stages.run import Trained, train_here
from atoplib.subprocesses import end, finished, last_lines

POLL_SECONDS = 0.2
STOP_SECONDS = 45  # for processes to save and end after a Ctrl-C; torchrun kills what has not ended after 30
COMPLAINT = "atoplib.stages: "  # begins the line in which a process says why it cannot go on


class TrainingFailed(RuntimeError):
    """The processes that torchrun started did not come to a good end; the message says why, and where their log is."""


def train(p: Training, stage: Stage, dataset: Dataset, *, notify: Callable[[str], None] | None = None) -> Trained:
    """Train a stage into the run's directory, measure it, save it; by as many processes as the parameters say.

    Interrupted or killed, the next call goes on where this one stopped, and one that is finished is just loaded.

    Args:
        notify: called with a sentence when something a person should know happens.

    Raises:
        ValueError: if several processes are to train a network of one's own, which they cannot build.
        TrainingFailed: if the processes that torchrun started did not come to a good end.
    """
    if p.processes > 1:
        if stage.given:
            raise ValueError(f"a network of your own cannot be built by {p.processes} processes: choose processes = 1")
        launch(p, stage.title)
    return train_here(p, stage, dataset, notify=notify)  # what other processes have trained is only loaded


def launch(p: Training, title: str) -> None:
    """Have torchrun start the processes that train a stage, show how far they are, and wait for their end.

    A Ctrl-C has them save and end. They do so, too, when this process is gone.

    Raises:
        TrainingFailed: if they did not come to a good end.
    """
    path = p.experiment_dir / run_name(p.STAGE, p.as_dict())
    parameters_file, log_path = path / "torchrun.json", path / "torchrun.log"
    write_json(parameters_file, p.as_dict())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(p.processes)]
    command = [*torchrun, "-m", "atoplib.stages", p.STAGE, str(parameters_file), "--follow-parent"]
    threads = max(1, len(os.sched_getaffinity(0)) // p.processes)
    line, shown = ProgressLine(title), ""
    (path / "progress.txt").unlink(missing_ok=True)
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # never written to: it ends when this process does
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            start_new_session=True,  # a Ctrl-C in a terminal reaches this process alone, which passes it on once
        )
        try:
            while not finished(process, POLL_SECONDS):
                latest = latest_line(path)
                if latest and latest != shown:
                    line.show(shown := latest)
        except BaseException:
            end(process, STOP_SECONDS)
            raise
        finally:
            process.stdin.close()
    if process.returncode:
        said = (text.partition(COMPLAINT)[2] for text in log_path.read_text(errors="replace").splitlines())
        reason = next(filter(None, said), None) or last_lines(log_path)
        raise TrainingFailed(f"{p.processes} processes did not train {path.name} to its end: {reason}\nlog: {log_path}")
