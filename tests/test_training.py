"""A training that was interrupted goes on exactly as if it had not been, and what it depends on decides on
its reuse."""

import copy
import os
import re
import signal

import pytest
import torch
from tiny_trainings import (
    KINDS,
    SETTINGS,
    Training,
    a_run,
    colourful,
    colourful_split,  # noqa: F401
    one_thread_and_a_look_at_every_step,  # noqa: F401
    same,
    state_of,
    tiny_classifier,
    weighted,
    without_times,
)
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from atoplib.checkpoints import CheckpointError, load_state
from atoplib.data import Split
from atoplib.pipeline import AToPPipeline
from atoplib.training import accuracy, fit, loop, parts


def interrupt_at(step, error=KeyboardInterrupt):
    """A progress callback that is interrupted once so many steps are done."""

    def progress(done, total, unit, numbers):
        if done == step * SETTINGS["batch_size"]:
            raise error

    return progress


@pytest.fixture(scope="module")
def uninterrupted(split):
    """Weights and history of each training when nothing happens."""
    known = {}

    def result(kind):
        if kind not in known:
            training = Training(kind, split, seed=1)
            history = training.run()
            known[kind] = training.weights, without_times(history)
        return known[kind]

    return result


@pytest.mark.parametrize("steps", [[0], [5], [10], [3, 7]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_ends_bit_by_bit_like_one_that_was_not(
    kind, steps, split, uninterrupted, tmp_path
):
    weights, history = uninterrupted(kind)
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            Training(kind, split, seed=1).run(tmp_path, progress=interrupt_at(step))
        assert state_of(tmp_path)["step"] == step
    training = Training(kind, split, seed=1)  # as in a new process
    assert not same(training.weights, weights)
    assert without_times(training.run(tmp_path)) == history
    assert same(training.weights, weights)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_killed_training_goes_on_from_its_last_regular_save(kind, split, uninterrupted, tmp_path):
    with pytest.raises(MemoryError):
        Training(kind, split, seed=1).run(
            tmp_path, save_every=-1, progress=interrupt_at(7, error=MemoryError)
        )
    assert state_of(tmp_path)["step"] == 6
    again = Training(kind, split, seed=1)
    assert without_times(again.run(tmp_path)) == uninterrupted(kind)[1]
    assert same(again.weights, uninterrupted(kind)[0])


def test_an_interruption_in_the_middle_of_a_step_leaves_the_last_regular_save(
    split, uninterrupted, tmp_path, monkeypatch
):
    moved, update = [], AveragedModel.update_parameters

    def interrupted(average, network):
        moved.append(network)
        if len(moved) == 8:
            raise KeyboardInterrupt  # the weights have moved, the average has not
        update(average, network)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AveragedModel, "update_parameters", interrupted)
        Training(KINDS[2], split, seed=1).run(tmp_path, save_every=-1)
    assert state_of(tmp_path)["step"] == 7
    again = Training(KINDS[2], split, seed=1)
    again.run(tmp_path)
    assert same(again.weights, uninterrupted(KINDS[2])[0])


@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]], ids=str
)
def test_signals_wait_for_the_end_of_a_step_and_nothing_is_lost(
    signals, split, uninterrupted, tmp_path, monkeypatch
):
    """A scheduler signals a group of processes, which pass it on to each other."""
    count, sample = [], AToPPipeline.sample

    def signalled(pipeline, images):
        count.append(images)
        if len(count) == 4:
            for number in signals:
                os.kill(os.getpid(), number)
        return sample(pipeline, images)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AToPPipeline, "sample", signalled)
        Training(KINDS[2], split, seed=1).run(tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert len(count) == state_of(tmp_path)["step"] == 4
    again = Training(KINDS[2], split, seed=1)
    assert without_times(again.run(tmp_path)) == uninterrupted(KINDS[2])[1]
    assert same(again.weights, uninterrupted(KINDS[2])[0])


def test_a_second_ctrl_c_does_not_wait(split):
    reached = []

    def step(x, y, epoch):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("second")

    with pytest.raises(KeyboardInterrupt):
        fit(step, tiny_classifier(), split, **SETTINGS)
    assert reached == ["first"]


def share(network):
    return {"share": accuracy(network, colourful())}


@pytest.mark.parametrize("presses, entry", [(2, 1), (1, 1), (1, 2)])
def test_an_interruption_during_validation_loses_no_entry_of_the_history(
    split, tmp_path, monkeypatch, presses, entry
):
    expected = Training(KINDS[0], split, seed=1)
    history = expected.run(validate=share)
    assert len(history) == 2 and all("share" in entry for entry in history)
    calls, sample_logits = [], parts.sample_logits

    def pressed(*arguments, **options):
        calls.append(arguments)
        for _ in range(presses if len(calls) == entry else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return sample_logits(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "sample_logits", pressed)
        Training(KINDS[0], split, seed=1).run(tmp_path, validate=share)
    again = Training(KINDS[0], split, seed=1)
    assert without_times(again.run(tmp_path, validate=share)) == without_times(history)
    assert same(again.weights, expected.weights)


# --- what decides on reuse


def trained(folder, network, step, split, **settings):
    """A training's history, what was said of it, and its run's directory."""
    said = []
    with a_run(folder) as run:
        history = fit(step, network, split, **{**SETTINGS, **settings}, run=run, notify=said.append)
    return history, said, run.path


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_training_is_only_loaded_and_says_so(kind, split, uninterrupted, tmp_path, monkeypatch):
    expected, first, said = uninterrupted(kind)[0], Training(kind, split, seed=1), []
    history = first.run(tmp_path, notify=said.append)
    written = next(tmp_path.glob("runs/test/*/.state.pt")).stat().st_mtime_ns
    assert not said
    again = Training(kind, split, seed=1)
    monkeypatch.setattr(loop._Training, "advance", lambda *_: pytest.fail("it trained"))
    assert again.run(tmp_path, notify=said.append, progress=lambda *_: pytest.fail("it reported")) == history
    assert re.fullmatch(r"Loaded, not trained again: .*; trained \d+ s ago\.", said[0])
    assert same(again.weights, first.weights) and same(again.weights, expected)
    assert next(tmp_path.glob("runs/test/*/.state.pt")).stat().st_mtime_ns == written
    assert not any(part.training for network in again.networks.values() for part in network.modules())


CHANGES = {
    "the step": lambda: (*weighted(2.0), colourful(), {}),
    "settings": lambda: (*weighted(1.0), colourful(), {"seed": 4}),
    "the training images": lambda: (*weighted(1.0), Split(255 - colourful().images, colourful().labels), {}),
    "the network that was given": lambda: (
        (other := tiny_classifier(5)),
        lambda x, y, epoch: 1.0 * F.cross_entropy(other(x), y),
        colourful(),
        {},
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_what_a_training_depends_on_decides_on_its_reuse_and_the_old_result_is_kept(split, tmp_path, changed):
    network, step = weighted(1.0)
    history, said, path = trained(tmp_path, network, step, split)
    old = load_state(path / ".state.pt")[0]["networks"]["network"]
    other, step, images, settings = CHANGES[changed]()
    now, said, path = trained(tmp_path, other, step, images, **settings)
    assert said[0].startswith(f"Trained anew, not loaded (changed: {changed}") and len(said) == 1
    assert without_times(now) != without_times(history)
    assert same(load_state(path / "superseded-1" / ".state.pt")[0]["networks"]["network"], old)
    _, said, _ = trained(tmp_path, other, step, images, **settings)
    assert said[0].startswith("Loaded")


def test_an_edit_of_the_training_loop_is_another_training(split, tmp_path, monkeypatch):
    trained(tmp_path, *weighted(1.0), split)
    known = parts.hashing.code_hash
    edited = {"atoplib.training.loop": "edited"}
    monkeypatch.setattr(parts.hashing, "code_hash", lambda name: edited.get(name) or known(name))
    assert "the training loop" in trained(tmp_path, *weighted(1.0), split)[1][0]


@pytest.mark.parametrize("edited", [False, True])
def test_a_cell_that_is_executed_again_means_the_network_as_it_was_given(split, tmp_path, edited):
    network, step = weighted(1.0)
    before = copy.deepcopy(network.state_dict())
    first, _, _ = trained(tmp_path, network, step, split)
    assert not same(network.state_dict(), before)
    if edited:
        step = lambda x, y, epoch: 2.0 * F.cross_entropy(network(x), y)  # noqa: E731
    again, said, _ = trained(tmp_path, network, step, split)
    assert said[0].startswith("Trained anew" if edited else "Loaded")
    fresh, step = weighted(2.0 if edited else 1.0)
    expected = fit(step, fresh, split, **SETTINGS)
    assert without_times(again) == without_times(expected) and same(network.state_dict(), fresh.state_dict())


def test_a_state_of_which_nobody_knows_the_origin_is_archived(split, tmp_path):
    network, step = weighted(1.0)
    path = trained(tmp_path, network, step, split)[2]
    (path / ".training.json").write_text("{")
    assert "not noted" in trained(tmp_path, *weighted(1.0), split)[1][0]
    (path / ".state.pt").write_bytes(b"garbage")
    (path / ".state.pt.previous").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        trained(tmp_path, *weighted(1.0), split)


def test_a_damaged_state_gives_way_to_the_one_before_and_a_person_is_told(split, uninterrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Training(KINDS[0], split, seed=1).run(tmp_path, save_every=-1, progress=interrupt_at(4))
    next(tmp_path.glob("runs/test/*/.state.pt")).write_bytes(b"")
    again, told = Training(KINDS[0], split, seed=1), []
    again.run(tmp_path, notify=told.append)
    assert "went on from the state before it" in told[0] and told[1].startswith("Goes on after step")
    assert same(again.weights, uninterrupted(KINDS[0])[0])


def test_the_same_seed_gives_the_same_weights_another_seed_others_and_torchs_own_numbers_go_on(
    split, uninterrupted
):
    again, other = Training(KINDS[2], split, seed=1), Training(KINDS[2], split, seed=1)
    other.settings["seed"] = 4
    torch.manual_seed(99)
    again.run()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(99)))
    other.run()
    assert same(again.weights, uninterrupted(KINDS[2])[0]) and not same(other.weights, again.weights)
