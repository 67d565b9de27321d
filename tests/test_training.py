"""A training that was cut off goes on exactly as if it had not been, loses nothing, and trains what it should."""

import copy
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from atoplib.attacks import PGDSettings
from atoplib.checkpoints import CheckpointError, load_state
from atoplib.classifiers import build_classifier
from atoplib.data import Split, fingerprint, to_float
from atoplib.flops import count_flops
from atoplib.front import Front
from atoplib.losses import Objective
from atoplib.pipeline import AToPPipeline
from atoplib.purifiers import PatchDiscriminator, build_purifier
from atoplib.training import (
    Batch,
    FineTuningAttack,
    TrainingDiverged,
    TrainingSettings,
    Updater,
    accuracy,
    classifier_step,
    compute_dtype,
    fit,
    learning_rate_at,
    loop,
    purifier_step,
    training_flops,
)
from atoplib.transforms import TransformSettings

CPU = torch.device("cpu")
SETTINGS = TrainingSettings(epochs=2, batch_size=8, learning_rate=0.01, dtype="float32", padding=2, flip=True, seed=3)
STEPS, STEPS_PER_EPOCH = 10, 5
RT2 = TransformSettings("rt2", missing_rate=0.25, noise_std=0.1, grid_size=4)


@pytest.fixture(autouse=True)
def one_thread_and_a_look_at_every_step(monkeypatch):
    """The tiny networks here are slower on more threads; and what happens every 10 steps should happen soon."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "CHECK_EVERY", 1)
    yield
    torch.set_num_threads(before)


def colourful() -> Split:
    """44 images, so that four are left out of each epoch, whose class can be seen in their colour."""
    dice = torch.Generator().manual_seed(0)
    labels = torch.arange(44) % 3
    images = torch.randint(0, 120, (44, 3, 16, 16), generator=dice, dtype=torch.uint8)
    images[torch.arange(44), labels] += 120
    return Split(images, labels)


@pytest.fixture(scope="module")
def split() -> Split:
    return colourful()


def tiny_classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_classifier("small_resnet", num_classes=3, mean=(0.4,) * 3, std=(0.3,) * 3, width=2)


def tiny_pipeline(seed: int = 0, transform: TransformSettings = RT2) -> AToPPipeline:
    classifier = tiny_classifier(100)  # the frozen one is the same whichever seed the purifier has
    torch.manual_seed(seed)
    return AToPPipeline(transform, build_purifier("gated_unet", width=4, fold=1), classifier).train()


class Training:
    """One of the trainings under test, with fresh weights from ``seed``; ``run`` trains it."""

    def __init__(self, kind: str, split: Split, seed: int) -> None:
        self.split, self.settings = split, SETTINGS
        if kind == "classifier":
            classifier = tiny_classifier(seed)
            self.networks = {"classifier": classifier}
            self.step = classifier_step(classifier, label_smoothing=0.1)
            self.settings = replace(SETTINGS, optimizer="sgd", weight_decay=0.01, schedule="cosine")
        elif kind == "adversarial classifier with EMA":
            classifier = tiny_classifier(seed)
            self.networks = {"classifier": classifier}
            self.step = classifier_step(classifier, attack=PGDSettings(0.1, steps=2))
            self.settings = replace(SETTINGS, ema_decay=0.9)
        else:
            pipeline = tiny_pipeline(seed)
            discriminator = PatchDiscriminator(2)
            self.networks = {"purifier": pipeline.purifier, "discriminator": discriminator}
            objective = Objective("ft_adv", gan_weight=0.1, warmup_epochs=0.5)
            attack = FineTuningAttack(PGDSettings(0.1, steps=2), ramp_epochs=1)
            self.step = purifier_step(pipeline, objective, attack=attack, discriminator=discriminator)
            self.settings = replace(SETTINGS, ema_decay=0.9)

    def run(self, state_path: Path | None = None, **more: object) -> list[dict[str, float]]:
        return fit(self.step, self.networks, self.split, self.settings, state_path=state_path, **more)

    @property
    def weights(self) -> dict[str, Tensor]:
        return {f"{n}.{k}": t.clone() for n, net in self.networks.items() for k, t in net.state_dict().items()}


KINDS = ("classifier", "adversarial classifier with EMA", "fine-tuning with EMA and a discriminator")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]


def interrupt_at(*steps: int, error: type[BaseException] = KeyboardInterrupt) -> Callable:
    """A progress callback during which Ctrl-C is pressed once so many steps of this call are done."""

    def progress(done: int, total: int, unit: str, numbers: dict[str, float]) -> None:
        if done in [step * SETTINGS.batch_size for step in steps]:
            raise error

    return progress


@pytest.fixture(scope="module")
def uninterrupted(split) -> Callable[[str], tuple[dict[str, Tensor], list[dict[str, float]]]]:
    """Weights and history of each training when nothing happens."""
    known = {}

    def result(kind: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        if kind not in known:
            training = Training(kind, split, seed=1)
            history = training.run()
            known[kind] = training.weights, without_times(history)
        return known[kind]

    return result


@pytest.mark.parametrize("steps", [[0], [1], [5], [7], [10], [3, 4]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_ends_bit_by_bit_like_one_that_was_not(kind, steps, split, uninterrupted, tmp_path):
    weights, history = uninterrupted(kind)
    training, done = Training(kind, split, seed=1), 0
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            training.run(tmp_path / "state.pt", progress=interrupt_at(step))
        done += step
        assert load_state(tmp_path / "state.pt")[0]["step"] == done
        training = Training(kind, split, seed=2)  # a new process: other weights until the state is loaded
        if done == 0:
            training = Training(kind, split, seed=1)
    assert not same(training.weights, weights)
    assert without_times(training.run(tmp_path / "state.pt")) == history
    assert same(training.weights, weights)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_killed_training_goes_on_from_its_last_regular_save(kind, split, uninterrupted, tmp_path):
    with pytest.raises(MemoryError):
        Training(kind, split, seed=1).run(tmp_path / "state.pt", save_every=-1, progress=interrupt_at(7, error=MemoryError))
    assert load_state(tmp_path / "state.pt")[0]["step"] == 6
    again = Training(kind, split, seed=2)
    assert without_times(again.run(tmp_path / "state.pt")) == uninterrupted(kind)[1]
    assert same(again.weights, uninterrupted(kind)[0])


def test_an_interruption_in_the_middle_of_a_step_leaves_the_last_regular_save(split, uninterrupted, tmp_path):
    training = Training(KINDS[2], split, seed=1)
    whole, count = training.step, 0

    def step(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        losses = whole(batch, updater)  # the weights have moved, the average has not
        if count == 8:
            raise KeyboardInterrupt
        return losses

    training.step = step
    with pytest.raises(KeyboardInterrupt):
        training.run(tmp_path / "state.pt", save_every=-1)
    assert load_state(tmp_path / "state.pt")[0]["step"] == 7
    again = Training(KINDS[2], split, seed=2)
    again.run(tmp_path / "state.pt")
    assert same(again.weights, uninterrupted(KINDS[2])[0])


def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end_and_nothing_is_lost(split, uninterrupted, tmp_path):
    training = Training(KINDS[2], split, seed=1)
    whole, batches = training.step, []

    def step(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        batches.append(batch)
        if len(batches) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(batch, updater)

    training.step = step
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.run(tmp_path / "state.pt")
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(batches) == load_state(tmp_path / "state.pt")[0]["step"] == 4
    again = Training(KINDS[2], split, seed=2)
    again.run(tmp_path / "state.pt")
    assert same(again.weights, uninterrupted(KINDS[2])[0])


def test_a_schedulers_sigterm_saves_and_ends_as_ctrl_c_does_and_never_in_the_middle_of_a_step(
    split, uninterrupted, tmp_path
):
    training = Training(KINDS[2], split, seed=1)
    step, state = training.step, tmp_path / "state.pt"

    def terminated(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        losses = step(batch, updater)
        if batch.epoch == 0.4:  # a scheduler signals a group of processes, which pass it on to each other
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
        return losses

    training.step = terminated
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        training.run(state)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert load_state(state)[0]["step"] == 3
    again = Training(KINDS[2], split, seed=2)
    assert without_times(again.run(state)) == uninterrupted(KINDS[2])[1]
    assert same(again.weights, uninterrupted(KINDS[2])[0])


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_clock_that_jumps_changes_no_number_and_no_time(split, uninterrupted, monkeypatch, jump):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    training = Training("classifier", split, seed=1)
    history = training.run(progress=lambda *_: monkeypatch.setattr(time, "time", real))
    assert same(training.weights, uninterrupted("classifier")[0])
    assert all(0 < entry["seconds"] < 1e4 for entry in history)


def test_a_second_ctrl_c_does_not_wait(split):
    training, reached = Training("classifier", split, seed=1), []

    def step(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("second")
        return {}

    training.step = step
    with pytest.raises(KeyboardInterrupt):
        training.run()
    assert reached == ["first"]


@pytest.mark.parametrize("press", ["twice while it validates", "once while it validates", "once in the last validation"])
def test_an_interruption_during_validation_loses_no_entry_of_the_history(split, tmp_path, press):
    def validate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(model, split)}

    expected = Training("classifier", split, seed=1)
    history = expected.run(validate=validate)
    assert len(history) == 2 and all("accuracy" in entry for entry in history)
    calls = []

    def interrupted(model: nn.Module) -> dict[str, float]:
        calls.append(model)
        if len(calls) == 1 + (press == "once in the last validation"):
            for _ in range(1 + ("twice" in press)):
                os.kill(os.getpid(), signal.SIGINT)
        return validate(model)

    with pytest.raises(KeyboardInterrupt):
        Training("classifier", split, seed=1).run(tmp_path / "state.pt", validate=interrupted)
    again = Training("classifier", split, seed=2)
    assert without_times(again.run(tmp_path / "state.pt", validate=validate)) == without_times(history)
    assert same(again.weights, expected.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_training_is_only_loaded(kind, split, uninterrupted, tmp_path):
    first = Training(kind, split, seed=1)
    history = first.run(tmp_path / "state.pt")
    written = (tmp_path / "state.pt").stat().st_mtime_ns
    again = Training(kind, split, seed=2)
    again.step = lambda batch, updater: pytest.fail("it trained")
    assert again.run(tmp_path / "state.pt", progress=lambda *_: pytest.fail("it reported")) == history
    assert same(again.weights, first.weights) and same(again.weights, uninterrupted(kind)[0])
    assert (tmp_path / "state.pt").stat().st_mtime_ns == written


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(split, uninterrupted):
    weights, _ = uninterrupted("classifier")
    again, other = Training("classifier", split, seed=1), Training("classifier", split, seed=1)
    other.settings = replace(other.settings, seed=4)
    torch.manual_seed(99)  # of no importance: every die of a step is thrown by a generator of its own
    again.run()
    other.run()
    assert same(again.weights, weights) and not same(other.weights, weights)


@pytest.mark.parametrize("change", [{"seed": 4}, {"learning_rate": 0.02}, {"epochs": 3}])
def test_the_state_of_other_settings_is_refused_by_name(split, tmp_path, change):
    training = Training("classifier", split, seed=1)
    training.run(tmp_path / "state.pt")
    training.settings = replace(training.settings, **change)
    with pytest.raises(ValueError, match=r"state\.pt was saved by another training .*choose another run directory"):
        training.run(tmp_path / "state.pt")


def test_the_state_of_other_data_is_refused_by_name(split, tmp_path):
    Training("classifier", split, seed=1).run(tmp_path / "state.pt", identity={"data": fingerprint(split)})
    other = Split(255 - split.images, split.labels)
    with pytest.raises(ValueError, match=r"state\.pt was saved by another training"):
        Training("classifier", other, seed=1).run(tmp_path / "state.pt", identity={"data": fingerprint(other)})


def test_a_state_that_is_none_is_refused_by_name(split, tmp_path):
    torch.save({"some": "thing"}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt was saved by another training"):
        Training("classifier", split, seed=1).run(tmp_path / "state.pt")
    (tmp_path / "state.pt").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        Training("classifier", split, seed=1).run(tmp_path / "state.pt")


def test_a_damaged_state_gives_way_to_the_one_before_and_a_person_is_told(split, uninterrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Training("classifier", split, seed=1).run(tmp_path / "state.pt", save_every=-1, progress=interrupt_at(4))
    (tmp_path / "state.pt").write_bytes(b"")
    again, told = Training("classifier", split, seed=2), []
    again.run(tmp_path / "state.pt", notify=told.append)
    assert len(told) == 1 and "went on from the state before it" in told[0]
    assert same(again.weights, uninterrupted("classifier")[0])


@pytest.mark.parametrize("how", ["loss", "weight", "statistics"])
def test_a_training_that_diverges_stops_keeps_the_last_good_state_and_says_where(split, tmp_path, how):
    training = Training("classifier", split, seed=1)
    whole, steps = training.step, []

    def step(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        losses = whole(batch, updater)
        steps.append(batch)
        if len(steps) == 7:
            if how == "loss":
                updater.update("classifier", losses["loss"].detach() * nn.Parameter(torch.tensor(math.nan)))
                return {"loss": losses["loss"] * math.nan}
            network = training.networks["classifier"]
            kind = network.parameters() if how == "weight" else (b for b in network.buffers() if b.is_floating_point())
            with torch.no_grad():
                list(kind)[-1].fill_(math.inf)
        return losses

    training.step = (
        step
        if how != "loss"
        else lambda batch, updater: (
            whole(batch, updater) if steps.append(batch) or len(steps) < 7 else {"loss": torch.tensor(math.nan)}
        )
    )
    message = r"diverged near step 7 of 10.*last good state is kept in .*state\.pt.*lower learning_rate \(now 0\.01\)"
    with pytest.raises(TrainingDiverged, match=message):
        training.run(tmp_path / "state.pt", save_every=-1)
    state, note = load_state(tmp_path / "state.pt")
    assert state["step"] == 6 and note is None
    assert all(torch.isfinite(tensor).all() for tensor in state["networks"]["classifier"].values())


def test_a_training_that_diverges_at_once_says_that_nothing_was_saved(split, tmp_path):
    training = Training("classifier", split, seed=1)
    training.settings = replace(training.settings, learning_rate=1e30, grad_clip=0.0)
    with pytest.raises(TrainingDiverged, match="nothing was saved yet"):
        training.run(tmp_path / "state.pt")
    assert load_state(tmp_path / "state.pt") == (None, None)


def test_weights_that_are_not_finite_are_never_a_result_even_where_no_state_is_kept(split):
    training = Training("classifier", split, seed=1)
    whole = training.step

    def step(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        losses = whole(batch, updater)
        with torch.no_grad():
            training.networks["classifier"][1].head.bias.fill_(math.nan)
        return losses

    training.step, training.settings = step, replace(training.settings, max_steps=1)
    with pytest.raises(TrainingDiverged):
        training.run()


def test_a_full_disk_ends_the_training_with_the_earlier_state_kept(split, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        Training("classifier", split, seed=1).run(tmp_path / "state.pt", progress=interrupt_at(3))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"could not write .*state\.pt.*free some disk space"):
            Training("classifier", split, seed=1).run(tmp_path / "state.pt", save_every=-1)
    assert load_state(tmp_path / "state.pt")[0]["step"] == 3


def test_a_batch_larger_than_the_set_is_refused(split):
    training = Training("classifier", split, seed=1)
    training.settings = replace(training.settings, batch_size=45)
    with pytest.raises(ValueError, match="batch_size 45 is larger than the training set of 44 images"):
        training.run()


def test_the_history_has_an_entry_an_epoch_and_progress_tells_images(split):
    training, calls = Training("classifier", split, seed=1), []
    history = training.run(progress=lambda *call: calls.append(call))
    assert [entry["epoch"] for entry in history] == [1, 2]
    assert {"epoch", "loss", "accuracy", "seconds"} == set(history[0]) and history[1]["seconds"] >= history[0]["seconds"]
    assert [call[:3] for call in calls] == [(8 * step, 80, "images") for step in range(STEPS + 1)]
    assert all(math.isfinite(call[3]["loss"]) for call in calls[1:])


def test_an_entry_of_the_history_is_the_mean_over_its_epoch(split):
    training, losses = Training("classifier", split, seed=1), []
    training.settings = replace(training.settings, max_steps=8)
    history = training.run(progress=lambda done, total, unit, numbers: losses.extend(numbers.values()))
    assert history[0]["loss"] == pytest.approx(sum(losses[:5]) / 5)
    assert history[1]["loss"] == pytest.approx(sum(losses[5:]) / 3) and history[1]["epoch"] == 1.6


def test_fewer_steps_shorten_the_schedule_too(split):
    rates = []
    training = Training("classifier", split, seed=1)
    whole = training.step

    def step(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        rates.append(updater.optimizers["classifier"].param_groups[0]["lr"])
        return whole(batch, updater)

    training.step, training.settings = step, replace(training.settings, max_steps=3)
    training.run()
    assert rates == [learning_rate_at(step, 3, training.settings) for step in range(3)]


def test_networks_are_trained_in_train_mode_and_validated_in_eval_mode(split):
    training, modes = Training("classifier", split, seed=1), []
    network = training.networks["classifier"].eval()
    whole = training.step

    def step(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        modes.append(all(part.training for part in network.modules()))
        return whole(batch, updater)

    training.step = step
    training.run(validate=lambda model: {"training": float(model.training)})
    assert modes == [True] * STEPS
    assert all(entry["training"] == 0 for entry in training.run(validate=lambda model: {"training": float(model.training)}))


# --- settings, schedule, optimizer, average, dtype


@pytest.mark.parametrize(
    "schedule, values",
    [
        ("constant", {0: 1, 50: 1, 99: 1}),
        ("cosine", {0: 0.99994, 49: 0.50785, 99: 0.00006}),
        ("one_cycle", {0: 0.025, 9: 0.475, 19: 0.975, 20: 0.99375, 59: 0.50625, 99: 0.00625}),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, values):
    settings = replace(SETTINGS, schedule=schedule, learning_rate=2.0)
    for step, share in values.items():
        assert learning_rate_at(step, 100, settings) == pytest.approx(2 * share, abs=2e-5)


@pytest.mark.parametrize("total", [1, 2, 7])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_the_learning_rate_is_never_0_nor_above_its_peak(schedule, total):
    rates = [learning_rate_at(step, total, replace(SETTINGS, schedule=schedule)) for step in range(total)]
    assert all(0 < rate <= SETTINGS.learning_rate for rate in rates)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weight_decay_shrinks_kernels_and_matrices_but_no_bias_and_no_norm(optimizer):
    module = tiny_classifier()
    updater = Updater({"classifier": module}, replace(SETTINGS, optimizer=optimizer, weight_decay=0.1, grad_clip=0.0))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    updater.update("classifier", sum((parameter * 0).sum() for parameter in module.parameters()))
    for name, parameter in module.named_parameters():
        decays = parameter.ndim > 1
        assert bool((parameter < 1).all()) == decays, name
        assert decays or bool((parameter == 1).all()), name
    assert any(parameter.ndim == 1 for parameter in module.parameters())


def test_an_update_touches_its_own_network_only_and_clips_the_gradient():
    first, second = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
    settings = replace(SETTINGS, optimizer="sgd", learning_rate=1.0, grad_clip=0.5)
    updater = Updater({"first": first, "second": second}, settings)
    before = first.weight.clone(), second.weight.clone()
    updater.update("first", 100 * (second(torch.ones(1, 3)) + first(torch.ones(1, 3))).sum())
    assert torch.equal(second.weight, before[1]) and second.weight.grad is None
    moved = first.weight - before[0]
    # Nesterov's first step: (1 + momentum) * gradient
    assert float(moved.detach().norm()) == pytest.approx(0.5 * 1.9, rel=1e-4)
    assert moved.max() < 0


def test_the_average_is_the_one_computed_by_hand(split):
    training = Training("classifier", split, seed=1)
    network, seen = training.networks["classifier"], []
    training.settings = replace(training.settings, ema_decay=0.4)

    def progress(done: int, total: int, unit: str, numbers: dict[str, float]) -> None:
        if done:
            seen.append(copy.deepcopy(network.state_dict()))

    training.run(progress=progress)
    expected = seen[0]
    for count, current in enumerate(seen[1:], start=1):
        rate = min(0.4, (1 + count) / (10 + count))  # 2/11, 3/12, 4/13, ... until it reaches the decay
        for name, value in current.items():
            expected[name] = rate * expected[name] + (1 - rate) * value if value.is_floating_point() else value
    result = network.state_dict()
    assert all(torch.allclose(result[name], expected[name], atol=1e-6) for name in expected)
    assert not torch.allclose(result["1.head.weight"], seen[-1]["1.head.weight"], atol=1e-4)


@pytest.mark.parametrize(
    "abilities, dtype",
    [
        ({}, torch.float32),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_has_it(monkeypatch, abilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert compute_dtype("auto", CPU) == dtype
    assert compute_dtype("float32", CPU) == torch.float32 and compute_dtype("bfloat16", CPU) == torch.bfloat16


def test_the_choice_on_this_machine_is_what_its_processor_says():
    abilities = torch.cpu.get_capabilities()
    native = bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
    assert compute_dtype("auto", CPU) == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_keeps_float32_weights_and_computes_in_bfloat16(kind, split):
    training, seen = Training(kind, split, seed=1), []
    network = next(iter(training.networks.values()))
    conv = next(part for part in network.modules() if isinstance(part, nn.Conv2d))
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    training.settings = replace(training.settings, dtype="bfloat16", max_steps=3)
    history = training.run()
    assert set(seen) == {torch.bfloat16} and math.isfinite(history[-1]["loss"])
    assert all(tensor.dtype != torch.bfloat16 and torch.isfinite(tensor).all() for tensor in training.weights.values())


# --- the classifier's step


def batch_of(split: Split, count: int = 8, epoch: float = 0.0) -> Batch:
    images = to_float(split.images[:count]).contiguous(memory_format=torch.channels_last)
    return Batch(images, split.labels[:count], torch.Generator().manual_seed(5), epoch)


class Recorder(nn.Module):
    """A classifier that notes in which mode and on which images it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = tiny_classifier(), []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((self.training, images.detach().clone()))
        return self.inner(images)


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0)])
def test_adversarial_training_attacks_in_eval_mode_and_learns_in_train_mode_within_eps(split, norm, eps):
    classifier, batch = Recorder().train(), batch_of(split)
    statistics = classifier.inner[1].stem[1].running_mean.clone()
    step = classifier_step(classifier, attack=PGDSettings(eps, norm, steps=3))
    losses = step(batch, Updater({"classifier": classifier}, SETTINGS))
    assert [training for training, _ in classifier.calls] == [False, False, False, True]
    assert all(part.training for part in classifier.modules())
    norm_layer = classifier.inner[1].stem[1]
    assert norm_layer.num_batches_tracked == 1 and not torch.equal(norm_layer.running_mean, statistics)
    learned = classifier.calls[-1][1]
    distance = (learned - batch.images).flatten(1)
    size = distance.abs().amax(dim=1) if norm == "linf" else distance.norm(dim=1)
    assert size.max() <= eps + 1e-6 and size.min() > eps / 10 and learned.min() >= 0 and learned.max() <= 1
    assert set(losses) == {"loss", "accuracy"}


