"""Trainings of tiny networks, which end within a second, for the tests of the training loop."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from atoplib import classifiers, purifiers
from atoplib.attacks import pgd
from atoplib.checkpoints import load_state
from atoplib.data import Split
from atoplib.losses import discriminator_loss, generator_loss, reconstruction_loss
from atoplib.parameters import Parameters
from atoplib.pipeline import AToPPipeline, to_unit
from atoplib.runs import open_run
from atoplib.training import fit, loop
from atoplib.transforms import Transform

SETTINGS = dict(epochs=2, batch_size=8, learning_rate=0.01, dtype="float32", padding=2, flip=True, seed=3)
STEPS = 10
RT2 = Transform("rt2", missing_rate=0.25, noise_std=0.1, grid_size=4)
KINDS = ("classifier", "adversarial classifier with EMA", "fine-tuning with EMA and a discriminator")


def colourful():
    """44 images, so that four are left out of each epoch, whose class can be seen in their colour."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(44) % 3
    images = torch.randint(0, 120, (44, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images[torch.arange(44), labels] += 120
    return Split(images, labels)


@pytest.fixture(autouse=True)
def one_thread_and_a_look_at_every_step(monkeypatch):
    """The tiny networks here are slower on more threads; and what happens every 10 steps should happen
    soon."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "CHECK_EVERY", 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", name="split")
def colourful_split():
    return colourful()


def tiny_classifier(seed=0):
    torch.manual_seed(seed)
    return classifiers.build("small_resnet", num_classes=3, mean=(0.4,) * 3, std=(0.3,) * 3, width=2)


class Training:
    """One of the trainings under test, with fresh weights from ``seed``; ``run`` trains it."""

    def __init__(self, kind, split, seed):
        self.split, self.settings = split, dict(SETTINGS)
        self.network = tiny_classifier(seed)
        self.networks, self.step = {"classifier": self.network}, self.classify
        if kind == KINDS[0]:
            self.settings |= dict(optimizer="sgd", weight_decay=0.01, schedule="cosine")
        elif kind == KINDS[1]:
            self.settings |= dict(ema_decay=0.9, grad_clip=1.0)
            self.step = self.classify_attacked
        else:
            self.settings |= dict(ema_decay=0.9)
            torch.manual_seed(seed)
            self.network = purifiers.build("gated_unet", width=4, blocks=0, fold=4)
            self.pipeline = AToPPipeline(RT2, self.network, tiny_classifier(100), seed=None)
            self.networks = {"purifier": self.network, "discriminator": purifiers.PatchDiscriminator(2)}
            self.step = self.finetune

    def classify(self, x, y, epoch):
        logits = self.network(x)
        return {"loss": F.cross_entropy(logits, y), "accuracy": (logits.argmax(dim=1) == y).float().mean()}

    def classify_attacked(self, x, y, epoch):
        return self.classify(pgd(partial(self.network), x, y, eps=0.1, steps=2, seed=None), y, epoch)

    def finetune(self, x, y, epoch):
        t = self.pipeline.sample(x)
        x = pgd(partial(self.pipeline, sample=t), x, y, eps=min(1, 0.1 + epoch) * 0.1, steps=2, seed=None)
        outputs = self.pipeline.outputs(x, t)

        def score(image):
            return self.networks["discriminator"](torch.cat([image, t.masks[0]], dim=1))

        gan = generator_loss(score(outputs[-1]))
        loss = reconstruction_loss(outputs, 2 * x - 1) + 0.1 * gan
        if epoch >= 0.5:
            loss = loss + F.cross_entropy(self.pipeline.classifier(to_unit(outputs[-1])), y)
        own = discriminator_loss(score(2 * x - 1), score(outputs[-1].detach()))
        return {"loss": loss, "gan": gan, "discriminator": own}

    def run(self, folder=None, **more):
        if folder is None:
            return fit(self.step, self.networks, self.split, **self.settings, **more)
        with a_run(folder) as run:
            return fit(self.step, self.networks, self.split, run=run, **self.settings, **more)

    @property
    def weights(self):
        return {
            f"{n}.{k}": t.clone() for n, net in self.networks.items() for k, t in net.state_dict().items()
        }


def a_run(folder):
    values = {
        "experiment": "test",
        "dataset": "mnist5k",
        "image_size": None,
        "workspace": str(folder),
        "smoke": False,
    }
    return open_run(Parameters(values), "01_train_classifier")


def state_of(folder):
    return load_state(next(folder.glob("runs/test/*")) / ".state.pt")[0]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def without_times(history):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]


def weighted(weight):
    network = tiny_classifier()
    return network, lambda x, y, epoch: weight * F.cross_entropy(network(x), y)
