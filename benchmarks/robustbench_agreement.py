"""RobustBench's ``benchmark`` on a classifier of the kit, to its end, and our AutoAttack on the same images.

    python -m benchmarks.robustbench_agreement folder:PATH [--defence undefended] [--images 32] [--eps 0.5/255]

PATH holds test/CLASS/IMAGE: CIFAR-10 images of 32 px, class folders named so that they sort as in CIFAR-10. RobustBench is
not installed with the kit: its release 1.1.1 imports the original AutoAttack by its old name, with other arguments, and
``pkg_resources`` (setuptools below 81). Install both apart, and put that folder on PYTHONPATH. Here the original AutoAttack
of ``pyautoattack`` is given that name, and the images of PATH stand in for the download; everything else is RobustBench's.
"""

import argparse
import importlib
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import pyautoattack
import torch
import torchvision
from torch import Tensor

from atoplib.attacks import AutoAttackSettings, autoattack
from atoplib.data import Split, load_dataset, to_float
from atoplib.pretrained import load_pretrained
from atoplib.verdicts import judge
from benchmarks.report import radius


class OldName(pyautoattack.AutoAttack):
    """The original AutoAttack with the arguments that RobustBench gives."""

    def __init__(self, model: object, log_path: str | None = None, **options: object) -> None:
        super().__init__(model, **options)

    def run_standard_evaluation(self, x: Tensor, y: Tensor, bs: int = 250, state_path: str | None = None) -> Tensor:
        """As the original, which calls ``bs`` another name, and now also returns what was predicted."""
        return super().run_standard_evaluation(x, y, batch_size=bs, state_path=state_path)[0]


class LocalImages(torch.utils.data.Dataset):
    """Test images in place of torchvision's CIFAR10, whose arguments it takes and does not need."""

    split: Split

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.split.images[index].float() / 255, int(self.split.labels[index])


@contextmanager
def names_in_place(split: Split) -> Iterator[None]:
    """Within the block ``autoattack`` is the original, and torchvision's CIFAR-10 the given images."""
    module = types.ModuleType("autoattack")
    module.AutoAttack = OldName
    module.__path__ = []
    state = importlib.import_module("pyautoattack.state")
    images = type("LocalImages", (LocalImages,), {"split": split})
    with (
        mock.patch.dict(sys.modules, {"autoattack": module, "autoattack.state": state}),
        mock.patch.object(torchvision.datasets, "CIFAR10", images),
    ):
        yield


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="folder:PATH with test/CLASS/IMAGE of CIFAR-10")
    parser.add_argument("--defence", default="undefended", help="a deterministic one of the kit's weights for cifar10")
    parser.add_argument("--images", type=int, default=32, help="test images, the first of the set's fixed subset")
    parser.add_argument("--eps", type=radius, default="0.5/255", help="linf, such as 0.5/255 or 0.03")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run both, and print what each left standing, and its seconds."""
    options = arguments(argv)
    model = load_pretrained("cifar10", options.defence)
    with tempfile.TemporaryDirectory() as cache:
        test = load_dataset(options.dataset, data_dir=cache, max_train=10, max_test=options.images).test
    with names_in_place(test):
        from robustbench.eval import benchmark  # not installed with the kit

        started = time.perf_counter()
        clean, theirs = benchmark(model, n_examples=options.images, dataset="cifar10", threat_model="Linf", eps=options.eps)
        seconds = time.perf_counter() - started
    images, labels = to_float(test.images), test.labels
    started = time.perf_counter()
    found = autoattack(model, images, labels, AutoAttackSettings(options.eps))
    ours, ours_seconds = float(judge(model, found, labels).float().mean()), time.perf_counter() - started
    print(f"{options.images} images, {options.defence}, linf {options.eps:.5f}: clean {100 * clean:.1f} %")
    print(f"RobustBench: {100 * theirs:.1f} % in {seconds:.0f} s; ours: {100 * ours:.1f} % in {ours_seconds:.0f} s")


if __name__ == "__main__":
    main()