def test_normal_training_sees_the_images_as_they_are(split):
    classifier, batch = Recorder().train(), batch_of(split)
    classifier_step(classifier)(batch, Updater({"classifier": classifier}, SETTINGS))
    ((training, images),) = classifier.calls
    assert training and torch.equal(images, batch.images)


def test_label_smoothing_is_the_one_asked_for(split):
    losses = {}
    for smoothing in (0.0, 0.2):
        classifier, batch = tiny_classifier(), batch_of(split)
        updater = Updater({"classifier": classifier}, SETTINGS)
        logits = classifier.train()(batch.images)
        losses[smoothing] = classifier_step(classifier, label_smoothing=smoothing)(batch, updater)["loss"].item()
        logs = logits.log_softmax(dim=1)
        right = logs[torch.arange(8), batch.labels].mean()
        by_hand = -((1 - smoothing) * right + smoothing * logs.mean())
        assert losses[smoothing] == pytest.approx(by_hand.item(), rel=1e-4)
    assert losses[0.0] != losses[0.2]


@pytest.mark.parametrize("attack", [None, PGDSettings(0.1, steps=2)], ids=["clean", "attacked"])
def test_a_classifier_behind_a_front_is_attacked_and_trained_on_one_draw_of_it(split, attack):
    front, classifier, seen = Front(tiny_pipeline()), Recorder().train(), []
    purify = front.pipeline.purify
    front.pipeline.purify = lambda images, draw: seen.append((images.detach().clone(), draw)) or purify(images, draw)
    before = [weight.clone() for weight in front.parameters()]
    step = classifier_step(classifier, attack=attack, front=front)
    for batch in (batch_of(split), batch_of(split)._replace(generator=torch.Generator().manual_seed(6))):
        step(batch, Updater({"classifier": classifier}, SETTINGS))
    half = len(seen) // 2
    assert half == (3 if attack else 1) and all(draw is seen[0][1] for _, draw in seen[:half])
    assert not torch.equal(seen[0][1].noise, seen[half][1].noise), "another step throws other dice"
    moved = float((seen[half - 1][0] - batch.images).abs().max())
    assert moved == 0 if attack is None else 0.01 < moved <= 0.1 + 1e-6
    for (images, draw), (_, read) in zip(seen, classifier.calls, strict=True):
        assert torch.equal(purify(images, draw), read)
    assert all(torch.equal(a, b) for a, b in zip(before, front.parameters(), strict=True))


