"""Kill trainings at random moments, also while they save, go on, and compare with one that nothing happened to.

    python benchmarks/kill_and_resume.py [--kills 50] [--seed 0] [--epochs 3] [--stages classifier,finetune]

Each stage is trained once in peace. Then it is trained again in a process that is killed (``kill -9``) at a random moment,
started anew, killed again, and so on; every third kill waits for a save to begin and strikes within it. In the end the
weights and the history must be the same bit by bit. The result is Markdown on the standard output; the exit code says
whether all were equal. Images are the digits that come with the kit, networks are tiny: what is tested is the saving.
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

from atoplib import data, training
from atoplib.attacks import PGDSettings
from atoplib.classifiers import build_classifier
from atoplib.losses import Objective
from atoplib.pipeline import AToPPipeline
from atoplib.purifiers import PatchDiscriminator, build_purifier
from atoplib.runs import open_run
from atoplib.training import loop
from atoplib.transforms import TransformSettings

STAGES = ("classifier", "adversarial", "pretrain", "finetune")
LONGEST = 600.0  # seconds for one attempt: a training that hangs is a failure, too


def train(stage: str, folder: Path, epochs: int, images: int) -> None:
    """Train one stage in a run directory, saving after every step; leaves ``result.pt`` when it is done."""
    loop.CHECK_EVERY, notes = 1, []
    torch.set_num_threads(1)
    torch.manual_seed(0)
    split = data.load_dataset("mnist5k", data_dir=folder / "data", max_train=images, max_test=1).train
    classifier = build_classifier("small_resnet", num_classes=10, mean=(0.1,) * 3, std=(0.3,) * 3, width=2, stem_stride=2)
    settings = training.TrainingSettings(
        epochs, batch_size=16, learning_rate=0.01, ema_decay=0.9, dtype="float32", flip=False
    )
    if stage in ("classifier", "adversarial"):
        attack = PGDSettings(0.3, steps=2) if stage == "adversarial" else None
        networks, step = {"classifier": classifier}, training.classifier_step(classifier, attack=attack)
    else:
        transform = TransformSettings("rt2", missing_rate=0.25, noise_std=0.1, grid_size=4)
        pipeline = AToPPipeline(transform, build_purifier("gated_unet", width=4, blocks=1, fold=2), classifier).train()
        tuned = stage == "finetune"
        discriminator = PatchDiscriminator(2) if tuned else None
        objective = Objective("ft_adv" if tuned else "ap", gan_weight=0.1 if tuned else 0.0)
        attack = training.FineTuningAttack(PGDSettings(0.3, steps=2), ramp_epochs=1) if tuned else None
        networks = {"purifier": pipeline.purifier} | ({"discriminator": discriminator} if tuned else {})
        step = training.purifier_step(pipeline, objective, attack=attack, discriminator=discriminator)
    with open_run(folder, stage, {"epochs": epochs}, device=torch.device("cpu")) as run:
        history = training.fit(
            step, networks, split, settings, state_path=run.state_path, save_every=0.0, notify=notes.append
        )
    weights = {name: network.state_dict() for name, network in networks.items()}
    history = [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]
    torch.save({"weights": weights, "history": history}, folder / "result.pt")


@dataclass
class Tally:
    """What happened to one stage.

    Attributes:
        kills: how often it was killed; saving: how many of them struck while a save was going on.
        equal: whether weights and history ended as those of the training that nothing happened to.
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
            train(stage, folder, options.epochs, options.images)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return process


def ended(process: int) -> bool:
    """Whether an attempt has come to its end; raises RuntimeError if that was a failure."""
    found, status = os.waitpid(process, os.WNOHANG)
    if found and status:
        raise RuntimeError(f"a training failed (status {status}), see above")
    return bool(found)


def finish(stage: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Let an attempt come to its end; returns what it trained."""
    process = start(stage, folder, options)
    while not ended(process):
        time.sleep(0.005)
    return torch.load(folder / "result.pt", weights_only=True)


def is_saving(folder: Path) -> bool:
    """Whether a half-written file lies in the run directory."""
    return any(folder.glob("*-*/.*.part"))


def steps_saved(folder: Path) -> float:
    """When the state was last saved; 0 before the first save."""
    return max((path.stat().st_mtime for path in folder.glob("*-*/state.pt")), default=0.0)


def kill_once(
    stage: str, folder: Path, options: argparse.Namespace, dice: random.Random, *, while_saving: bool
) -> bool | None:
    """Start an attempt and kill it; returns whether a save was going on, or None if it ended before."""
    before, began = steps_saved(folder), time.monotonic()
    process, over = start(stage, folder, options), False
    try:
        while not (over := ended(process)) and steps_saved(folder) == before:  # it goes forward from kill to kill
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
        return struck(process, folder)
    finally:
        if not over:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def struck(process: int, folder: Path) -> bool:
    """Kill an attempt; returns whether it was saving."""
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return is_saving(folder)


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
    """Train a stage in peace and under fire, and compare. A training that ends before its kills is begun anew."""
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
    parser = argparse.ArgumentParser(description="Kill trainings at random moments, go on, and compare.")
    parser.add_argument("--kills", type=int, default=50, help="in all, shared among the stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--spread", type=float, default=0.3, help="seconds after a save within which a kill strikes")
    parser.add_argument("--stages", default=",".join(STAGES))
    options = parser.parse_args(arguments)
    stages = options.stages.split(",")
    if unknown := sorted(set(stages) - set(STAGES)):
        parser.error(f"unknown stage {unknown[0]!r}; allowed: {', '.join(STAGES)}")
    dice, tallies = random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as folder:
        for number, stage in enumerate(stages):
            share = options.kills * (number + 1) // len(stages) - options.kills * number // len(stages)
            tallies.append(trial(stage, share, Path(folder), options, dice))
    print("| stage | kills | of them during a save | weights and history as without |")
    print("|---|---:|---:|---|")
    for tally in tallies:
        print(f"| {tally.stage} | {tally.kills} | {tally.saving} | {'equal, bit by bit' if tally.equal else 'DIFFERENT'} |")
    return 0 if all(tally.equal for tally in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
