"""What decides on reuse sees every change that could change a number, and nothing else."""

import abc
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import deque
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from jaxtyping import jaxtyped
from PIL import Image
from torch import nn
from torchvision.transforms import Compose, Resize
from typeguard import typechecked
from zoo import linear, nudged

from atoplib import hashing
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


class Slotted:
    __slots__ = ("number",)

    def __init__(self, number):
        self.number = number


class Bare(nn.Module):
    """A network of one weight, and a buffer that is not saved."""

    def __init__(self, number=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("kept_elsewhere", torch.tensor(number), persistent=False)


def annotated(value, number):
    """A value, or a function, with an attribute."""
    value.number = number
    return value


def with_hook(register, number):
    network = Bare()
    getattr(network.weight, register)(lambda gradient: number)
    return network


def of_class(kind, value, number):
    return annotated(type("Own", (kind,), {"__module__": "__main__"})(value), number)


BUILT_IN = {dict: {1: 2}, list: [1], tuple: (1,), set: {1}, str: "a", int: 3, float: 0.5, bytes: b"a"}
HOLDERS = {
    "a number": lambda n: 1 + 1e-5 * n,
    "a tensor": lambda n: torch.tensor([0, 0, 1e-30 * n]),
    "nested": lambda n: [1, {"a": (n,)}],
    "an array": lambda n: np.full(3, n),
    "a partial call": lambda n: functools.partial(print, end=n),
    "a function of a function": lambda n: compiled(
        f"def loss(x):\n    return {n} * x\ndef step(x):\n    return [loss(y) for y in x]\n"
    ),
    "parameters": lambda n: Parameters({"s": n}),
    "a weight that is computed": lambda n: nn.utils.spectral_norm(linear(nudged)[1] if n else linear()[1]),
    "weights": lambda n: linear(nudged) if n else linear(),
    "a type of numbers": lambda n: (torch.float32, torch.float64)[n],
    "a circle": lambda n: compiled(
        f"def step(x):\n    return other(x)\ndef other(x):\n    return {n} * step(x)\n"
    ),
    "a closure": lambda n: lambda x: n * x,
    "a default": lambda n: eval(f"lambda x, number={n}: x"),
    "a function's attribute": lambda n: annotated(eval("lambda x: x"), n),
    "a library's closure": torch.optim.swa_utils.get_ema_multi_avg_fn,
    "a cached function": lambda n: functools.lru_cache(lambda: n),
    "a method of another object": lambda n: Fraction(n, 3).limit_denominator,
    "the mode of a teacher": lambda n: nn.Sequential(Bare()).train(bool(n)),
    "the mode of a teacher's part": lambda n: nn.Sequential(Bare().train(bool(n))),
    "a buffer that is not saved": lambda n: Bare(float(n)),
    "a hook of a weight": lambda n: with_hook("register_hook", n),
    "a hook after a weight's gradient": lambda n: with_hook("register_post_accumulate_grad_hook", n),
    "the order of a dict": lambda n: dict([(1, 2), (3, 4)][:: 1 - 2 * n]),
    **{
        f"an attribute of a {kind.__name__}": lambda n, kind=kind, value=value: of_class(kind, value, n)
        for kind, value in BUILT_IN.items()
    },
    "slots": Slotted,
    "a deque": lambda n: deque([n]),
    "a namespace": lambda n: SimpleNamespace(n=n),
    "a fraction": lambda n: Fraction(n, 3),
    "a transform of torchvision": lambda n: Compose([Resize(n + 1)]),
    "the same part again": lambda n: (lambda a, b: [a, b, (a, b)[n]])([0], [1]),
    "a distribution": lambda n: torch.distributions.Normal(0.0, 1.0 + n),
    "a table": lambda n: pandas.DataFrame({"a": [1.5, 2], "b": ["x", "yz"[n]]}),
    "NumPy's generator": np.random.default_rng,
    "torch's generator": lambda n: torch.Generator().manual_seed(n),
    "a masked array": lambda n: np.ma.array([1, 2], mask=[0, n]),
    "texts in an array": lambda n: np.array([{}, "ab"[n]], dtype=object),
    "a regular expression": lambda n: re.compile("ab"[n]),
    "an abstract class": lambda n: type("Own", (abc.ABC,), {"__module__": "__main__", "number": n}),
    "a picture": lambda n: Image.new("RGB", (2, 2), ("red", "blue")[n]),
    "a lock beside it": lambda n: SimpleNamespace(lock=threading.Lock(), n=n),
    "a function whose shapes are checked": lambda n: jaxtyped(
        compiled(STEP, weight=n), typechecker=typechecked
    ),
    "a set": lambda n: {"a", "b", ("c", n)},
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_what_is_kept_in_any_kind_of_object_makes_another_step(hold):
    first, again, other = (compiled(STEP, weight=hold(n)) for n in (0, 0, 1))
    assert function_hash(first) == function_hash(first) == function_hash(again) != function_hash(other)


def test_a_weight_that_a_call_computes_anew_leaves_the_network_the_same():
    network = nn.utils.spectral_norm(linear()[1]).eval()
    before = model_hash(network)
    network(torch.rand(1, 3072))
    assert model_hash(network) == before


def test_another_class_of_a_number_is_another_step():
    kinds = [of_class(int, 3, 0), type("Own", (int,), {"__module__": "__main__", "f": 1})(3), 3]
    assert len({function_hash(compiled(STEP, weight=each)) for each in kinds}) == 3


def test_what_not_even_pickle_can_keep_is_never_the_same():
    step = compiled(STEP, weight=(n for n in range(3)))
    assert function_hash(step) != function_hash(step)


SAME = {
    "its lines and its cell": [
        compiled(STEP, weight=1.0),
        compiled("\n\n# said\n" + STEP, weight=1.0, other=3),
    ],
    "where results are kept": [
        compiled(STEP, weight=Parameters({"s": 1.0, "device": place})) for place in ("a", "b")
    ],
    "a global with the name of an attribute": [
        compiled(STEP, weight=1.0, sum=value) for value in ("8/255", 0.3)
    ],
}


@pytest.mark.parametrize("first, second", SAME.values(), ids=SAME)
def test_what_changes_no_number_is_no_part_of_a_step(first, second):
    assert function_hash(first) == function_hash(second)


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
    finders = [hashing._Sources(), *(each for each in sys.meta_path if each is not hashing.SOURCES)]
    monkeypatch.setattr(sys, "meta_path", finders)
    monkeypatch.setattr(hashing, "SOURCES", finders[0])  # the package's own stay as they were imported
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
    before = code_hash("atoplib.alone")
    module = importlib.import_module("atoplib.alone")
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

    code = "%%time\n%matplotlib inline\nfiles = !ls\nfiles?\nx = (5\n    % 3)\nfrom atoplib import middle"
    first = written("a = 1", code)
    assert written("a = 2", code) == first != written("a = 1", code + "\nb = 1")
    (package / "alone.py").write_text("x = 3")
    assert written("a = 1", code) != first


def test_a_notebooks_code_holds_the_users_own_modules_beside_it(tmp_path):
    hashes = set()
    for number in (1, 2):
        (tmp_path / "mine.py").write_text(f"x = {number}")
        (tmp_path / "n.ipynb").write_text(
            '{"cells": [{"cell_type": "code", "metadata": {}, "source": ["import mine"]}]}'
        )
        hashes.add(notebook_hash(tmp_path / "n.ipynb"))
    assert len(hashes) == 2


def test_hashes_are_the_same_in_every_process():
    code = """
import test_hashing as t
from atoplib.pretrained import load_pretrained
print(t.code_hash("atoplib.pipeline"), t.model_hash(load_pretrained("mnist", "AToP")))
print([t.function_hash(t.compiled(t.STEP, weight=hold(0))) for hold in t.HOLDERS.values()])
"""
    places = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    first, second = (subprocess.check_output([sys.executable, "-c", code], env=places) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "one, other", [([[1], 2], [[1, 2]]), ([(1, 2), 3], [(1,), 2, 3]), ([{}], []), ([{1: 2}], [1, 2])]
)
def test_values_that_hold_the_same_in_another_shape_are_told_apart(one, other):
    assert function_hash(lambda: one) != function_hash(lambda: other)
