"""The hash of a network: whatever changes an answer, and nothing else."""

import os
import random

import numpy as np
import pytest
import torch
from torch import nn
from zoo import linear, nudged

from atoplib.certification import NoisyInput
from atoplib.hashing import model_hash
from atoplib.probing import undisturbed


class Holding(nn.Module):
    """A network that keeps a number where torch does not look."""

    def __init__(self, held):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 10)
        self.held = held

    def number(self):
        held = self.held
        while not isinstance(held, int | float | torch.Tensor):
            held = held() if callable(held) else next(iter(held.values() if isinstance(held, dict) else held))
        return held

    def forward(self, x):
        dark = self.layer(x.mean((2, 3)))
        return torch.where(
            (x.amin((1, 2, 3)) > 0.9)[:, None], dark + self.number(), dark
        )  # on bright images only


class Shifted(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return x.mean(dim=(2, 3)) + self.shift


def scaled_by_a_hook(factor):
    """With a hook, and others of torch, to which it gives numbers."""
    torch.manual_seed(0)
    network = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    network.register_forward_hook(lambda module, given, result: factor * result)
    return network


def scaled_in_a_graph(factor):
    """A graph that calls a function of one's own."""
    graph = torch.fx.Graph()
    graph.output(graph.call_function(lambda x: factor * x, (graph.placeholder("x"),)))
    return torch.fx.GraphModule(nn.Module(), graph)


CONSTANTS = {
    "a number": lambda n: Holding(n),
    "a list": lambda n: Holding([n]),
    "a tuple": lambda n: Holding((0 * n + n,)),
    "a dict": lambda n: Holding({"n": n}),
    "a tensor": lambda n: Holding(torch.tensor(n)),
    "a function": lambda n: Holding(lambda: n),
    "nested": lambda n: Holding([{"n": (lambda: n,)}]),
    "scripted": lambda n: torch.jit.script(Shifted((n - 0.9) * 1e5)),  # known by some digits of its answers
    "a hook": scaled_by_a_hook,
    "a graph": scaled_in_a_graph,
}


@pytest.mark.parametrize("make", CONSTANTS.values(), ids=CONSTANTS)
def test_a_constant_anywhere_makes_another_network(make):
    first, again, other = (model_hash(make(number).eval()) for number in (0.9, 0.9, 0.90001))
    assert first == again != other


def replaced(network):
    network.forward = lambda x, original=network.forward: original(1 - x)


def hooked(network):
    network[1].register_forward_hook(lambda module, inputs, output: -output)


@pytest.mark.parametrize("change", [replaced, hooked, nudged])
def test_another_function_is_another_network(change):
    assert model_hash(linear()) == model_hash(linear()) != model_hash(linear(change))


class Rolling(nn.Module):
    """A network with random numbers of its own, and of numpy and Python."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 10)
        self.norm = nn.BatchNorm2d(3)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        noise = (
            torch.rand(len(x), 10, generator=self.generator)
            + np.random.rand()
            + random.random()
            + torch.rand(1)
        )
        return self.layer(self.norm(x).mean((2, 3))) + noise


def test_asking_a_random_network_gives_one_answer_and_disturbs_nothing():
    network = Rolling().train()
    kept = [network.generator.get_state(), torch.get_rng_state(), network.norm.running_mean.clone()]
    others = (np.random.get_state()[2], random.getstate())
    assert model_hash(network) == model_hash(network)
    now = [network.generator.get_state(), torch.get_rng_state(), network.norm.running_mean]
    assert (
        all(map(torch.equal, kept, now))
        and others == (np.random.get_state()[2], random.getstate())
        and network.training
    )


def test_mode_and_seed_are_no_part_of_a_network(defences):
    network = Holding(1)
    assert model_hash(network.train()) == model_hash(network.eval())
    before = model_hash(defences["AToP"])
    defences["AToP"](torch.rand(2, 3, 32, 32))
    assert model_hash(defences["AToP"]) == before


def test_a_network_of_an_odd_size_is_its_own_equal():
    odd = nn.Sequential(nn.Flatten(), nn.Linear(3 * 70 * 70, 10)).eval()
    assert model_hash(odd) == model_hash(odd) == model_hash(odd, torch.rand(4, 3, 70, 70))


def test_asking_a_random_network_about_its_hash_changes_neither_hash_nor_samples():
    images = torch.rand(2, 3, 4, 4)
    asked, other = (NoisyInput(nn.Flatten(), 0.5).eval() for _ in range(2))
    before = model_hash(asked)
    assert torch.equal(asked(images), other(images))
    assert model_hash(asked) == before


def test_a_random_network_is_known_by_its_answers_to_one_seed(monkeypatch):
    class Noisy(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) + float(os.environ["NOISE"]) * torch.randn(len(x), 3)

    def found(noise):
        monkeypatch.setenv("NOISE", noise)
        return model_hash(Noisy().eval())

    assert found("0.1") == found("0.1") != found("0.2")


def test_what_a_network_counts_and_keeps_of_its_last_images_is_as_it_was():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.register_buffer("last", torch.zeros(1))

        def forward(self, x):
            self.calls, self.last = self.calls + 1, x
            return x.mean((2, 3))

    network = Keeps().eval()
    network(torch.ones(2, 3, 4, 4))
    assert model_hash(network) == model_hash(network)
    assert network.calls == 1 and (network.last == 1).all()


def test_buffers_of_every_layout_have_a_hash_and_are_left_as_they_were():
    network = nn.Flatten().eval()
    expanded, turned = torch.ones(1, 1).expand(1, 3), torch.randn(2, dtype=torch.cfloat).conj()
    for number, buffer in enumerate((expanded, torch.eye(3).to_sparse(), turned)):
        network.register_buffer(f"buffer{number}", buffer)
    with undisturbed(network):
        pass
    assert model_hash(network) == model_hash(network)
