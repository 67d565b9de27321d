"""Kill trainings and evaluations at random moments, also while they save, go on, and compare with what nothing happened to.

    python benchmarks/kill_and_resume.py [--kills 50] [--seed 0] [--epochs 3] [--stages classifier,finetune]
                                         [--signals KILL,TERM,INT]

Each stage is done once in peace. Then it is done again in a process that is killed (``kill -9``, unless other signals are
asked for) at a random moment, started anew, killed again, and so on; every third kill waits for a save to begin and strikes
within it. In the end the weights and the history, or every verdict on every image, must be the same bit by bit. The result
is Markdown on the standard output; the exit code says whether all were equal. Images are the digits that come with the kit,
networks are tiny: what is tested is the saving.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atoplib import data, training
from atoplib.attacks import PGDSettings
from atoplib.classifiers import build_classifier
from atoplib.evaluation import Budget, PlannedAttack, Protocol, evaluate
from atoplib.losses import Objective
from atoplib.pipeline import AToPPipeline
from atoplib.purifiers import PatchDiscriminator, build_purifier
from atoplib.runs import Run, open_run
from atoplib.training import loop
from atoplib.transforms import TransformSettings

STAGES = ("classifier", "adversarial", "pretrain", "finetune", "evaluation")
SIGNALS = ("KILL", "TERM", "INT")
LONGEST = 600.0  # seconds for one attempt: one that hangs is a failure, too
MOST_SECONDS_TO_END = 10.0  # what schedulers may leave between SIGTERM and SIGKILL
PROTOCOL = Protocol(
    "short",
    "blind and white-box, a few steps each",
    (
        PlannedAttack("transfer", "pgd", sees="classifier", settings={"steps": 3}),
        PlannedAttack("white-box", "pgd", settings={"steps": 3, "eot_samples": 2}),
        PlannedAttack("Square", "square", settings={"queries": 5, "eot_samples": 1}),
    ),
    num_draws=3,
)


def work(stage: str, folder: Path, epochs: int, images: int) -> None:
    """Do one stage in a run directory, saving as often as it can; leaves ``result.pt`` when it is done."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    split = data.load_dataset("mnist5k", data_dir=folder / "data", max_train=images, max_test=1).train
    classifier = build_classifier("small_resnet", num_classes=10, mean=(0.1,) * 3, std=(0.3,) * 3, width=2, stem_stride=2)
    with open_run(folder, stage, {"epochs": epochs}, device=torch.device("cpu")) as run:
        if stage == "evaluation":
            result = measure(classifier, split, run)
        else:
            result = train(stage, classifier, split, epochs, run)
    torch.save(result, folder / "result.pt")


def pipeline_of(classifier: nn.Module) -> AToPPipeline:
    """A tiny one; it freezes the classifier."""
    transform = TransformSettings("rt2", missing_rate=0.25, noise_std=0.1, grid_size=4)
    return AToPPipeline(transform, build_purifier("gated_unet", width=4, blocks=1, fold=2), classifier)


def train(stage: str, classifier: nn.Module, split: data.Split, epochs: int, run: Run) -> dict[str, Any]:
    """A training that saves after every step: weights and history."""
    loop.CHECK_EVERY, notes = 1, []
    settings = training.TrainingSettings(
        epochs, batch_size=16, learning_rate=0.01, ema_decay=0.9, dtype="float32", flip=False
    )
    if stage in ("classifier", "adversarial"):
        attack = PGDSettings(0.3, steps=2) if stage == "adversarial" else None
        networks, step = {"classifier": classifier}, training.classifier_step(classifier, attack=attack)
    else:
        tuned, pipeline = stage == "finetune", pipeline_of(classifier).train()
        discriminator = PatchDiscriminator(2) if tuned else None
        objective = Objective("ft_adv" if tuned else "ap", gan_weight=0.1 if tuned else 0.0)
        attack = training.FineTuningAttack(PGDSettings(0.3, steps=2), ramp_epochs=1) if tuned else None
        networks = {"purifier": pipeline.purifier} | ({"discriminator": discriminator} if tuned else {})
        step = training.purifier_step(pipeline, objective, attack=attack, discriminator=discriminator)
    history = training.fit(step, networks, split, settings, state_path=run.state_path, save_every=0.0, notify=notes.append)
    weights = {name: network.state_dict() for name, network in networks.items()}
    history = [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]
    return {"weights": weights, "history": history}


def measure(classifier: nn.Module, split: data.Split, run: Run) -> dict[str, Any]:
    """An evaluation in small pieces: every verdict on every image, and every score."""
    evaluation = evaluate(
        {"undefended": classifier.eval(), "defended": pipeline_of(classifier).eval()},
        data.to_float(split.images),
        split.labels,
        PROTOCOL,
        Budget(0.3, 2.0),
        classifier=classifier,
        batch_size=16,
        directory=run.path / "pieces",
    )
    verdicts = {f"{item.defence} {item.attack}": {**item.right, "average": item.average} for item in evaluation.outcomes}
    scores = [{name: value for name, value in vars(item).items() if name != "seconds"} for item in evaluation.scores]
    return {"verdicts": verdicts, "scores": scores}


