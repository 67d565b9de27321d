"""What notebooks 1 to 3 train: built from their parameters, trained into the run's directory, measured and saved; by this
process, or by several that torchrun starts (``python -m atoplib.training``).
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from atoplib.checkpoints import load_built, load_checkpoint, save_checkpoint, write_json
from atoplib.classifiers import build_classifier, fold_batch_norms
from atoplib.data import Dataset, channel_statistics, fingerprint
from atoplib.flops import training_total
from atoplib.front import load_front
from atoplib.parameters import LATEST, FinetuneAtop, PretrainPurifier, PurifierTraining, TrainClassifier, Training
from atoplib.pipeline import AToPPipeline
from atoplib.progress import ProgressLine
from atoplib.purifiers import PatchDiscriminator, build_purifier, load_deepfill_weights
from atoplib.runs import Run, latest_line, open_run, run_name
from atoplib.shares import WHOLE, Share
from atoplib.subprocesses import end, finished, last_lines
from atoplib.training import accuracy, classifier_step, fit, purifier_step, training_flops
from atoplib.training.loop import Step
from atoplib.verdicts import reseed

POLL_SECONDS = 0.2
STOP_SECONDS = 45  # for processes to save and end after a Ctrl-C; torchrun kills what has not ended after 30
GUESSING = 1.2  # times the share that guessing reads: a training that ends below has collapsed
COMPLAINT = "atoplib.training: "  # begins the line in which a process says why it cannot go on


class TrainingFailed(RuntimeError):
    """The processes that torchrun started did not come to a good end; the message says why, and where their log is."""


@dataclass(frozen=True)
class Stage:
    """What one of the notebooks trains, and all that belongs to its checkpoint.

    Attributes:
        title: of its progress.
        networks: by name; the first one, ``classifier`` or ``purifier``, is the result.
        step: of the training.
        model: what reads the test images: the classifier, or the pipeline.
        architecture, options: what the result's builder was called with.
        facts: that stand beside the weights.
        inputs: checkpoints that it starts from.
        before: metrics from before the training: what it begins with, and what that cost.
        warmup_epochs: until every term of the loss applies.
        validate: whether test images are read after every epoch.
        own: whether a network was given that the parameters do not describe.
        front: what the result reads images through, if it does.
    """

    title: str
    networks: dict[str, nn.Module]
    step: Step
    model: nn.Module
    architecture: str
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    inputs: Mapping[str, Path] = field(default_factory=dict)
    before: Mapping[str, float | None] = field(default_factory=dict)
    warmup_epochs: float = 0.0
    validate: bool = False
    own: bool = False
    front: nn.Module | None = None

    @property
    def result(self) -> nn.Module:
        """The network that is trained."""
        return self.networks[self.kind]

    @property
    def kind(self) -> str:
        """``classifier`` or ``purifier``, which is also the name of the checkpoint."""
        return next(iter(self.networks))


class Trained(NamedTuple):
    """A finished training: its run, one dict of means an epoch, the share of test images that are read correctly, and the
    FLOPs that it cost, attacks included.
    """

    run: Run
    history: list[dict[str, float]]
    test_accuracy: float
    train_flops: int


def classifier_stage(p: TrainClassifier, dataset: Dataset, *, classifier: nn.Module | None = None) -> Stage:
    """Notebook 1: the classifier, from the weights of ``start_run`` or fresh ones by the seed, unless one is given; it reads
    images as they are, or what the purifier of ``purifier_run`` makes of them.

    Raises:
        ValueError: if the classifier of ``start_run`` is not of the architecture and classes that are asked for.
        FileNotFoundError: if there is no such run.
    """
    mean, std = channel_statistics(dataset.train.images)
    options = {**p.classifier_options, "num_classes": len(dataset.classes), "mean": mean, "std": std}
    torch.manual_seed(p.seed)  # the initial weights
    inputs, before = {}, {}
    if classifier is not None:
        network = classifier
    elif p.start_run:
        inputs["start"] = p.checkpoint(p.start_run, "undefended")
        network, header = load_built(inputs["start"], build_classifier, kind="classifier")
        for name, wanted in {"architecture": p.classifier, **options}.items():
            found = header.get(name, header["options"].get(name))
            if name not in ("mean", "std") and found != wanted:
                raise ValueError(
                    f"start_run = {p.start_run!r} has {name} {found}, and {wanted} is asked for: let them agree"
                )
        options = header["options"]
        before["start_flops"] = training_total(header.get("metrics", {}))
    else:
        network = build_classifier(p.classifier, **options)
    network = network.to(p.torch_device, memory_format=torch.channels_last)
    front, facts = None, {"classes": dataset.classes}
    if p.purifier_run:
        inputs["purifier"] = p.checkpoint(p.purifier_run, "ap")
        front = load_front(inputs["purifier"], device=p.torch_device, seed=p.seed)
        facts["reads_through"] = inputs["purifier"].parent.name if p.purifier_run == "latest" else p.purifier_run
    return Stage(
        "training the classifier",
        {"classifier": network},
        classifier_step(network, label_smoothing=p.label_smoothing, attack=p.attack, front=front),
        network if front is None else nn.Sequential(front, network),
        p.classifier,
        options,
        facts,
        inputs,
        before,
        validate=True,
        own=classifier is not None,
        front=front,
    )


def frozen_classifier(p: PurifierTraining) -> tuple[nn.Module, Mapping[str, Any], Path]:
    """The classifier that a purifier is trained for, the header of its checkpoint, and its path; FileNotFoundError says what
    to run first.
    """
    path = p.checkpoint(p.classifier_run, "undefended", **LATEST["undefended"])
    return *load_checkpoint(path, kind="classifier", device=p.torch_device), path


def pretraining_stage(p: PretrainPurifier, dataset: Dataset, *, purifier: nn.Module | None = None) -> Stage:
    """Notebook 2: the purifier, freshly initialised from the seed or from public weights unless one is given."""
    classifier, _, classifier_path = frozen_classifier(p)
    torch.manual_seed(p.seed)  # the initial weights
    if purifier is not None:
        network = purifier
    else:
        network = load_deepfill_weights(p.weights) if p.weights else build_purifier(p.purifier, **p.purifier_options)
    network = network.to(p.torch_device, memory_format=torch.channels_last)
    pipeline, networks = pipeline_of(p, network, classifier)
    return Stage(
        "pre-training the purifier",
        networks,
        purifier_step(pipeline, p.objective, discriminator=networks.get("discriminator")),
        pipeline,
        p.purifier,
        p.purifier_options,
        {"transform": asdict(p.transform_settings)},
        {"classifier": classifier_path},
        own=purifier is not None,
    )


def finetuning_stage(p: FinetuneAtop, dataset: Dataset, *, classifier: nn.Module | None = None) -> Stage:
    """Notebook 3: the pre-trained purifier in front of the frozen classifier, that of the run unless one is given."""
    loaded, header, classifier_path = frozen_classifier(p)
    loaded = fold_batch_norms(loaded) if classifier is None else classifier  # the same function, faster
    its = classifier_path.parent.name if p.classifier_run == "latest" else p.classifier_run
    purifier_path = p.checkpoint(p.purifier_run, "ap")
    purifier, start = load_checkpoint(purifier_path, kind="purifier", device=p.torch_device)
    torch.manual_seed(p.seed)  # the discriminator's initial weights
    pipeline, networks = pipeline_of(p, purifier.to(memory_format=torch.channels_last), loaded)
    before = {
        "test_accuracy_before": accuracy(pipeline.eval(), dataset.test),
        "classifier_flops": training_total(header.get("metrics", {})),
        "pretrain_flops": training_total(start.get("metrics", {})),
    }
    discriminator = networks.get("discriminator")
    return Stage(
        "fine-tuning the purifier",
        networks,
        purifier_step(pipeline.train(), p.objective, attack=p.attack, discriminator=discriminator),
        pipeline,
        start["architecture"],
        start["options"],
        {"transform": asdict(p.transform_settings)} | ({"classifier": its} if classifier is None else {}),
        {"classifier": classifier_path, "purifier": purifier_path},
        before,
        warmup_epochs=p.objective.warmup_epochs,
        own=classifier is not None,
    )


def pipeline_of(
    p: PurifierTraining, purifier: nn.Module, classifier: nn.Module
) -> tuple[AToPPipeline, dict[str, nn.Module]]:
    """The pipeline, and the networks in it that are trained; with a GAN term also the discriminator, freshly initialised."""
    networks = {"purifier": purifier}
    if p.gan_weight:
        networks["discriminator"] = PatchDiscriminator(p.discriminator_width).to(p.torch_device)
    return AToPPipeline(p.transform_settings, purifier, classifier, seed=p.seed), networks


BUILDERS: Mapping[str, Callable[..., Stage]] = {
    TrainClassifier.STAGE: classifier_stage,
    PretrainPurifier.STAGE: pretraining_stage,
    FinetuneAtop.STAGE: finetuning_stage,
}


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
        if stage.own:
            raise ValueError(f"a network of your own cannot be built by {p.processes} processes: choose processes = 1")
        launch(p, stage.title)
    return train_here(p, stage, dataset, notify=notify)  # what other processes have trained is only loaded


def train_here(
    p: Training,
    stage: Stage,
    dataset: Dataset,
    *,
    share: Share = WHOLE,
    notify: Callable[[str], None] | None = None,
) -> Trained:
    """Train a stage in this process, or this process's share of it; the first process alone writes the run's directory."""
    if share.rank:
        run = Run(p.experiment_dir / run_name(p.STAGE, p.as_dict()), {})
        return Trained(run, fit_stage(p, stage, dataset, run, share), 0.0, 0)
    with open_run(p.experiment_dir, p.STAGE, p.as_dict(), device=p.torch_device) as run:
        if stage.inputs:
            run.input(**stage.inputs)
        train_flops = run.metrics.get("train_flops")  # counted by the call that began this run: it costs a step or two
        if train_flops is None:
            # before fit, which has batch normalisations wait for the other processes
            train_flops = training_flops(
                stage.step, stage.networks, dataset.train, p.training, warmup_epochs=stage.warmup_epochs
            )
            run.record(train_flops=train_flops)
        line = ProgressLine(stage.title, listener=run.progress)
        history = fit_stage(p, stage, dataset, run, share, progress=lambda *report: line(*report), notify=notify)
        warning = "" if p.smoke else warning_of(history, len(dataset.classes))
        if warning and notify:
            notify(warning)
        stage.model.eval()
        reseed(stage.model, p.seed)
        test_accuracy = accuracy(stage.model, dataset.test)
        metrics = {"test_accuracy": test_accuracy, "train_flops": train_flops, **stage.before}
        said = {"warning": warning} if warning else {}
        run.record(**metrics, history=history, train_seconds=history[-1]["seconds"], **said)
        save_stage(p, stage, run.path / f"{stage.kind}.safetensors", stage.result, metrics=metrics)
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
        parameters=p.as_dict(),
        **stage.facts,
        **facts,
    )


def fit_stage(p: Training, stage: Stage, dataset: Dataset, run: Run, share: Share, **shown: Any) -> list[dict[str, float]]:
    """Train a stage's networks, going on from the state in the run's directory; returns the history."""

    def validate(model: nn.Module) -> dict[str, float]:
        reader = model if stage.front is None else nn.Sequential(stage.front, model)
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
    command = [*torchrun, "-m", "atoplib.training", p.STAGE, str(parameters_file), "--follow-parent"]
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
