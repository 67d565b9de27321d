"""What is saved comes back as it was; a file that cannot be used says so and runs nothing; a full disk loses nothing."""

import errno
import os
import pickle
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from atoplib.checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_state,
    read_header,
    save_checkpoint,
    save_state,
    write_json,
)
from atoplib.classifiers import build_classifier
from atoplib.purifiers import build_purifier

CLASSIFIER = {"num_classes": 3, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "width": 2}


def classifier() -> nn.Module:
    """A tiny one whose batch statistics are no longer the initial ones."""
    module = build_classifier("small_resnet", **CLASSIFIER)
    module(torch.rand(4, 3, 16, 16))
    return module.eval()


def save_classifier(path: Path, **changes: object) -> Path:
    save_checkpoint(
        path, classifier(), **{"kind": "classifier", "architecture": "small_resnet", "options": CLASSIFIER, **changes}
    )
    return path


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond ``room`` bytes: the operating system refuses the write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Intruder:
    """Unpickling it makes a folder: a stand-in for any command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "kind, name, options, shape",
    [
        ("classifier", "small_resnet", CLASSIFIER, (2, 3, 16, 16)),
        ("purifier", "gated_unet", {"width": 4, "fold": 2}, (2, 5, 16, 16)),
        ("purifier", "deepfill_v2", {"width": 4}, (2, 5, 16, 16)),
    ],
)
def test_a_module_comes_back_bit_by_bit_with_its_header(tmp_path, kind, name, options, shape):
    module = (build_classifier if kind == "classifier" else build_purifier)(name, **options).train()
    module(torch.rand(shape))  # moves batch statistics, which are part of the module, away from their start
    path = tmp_path / "folder" / "file.safetensors"
    facts = {"metrics": {"test_accuracy": 0.5}, "dataset": "mnist5k", "classes": ["a", "b"], "transform": {"name": "rt2"}}
    save_checkpoint(path, module, kind=kind, architecture=name, options=options, **facts)
    torch.manual_seed(1)
    loaded, header = load_checkpoint(path, kind=kind)
    assert not any(part.training for part in loaded.modules())
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in module.state_dict().items())
    inputs = torch.rand(shape)
    assert str(loaded(inputs)) == str(module.eval()(inputs))
    assert header == read_header(path)
    assert header["kind"] == kind and header["architecture"] == name
    assert {key: header[key] for key in facts} == facts
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in options.items()} == header["options"]


def test_weights_of_any_memory_format_are_saved(tmp_path):
    module = classifier().to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "a", module, kind="classifier", architecture="small_resnet", options=CLASSIFIER)
    loaded, _ = load_checkpoint(tmp_path / "a", kind="classifier")
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("left", [0, 1, 7, 8, 9, 100, 0.5, -1])
def test_a_truncated_checkpoint_is_refused_by_name(tmp_path, left):
    path = save_classifier(tmp_path / "c.safetensors")
    size = path.stat().st_size
    os.truncate(path, int(left * size) if left == 0.5 else left % size)
    for use in (read_header, lambda path: load_checkpoint(path, kind="classifier")):
        with pytest.raises(CheckpointError, match=r"c\.safetensors is not a whole safetensors file.*[Dd]elete it"):
            use(path)


def test_flipped_bits_in_the_header_never_raise_anything_but_a_checkpoint_error(tmp_path):
    whole = save_classifier(tmp_path / "c.safetensors").read_bytes()
    dice, path, refused = random.Random(0), tmp_path / "flipped.safetensors", 0
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    for byte in [*range(8), *(dice.randrange(8, header_bytes) for _ in range(150))]:
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path, kind="classifier")
        except CheckpointError as error:
            refused += 1
            assert "flipped.safetensors" in str(error)
    assert refused > 100


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path, form):
    trace, path = tmp_path / "it-ran", tmp_path / "stolen.pt"
    content = {"identity": {}, "networks": Intruder(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path)
        torch.load(path, weights_only=False)
    assert trace.is_dir(), "the file should be able to do harm"
    trace.rmdir()
    with pytest.raises(CheckpointError, match=r"stolen\.pt is not a whole safetensors file"):
        load_checkpoint(path, kind="classifier")
    with pytest.raises(CheckpointError, match=r"stolen\.pt cannot be read"):
        load_state(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"options": {**CLASSIFIER, "width": 3}}, r"another architecture: 0 missing, 0 unknown, \d+ of another shape"),
        ({"architecture": "wide_resnet_28_10"}, "names an architecture that cannot be built.*does not take the options"),
        ({"architecture": "resnet19"}, "cannot be built: unknown classifier 'resnet19'; allowed: small_resnet"),
        ({"options": {**CLASSIFIER, "std": (0, 1, 1)}}, "cannot be built: mean and std need 3 values"),
        ({"options": {**CLASSIFIER, "width": 10**9}}, "cannot be built"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path, changes, message):
    path = save_classifier(tmp_path / "c.safetensors", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, kind="classifier")
    assert str(path) in str(caught.value)


def test_missing_and_unknown_weights_are_counted(tmp_path):
    module = classifier()
    module.register_buffer("surplus", torch.zeros(1))
    module[1].head = nn.Identity()
    options = {"kind": "classifier", "architecture": "small_resnet", "options": CLASSIFIER}
    save_checkpoint(tmp_path / "c.safetensors", module, **options)
    with pytest.raises(CheckpointError, match=r"2 missing, 1 unknown, 0 of another shape \(for example '1.head.bias'\)"):
        load_checkpoint(tmp_path / "c.safetensors", kind="classifier")


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"c\.safetensors holds a classifier, not a purifier"):
        load_checkpoint(save_classifier(tmp_path / "c.safetensors"), kind="purifier")


def test_a_missing_checkpoint_is_named(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("c.safetensors", "folder.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"there is no checkpoint .*{name}; run the notebook"):
            load_checkpoint(tmp_path / name, kind="classifier")


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, "holds no atoplib header"),
        ({"format": "pt"}, "holds no atoplib header"),
        ({"atoplib": "{"}, "holds no atoplib header"),
        ({"atoplib": "[]"}, "is not of format atoplib-checkpoint-1"),
        ({"atoplib": '{"format": "atoplib-checkpoint-9"}'}, "written by another version"),
        ({"atoplib": '{"format": "atoplib-checkpoint-1", "kind": "classifier"}'}, "cannot be built: 'architecture'"),
    ],
)
def test_a_safetensors_file_of_another_program_or_version_is_refused(tmp_path, metadata, message):
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, kind="classifier")


WRITERS = {
    "checkpoint": save_classifier,
    "state": lambda path: save_state(path, {"weights": torch.rand(5000)}),
    "json": lambda path: write_json(path, {"metrics": [0.5] * 5000}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_earlier_file_and_no_other_and_says_what_to_do(tmp_path, writer):
    path = tmp_path / "file"
    write = WRITERS[writer]
    write(path)
    before = path.read_bytes()
    with full_disk(4096), pytest.raises(OSError, match=r"could not write .*/file.*is untouched; free some disk space"):
        write(path)
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == before
    write(path)  # and with room again it goes on


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_full_only_at_the_very_end_loses_nothing_either(tmp_path, monkeypatch, writer, call):
    path = tmp_path / "file"
    WRITERS[writer](path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=r"could not write .*/file.*No space left on device"):
        WRITERS[writer](path)
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not write .*/file/inside/c.*choose another folder"):
        write_json(tmp_path / "file" / "inside" / "c", {})


def test_an_interrupted_write_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch):
    path = save_classifier(tmp_path / "file")
    before = path.read_bytes()

    def interrupted(tensors, part, metadata):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_classifier(path)
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == before


def test_json_refuses_nan_and_keeps_the_earlier_file(tmp_path):
    write_json(tmp_path / "file", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file", {"a": float("nan")})
    assert os.listdir(tmp_path) == ["file"] and '"a": 1' in (tmp_path / "file").read_text()


def saved_twice(path: Path) -> Path:
    for step in (1, 2):
        save_state(path, {"step": step, "weights": torch.full((100,), step), "history": [{"loss": 0.5}]})
    return path


def test_the_newest_state_is_loaded_without_a_word(tmp_path):
    state, note = load_state(saved_twice(tmp_path / "state.pt"))
    assert state["step"] == 2 and torch.equal(state["weights"], torch.full((100,), 2)) and note is None
    assert state["history"] == [{"loss": 0.5}]
    assert sorted(os.listdir(tmp_path)) == ["state.pt", "state.pt.previous"]


def test_no_state_is_nothing_to_load(tmp_path):
    assert load_state(tmp_path / "state.pt") == (None, None)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "another object", "malicious"])
def test_a_damaged_newest_state_gives_way_to_the_one_before_and_is_named(tmp_path, damage):
    path = saved_twice(tmp_path / "state.pt")
    if damage == "another object":
        torch.save([1, 2], path)
    elif damage == "malicious":
        torch.save({"step": Intruder(tmp_path / "it-ran")}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": b"\x00garbage" * 99}[damage])
    state, note = load_state(path)
    assert state["step"] == 1
    assert f"{path} cannot be read" in note and note.endswith("went on from the state before it")
    assert not (tmp_path / "it-ran").exists()


def test_a_state_that_was_lost_between_two_renames_gives_way_to_the_one_before(tmp_path):
    path = saved_twice(tmp_path / "state.pt")
    path.unlink()
    assert load_state(path)[0]["step"] == 1


def test_two_damaged_states_are_an_error_that_names_both(tmp_path):
    path = saved_twice(tmp_path / "state.pt")
    path.write_bytes(b"")
    path.with_name("state.pt.previous").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"state\.pt cannot .*state\.pt\.previous cannot .*Delete the run directory"):
        load_state(path)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_keeps_both_states(tmp_path, monkeypatch, call):
    path = saved_twice(tmp_path / "state.pt")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((torch, "save", fail) if call == "write" else (os, "fsync", fail)))
    with pytest.raises(OSError, match="No space left"):
        save_state(path, {"step": 3})
    monkeypatch.undo()
    assert load_state(path)[0]["step"] == 2
    path.unlink()
    assert load_state(path)[0]["step"] == 1
