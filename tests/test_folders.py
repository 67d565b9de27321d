"""Folders of images: what is read of them and of each image, their caches, a sentence for each kind of bad
input."""

import io
import os
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from atoplib import data
from atoplib.data import epoch_batches, facts_of, fingerprint, read_image
from atoplib.hashing import path_hash


def smooth_image(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    """Smooth, so that a JPEG of it stays close."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def make_tree(
    root: Path, *, test: str = "test", classes=("cat", "dog"), each: int = 3, size=(16, 16), end="png"
) -> Path:
    for split in ("train", test):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                smooth_image(10 * label + i, *size).save(root / split / name / f"{i}.{end}")
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "images")


def load(tree: Path, **options) -> data.Dataset:
    return data.load(f"folder:{tree}", data_dir=tree.parent / "data", **options)


def caches(tree: Path) -> list[Path]:
    return sorted((tree.parent / "data" / "cache").glob("*"))


class TestFolder:
    def test_reads_pixels_and_labels_by_class_name(self, tree, tmp_path):
        dataset = load(tree)
        assert dataset.classes == ("cat", "dog") and dataset.name == tree.name
        assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert np.array_equal(
            dataset.train.images[4].numpy(), np.asarray(smooth_image(11)).transpose(2, 0, 1)
        )
        assert facts_of(f"folder:{tree}") == (("cat", "dog"), 6, 6, (16, 16))
        wide = load(make_tree(tmp_path / "other" / "images", test="val", size=(24, 16)))
        assert len(wide.test.labels) == 6 and wide.train.images.shape == (6, 3, 16, 24)

    def test_labels_of_test_follow_the_classes_of_train(self, tmp_path):
        tree = make_tree(tmp_path / "images", classes=("a", "b", "c"))
        shutil.rmtree(tree / "test" / "a")
        assert load(tree).test.labels.tolist() == [1, 1, 1, 2, 2, 2]

    def test_hidden_files_and_notes_are_no_images_and_no_classes(self, tree):
        for folder in (tree / "train", tree / "train" / "cat"):
            (folder / ".ipynb_checkpoints").mkdir()
            Image.new("RGB", (8, 8)).save(folder / ".ipynb_checkpoints" / "thumbnail.jpg")
            (folder / "notes.txt").write_text("no image")
        (tree / "train" / "cat" / "._0.png").write_bytes(b"a file manager's note")
        dataset = load(tree)
        assert dataset.classes == ("cat", "dog") and len(dataset.train.labels) == 6

    def test_other_formats_are_counted_in_a_warning_and_jfif_is_jpeg(self, tree):
        for name in ("a.gif", "b.HEIC", "notes.txt"):
            (tree / "train" / "cat" / name).write_bytes(b"x")
        smooth_image(0).save(tree / "train" / "dog" / "more.jfif", format="JPEG")
        with pytest.warns(
            UserWarning, match=r"^2 files of .*train are left out, .*/a\.gif for one: images are read from"
        ):
            assert len(load(tree).train.labels) == 7

    def test_image_size_takes_the_central_square_antialiased(self, tmp_path):
        images = load(make_tree(tmp_path / "images", size=(24, 16)), image_size=16).train.images
        centre = np.asarray(smooth_image(0, 24, 16))[:, 4:20].transpose(2, 0, 1)
        assert np.array_equal(images[0].numpy(), centre)
        stripes = np.tile(np.array([[[255] * 3, [0] * 3]], dtype=np.uint8), (64, 32, 1))
        Image.fromarray(stripes).save(tmp_path / "stripes.png")
        assert np.abs(read_image(tmp_path / "stripes.png", 8).astype(int) - 127).max() < 20

    def test_a_subset_is_decoded_alone_and_is_part_of_the_whole(self, tree):
        seen = []
        part = load(tree, max_train=2, max_test=[2, 0], progress=lambda *step: seen.append(step))
        assert seen == [(2, 2, "train images"), (2, 2, "test images")]
        whole = load(tree)
        assert part.test.indices.tolist() == [2, 0]
        for some, split in ((part.train, whole.train), (part.test, whole.test)):
            assert torch.equal(some.images, split.images[some.indices])
            assert torch.equal(some.labels, split.labels[some.indices])


class TestCache:
    def test_second_load_decodes_nothing_but_changed_or_added_files(self, tree, monkeypatch):
        before = load(tree)
        with monkeypatch.context() as patch:
            patch.setattr(data.images, "read_image", lambda *_: pytest.fail("decoded again"))
            assert fingerprint(load(tree).train) == fingerprint(before.train)
        smooth_image(99).save(tree / "train" / "cat" / "0.png")
        os.utime(tree / "train" / "cat" / "0.png", ns=(1, 1))
        changed = load(tree).train
        assert not torch.equal(changed.images[0], before.train.images[0])
        assert torch.equal(changed.images[1:], before.train.images[1:])
        smooth_image(98).save(tree / "train" / "dog" / "9.png")
        assert len(load(tree).train.labels) == 7

    def test_large_set_is_mapped_and_equal_to_the_small_one(self, tree, monkeypatch, recwarn):
        small = load(tree)
        monkeypatch.setattr(data.sources, "SMALL_SET_BYTES", 1000)
        large = load(tree)
        assert fingerprint(small.train) == fingerprint(large.train)
        assert str(caches(tree)[1]) in Path("/proc/self/maps").read_text()
        pairs = zip(*(epoch_batches(d.train, 2, seed=0, epoch=0) for d in (small, large)), strict=True)
        for (images, labels), (mapped, mapped_labels) in pairs:
            assert torch.equal(images, mapped) and torch.equal(labels, mapped_labels)
        assert not recwarn.list

    @pytest.mark.parametrize("kept", [200, 0])
    def test_damaged_cache_is_made_again(self, tree, kept):
        before = load(tree)
        for path in caches(tree):
            path.write_bytes(path.read_bytes()[:kept])
        assert fingerprint(load(tree).train) == fingerprint(before.train)

    def test_interrupted_decoding_leaves_no_cache(self, tree):
        def interrupt(done, total, unit):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            load(tree, progress=interrupt)
        assert caches(tree) == [] and len(load(tree).train.labels) == 6


class TestImages:
    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
    def test_16_bit_gray_is_scaled_not_clipped(self, tmp_path, suffix):
        values = np.array([[0, 257, 1000, 32768, 65278, 65535]], dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
        assert read_image(tmp_path / f"deep.{suffix}")[0, :, 1].tolist() == [0, 1, 4, 128, 254, 255]

    def test_transparency_of_every_kind_is_composited_over_white(self, tmp_path):
        pixels = np.array([[[200, 0, 0, 0], [200, 0, 0, 128], [200, 0, 0, 255]]], dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").save(tmp_path / "alpha.png")
        image = read_image(tmp_path / "alpha.png").astype(int)
        assert image[0, 0].tolist() == [255, 255, 255] and image[0, 2].tolist() == [200, 0, 0]
        assert np.abs(image[0, 1] - [227, 127, 127]).max() <= 1
        Image.fromarray(np.array([[[9, 0], [9, 255]]], dtype=np.uint8), "LA").save(tmp_path / "la.png")
        assert read_image(tmp_path / "la.png")[0, :, 0].tolist() == [255, 9]
        deep = Image.fromarray(np.array([[1000, 1001, 0]], dtype=np.uint16))  # 1000 and 1001 are one byte
        deep.save(tmp_path / "deep.png", transparency=1000)
        assert read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [255, 4, 0]

    def test_gray_palettes_and_cmyk_give_their_colours(self, tmp_path):
        smooth_image(0).convert("L").save(tmp_path / "gray.png")
        gray = np.asarray(smooth_image(0).convert("L"))
        assert np.array_equal(read_image(tmp_path / "gray.png"), np.stack([gray] * 3, axis=2))
        image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.save(tmp_path / "palette.png", transparency=0)
        assert read_image(tmp_path / "palette.png").tolist() == [[[255, 255, 255], [200, 100, 50]]]
        smooth_image(0).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
        assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - np.asarray(smooth_image(0))).mean() < 6

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_exif_orientation_is_applied_and_damaged_exif_passed_over(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: to be shown rotated by 90 degrees clockwise
        smooth_image(0, 16, 8).save(tmp_path / "turned.png", exif=exif)
        assert np.array_equal(
            read_image(tmp_path / "turned.png"), np.rot90(np.asarray(smooth_image(0, 16, 8)), -1)
        )
        smooth_image(0).save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
        assert read_image(tmp_path / "exif.jpg").shape == (16, 16, 3)

    def test_values_of_unknown_range_and_bombs_are_refused_before_they_are_decoded(self, tmp_path):
        Image.fromarray(np.array([[0.5, 3e5]], dtype=np.float32)).save(tmp_path / "float.tif")
        with pytest.raises(ValueError, match=r"float\.tif .*float32 pixels.*8 or 16 bits"):
            read_image(tmp_path / "float.tif")
        smooth_image(0).save(tmp_path / "bomb.bmp")
        content = bytearray((tmp_path / "bomb.bmp").read_bytes())
        content[18:26] = struct.pack("<ii", 60_000, 60_000)
        (tmp_path / "bomb.bmp").write_bytes(content)
        with pytest.raises(ValueError, match=r"bomb\.bmp cannot be decoded .*3600000000 pixels"):
            read_image(tmp_path / "bomb.bmp")

    def test_a_hundred_malformed_images_are_refused_by_name_or_are_images(self, tmp_path):
        numbers, refused = random.Random(4), 0
        pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        for number in range(100):
            suffix = ("png", "jpeg", "webp", "bmp", "ppm", "tiff")[number % 6]
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, suffix)
            content, path = bytearray(buffer.getvalue()), tmp_path / f"{number}.{suffix}"
            if number % 3 == 0:
                content = content[: int(len(content) * numbers.random())]
            else:
                for _ in range(numbers.choice((1, 8, 64))):
                    content[int(len(content) * numbers.random() ** 4)] ^= 1 << numbers.randrange(8)
            path.write_bytes(content)
            try:
                assert read_image(path, 16).shape == (16, 16, 3)
            except ValueError as error:
                assert str(path) in str(error) and "replace it or remove it" in str(error)
                refused += 1
        assert refused >= 40


def _link(tree: Path, name: str, target: str) -> None:
    make_tree(tree.parent / "outside")
    (tree / name).symlink_to(tree.parent / target)


BAD_FOLDERS = {
    "empty class": (
        lambda t: (t / "test" / "emu").mkdir(),
        ValueError,
        r"test/emu holds no image.*\.png.*delete it",
    ),
    "class that train lacks": (
        lambda t: (
            make_tree(t, classes=("emu",), test="val") and (t / "train" / "emu").rename(t / "test" / "emu")
        ),
        ValueError,
        r"test holds the class 'emu'.*train does not: add it",
    ),
    "two sizes": (
        lambda t: smooth_image(0, 20, 12).save(t / "train" / "dog" / "2.png"),
        ValueError,
        r"0\.png is 16 x 16.*2\.png is 12 x 20.*give image_size",
    ),
    "splits of two sizes": (
        lambda t: [smooth_image(0, 20, 20).save(path) for path in (t / "test").rglob("*.png")],
        ValueError,
        "train is 16 x 16, .*test is 20 x 20: give image_size",
    ),
    "damaged image": (
        lambda t: (t / "train" / "dog" / "1.png").write_bytes(b"x"),
        ValueError,
        r"dog/1\.png cannot be decoded",
    ),
    "circle": (
        lambda t: _link(t, "train/cat/round", "images/train"),
        ValueError,
        "round is a link to a folder that .* holds already",
    ),
    "link to nothing": (
        lambda t: _link(t, "train/cat/x.png", "images/train/no.png"),
        FileNotFoundError,
        r"x\.png",
    ),
}


@pytest.mark.parametrize("change, kind, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_by_the_name_of_what_is_wrong(tree, change, kind, message):
    change(tree)
    with pytest.raises(kind, match=message):
        load(tree)
    assert not [path for path in caches(tree) if path.suffix != ".npy"], "half a cache was left"


def test_links_to_files_and_to_folders_of_a_class_are_followed_and_what_is_there_counts(tree):
    _link(tree, "train/emu", "outside/test/cat")
    (tree / "train" / "cat" / "link.png").symlink_to(tree.parent / "outside" / "train" / "cat" / "0.png")
    linked = load(tree)
    assert linked.classes[-1] == "emu" and linked.train.labels.bincount().tolist() == [4, 3, 3]
    (tree / ".venv" / "lib").mkdir(parents=True)
    (tree / ".venv" / "lib64").symlink_to(tree / ".venv" / "lib")  # no data, so it may be there twice
    before = path_hash(tree)
    (tree.parent / "outside" / "test" / "cat" / "0.png").unlink()
    assert path_hash(tree) != before and len(load(tree).train.labels) == 9


def test_a_file_that_is_replaced_by_one_of_equal_name_size_and_time_is_another(tree):
    path, before, hashed = tree / "train" / "cat" / "0.png", load(tree).train.images[0], path_hash(tree)
    other, stat = (tree / "train" / "dog" / "0.png").read_bytes(), path.stat()
    path.write_bytes(other[: stat.st_size].ljust(stat.st_size, b"\0"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.stat().st_mtime_ns == stat.st_mtime_ns
    assert path_hash(tree) != hashed and not torch.equal(load(tree).train.images[0], before)


def test_missing_folders_splits_and_classes_are_named(tmp_path):
    (tmp_path / "half" / "train").mkdir(parents=True)
    for name in ("folder:", "folder:  ", "folder:/no/such/place", f"folder:{tmp_path}/half"):
        with pytest.raises(FileNotFoundError, match=f"{name}.*lacks .*train/CLASS/IMAGE"):
            data.load(name, data_dir=tmp_path)
    (tmp_path / "half" / "test").mkdir()
    with pytest.raises(ValueError, match="holds no class"):
        data.load(f"folder:{tmp_path}/half", data_dir=tmp_path)
    with pytest.raises(ValueError, match="one class only.*'cat'.*at least two"):
        load(make_tree(tmp_path / "images", classes=("cat",)))