def test_a_front_and_an_attack_over_several_draws_are_refused():
    for settings, got in ((PGDSettings(0.1, eot_samples=2), "2 and 0"), (PGDSettings(0.1, stop_after=1), "1 and 1")):
        with pytest.raises(ValueError, match=f"eot_samples must be 1 and stop_after 0, got {got}"):
            classifier_step(tiny_classifier(), attack=settings, front=Front(tiny_pipeline()))


def test_a_front_meets_batches_of_any_size(split):
    images = torch.rand(520, 3, 16, 16)
    batch = Batch(images, torch.zeros(520, dtype=torch.int64), torch.Generator().manual_seed(5), 0.0)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    step = classifier_step(classifier, attack=PGDSettings(0.1, steps=1), front=Front(tiny_pipeline()))
    assert step(batch, Updater({"classifier": classifier}, SETTINGS))["loss"].isfinite()


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_an_impossible_label_smoothing_is_refused(value):
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\)"):
        classifier_step(tiny_classifier(), label_smoothing=value)


def test_a_classifier_learns_what_can_be_seen(split):
    training = Training("classifier", split, seed=1)
    training.settings = replace(training.settings, epochs=8, learning_rate=0.1)
    assert accuracy(training.networks["classifier"].eval(), split) < 0.6
    training.run()
    assert accuracy(training.networks["classifier"].eval(), split) > 0.9


