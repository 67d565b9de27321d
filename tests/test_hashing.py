"""What decides on reuse sees every change that could change a number, and nothing else."""

import functools
import importlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from atoplib import hashing
from atoplib.certification import NoisyInput
from atoplib.hashing import code_hash, function_hash, model_hash, notebook_hash
from atoplib.parameters import Parameters


def compiled(source, **names):
    """A function ``step`` as a cell defines it."""
    space = {"__name__": "__main__", "torch": torch, **names}
    exec(source, space)
    return space["step"]


STEP = "def step(x, y, epoch):\n    return (2 * x).sum() * weight\n"


@pytest.mark.parametrize(
    "edited",
    [
        STEP.replace("2 * x", "3 * x"),
        STEP.replace("sum", "mean"),
        STEP.replace("2 * x", "x * 2"),
        STEP.replace("epoch", "epoch, more=1"),
    ],
)
def test_an_edit_of_the_step_is_another_step(edited):
    assert function_hash(compiled(STEP, weight=1.0)) != function_hash(compiled(edited, weight=1.0))


def test_the_same_step_is_the_same_whatever_its_lines_and_its_cell():
    assert function_hash(compiled(STEP, weight=1.0)) == function_hash(
        compiled("\n\n# said\n" + STEP, weight=1.0, other=3)
    )


HELPER = "def loss(x):\n    return {} * x\ndef step(x, y, epoch):\n    return [loss(part) for part in x]\n"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (compiled(STEP, weight=1.0), compiled(STEP, weight=1.00001)),
        (compiled(STEP, weight=torch.zeros(3)), compiled(STEP, weight=torch.tensor([0, 0, 1e-30]))),
        (compiled(STEP, weight=[1, {"a": (2,)}]), compiled(STEP, weight=[1, {"a": (3,)}])),
        (compiled(STEP, weight=np.zeros(3)), compiled(STEP, weight=np.ones(3))),
        (
            compiled(STEP, weight=functools.partial(print, end="a")),
            compiled(STEP, weight=functools.partial(print, end="b")),
        ),
        (compiled(HELPER.format(1)), compiled(HELPER.format(2))),
        (compiled(STEP, weight=Parameters({"s": 1.0})), compiled(STEP, weight=Parameters({"s": 2.0}))),
        (compiled(STEP, weight=nn.Linear(2, 2)), compiled(STEP, weight=nn.Linear(2, 2))),
        (compiled(STEP, weight=torch.float32), compiled(STEP, weight=torch.float64)),
    ],
)
def test_whatever_a_step_refers_to_is_part_of_it(first, second):
    assert function_hash(first) == function_hash(first)
    assert function_hash(first) != function_hash(second)


def test_a_closure_and_a_default_are_part_of_a_step():
    def step(s, t=1):
        return lambda x: s * x * t

    hashes = [function_hash(step(*each)) for each in ((1,), (1,), (2,), (1, 3))]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


SAME = {
    "where results are kept": [{"weight": Parameters({"s": 1.0, "device": place})} for place in ("a", "b")],
    "a global with the name of an attribute": [{"weight": 1.0, "sum": value} for value in ("8/255", 0.3)],
}


@pytest.mark.parametrize("first, second", SAME.values(), ids=SAME)
def test_what_changes_no_number_is_no_part_of_a_step(first, second):
    assert function_hash(compiled(STEP, **first)) == function_hash(compiled(STEP, **second))


def test_functions_that_refer_to_each_other_end():
    step = compiled("def step(x):\n    return other(x)\ndef other(x):\n    return step(x)\n")
    assert function_hash(step) == function_hash(step)


