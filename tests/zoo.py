"""Odd networks, as anybody may bring them: those that must work everywhere, those that must be refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune


class NormAct(nn.BatchNorm2d):
    """As timm's norm layers: an activation inside."""

    def forward(self, x):
        return F.relu(super().forward(x))


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Residual(nn.Sequential):
    """A Sequential with a forward of its own."""

    def forward(self, x):
        for part in self:
            x = part(x) * 0.5
        return x


class Net(nn.Module):
    """Body, pooling to 2 x 2, flattened by ``view``, head; ``out`` wraps the logits, ``before`` treats the
    images."""

    def __init__(self, *body, classes=4, out=None, before=None, channels=6):
        super().__init__()
        self.body = nn.Sequential(*(body or (nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())))
        self.head = nn.Linear(4 * channels, classes)
        self.out, self.before = out, before

    def forward(self, x):
        if self.before is not None:
            x = self.before(x)
        logits = self.head(F.adaptive_avg_pool2d(self.body(x), 2).contiguous().view(len(x), -1))
        return logits if self.out is None else self.out(logits)


class LeNet(nn.Module):
    """Flattens by ``view`` what its convolution returns, in the layout in which it comes."""

    def __init__(self, size=(16, 16), classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, 1, 1)
        self.head = nn.Linear(2 * size[0] * size[1], classes)

    def forward(self, x):
        return self.head(self.conv(x).view(x.size(0), -1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 4)
        )
        self.fc = self.backbone[-1]
        self.again = nn.Linear(16, 16)
        self.again.weight = self.backbone[2].weight

    def forward(self, x):
        return self.fc(self.again(self.backbone[:3](x)).relu())


class ExtraState(Net):
    def __init__(self, kept=None):
        super().__init__()
        self.kept = {"scale": 2.0, "shift": torch.ones(4)} if kept is None else kept

    def get_extra_state(self):
        return self.kept

    def set_extra_state(self, state):
        self.kept = state


class Constants(Net):
    """Constants in a list, a tuple, a dict, a plain tensor and a closure."""

    def __init__(self):
        super().__init__()
        self.parts = [0.1], (0.9,), {"a": 0.2}
        self.plain, self.reseed = torch.full((3, 1, 1), 0.3), 3  # named as a method of ours
        shift = 0.05
        self.before = lambda x: (
            (x - self.parts[0][0]) * self.parts[1][0] + self.parts[2]["a"] * self.plain - shift
        )


def weight_norm_old(module):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


def folded_beside(layer):
    """A layer in the place of the convolution that folding would take up."""
    return Net(layer, nn.BatchNorm2d(6), nn.ReLU())


def conv():
    return nn.Conv2d(3, 6, 3, 2)


def with_replaced_forward():
    """A Sequential whose instance has a forward of its own: on bright images it skips the norm."""
    net = Net()
    first, whole = net.body[0], net.body.forward
    net.body.forward = lambda x: F.relu(first(x)) if x.mean() > 0.7 else whole(x)
    return net


def with_a_hook():
    """A convolution whose output a hook doubles, on bright images alone."""
    net = Net()
    net.body[0].register_forward_hook(lambda part, x, out: 2 * out if x[0].mean() > 0.7 else out)
    return net


class Visible(nn.Module):
    """A purifier that hands on the image that it is given."""

    def forward(self, given):
        return given[:, :3]


class NotDifferentiable(Net):
    def forward(self, x):
        with torch.no_grad():
            return super().forward((x * 15).round() / 15)


# Every row works at every entry.
WORKS = {
    "norm with an activation inside": lambda: Net(conv(), NormAct(6)),
    "weight-standardised convolution": lambda: folded_beside(StandardisedConv(3, 6, 3, 2)),
    "Sequential with its own forward": lambda: Net(Residual(conv(), nn.BatchNorm2d(6))),
    "spectral norm, old form": lambda: folded_beside(nn.utils.spectral_norm(conv())),
    "spectral norm": lambda: folded_beside(parametrizations.spectral_norm(conv())),
    "weight norm, old form": lambda: folded_beside(weight_norm_old(conv())),
    "weight norm": lambda: folded_beside(parametrizations.weight_norm(conv())),
    "pruned": lambda: folded_beside(prune.l1_unstructured(conv(), "weight", 0.5)),
    "group norm": lambda: Net(conv(), nn.GroupNorm(2, 6)),
    "view": LeNet,
    "in place on the input": lambda: Net(before=lambda x: x.sub_(0.5)),
    "in place by its first layer": lambda: nn.Sequential(
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(768, 4)
    ),
    "tied and aliased weights": Tied,
    "extra state": ExtraState,
    "constants": Constants,
    "half": lambda: Net().half(),
    "bfloat16": lambda: Net().bfloat16(),
    "float64": lambda: Net().double(),
    "tuple": lambda: Net(out=lambda z: (z, z.mean())),
    "dict": lambda: Net(out=lambda z: {"logits": z, "aux": z.mean()}),
    "object with logits": lambda: Net(out=lambda z: SimpleNamespace(logits=z)),
    "2 classes": lambda: Net(classes=2),
    "3 classes": lambda: Net(classes=3),
    "200 classes": lambda: Net(classes=200),
    "DataParallel": lambda: nn.DataParallel(Net()),
    "scripted": lambda: torch.jit.script(LeNet().eval()),
    "random by dropout": lambda: Net(before=lambda x: F.dropout(x, 0.2, training=True)),
    "forward replaced": with_replaced_forward,
    "hook": with_a_hook,
    "compiled": lambda: torch.compile(Net(), backend="eager"),
}
REFUSED = {  # what makes it, and what the sentence says
    "1 logit": (lambda: Net(classes=1), "one logit an image.*torch.cat"),
    "1 logit, flat": (lambda: Net(classes=1, out=lambda z: z.squeeze(1)), "one logit an image.*torch.cat"),
    "1 channel": (
        lambda: Net(nn.Conv2d(1, 6, 3, 2), nn.ReLU()),
        r"cannot take images of shape \(3, 16, 16\).*single channel needs a layer in front",
    ),
    "dict without logits": (
        lambda: Net(out=lambda z: {"a": z, "b": z}),
        "returns a dict; allowed are logits",
    ),
    "a text": (lambda: Net(out=str), "returns a str; allowed are logits"),
    "probabilities": (lambda: Net(out=lambda z: z.softmax(1)), "probabilities"),
    "not finite": (lambda: Net(out=lambda z: z / 0), "not finite"),
    "batch norm without running statistics": (
        lambda: Net(conv(), nn.BatchNorm2d(6, track_running_stats=False)),
        "depend on the other images of its batch.*track_running_stats=True",
    ),
    "the same, random": (
        lambda: Net(
            conv(),
            nn.BatchNorm2d(6, track_running_stats=False),
            before=lambda x: F.dropout(x, 0.1, training=True),
        ),
        "depend on the other images of its batch",
    ),
}


def made(make):
    torch.manual_seed(0)
    model = make()
    if "norm" in str(model):  # statistics unlike those of a fresh model
        model.train()
        dtype = next(model.parameters()).dtype
        for _ in range(2):
            model(torch.rand(8, 3, 16, 16).to(dtype))
    return model.eval()


def images_of(count=3, size=(16, 16)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def linear(change=lambda network: None):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    change(network)
    return network


def nudged(network):
    network[1].weight.data[0, 0] += 1e-6
