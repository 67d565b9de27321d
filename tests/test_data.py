"""Data sets: what they hold, their orders and caches, and a clear sentence for each kind of bad input."""

import inspect
import os
import pickle
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from test_folders import make_tree, smooth_image

from atoplib import data
from atoplib.data import Split, augment, channel_statistics, epoch_batches, fingerprint, load_images, to_float


def random_split(count: int, size: int = 8) -> Split:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count))


def order(split: Split, batch_size: int, **options) -> list[int]:
    return [int(label) for _, labels in epoch_batches(split, batch_size, **options) for label in labels]


@pytest.fixture(scope="module")
def mnist5k() -> data.Dataset:
    return data.load("mnist5k")


class TestMnist5k:
    def test_holds_4000_and_1000_padded_digits_that_never_change(self, mnist5k):
        # Numbers in the README rest on this split: a change of these constants changes all of them.
        assert fingerprint(mnist5k.train) == "632cd8c1a80e48af"
        assert fingerprint(mnist5k.test) == "45f3b55d1a79bb4e"
        assert mnist5k.train.images.shape == (4000, 3, 32, 32) and mnist5k.classes == tuple("0123456789")
        assert mnist5k.train.labels.bincount().tolist() == [400] * 10
        assert mnist5k.test.labels.bincount().tolist() == [100] * 10
        assert mnist5k.train.images[:, :, 2:-2, 2:-2].sum() == mnist5k.train.images.sum(), (
            "the border is empty"
        )

    def test_subsets_mix_classes_are_nested_and_tell_their_indices(self, mnist5k, tmp_path):
        larger = data.load("mnist5k", max_train=200, max_test=100)
        smaller = data.load("mnist5k", max_train=50, max_test=[998, 3, 40])
        assert torch.equal(larger.train.images[:50], smaller.train.images)
        assert len(larger.test.labels.unique()) == 10 and smaller.test.indices.tolist() == [998, 3, 40]
        for some, whole in ((larger.train, mnist5k.train), (smaller.test, mnist5k.test)):
            assert torch.equal(whole.indices, torch.arange(len(whole.labels)))
            assert torch.equal(some.images, whole.images[some.indices])
            assert torch.equal(some.labels, whole.labels[some.indices])

    def test_images_for_a_start_are_always_the_first_of_one_order_and_never_downloaded(
        self, mnist5k, tmp_path
    ):
        images, labels = load_images("mnist5k", 64)
        known = data.load("mnist5k", max_test=64).test
        assert torch.equal(images, to_float(known.images)) and torch.equal(labels, known.labels)
        fewer, _ = load_images("mnist", 10)
        assert torch.equal(fewer, images[:10]) and not torch.equal(
            load_images("mnist5k", 10, seed=1)[0], fewer
        )
        assert torch.equal(load_images("mnist")[0][:64], images), "all begin as some do"
        assert len(load_images("mnist5k", split="train")[1]) == 4000
        with pytest.raises(ValueError, match="n must be at least 1"):
            load_images("mnist", -5)
        with pytest.raises(
            FileNotFoundError, match=r"cifar10 is not in .*; data\.load\('cifar10'\)` downloads it"
        ):
            load_images("cifar10", 4, data_dir=tmp_path)

    def test_image_size_resizes_and_caches(self, tmp_path):
        options = {"data_dir": tmp_path, "max_train": 20, "max_test": 10}
        own, resized = (data.load("mnist5k", image_size=size, **options).train.images for size in (None, 48))
        assert (
            resized.shape == (20, 3, 48, 48) and abs(to_float(resized).mean() - to_float(own).mean()) < 0.01
        )
        assert len(list((tmp_path / "cache").glob("mnist5k-48px-*.npy"))) == 2


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("CIFAR-10", {}, r"no data set 'CIFAR-10'.*mnist5k.*folder:PATH"),
        ("mnist5k", {"image_size": 0}, "must be at least 1"),
        ("mnist5k", {"image_size": -1}, "must be at least 1"),
        ("mnist5k", {"max_train": 0}, "must be at least 1"),
        ("mnist5k", {"max_train": -1}, "must be at least 1"),
        ("mnist5k", {"max_test": 0}, "must be at least 1"),
        ("mnist5k", {"max_test": -1}, "must be at least 1"),
        ("mnist5k", {"max_test": [3, 1000]}, "must lie in 0..999, got 1000"),
        ("mnist5k", {"max_test": []}, "must not be empty"),
    ],
    ids=str,
)
def test_impossible_arguments_are_named(name, options, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        data.load(name, **options)


class TestSplits:
    def test_an_epoch_visits_images_once_with_their_labels_in_whole_batches(self):
        split, seen = random_split(23), []
        for images, labels in epoch_batches(split, 5, seed=0, epoch=0):
            assert torch.equal(images, split.images[labels]) and len(labels) == 5
            seen += labels.tolist()
        assert len(set(seen)) == len(seen) == 20 and seen != sorted(seen)

    def test_the_order_depends_on_seed_and_epoch_alone_and_resumes_in_the_middle(self):
        # A training that was interrupted before an update of the kit resumes after it.
        assert order(random_split(12), 4, seed=0, epoch=0) == [6, 1, 8, 0, 4, 3, 7, 11, 9, 2, 5, 10]
        split, before = random_split(50), torch.get_rng_state()
        assert order(split, 8, seed=4, epoch=1, start=2) == order(split, 8, seed=4, epoch=1)[16:]
        assert order(split, 8, seed=4, epoch=1, start=6) == []
        others = {tuple(order(split, 10, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
        assert len(others) == 9 and torch.equal(torch.get_rng_state(), before)

    def test_augmented_images_are_one_of_the_shifts_and_mirrors_of_each(self):
        images, before = random_split(40).images, torch.get_rng_state()
        results, again = (
            augment(images, generator=torch.Generator().manual_seed(0), padding=2) for _ in range(2)
        )
        assert torch.equal(results, again) and torch.equal(torch.get_rng_state(), before)
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
            (match,) = [draw for draw, candidate in candidates.items() if torch.equal(candidate, result)]
            drawn.add(match)
        assert {flip for *_, flip in drawn} == {False, True}
        assert {dy for dy, _, _ in drawn} == {dx for _, dx, _ in drawn} == set(range(5))
        assert torch.equal(augment(images, generator=torch.Generator(), padding=0, flip=False), images)
        with pytest.raises(ValueError, match=r"padding must lie in 0\.\.7, got 8"):
            augment(images, generator=torch.Generator(), padding=8)

    def test_channel_statistics_agree_with_float64_in_one_part_or_in_several(self):
        images = random_split(30).images
        large = images[:3].repeat(120, 1, 16, 32)
        assert large.numel() > 2**24
        for given in (images, large):
            mean, std = channel_statistics(given)
            wide = given.double() / 255
            assert mean == pytest.approx(wide.mean(dim=(0, 2, 3)).tolist(), abs=1e-12)
            assert std == pytest.approx(wide.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-12)
        images[:, 1] = 7
        with pytest.raises(ValueError, match="cannot be normalised"):
            channel_statistics(images)
        with pytest.raises(ValueError, match="float32.*uint8"):
            inspect.unwrap(to_float)(torch.rand(1, 3, 4, 4))

    def test_fingerprints_tell_pixels_labels_and_shapes_apart_and_floats_reach_1(self):
        split = random_split(4)
        pixel = split.images.clone()
        pixel[0, 0, 0, 0] += 1
        others = [
            Split(pixel, split.labels),
            Split(split.images, split.labels.flip(0)),
            Split(split.images.view(4, 3, 4, 16), split.labels),
        ]
        assert len({fingerprint(each) for each in (split, *others)}) == 4
        assert fingerprint(split) == fingerprint(random_split(4))
        values = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1))
        assert values.flatten().tolist() == pytest.approx([0.0, 0.2, 1.0]) and values.dtype == torch.float32


def fake_set(classes: int, *, present: bool = True, error: Exception | None = None, size: int = 32):
    """A stand-in for torchvision's class: `error` is what its download raises, `present` whether it needs
    one."""
    calls = []

    class Fake:
        def __init__(self, root, train=True, download=False):
            calls.append((download, socket.getdefaulttimeout()))
            if not present and not download:
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            if download:
                print("Downloading ...", file=sys.stderr)
                if error:
                    raise error
            count = 40 if train else 20
            smooth = np.stack([np.asarray(smooth_image(i, size, size)) for i in range(count)])
            self.data, self.targets = (
                smooth if size == 32 else smooth[..., 0],
                [i % classes for i in range(count)],
            )
            self.classes = [f"class{i}" for i in range(classes)]

    Fake.calls = calls
    return Fake


class TestTorchvisionSets:
    @pytest.mark.parametrize(
        "name, kind, classes, size",
        [("cifar10", "CIFAR10", 10, 32), ("cifar100", "CIFAR100", 20, 32), ("mnist", "MNIST", 10, 28)]
        + [("fashion_mnist", "FashionMNIST", 10, 28)],
    )
    def test_pixels_and_labels_are_kept_digits_padded_and_nothing_downloaded_that_is_there(
        self, tmp_path, monkeypatch, name, kind, classes, size
    ):
        fake = fake_set(classes, size=size)
        monkeypatch.setattr(torchvision.datasets, kind, fake)
        dataset, expected = data.load(name, data_dir=tmp_path), fake(tmp_path).data
        assert [download for download, _ in fake.calls] == [False] * 3
        if size == 28:
            expected = np.repeat(np.pad(expected, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=3)
        assert np.array_equal(dataset.train.images.permute(0, 2, 3, 1).numpy(), expected)
        assert dataset.test.labels.tolist() == [i % classes for i in range(20)]
        if name != "mnist":
            assert dataset.classes == tuple(f"class{i}" for i in range(classes))

    def test_download_is_quiet_has_a_timeout_and_reports_progress(self, tmp_path, monkeypatch, capfd):
        fake, seen = fake_set(10, present=False), []
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
        data.load("cifar10", data_dir=tmp_path, progress=lambda *step: seen.append(step))
        assert (0, 1, "CIFAR10 download") in seen
        assert capfd.readouterr() == ("", "") and (True, 30.0) in fake.calls
        assert socket.getdefaulttimeout() is None

    @pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
    @pytest.mark.parametrize(
        "error",
        [
            urllib.error.URLError("no name"),
            RuntimeError("Error downloading\ntrain-images"),
            OSError(28, "No space left on device"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_no_network_is_one_sentence_with_a_way_out(self, tmp_path, monkeypatch, name, kind, error):
        monkeypatch.setattr(torchvision.datasets, kind, fake_set(10, present=False, error=error))
        with pytest.raises(FileNotFoundError, match="by hand, or use mnist5k.*folder:PATH") as raised:
            data.load(name, data_dir=tmp_path)
        assert str(raised.value).startswith(f"{name} is not complete in {tmp_path}") and "\n" not in str(
            raised.value
        )

    def test_truncated_files_are_named(self, tmp_path):
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name in (
            f"{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")
        ):
            (raw / name).write_bytes(b"\0\0\x08\x03\0\0\xea\x60\0\0\0\x1c\0\0\0\x1c\0\0")
        with pytest.raises(ValueError, match="MNIST is damaged.*delete it and run again"):
            data.load("mnist", data_dir=tmp_path)

    def test_forged_cifar_files_are_never_unpickled(self, tmp_path, monkeypatch):
        # torchvision reads pickles, so a changed file must fail its checksum before it is opened.
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
            (folder / name).write_bytes(pickle.dumps({"data": 1}))
        monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
        with pytest.raises(FileNotFoundError, match="is not in"):
            data.load("cifar10", data_dir=tmp_path, download=False)


class TestImagenette:
    def test_is_decoded_at_256_px_with_the_names_of_its_classes_and_refused_in_part(
        self, tmp_path, monkeypatch
    ):
        root = tmp_path / "imagenette2-320"
        make_tree(root, test="val", classes=("n01440764", "n02102040"), each=4, size=(48, 40), end="JPEG")
        monkeypatch.setattr(data.sources, "IMAGENETTE_IMAGES", {"train": 8, "val": 8})
        dataset = data.load("imagenette", data_dir=tmp_path)
        assert dataset.train.images.shape == (8, 3, 256, 256) and dataset.classes == (
            "tench",
            "English springer",
        )
        assert dataset.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        (root / "train" / "n01440764" / "0.JPEG").unlink()
        with pytest.raises(
            ValueError, match=r"holds 7 images instead of 8.*interrupted: delete .*imagenette2-320"
        ):
            data.load("imagenette", data_dir=tmp_path)

    @pytest.mark.parametrize(("image_size", "size"), [(None, "320px"), (320, "320px"), (384, "full")])
    def test_downloads_the_smallest_archive_that_is_large_enough(
        self, tmp_path, monkeypatch, image_size, size
    ):
        asked = []

        def fake(root, **options):
            asked.append(options)
            raise RuntimeError("Dataset not found. You can use download=True to download it.")

        monkeypatch.setattr(torchvision.datasets, "Imagenette", fake)
        with pytest.raises(FileNotFoundError, match=r"imagenette2-320\.tgz.*by hand"):
            data.load("imagenette", data_dir=tmp_path, image_size=image_size)
        assert asked == [{"split": "train", "size": size}, {"split": "train", "size": size, "download": True}]


def test_import_loads_no_torchvision_and_touches_no_file(tmp_path):
    code = "import sys, atoplib.data; sys.exit('torchvision' in sys.modules or 'mlxtend' in sys.modules)"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(data.__file__).parents[2]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert not list(tmp_path.iterdir())