# ---------------------------------------------------------------------------------------------------- the
# package's code


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the package: alone imports nothing, middle imports deep, figures only shows."""
    files = {
        "alone": "x = 1",
        "middle": "from atoplib import deep, figures",
        "deep": "import atoplib.alone",
        "figures": "y = 1",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(hashing, "PACKAGE", tmp_path)
    return tmp_path


def test_an_edit_anywhere_along_the_imports_counts_and_elsewhere_not(package):
    before = {name: code_hash(f"atoplib.{name}") for name in ("alone", "middle", "deep")}
    (package / "deep.py").write_text("import atoplib.alone  # edited")
    after = {name: code_hash(f"atoplib.{name}") for name in before}
    assert [name for name in before if before[name] != after[name]] == ["middle", "deep"]
    (package / "figures.py").write_text("y = 2")
    assert code_hash("atoplib.middle") == after["middle"]


def test_a_module_counts_as_it_was_imported_until_it_is_reloaded(package, monkeypatch):
    (package / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name.split(".")[0] == "atoplib"]:
        monkeypatch.delitem(sys.modules, name)
    outer = package.parent / "outer"
    outer.mkdir()
    (outer / "atoplib").symlink_to(package)
    monkeypatch.syspath_prepend(str(outer))
    module = importlib.import_module("atoplib.alone")
    before = code_hash("atoplib.alone")
    (package / "alone.py").write_text("x = 22")
    assert code_hash("atoplib.alone") == before  # what runs is what was imported
    importlib.reload(module)
    assert code_hash("atoplib.alone") != before
    for name in [name for name in sys.modules if name.split(".")[0] == "atoplib"]:
        del sys.modules[name]


@pytest.mark.parametrize("needed", ["pipeline", "transforms", "contract", "purifiers.gated"])
def test_the_code_of_an_evaluation_holds_what_measures(needed):
    graph, waiting = set(), ["atoplib.evaluation.measure"]
    while waiting:
        name = waiting.pop()
        path = hashing._source(name)
        if path is not None and name not in graph:
            graph.add(name)
            waiting += hashing._imports(path.read_text())
    assert f"atoplib.{needed}" in graph


def test_a_notebooks_code_is_its_cells_but_the_parameters_and_what_they_import(tmp_path, package):
    def written(parameters, code):
        cells = [
            {"cell_type": "code", "metadata": {"tags": tags}, "source": [text]}
            for text, tags in ((parameters, ["parameters"]), (code, []))
        ]
        (path := tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
        return notebook_hash(path)

    code = "%matplotlib inline\nfrom atoplib import middle"
    first = written("a = 1", code)
    assert written("a = 2", code) == first != written("a = 1", code + "\nb = 1")
    (package / "alone.py").write_text("x = 3")
    assert written("a = 1", code) != first


def test_hashes_are_the_same_in_every_process():
    code = "from atoplib.hashing import *; from atoplib.pretrained import load_pretrained; print(code_hash('atoplib.pipeline'), model_hash(load_pretrained('mnist', 'AToP')), json_hash({'a': {1, 2} and 1}))"  # noqa: E501
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1


# ------------------------------------------------------------------------------------------------------------
# -- networks


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


HOLDS = [
    lambda n: n,
    lambda n: [n],
    lambda n: (0 * n + n,),
    lambda n: {"n": n},
    lambda n: torch.tensor(n),
    lambda n: lambda: n,
    lambda n: [{"n": (lambda: n,)}],
]


@pytest.mark.parametrize("hold", HOLDS)
def test_a_constant_anywhere_makes_another_network(hold):
    assert model_hash(Holding(hold(0.9)).eval()) == model_hash(Holding(hold(0.9)).eval())
    assert model_hash(Holding(hold(0.9)).eval()) != model_hash(Holding(hold(0.90001)).eval())


def linear(change=lambda network: None):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    change(network)
    return network


def replaced(network):
    network.forward = lambda x, original=network.forward: original(1 - x)


def hooked(network):
    network[1].register_forward_hook(lambda module, inputs, output: -output)


def nudged(network):
    network[1].weight.data[0, 0] += 1e-6


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


def test_hooks_count_but_not_the_numbers_that_torch_gives_them():
    def hooked(factor):
        torch.manual_seed(0)
        network = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        network.register_forward_hook(lambda module, given, result: factor * result)
        return model_hash(network)

    assert hooked(2) == hooked(2) != hooked(3)


def test_pictures_count_by_their_pixels():
    def seen(colour):
        picture = Image.new("RGB", (2, 2), colour)
        return function_hash(lambda: picture)

    assert seen("red") == seen("red") != seen("blue")


@pytest.mark.parametrize(
    "one, other", [([[1], 2], [[1, 2]]), ([(1, 2), 3], [(1,), 2, 3]), ([{}], []), ([{1: 2}], [1, 2])]
)
def test_values_that_hold_the_same_in_another_shape_are_told_apart(one, other):
    assert function_hash(lambda: one) != function_hash(lambda: other)


def test_asking_a_random_network_about_its_hash_changes_neither_hash_nor_samples():
    images = torch.rand(2, 3, 4, 4)
    asked, other = (NoisyInput(nn.Flatten(), 0.5).eval() for _ in range(2))
    before = model_hash(asked)
    assert torch.equal(asked(images), other(images))
    assert model_hash(asked) == before
