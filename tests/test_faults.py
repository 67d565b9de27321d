"""Kinds of faults that users once found, in instances beside those of the other files: none may come back."""

import importlib
import struct
import sys
import zlib

import pytest
import torch
from PIL import Image
from test_hashing import compiled
from torch import nn
from zoo import WORKS, LeNet, images_of, made

from atoplib.attacks import ATTACKS, RADII, Ball
from atoplib.batch.checks import check
from atoplib.data import Split
from atoplib.data.images import folder_listings, read_image
from atoplib.evaluation import PROTOCOLS, evaluate
from atoplib.hashing import function_hash, path_hash

SHORT = {"steps": 2, "eot_samples": 1, "restarts": 1, "queries": 5, "samples": 2, "angles": 3, "shifts": 1}
OWN = [name for name in ATTACKS if ":" not in name]


def attacked(row, model, images, labels, norm, **options):
    options = {name: value for name, value in (SHORT | options).items() if name in row.options} | {
        name: value for name, value in options.items() if name == "targets"
    }
    return row.function(model, images, labels, eps=RADII[norm][0], norm=norm, **options)


# ------------------------------------------------------------------------------------------ stale numbers


SOURCES = {
    "module": "import fault_outer\ndef step(x, y, epoch):\n    return fault_outer.f(x)\n",
    "imported in the step": "def step(x, y, epoch):\n    from fault_outer import f\n    return f(x)\n",
    "a module of a package": "def step(x, y, epoch):\n    from fault import outer\n    return outer.f(x)\n",
    "relative, in the step": "from fault.relative import step\n",
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_an_edit_of_what_a_users_module_imports_makes_another_step(source, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "fault").mkdir()
    outer = "from {}inner import g\ndef f(x):\n    return g(x)\n"
    relative = "def step(x, y, epoch):\n    from . import outer\n    return outer.f(x)\n"
    files = {"fault/__init__": "", "fault/outer": outer.format("."), "fault/relative": relative}
    files["fault_outer"] = outer.format("fault_")
    found = []
    for factor in (1, 1, 0):
        inner = f"def g(x):\n    return {factor} * x\n"
        for name, text in (files | {"fault_inner": inner, "fault/inner": inner}).items():
            (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.startswith("fault")]:
            sys.modules.pop(name)
        found.append(function_hash(compiled(source)))
    assert found[0] == found[1] != found[2]


# ------------------------------------------------------------------------------------- networks and labels


def test_labels_of_shape_n_1_make_no_split(without_shape_checks):
    with pytest.raises(ValueError, match="one class an image"):
        Split(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["in place on the input", "half", "view", "tuple"])
@pytest.mark.parametrize("name", sorted(set(OWN) - {"fgsm", "pgd", "apgd", "square", "flow"}))
def test_every_further_attack_takes_odd_networks_and_leaves_the_images_alone(name, kind):
    model, images, row = made(WORKS[kind]), images_of(2), ATTACKS[name]
    before, labels = images.clone(), torch.zeros(2, dtype=torch.int64)
    found = attacked(row, model, images, labels, row.norms[0])
    assert torch.equal(images, before) and found.dtype == torch.float32 and found.shape == images.shape


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("name", [name for name in OWN if ATTACKS[name].gradient and ATTACKS[name].targeted])
def test_a_targeted_attack_reaches_its_targets_also_with_restarts(name, restarts):
    model, images = made(lambda: LeNet((16, 16), 4)), images_of(4)
    labels = model(images).argmax(dim=1)
    targets = (labels + 1) % 4
    row = ATTACKS[name]
    found = attacked(row, model, images, labels, row.norms[0], steps=20, restarts=restarts, targets=targets)
    assert torch.equal(model(found).argmax(dim=1), targets)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "name",
    [
        "quick",
        "cpu",
        "standard",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("strict", "authors-log")),
    ],
)
def test_every_protocol_runs_with_few_classes_and_says_what_it_left_out(name, classes):
    model, images, protocol = made(lambda: LeNet((16, 16), classes)), images_of(2), PROTOCOLS[name]
    few = {
        key: 1 for key in ("steps", "eot_samples", "queries") if any(key in r.options for r in protocol.rows)
    }
    result = evaluate(
        {"undefended": model, "defence": model},
        images,
        model(images).argmax(1),
        protocol=protocol,
        eps=0.1,
        **few,
    )
    headings = set(result.frame.attack)
    needs = {"autoattack": 4, "apgd": 3}
    assert any(f"({classes} classes)" in heading for heading in headings) == any(
        needs.get(row.attack, 2) > classes for row in protocol.rows
    )
    assert not any(heading.startswith("AutoAttack") and ":" not in heading for heading in headings)


@pytest.mark.parametrize(
    "name, norm", [(n, norm) for n in OWN for norm in ATTACKS[n].norms if norm in ("l2", "l1")]
)
def test_every_attack_stays_in_its_ball_at_224_pixels(name, norm):
    network = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)).eval()
    images = images_of(1, (224, 224))
    found = attacked(ATTACKS[name], network, images, network(images).argmax(dim=1), norm)
    if name not in ("ddn", "fmn"):
        Ball(images, RADII[norm][0], norm).check(found)


# ----------------------------------------------------------------------------------------- before an hour


@pytest.mark.parametrize("field", ["classifier_run", "at_run"])
def test_a_file_of_weights_that_is_not_there_is_known_before_anything_runs(field, tmp_path):
    path = tmp_path / "weights.pth"
    p = {"device": "cpu", field: str(path)}
    with pytest.raises(ValueError, match=field):
        check(p)
    path.touch()
    check(p)


# ------------------------------------------------------------------------------------------------- images


def grey_png(path, bits, pixels, clear):
    """A grey PNG of one row with a transparent colour."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    row = sum(value << bits * (7 - i) for i, value in enumerate([*pixels, *[0] * (8 - len(pixels))]))
    head = struct.pack(">IIBBBBB", len(pixels), 1, bits, 0, 0, 0, 0)
    data = zlib.compress(b"\0" + row.to_bytes(bits, "big")[: -(-bits * len(pixels) // 8)])
    chunks = (b"IHDR", head), (b"tRNS", struct.pack(">H", clear)), (b"IDAT", data), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_colour_of_a_grey_png_is_white_at_every_depth(bits, tmp_path):
    grey_png(tmp_path / "a.png", bits, (0, 1), 0)
    grey_png(tmp_path / "b.png", bits, (0, 1), 1)
    first, second = (read_image(tmp_path / name)[0, :, 0].tolist() for name in ("a.png", "b.png"))
    assert first == [255, round(255 / (2**bits - 1))] and second == [0, 255]


@pytest.mark.parametrize("junk", ["@eaDir", "@Recycle", "@tmp", "~snapshot", "System Volume Information"])
def test_what_drives_put_into_folders_is_no_class_no_image_and_no_change(junk, tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "@home"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "1.png")
    before = path_hash(tmp_path)
    for place in (tmp_path / "train" / junk, tmp_path / "train" / "cat" / junk):
        place.mkdir()
        Image.new("RGB", (8, 8)).save(place / "thumb.jpg")
    listing = folder_listings(f"folder:{tmp_path}")[0]
    assert listing.classes == ("@home", "cat") and len(listing.files) == 2 and path_hash(tmp_path) == before
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "@home" / "1.png")
    assert path_hash(tmp_path) != before
