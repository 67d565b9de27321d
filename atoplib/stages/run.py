"""A stage trained into its run's directory, measured and saved; by this process or as one of several."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from atoplib.checkpoints import holds, save_checkpoint
from atoplib.data import Dataset, fingerprint
from atoplib.fingerprints import code_hash, environment
from atoplib.parameters import Training
from atoplib.progress import ProgressLine
from atoplib.runs import PLACES, Run, open_run, run_name
from atoplib.shares import WHOLE, Share
from atoplib.stages.build import Stage
from atoplib.stages.given import remember
from atoplib.training import accuracy, fit, training_flops
from atoplib.verdicts import reseed

GUESSING = 1.2  # times the share that guessing reads: a training that ends below has collapsed


class Trained(NamedTuple):
    """A finished training: its run, one dict of means an epoch, the share of test images that are read correctly, and the
    FLOPs that it cost, attacks included.
    """

    run: Run
    history: list[dict[str, float]]
    test_accuracy: float
    train_flops: int


def train_here(
    p: Training,
    stage: Stage,
    dataset: Dataset,
    *,
    share: Share = WHOLE,
    notify: Callable[[str], None] | None = None,
) -> Trained:
    """Train a stage in this process, or this process's share of it; the first process alone writes the run's directory.

    A training from other weights than an earlier call began it from starts anew; what that call left is moved aside.
    """
    if share.rank:
        run = Run(p.experiment_dir / run_name(p.STAGE, p.as_dict()), {})
        return Trained(run, fit_stage(p, stage, dataset, run, share), 0.0, 0)
    with open_run(p.experiment_dir, p.STAGE, p.as_dict(), device=p.torch_device) as run:
        if stage.inputs:
            run.input(**stage.inputs)
        given = {f"your own {name}": digest for name, digest in stage.given.items()}
        given |= {"the code of atoplib": code_hash("atoplib.stages"), "torch or the device": environment(p.torch_device)}
        changed = run.made_from((name for name in stage.inputs if name not in stage.only_measures), given)
        if changed and notify:
            notify(
                f"What this training depends on has changed since it was begun ({', '.join(changed)}): it starts anew. "
                f"What was made before is kept in {run.path / 'other-inputs-*'}"
            )
        if notify and run.metrics.get("train_seconds") and (age := run.age()):
            notify(f"Loaded, not trained again: all that it depends on is as it was; trained {age} ago.")
        train_flops = run.metrics.get("train_flops")  # counted by the call that began this run: it costs a step or two
        if train_flops is None:
            # before fit, which has batch normalisations wait for the other processes
            train_flops = training_flops(
                stage.step, stage.networks, dataset.train, p.training, warmup_epochs=stage.warmup_epochs
            )
            run.record(train_flops=train_flops)
        line = ProgressLine(stage.title, listener=run.progress)
        try:
            history = fit_stage(p, stage, dataset, run, share, progress=lambda *report: line(*report), notify=notify)
        finally:
            if stage.kind in stage.given:
                remember(stage.result, stage.given[stage.kind])
        warning = "" if p.smoke else warning_of(history, len(dataset.classes))
        if warning and notify:
            notify(warning)
        stage.model.eval()
        reseed(stage.model, p.seed)
        test_accuracy = accuracy(stage.model, dataset.test)
        metrics = {"test_accuracy": test_accuracy, "train_flops": train_flops, **stage.before}
        said = {"warning": warning} if warning else {}
        run.record(**metrics, history=history, train_seconds=history[-1]["seconds"], **said)
        path = run.path / f"{stage.kind}.safetensors"
        if not holds(path, stage.result):  # else what was made from this file would seem to be of another
            save_stage(p, stage, path, stage.result, metrics=metrics)
    return Trained(run, history, test_accuracy, train_flops)


def warning_of(history: Sequence[Mapping[str, float]], classes: int) -> str:
    """A sentence if a training ended no better than guessing, which its loss alone does not tell; else nothing.

    Args:
        history: means by epoch; ``accuracy``, where there is one, is the share of training images that were read correctly,
            attacked ones if they were attacked.
        classes: among which guessing chooses.
    """
    reached = history[-1].get("accuracy", 1.0)
    if reached >= GUESSING / classes:
        return ""
    best = max(range(len(history)), key=lambda epoch: history[epoch].get("accuracy", 0.0))
    return (
        f"This training has collapsed: in its last epoch it read {100 * reached:.1f} % of its training images correctly, "
        f"and guessing reads {100 / classes:.1f} % ({100 * history[best]['accuracy']:.1f} % in epoch {best + 1}). "
        f"Try a smaller learning_rate, eps or classification_weight, or a longer ramp_epochs."
    )


def save_stage(p: Training, stage: Stage, path: Path, network: nn.Module, **facts: Any) -> None:
    """Save a stage's network with all that is needed to build it again."""
    save_checkpoint(
        path,
        network,
        kind=stage.kind,
        architecture=stage.architecture,
        options=stage.options,
        dataset=p.dataset,
        parameters={name: value for name, value in p.as_dict().items() if name not in PLACES},
        **stage.facts,
        **facts,
    )


def fit_stage(p: Training, stage: Stage, dataset: Dataset, run: Run, share: Share, **shown: Any) -> list[dict[str, float]]:
    """Train a stage's networks, going on from the state in the run's directory; returns the history."""

    def validate(model: nn.Module) -> dict[str, float]:
        reader = model if stage.front is None else nn.Sequential(stage.front, model)
        reseed(reader, p.seed)  # the same draws after every epoch, whatever was thrown before
        return {"test_accuracy": accuracy(reader, dataset.test)}

    def keep(model: nn.Module, epoch: int) -> None:
        if epoch % p.keep_every == 0:
            save_stage(p, stage, run.path / f"{stage.kind}-epoch{epoch:04d}.safetensors", model, epoch=epoch)

    return fit(
        stage.step,
        stage.networks,
        dataset.train,
        p.training,
        state_path=run.state_path,
        identity={"run": run.path.name, "data": fingerprint(dataset.train)},
        validate=validate if stage.validate else None,
        keep=keep if p.keep_every else None,
        share=share,
        **shown,
    )
