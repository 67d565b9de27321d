"""A protocol of three short attacks on small defences, for the tests of the evaluation."""

import pandas as pd
import torch
from torch import nn

from atoplib.evaluation import Protocol, Row, evaluate
from atoplib.pipeline import AToPPipeline
from atoplib.transforms import Transform

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
EPS = {"linf": 0.05, "l2": 0.5}
PGD = {"steps": 3, "eot_samples": 2}
ROWS = (
    Row("pgd", "transfer", threat_model="transfer", options=PGD),
    Row("pgd", "white-box", options=PGD),
    Row("pgd", "white-box l2", "l2", options=PGD),
)
PROTOCOL = Protocol("test", "a small one", ROWS, votes=5)
COLUMNS = ["clean", "transfer", "white-box", "white-box l2", "worst case linf", "worst case"]
NAMES = ["undefended", "other", "pipeline"]


def linear(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes)).eval()


def pooled():
    """Of three classes, for images of any size."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()


LABELS = linear()(IMAGES).argmax(dim=1)  # so that the undefended classifier is correct on all of them


class Recolour(nn.Module):
    """A purifier without weights: the visible image, a little brighter."""

    def forward(self, given):
        return (given[:, :3] * 0.9 + 0.05).tanh()


def purifying(classifier=None, purifier=None, noise=0.05, name="rt2"):
    transform = Transform(name, noise_std=noise, grid_size=4)
    return AToPPipeline(transform, purifier or Recolour(), classifier or linear()).eval()


def setting():
    return dict(zip(NAMES, (linear(), linear(7), purifying()), strict=True))


def run(defences=None, images=IMAGES, labels=LABELS, **options):
    options = {"protocol": PROTOCOL, "eps": EPS, "keep_images": True} | options
    return evaluate(defences or setting(), images, labels, **options)


def assert_same(first, second):
    pd.testing.assert_frame_equal(*(each.by_image.drop(columns="seconds") for each in (first, second)))
    assert first.images.keys() == second.images.keys()
    assert all(torch.equal(shown, second.images[key]) for key, shown in first.images.items())


def accuracy(result, defence, attack, rule="single"):
    frame = result.frame
    return frame[(frame.defence == defence) & (frame.attack == attack) & (frame.rule == rule)].accuracy.item()