@dataclass
class Tally:
    """What happened to one stage.

    Attributes:
        kills: how often it was killed; saving: how many of them struck while a save was going on.
        equal: whether it ended as the one that nothing happened to.
    """

    stage: str
    kills: int = 0
    saving: int = 0
    equal: bool = False


def start(stage: str, folder: Path, options: argparse.Namespace) -> int:
    """Begin an attempt in a process of its own, forked so that torch is imported once; returns its number."""
    folder.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work(stage, folder, options.epochs, options.images)
            status = 0
        except KeyboardInterrupt:
            pass  # asked for
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return process


def ended(process: int) -> bool:
    """Whether an attempt has come to its end; raises RuntimeError if that was a failure."""
    found, status = os.waitpid(process, os.WNOHANG)
    if found and status:
        raise RuntimeError(f"an attempt failed (status {status}), see above")
    return bool(found)


def finish(stage: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Let an attempt come to its end; returns what came out."""
    process = start(stage, folder, options)
    while not ended(process):
        time.sleep(0.005)
    return torch.load(folder / "result.pt", weights_only=True)


def is_saving(folder: Path) -> bool:
    """Whether a half-written file lies in the run directory."""
    return any(folder.glob("*-*/**/.*.part"))


def steps_saved(folder: Path) -> float:
    """When something was last saved from which an attempt goes on; 0 before the first save."""
    latest = 0.0
    for path in (*folder.glob("*-*/state.pt"), *folder.glob("*-*/pieces/*.safetensors")):
        with suppress(FileNotFoundError):  # renamed, or removed at the end of the run, between the two calls
            latest = max(latest, path.stat().st_mtime)
    return latest


def kill_once(
    stage: str, folder: Path, options: argparse.Namespace, dice: random.Random, *, while_saving: bool
) -> bool | None:
    """Start an attempt and kill it; returns whether a save was going on, or None if it ended before."""
    before, began = steps_saved(folder), time.monotonic()
    process, over = start(stage, folder, options), False
    try:
        while not (over := ended(process)) and steps_saved(folder) <= before:  # it goes forward from kill to kill
            if time.monotonic() - began > LONGEST:
                raise TimeoutError(f"{stage} saved nothing in {LONGEST:.0f} s")
            time.sleep(0.001)
        strike = time.monotonic() + dice.random() * options.spread
        while not (over := over or ended(process)):
            if time.monotonic() >= strike and (is_saving(folder) or not while_saving):
                break
        if over:
            return None
        over = True  # the number may soon be another process's
        return struck(process, folder, dice.choice(options.signals))
    finally:
        if not over:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def struck(process: int, folder: Path, name: str) -> bool:
    """Kill an attempt by a signal; returns whether it was saving. Raises TimeoutError unless it ends within 10 s."""
    saving = is_saving(folder)
    os.kill(process, getattr(signal, f"SIG{name}"))
    until = time.monotonic() + MOST_SECONDS_TO_END
    while not os.waitpid(process, os.WNOHANG)[0]:
        if time.monotonic() > until:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise TimeoutError(f"it went on for {MOST_SECONDS_TO_END:.0f} s after SIG{name}")
        time.sleep(0.001)
    return is_saving(folder) if name == "KILL" else saving


def same(first: object, second: object) -> bool:
    """Bit equality of nested results."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def trial(stage: str, kills: int, folder: Path, options: argparse.Namespace, dice: random.Random) -> Tally:
    """Do a stage in peace and under fire, and compare. One that ends before its kills is begun anew."""
    peace, number, tally = folder / f"{stage}-in-peace", 0, Tally(stage, equal=True)
    wanted = finish(stage, peace, options)
    while tally.kills < kills:
        under_fire = folder / f"{stage}-{number}"
        number += 1
        while tally.kills < kills:
            struck = kill_once(stage, under_fire, options, dice, while_saving=tally.kills % 3 == 2)
            if struck is None:
                break
            tally.kills += 1
            tally.saving += struck
        tally.equal &= same(finish(stage, under_fire, options), wanted)
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Kill trainings and evaluations at random moments, go on, and compare.")
    parser.add_argument("--kills", type=int, default=50, help="in all, shared among the stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--spread", type=float, default=0.3, help="seconds after a save within which a kill strikes")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--signals", default="KILL", help="one of them a kill, by chance: KILL,TERM,INT")
    options = parser.parse_args(arguments)
    stages, options.signals = options.stages.split(","), options.signals.split(",")
    for what, given, allowed in (("stage", stages, STAGES), ("signal", options.signals, SIGNALS)):
        if unknown := sorted(set(given) - set(allowed)):
            parser.error(f"unknown {what} {unknown[0]!r}; allowed: {', '.join(allowed)}")
    dice, tallies = random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as folder:
        for number, stage in enumerate(stages):
            share = options.kills * (number + 1) // len(stages) - options.kills * number // len(stages)
            tallies.append(trial(stage, share, Path(folder), options, dice))
    print("| stage | kills | of them during a save | result as without |")
    print("|---|---:|---:|---|")
    for tally in tallies:
        print(f"| {tally.stage} | {tally.kills} | {tally.saving} | {'equal, bit by bit' if tally.equal else 'DIFFERENT'} |")
    return 0 if all(tally.equal for tally in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
