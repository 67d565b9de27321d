"""Train one stage into its run's directory, as its notebook does: alone, or with others under torchrun.

torchrun --standalone --nproc-per-node 4 -m atoplib.stages 03_finetune_atop PARAMETERS.yaml
"""

import argparse
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from atoplib.parameters import NOTEBOOKS, Training
from atoplib.plain_yaml import load_yaml
from atoplib.stages import BUILDERS, COMPLAINT, train_here
from atoplib.subprocesses import follow_parent
from atoplib.training.processes import first_then_others, joined


def read_parameters(stage: str, path: Path, processes: int, local_rank: int) -> Training:
    """A notebook's parameters from a YAML or JSON file; several processes get a GPU each, where there are any.

    Raises:
        ParameterError: for a name, type or value that the notebook does not have.
        ValueError: for a file that holds no mapping.
    """
    values: Any = load_yaml(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold the parameters of {stage} by name, got a {type(values).__name__}")
    parameters = NOTEBOOKS[stage].from_mapping({**values, "processes": processes})
    if processes > 1 and parameters.device in ("auto", "cuda") and torch.cuda.is_available():
        parameters = replace(parameters, device=f"cuda:{local_rank}")
    return parameters


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m atoplib.stages", description="Train one stage; see docs/cluster.md.")
    parser.add_argument("stage", choices=BUILDERS, help="the notebook whose training this is")
    parser.add_argument("parameters", type=Path, help="YAML or JSON file of that notebook's parameters")
    parser.add_argument("--follow-parent", action="store_true", help="save and end when standard input ends")
    options = parser.parse_args(arguments)
    if options.follow_parent:
        threading.Thread(target=follow_parent, daemon=True).start()
    processes, local_rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    with complaints():
        p = read_parameters(options.stage, options.parameters, processes, local_rank)
        # Inside, too: the process that failed speaks before the others miss it.
        with joined(p.batch_size, device=p.torch_device) as share, complaints():
            dataset = first_then_others(p.load_data, share)  # which may download it
            stage = BUILDERS[options.stage](p, dataset)
            trained = train_here(p, stage, dataset, share=share, notify=None if share.rank else print)
        if share.rank == 0:
            print(f"test accuracy {100 * trained.test_accuracy:.1f} %, run directory: {trained.run.path}")


@contextmanager
def complaints() -> Iterator[None]:
    """End this process with a sentence and its exit code where it cannot go on."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{COMPLAINT}{error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print(f"{COMPLAINT}interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from error


if __name__ == "__main__":
    main()