def test_accuracy_counts_every_image_once_in_batches_of_any_size(split):
    model = tiny_classifier().eval()
    expected = (model(to_float(split.images)).argmax(dim=1) == split.labels).float().mean().item()
    for max_batch in (500, 44, 7, 1):
        assert accuracy(model, split, max_batch=max_batch) == pytest.approx(expected)
    flat = Split(split.images, model(to_float(split.images)).argmax(dim=1))
    assert accuracy(model, flat) == 1.0


# --- the purifier's step


class Planted(AToPPipeline):
    """A pipeline that notes which draw each of its uses had."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.attacked, self.learned = [], []

    def forward(self, images: Tensor, draw: object = None) -> Tensor:
        self.attacked.append(draw)
        return self.classifier(super().purify_stages(images, self.draw(images) if draw is None else draw)[-1] / 2 + 0.5)

    def purify_stages(self, images: Tensor, draw: object) -> tuple[Tensor, ...]:
        self.learned.append((images.detach().clone(), draw))
        return super().purify_stages(images, draw)


def planted(split: Split, attack: FineTuningAttack, epoch: float = 0.0) -> Planted:
    """A pipeline after one step of fine-tuning."""
    torch.manual_seed(1)
    pipeline = Planted(RT2, build_purifier("gated_unet", width=4, fold=1), tiny_classifier(100)).train()
    updater = Updater({"purifier": pipeline.purifier}, SETTINGS)
    purifier_step(pipeline, Objective("ft_adv"), attack=attack)(batch_of(split, epoch=epoch), updater)
    return pipeline


def test_the_attack_through_the_pipeline_hits_the_very_draw_of_the_loss(split):
    pipeline = planted(split, FineTuningAttack(PGDSettings(0.1, steps=3), sees="pipeline"))
    ((images, draw),) = pipeline.learned
    assert len(pipeline.attacked) == 3 and all(seen is draw for seen in pipeline.attacked)
    distance = (images - batch_of(split).images).abs()
    assert 0.05 < distance.max() <= 0.1 + 1e-6


def test_an_attack_with_eot_averages_over_draws_of_its_own(split):
    pipeline = planted(split, FineTuningAttack(PGDSettings(0.1, steps=2, eot_samples=4), sees="pipeline"))
    assert pipeline.attacked == [None, None] and len(pipeline.learned) == 1


def test_the_papers_attack_never_touches_the_pipeline(split):
    attack = FineTuningAttack(PGDSettings(0.1, steps=1, start="clean"), sees="classifier")
    pipeline = planted(split, attack)
    ((images, _),) = pipeline.learned
    batch = batch_of(split)
    clean = batch.images.clone().requires_grad_()
    nn.functional.cross_entropy(pipeline.classifier(clean), batch.labels).backward()
    fgsm = (batch.images + 0.1 * clean.grad.sign()).clamp(0, 1)
    assert pipeline.attacked == [] and torch.allclose(images, fgsm, atol=1e-6)


def test_the_attack_raises_the_loss_under_the_draw_it_hits_more_than_one_on_the_classifier_alone(split):
    pipeline, batch = tiny_pipeline(), batch_of(split)
    draw = pipeline.draw(batch.images)

    def loss(images: Tensor) -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(pipeline(images, draw), batch.labels).item()

    made = {
        sees: loss(FineTuningAttack(PGDSettings(0.2, steps=10), sees).make(pipeline, batch, draw))
        for sees in ("classifier", "pipeline")
    }
    assert made["pipeline"] > made["classifier"] and made["pipeline"] > loss(batch.images) + 0.01


@pytest.mark.parametrize(
    "ramp, epoch, share", [(6, 0, 0.01), (6, 3, 0.5), (6, 6, 1), (6, 60, 1), (0, 0, 1), (0.5, 0.25, 0.5)]
)
def test_eps_and_step_size_grow_together_along_the_ramp(ramp, epoch, share):
    settings = PGDSettings(0.3, steps=5)
    now = FineTuningAttack(settings, ramp_epochs=ramp).at(epoch)
    assert now.eps == pytest.approx(share * 0.3) and now.step_size == pytest.approx(share * settings.step_size)
    assert (now.steps, now.norm, now.start) == (settings.steps, settings.norm, settings.start)


def test_the_ramp_is_used_by_the_step(split):
    attack = FineTuningAttack(PGDSettings(0.2, steps=2), ramp_epochs=4)
    for epoch, eps in ((0, 0.002), (1, 0.05), (4, 0.2)):
        ((images, _),) = planted(split, attack, epoch).learned
        assert eps / 2 < (images - batch_of(split).images).abs().max() <= eps + 1e-6


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sees": "all"}, "unknown sees 'all'"),
        ({"ramp_epochs": -1}, "ramp_epochs"),
        ({"attack": PGDSettings(0.1, stop_after=1)}, "stop_after must be 0, got 1"),
    ],
)
def test_an_impossible_attack_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FineTuningAttack(**{"attack": PGDSettings(0.1), **values})


def test_what_an_objective_needs_must_be_given():
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="'ft_adv' needs an attack"):
        purifier_step(pipeline, Objective("ft_adv"))
    with pytest.raises(ValueError, match="a discriminator is needed"):
        purifier_step(pipeline, Objective("ap", gan_weight=1.0))


def test_fine_tuning_leaves_the_classifier_as_it_was(split):
    training = Training(KINDS[2], split, seed=1)
    pipeline = tiny_pipeline(1)
    before = copy.deepcopy(pipeline.classifier.state_dict())
    attack = FineTuningAttack(PGDSettings(0.1, steps=2))
    training.networks = {"purifier": pipeline.purifier}
    training.step = purifier_step(pipeline, Objective("ft_adv"), attack=attack)
    purifier = copy.deepcopy(pipeline.purifier.state_dict())
    training.run()
    assert same(pipeline.classifier.state_dict(), before) and not pipeline.classifier.training
    assert all(parameter.grad is None for parameter in pipeline.classifier.parameters())
    assert not same(pipeline.purifier.state_dict(), purifier)


def test_each_step_throws_new_dice_and_the_same_step_the_same(split):
    draws = []
    for seed in (5, 5, 6):
        pipeline = Planted(RT2, build_purifier("gated_unet", width=4, fold=1), tiny_classifier(100)).train()
        pipeline.draw(batch_of(split).images)  # whatever was thrown before
        batch = batch_of(split)._replace(generator=torch.Generator().manual_seed(seed))
        purifier_step(pipeline, Objective("ap"))(batch, Updater({"purifier": pipeline.purifier}, SETTINGS))
        draws.append(pipeline.learned[0][1])
    assert torch.equal(draws[0].noise, draws[1].noise) and torch.equal(draws[0].masks, draws[1].masks)
    assert not torch.equal(draws[0].noise, draws[2].noise) and not torch.equal(draws[0].masks, draws[2].masks)


def test_the_classification_term_joins_in_after_the_warm_up(split):
    pipeline = tiny_pipeline()
    updater = Updater({"purifier": pipeline.purifier}, SETTINGS)
    step = purifier_step(pipeline, Objective("ft_clean", warmup_epochs=1.0))
    assert set(step(batch_of(split, epoch=0.9), updater)) == {"loss", "reconstruction"}
    assert set(step(batch_of(split, epoch=1.0), updater)) == {"loss", "reconstruction", "classification", "accuracy"}


@pytest.mark.parametrize("transform", ["none", "rt1", "rt2", "rt3"])
@pytest.mark.parametrize("gan", ["hinge", "least_squares"])
def test_the_gan_term_moves_purifier_and_discriminator_each_by_its_own_loss(split, transform, gan):
    moved = []
    for weight in (0.0, 1.0):
        pipeline = tiny_pipeline(transform=replace(RT2, name=transform))
        torch.manual_seed(7)
        discriminator = PatchDiscriminator(2)
        before = copy.deepcopy(discriminator.state_dict())
        updater = Updater({"purifier": pipeline.purifier, "discriminator": discriminator}, SETTINGS)
        step = purifier_step(pipeline, Objective("ap", gan_weight=weight, gan_loss=gan), discriminator=discriminator)
        losses = step(batch_of(split), updater)
        assert ({"gan", "discriminator"} <= set(losses)) == bool(weight)
        assert same(discriminator.state_dict(), before) != bool(weight)
        moved.append(copy.deepcopy(pipeline.purifier.state_dict()))
    assert not same(*moved), "the GAN term should have a gradient"


@pytest.mark.parametrize("gan_weight", [0.0, 0.05])
@pytest.mark.parametrize("variant", ["ap", "ft_clean", "ft_adv"])
@pytest.mark.parametrize("purifier, options", [("gated_unet", {"width": 8, "fold": 1}), ("deepfill_v2", {"width": 8})])
def test_every_objective_is_learned_on_a_small_fixed_batch(split, purifier, options, variant, gan_weight):
    classifier = tiny_classifier(100)
    torch.manual_seed(1)
    pipeline = AToPPipeline(replace(RT2, noise_std=0.02), build_purifier(purifier, **options), classifier).train()
    networks = {"purifier": pipeline.purifier}
    if gan_weight:
        networks["discriminator"] = PatchDiscriminator(4)
    attack = FineTuningAttack(PGDSettings(0.05, steps=1), ramp_epochs=0)
    objective = Objective(variant, classification_weight=0.5, gan_weight=gan_weight)
    step = purifier_step(pipeline, objective, attack=attack, discriminator=networks.get("discriminator"))
    small = Split(split.images[:8], split.labels[:8])
    settings = replace(SETTINGS, epochs=30, padding=0, flip=False, learning_rate=0.003, schedule="constant")
    history = fit(step, networks, small, settings)

    def learned(name: str) -> float:
        first, last = ([entry[name] for entry in part] for part in (history[:3], history[-3:]))
        return sum(last) / sum(first)

    assert learned("reconstruction") < 0.95
    assert gan_weight or learned("loss") < 0.95
    names = {"reconstruction"} | ({"gan", "discriminator"} if gan_weight else set())
    names |= {"classification", "accuracy"} if variant != "ap" else set()
    assert set(history[0]) == {"epoch", "loss", "seconds", *names}


def flops_of(training: Training) -> int:
    """What is counted for one of the trainings under test."""
    warmup = {"warmup_epochs": 0.5} if "discriminator" in training.networks else {}
    return training_flops(training.step, training.networks, training.split, training.settings, **warmup)


@pytest.mark.parametrize("max_steps", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_flops_that_are_stated_are_those_that_a_whole_training_spends(kind, max_steps, split):
    training = Training(kind, split, seed=1)
    training.settings = replace(training.settings, max_steps=max_steps)
    assert flops_of(training) == count_flops(training.run)


@pytest.mark.parametrize("kind", KINDS)
def test_counting_flops_disturbs_no_training_whenever_it_is_done(kind, split, uninterrupted, tmp_path):
    weights, history = uninterrupted(kind)
    training = Training(kind, split, seed=1)
    before, dice = training.weights, torch.get_rng_state()
    modes = [module.training for network in training.networks.values() for module in network.modules()]
    counted = flops_of(training)
    assert same(training.weights, before) and torch.equal(torch.get_rng_state(), dice)
    assert modes == [module.training for network in training.networks.values() for module in network.modules()]
    assert all(p.grad is None for network in training.networks.values() for p in network.parameters())
    with pytest.raises(KeyboardInterrupt):
        training.run(tmp_path / "state.pt", progress=interrupt_at(4))
    assert flops_of(training) == counted
    training = Training(kind, split, seed=2)
    assert flops_of(training) == counted
    assert without_times(training.run(tmp_path / "state.pt")) == history and same(training.weights, weights)
    assert flops_of(training) == counted and same(training.weights, weights)


def test_what_is_counted_is_left_alone_when_the_step_fails(split):
    training = Training("classifier", split, seed=1)
    before, step = training.weights, training.step

    def broken(batch: Batch, updater: Updater) -> dict[str, Tensor]:
        step(batch, updater)
        raise RuntimeError("no memory")

    training.networks["classifier"].eval()
    with pytest.raises(RuntimeError, match="no memory"):
        training_flops(broken, training.networks, split, SETTINGS)
    assert same(training.weights, before) and not training.networks["classifier"].training


def test_flops_of_a_training_without_a_whole_batch_are_refused(split):
    few = Split(split.images[:3], split.labels[:3])
    training = Training("classifier", few, seed=1)
    with pytest.raises(ValueError, match="batch_size 8 is larger than the training set of 3 images"):
        flops_of(training)


def test_dice_of_a_step_are_known_without_asking_a_gpu():
    def seed(state: int, device: str) -> int:
        generator = SimpleNamespace(device=torch.device(device), initial_seed=lambda: state)
        return Batch(torch.zeros(0), torch.zeros(0), generator, 0.0).seed()

    assert seed(5, "cuda") == seed(5, "cuda") != seed(6, "cuda") and 0 <= seed(5, "cuda") < 2**62
    seeds = [Batch(torch.zeros(0), torch.zeros(0), torch.Generator().manual_seed(s), 0.0).seed() for s in (5, 5, 6)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_large_images_are_read_few_at_once(monkeypatch):
    seen = []

    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, images):
            seen.append(len(images))
            return torch.zeros(len(images), 2) + self.weight

    for size, expected in ((8, [501 - 1, 1]), (1024, [4] * 2 + [2])):
        count = sum(expected)
        split = Split(torch.zeros(count, 3, size, size, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
        seen.clear()
        assert accuracy(Noted(), split) == 1.0 and seen == expected
