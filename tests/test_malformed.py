"""A hundred malformed files of each kind: a sentence each; no crash, no code run, no hang."""

import io
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from atoplib.batch import RecipeError, make_plan, read_recipe
from atoplib.batch.recipe import MOST_POINTS
from atoplib.checkpoints import CheckpointError, load_checkpoint, load_state, save_checkpoint, save_state
from atoplib.classifiers import build_classifier
from atoplib.data import load_dataset, read_image

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
COUNT = 100
HUGE = (2**31, 2**63, -1, 10**30, 1e308, float("inf"), float("nan"))
WRONG = (None, True, "x", "", [], [1], {}, {"a": 1}, [[]] * 3, "!!python/object/apply:os.abort []")


def flipped(content: bytes, dice: random.Random) -> bytes:
    """Some bits turned, most of them near the beginning, where the structure stands."""
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 8, 64))):
        at = int(len(content) * dice.random() ** dice.choice((1, 4, 16)))
        changed[min(at, len(content) - 1)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def malformed(content: bytes, dice: random.Random) -> bytes:
    """Truncated, bit-flipped, doubled in part, or empty."""
    how = dice.randrange(4)
    if how == 0:
        return content[: int(len(content) * dice.random())]
    if how == 1:
        begin = dice.randrange(len(content))
        return content[:begin] + content[begin // 2 :]
    return flipped(content, dice)


def replaced(content: object, dice: random.Random) -> object:
    """Nested data with one value, anywhere, turned into a huge number or something of a wrong type."""
    if isinstance(content, dict) and content and dice.random() < 0.8:
        name = dice.choice(sorted(content, key=str))
        return {**content, name: replaced(content[name], dice)}
    if isinstance(content, list) and content and dice.random() < 0.8:
        at = dice.randrange(len(content))
        return [*content[:at], replaced(content[at], dice), *content[at + 1 :]]
    return dice.choice(dice.choice((HUGE, WRONG)))


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
    classifier = build_classifier("small_resnet", **options)
    save_checkpoint(path, classifier, kind="classifier", architecture="small_resnet", options=options, note=[1, {"a": 2}])
    return path.read_bytes()


def rewritten(content: bytes, change: Callable[[dict], dict]) -> bytes:
    """A safetensors file with another header, as someone who knows the format would write it."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def with_other_facts(header: dict, dice: random.Random) -> dict:
    """One fact of ours replaced, and no digest that would give it away."""
    facts = json.loads(header["__metadata__"]["atoplib"])
    del facts["sha256"]
    changed = replaced(facts, dice) if dice.random() < 0.3 else {**facts, "options": replaced(facts["options"], dice)}
    return {**header, "__metadata__": {"atoplib": json.dumps(changed)}}


def bad_checkpoints(good: bytes) -> Iterator[bytes]:
    """Every kind of damage, and of malice."""
    dice = random.Random(0)
    for number in range(COUNT):
        if number % 4 == 0:
            yield malformed(good, dice)
        elif number % 4 == 1:
            yield rewritten(good, lambda header: with_other_facts(header, dice))
        elif number % 4 == 2:
            yield rewritten(good, lambda header: replaced(header, dice))
        else:
            yield struct.pack("<Q", dice.choice((0, 1, 2**20, 2**31, 2**63, 2**64 - 1))) + good[8:]


def test_malformed_checkpoints_are_refused_with_a_sentence(tmp_path, checkpoint, monkeypatch):
    path, refused = tmp_path / "classifier.safetensors", 0
    for content in bad_checkpoints(checkpoint):
        path.write_bytes(content)
        try:
            load_checkpoint(path, kind="classifier")
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
    dice, path = random.Random(1), tmp_path / "classifier.safetensors"
    for _ in range(COUNT):
        changed = bytearray(checkpoint)
        changed[dice.randrange(len(checkpoint))] ^= 1 << dice.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_checkpoint(path, kind="classifier")


@pytest.mark.parametrize("options", [{"width": 2**20}, {"width": 2**40}, {"num_classes": 2**33}, {"stem_stride": 2**70}])
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
        load_checkpoint(path, kind="classifier")  # no weight depends on it
    else:
        with pytest.raises(CheckpointError, match="belong to another architecture|cannot be built"):
            load_checkpoint(path, kind="classifier")


def test_malformed_states_are_refused_with_a_sentence(tmp_path):
    path, dice = tmp_path / "state.pt", random.Random(2)
    state = {"networks": {"a": nn.Linear(20, 20).state_dict()}, "step": 3, "history": [{"loss": 1.0}]}
    save_state(path, state)
    good, loaded = path.read_bytes(), 0
    for _ in range(COUNT):
        path.write_bytes(malformed(good, dice))
        try:
            found, note = load_state(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            loaded += 1
            same = torch.equal(found["networks"]["a"]["weight"], state["networks"]["a"]["weight"])
            assert same and note is None, "a state with other weights was taken for whole"
    assert loaded < COUNT / 2


def bad_recipes() -> Iterator[bytes]:
    """Damaged recipes, and well-formed ones with impossible content."""
    dice = random.Random(3)
    sources = [(FOLDER / "recipes" / f"{name}.yaml").read_bytes() for name in ("mnist", "cifar10")]  # quick to check
    for number in range(COUNT):
        source = dice.choice(sources)
        if number % 2:
            yield malformed(source, dice)
        else:
            content = yaml.safe_load(source)
            content["grid"] = {"seed": [0, 1], "04_attack": {"steps": [1, 2]}}
            yield yaml.safe_dump(replaced(content, dice)).encode()


def test_malformed_recipes_are_refused_with_a_sentence_or_are_whole(tmp_path):
    path, refused = tmp_path / "recipe.yaml", 0
    for content in bad_recipes():
        path.write_bytes(content)
        try:
            jobs = make_plan(read_recipe(path), FOLDER, {"workspace": str(tmp_path)})
        except RecipeError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 5000
            refused += 1
        else:
            assert 0 < len(jobs) <= MOST_POINTS * 5  # damage may hit a comment, or give another allowed number
    assert refused >= 0.6 * COUNT
    assert list(tmp_path.iterdir()) == [path]


def images() -> dict[str, bytes]:
    """A good image of every format."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    good = {}
    for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP"), ("ppm", "PPM"), ("tif", "TIFF")):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        good[suffix] = buffer.getvalue()
    return good


def test_malformed_images_are_refused_by_name_or_are_images(tmp_path):
    dice, good, refused = random.Random(4), images(), 0
    for number in range(COUNT):
        suffix = sorted(good)[number % len(good)]
        path = tmp_path / f"{number}.{suffix}"
        path.write_bytes(malformed(good[suffix], dice))
        try:
            pixels = read_image(path, 16)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert refused >= 0.4 * COUNT


def test_a_folder_with_a_malformed_image_is_refused_by_the_name_of_the_file(tmp_path):
    dice, good = random.Random(5), images()["png"]
    for number in range(COUNT // 10):
        root = tmp_path / str(number)
        for split in ("train", "test"):
            for name in ("a", "b"):
                (root / split / name).mkdir(parents=True)
                (root / split / name / "0.png").write_bytes(good)
        bad = root / dice.choice(("train", "test")) / dice.choice("ab") / "0.png"
        bad.write_bytes(good[: dice.randrange(len(good) // 2)])
        with pytest.raises(ValueError, match=str(bad)):
            load_dataset(f"folder:{root}", data_dir=tmp_path / "data")


def test_an_image_of_a_few_bytes_and_billions_of_pixels_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "bomb.bmp"
    content = bytearray(images()["bmp"])
    content[18:26] = struct.pack("<ii", 60_000, 60_000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="too large to be decoded safely"):
        read_image(path)
