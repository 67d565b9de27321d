"""A hundred malformed checkpoints and states: a sentence each; no crash, no code run, no gigabytes, no
hang."""

import json
import random
import struct
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from atoplib import classifiers
from atoplib.checkpoints import CheckpointError, load, load_state, save, save_state

COUNT = 100
HUGE = (2**31, 2**63, -1, 10**30, 1e308, float("inf"), float("nan"))
WRONG = (None, True, "x", "", [], [1], {}, {"a": 1}, [[]] * 3, "os:abort")


def flipped(content: bytes, generator: random.Random) -> bytes:
    """Some bits turned, most of them near the beginning, where the structure is."""
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 8, 64))):
        at = int(len(content) * generator.random() ** generator.choice((1, 4, 16)))
        changed[min(at, len(content) - 1)] ^= 1 << generator.randrange(8)
    return bytes(changed)


def malformed(content: bytes, generator: random.Random) -> bytes:
    """Truncated, bit-flipped, doubled in part, or empty."""
    kind = generator.randrange(4)
    if kind == 0:
        return content[: int(len(content) * generator.random())]
    if kind == 1:
        begin = generator.randrange(len(content))
        return content[:begin] + content[begin // 2 :]
    return flipped(content, generator)


def replaced(content: object, generator: random.Random) -> object:
    """Nested data with one value, anywhere, turned into a huge number or something of a wrong type."""
    if isinstance(content, dict) and content and generator.random() < 0.8:
        name = generator.choice(sorted(content, key=str))
        return {**content, name: replaced(content[name], generator)}
    if isinstance(content, list) and content and generator.random() < 0.8:
        at = generator.randrange(len(content))
        return [*content[:at], replaced(content[at], generator), *content[at + 1 :]]
    return generator.choice(generator.choice((HUGE, WRONG)))


@pytest.fixture(autouse=True)
def nothing_is_executed(monkeypatch):
    """What a file could have run ends the test."""
    for name in ("system", "popen", "abort", "_exit"):
        monkeypatch.setattr(f"os.{name}", lambda *_, name=name: pytest.fail(f"a file ran os.{name}"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    """A good checkpoint."""
    path = tmp_path_factory.mktemp("good") / "classifier.safetensors"
    options = {"num_classes": 3, "mean": [0.4] * 3, "std": [0.3] * 3, "width": 2}
    classifier = classifiers.build("small_resnet", **options)
    facts = {"options": options, "note": [1, {"a": 2}]}
    save(path, classifier, kind="classifier", architecture="small_resnet", **facts)
    return path.read_bytes()


def rewritten(content: bytes, change: Callable[[dict], dict]) -> bytes:
    """A safetensors file with another header, as someone who knows the format would write it."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def with_other_facts(header: dict, generator: random.Random) -> dict:
    """One fact of ours replaced, and no digest that would give it away."""
    facts = json.loads(header["__metadata__"]["atoplib"])
    del facts["sha256"]
    changed = (
        replaced(facts, generator)
        if generator.random() < 0.3
        else {**facts, "options": replaced(facts["options"], generator)}
    )
    return {**header, "__metadata__": {"atoplib": json.dumps(changed)}}


def bad_checkpoints(good: bytes) -> Iterator[bytes]:
    """Every kind of damage, and of malice."""
    generator = random.Random(0)
    for number in range(COUNT):
        if number % 4 == 0:
            yield malformed(good, generator)
        elif number % 4 == 1:
            yield rewritten(good, lambda header: with_other_facts(header, generator))
        elif number % 4 == 2:
            yield rewritten(good, lambda header: replaced(header, generator))
        else:
            yield struct.pack("<Q", generator.choice((0, 1, 2**20, 2**31, 2**63, 2**64 - 1))) + good[8:]


def test_malformed_checkpoints_are_refused_with_a_sentence(tmp_path, checkpoint, monkeypatch):
    path, refused = tmp_path / "classifier.safetensors", 0
    for content in bad_checkpoints(checkpoint):
        path.write_bytes(content)
        try:
            load(path, kind="classifier")
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            # Only facts that decide on nothing may be other ones; the weights are those that were saved.
            assert (
                content[8 + struct.unpack("<Q", content[:8])[0] :]
                == checkpoint[8 + struct.unpack("<Q", checkpoint[:8])[0] :]
            )
    assert refused >= 0.9 * COUNT


def test_a_single_bit_turned_anywhere_in_a_checkpoint_is_noticed(tmp_path, checkpoint):
    generator, path = random.Random(1), tmp_path / "classifier.safetensors"
    for _ in range(COUNT // 2):
        changed = bytearray(checkpoint)
        changed[generator.randrange(len(checkpoint))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load(path, kind="classifier")


@pytest.mark.parametrize(
    "options", [{"width": 2**20}, {"width": 2**40}, {"num_classes": 2**33}, {"stem_stride": 2**70}]
)
def test_a_checkpoint_that_asks_for_gigabytes_gets_none(tmp_path, checkpoint, monkeypatch, options):
    def change(header: dict) -> dict:
        facts = json.loads(header["__metadata__"]["atoplib"])
        del facts["sha256"]
        facts["options"] |= options
        return {**header, "__metadata__": {"atoplib": json.dumps(facts)}}

    path = tmp_path / "classifier.safetensors"
    path.write_bytes(rewritten(checkpoint, change))
    real = torch.empty

    def empty(*sizes: object, **more: object) -> torch.Tensor:
        made = real(*sizes, **more)
        assert made.is_meta or made.numel() < 2**20, "it was allocated"
        return made

    monkeypatch.setattr(torch, "empty", empty)
    if "stem_stride" in options:
        load(path, kind="classifier")  # no weight depends on it
    else:
        with pytest.raises(CheckpointError, match="belong to another architecture|can be built"):
            load(path, kind="classifier")


def test_malformed_states_are_refused_with_a_sentence(tmp_path):
    path, generator = tmp_path / "state.pt", random.Random(2)
    state = {"networks": {"a": nn.Linear(20, 20).state_dict()}, "step": 3, "history": [{"loss": 1.0}]}
    save_state(path, state)
    good, loaded = path.read_bytes(), 0
    for _ in range(COUNT):
        path.write_bytes(malformed(good, generator))
        try:
            loaded_state, note = load_state(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            loaded += 1
            same = torch.equal(loaded_state["networks"]["a"]["weight"], state["networks"]["a"]["weight"])
            assert same and note is None, "a state with other weights was taken for whole"
    assert loaded < COUNT / 2
