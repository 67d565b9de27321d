"""What is saved comes back as it was; a file that cannot be used says so and runs nothing; a full disk loses
nothing."""

import errno
import json
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from atoplib import classifiers
from atoplib.checkpoints import CheckpointError, load, load_state, read_header, save, save_state
from atoplib.purifiers import GatedUNet

CLASSIFIER = {"num_classes": 3, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "width": 2}


def classifier() -> nn.Module:
    """A tiny one whose batch statistics are no longer the initial ones."""
    module = classifiers.build("small_resnet", **CLASSIFIER)
    module(torch.rand(4, 3, 16, 16))
    return module.eval()


def save_classifier(path: Path, **changes: object) -> Path:
    save(
        path,
        classifier(),
        **{"kind": "classifier", "architecture": "small_resnet", "options": CLASSIFIER, **changes},
    )
    return path


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond ``room`` bytes: the operating system refuses the write, as it does on a full
    disk."""
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


def rewritten(path: Path, **changes: object) -> Path:
    """The checkpoint with other facts in its header, as a foreign or forged file may have them."""
    metadata = {"atoplib": json.dumps({**read_header(path), **changes})}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata=metadata)
    return path


def test_a_module_comes_back_bit_by_bit_with_its_header_and_is_saved_alike_twice(tmp_path):
    module = classifier().to(memory_format=torch.channels_last)
    facts = {"metrics": {"test_accuracy": 0.5}, "dataset": "mnist5k", "transform": {"name": "rt2"}}
    paths = [tmp_path / "folder" / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save(path, module, kind="classifier", architecture="small_resnet", options=CLASSIFIER, **facts)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    torch.manual_seed(1)
    loaded, header = load(paths[0], kind="classifier")
    assert not any(part.training for part in loaded.modules())
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in module.state_dict().items())
    assert header == read_header(paths[0]) and {key: header[key] for key in facts} == facts
    assert header["kind"] == "classifier" and header["architecture"] == "small_resnet"
    assert header["options"] == json.loads(json.dumps(CLASSIFIER))


@pytest.mark.parametrize("case", ["other options", "other class", "same weights, other class"])
def test_a_network_that_the_named_builder_does_not_make_is_saved_as_what_it_is(tmp_path, case):
    class Inverted(GatedUNet):
        def forward(self, inputs):
            return -super().forward(inputs)

    module = {
        "other options": lambda: GatedUNet(width=8),
        "other class": lambda: nn.Conv2d(5, 3, 1),
        "same weights, other class": lambda: Inverted(width=4),
    }[case]().eval()
    path = tmp_path / "p.safetensors"
    save(path, module, kind="purifier", architecture="gated_unet", options={"width": 4})
    assert read_header(path)["architecture"] == f"custom: {type(module).__name__}"
    with pytest.raises(CheckpointError, match="holds a custom purifier"):
        load(path, kind="purifier")
    given = torch.rand(1, 5, 16, 16)
    again, _ = load(
        path, kind="purifier", build=lambda: Inverted(width=4) if case.startswith("same") else module
    )
    assert torch.equal(again(given), module(given))


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
        load(path, kind="classifier")
    with pytest.raises(CheckpointError, match=r"stolen\.pt cannot be read"):
        load_state(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"options": {**CLASSIFIER, "width": 3}},
            r"another architecture: 0 missing, 0 unknown, \d+ of another",
        ),
        (
            {"architecture": "wide_resnet_28_10"},
            "no network that can be built.*wide_resnet_28_10 cannot build a network with",
        ),
        ({"architecture": "resnet19"}, "can be built: unknown classifier 'resnet19'"),
        ({"architecture": "os:system", "options": {"command": "true"}}, "custom classifier .*build=MAKE"),
        ({"options": {**CLASSIFIER, "std": (0, 1, 1)}}, "can be built: std must be above 0"),
        ({"options": {**CLASSIFIER, "width": 10**9}}, "another architecture|can be built"),
        ({"dataset": "another"}, "is damaged: its content is not what was saved"),
    ],
)
def test_a_checkpoint_of_another_architecture_or_content_is_refused_by_name(tmp_path, changes, message):
    path = rewritten(save_classifier(tmp_path / "c.safetensors"), **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path, kind="classifier")
    assert str(path) in str(caught.value)


def test_a_checkpoint_with_other_weights_of_another_kind_or_missing_is_named(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*c\.safetensors; run the notebook"):
        load(path, kind="classifier")
    save_classifier(path)
    with pytest.raises(CheckpointError, match=r"c\.safetensors holds a classifier, not a purifier"):
        load(path, kind="purifier")
    tensors, metadata = safetensors.torch.load_file(path), {"atoplib": json.dumps(read_header(path))}
    del tensors["1.head.weight"], tensors["1.head.bias"]
    safetensors.torch.save_file({**tensors, "surplus": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(
        CheckpointError, match=r"2 missing, 1 unknown, 0 of another shape \(for example '1.head.bias'"
    ):
        load(path, kind="classifier")


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, "no header of format"),
        ({"format": "pt"}, "no header of format"),
        ({"atoplib": "{"}, "no header of format"),
        ({"atoplib": "[]"}, "no header of format"),
        ({"atoplib": '{"format": "atoplib-checkpoint-9"}'}, "or another version"),
        ({"atoplib": '{"format": "atoplib-checkpoint-1", "kind": "classifier"}'}, "can be built: 'options'"),
    ],
)
def test_a_safetensors_file_of_another_program_or_version_is_refused(tmp_path, metadata, message):
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        load(path, kind="classifier")


def test_a_full_disk_leaves_the_earlier_file_and_no_other_and_says_what_to_do(tmp_path):
    path = save_classifier(tmp_path / "file")
    before = path.read_bytes()
    with (
        full_disk(4096),
        pytest.raises(OSError, match="could not write .*/file.*is untouched; free some disk space"),
    ):
        save_classifier(path)
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == before
    save_classifier(path)  # and with room again it goes on


def saved_twice(path: Path) -> Path:
    for step in (1, 2):
        save_state(path, {"step": step, "weights": torch.full((100,), step), "history": [{"loss": 0.5}]})
    return path


def test_the_newest_state_is_loaded_without_a_word(tmp_path):
    state, note = load_state(saved_twice(tmp_path / "state.pt"))
    assert state["step"] == 2 and torch.equal(state["weights"], torch.full((100,), 2)) and note is None
    assert state["history"] == [{"loss": 0.5}]
    assert sorted(os.listdir(tmp_path)) == ["state.pt", "state.pt.previous"]


@pytest.mark.parametrize("renamed", [[], ["state.pt"]])
def test_a_process_that_is_killed_between_the_renames_leaves_a_state_that_is_put_in_its_place(
    tmp_path, renamed
):
    path = saved_twice(tmp_path / "state.pt")
    path.with_name("state.pt.previous").unlink()
    os.replace(path, path.with_name("state.pt.newest"))
    for name in renamed:
        save_classifier(tmp_path / name)
    assert load_state(path)[0]["step"] == 2
    assert path.is_file() and not path.with_name("state.pt.newest").exists()
    assert load_state(path)[0]["step"] == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "malicious"])
def test_a_damaged_newest_state_gives_way_to_the_one_before_and_is_named(tmp_path, damage):
    path = saved_twice(tmp_path / "state.pt")
    if damage == "malicious":
        torch.save({"step": Intruder(tmp_path / "it-ran")}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes(
            {"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": b"\x00garbage" * 99}[damage]
        )
    state, note = load_state(path)
    assert state["step"] == 1
    assert f"{path} cannot be read" in note and note.endswith("went on from the state before it")
    path.with_name("state.pt.previous").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"state\.pt cannot .*\.previous cannot .*Delete the run directory"
    ):
        load_state(path)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("owner, name", [(torch, "save"), (os, "fsync")], ids=["write", "fsync"])
def test_a_full_disk_keeps_both_states(tmp_path, monkeypatch, owner, name):
    path, full = saved_twice(tmp_path / "state.pt"), OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        save_state(path, {"step": 3})
    monkeypatch.undo()
    assert load_state(path)[0]["step"] == 2
    path.unlink()
    assert load_state(path)[0]["step"] == 1
