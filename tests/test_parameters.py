"""Parameters: stated in one cell, checked by the next, the same for a notebook and for a batch."""

import json
import subprocess
import sys

import pytest

from atoplib.parameters import (
    ParameterError,
    above,
    at_least,
    between,
    check,
    convert,
    each,
    one_of,
    read,
    run_of,
    runs_of,
)  # fmt: skip

CELL = """
experiment: str = "mnist"
epochs: int = 6
eps: float = 8 / 255  # radius
norm: str = "linf"
max_train: int | None = None
flip: bool = False
levels: list[float] = [0.1, 0.2]
classifier_run: str = "latest"
smoke: bool = False
"""
CHECK = """
from atoplib.parameters import above, at_least, between, check, each, one_of, run_of
p = check(globals(), epochs=at_least(1), eps=between(0, 1), norm=one_of("linf", "l2"), levels=each(above(0)),
          classifier_run=run_of("01_train_classifier", adversarial=False),
          smoke=dict(epochs=1, max_train=256))
"""


def checked(**values):
    namespace = {}
    exec(CELL, namespace)
    namespace |= values
    exec(CHECK, namespace)
    return namespace["p"]


@pytest.fixture
def notebook(tmp_path):
    def cell(source, *tags):
        return {
            "cell_type": "code",
            "metadata": {"tags": list(tags)},
            "source": source.splitlines(keepends=True),
        }

    path = tmp_path / "01_small.ipynb"
    path.write_text(json.dumps({"cells": [cell(CELL, "parameters"), cell(CHECK), cell("import torch")]}))
    return path


def test_the_defaults_are_the_cells_and_a_value_of_the_cell_changes_with_it(notebook):
    assert read(notebook).as_dict() == checked().as_dict()
    assert checked().eps == pytest.approx(8 / 255) and checked(epochs=3).epochs == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": 0}, ["epochs", "at least 1", "0"]),
        ({"epochs": 2.5}, ["epochs", "int", "2.5"]),
        ({"epochs": True}, ["epochs", "int", "bool"]),
        ({"flip": 1}, ["flip", "bool"]),
        ({"eps": 1.5}, ["eps", "0..1", "1.5"]),
        ({"eps": float("nan")}, ["eps", "0..1", "nan"]),
        ({"eps": "a lot"}, ["eps", "float", "a lot"]),
        ({"eps": "1/0"}, ["eps", "float"]),
        ({"norm": "linff"}, ["norm", "linf, l2", "did you mean 'linf'"]),
        ({"max_train": 0}, ["max_train", "at least 1"]),
        ({"levels": []}, ["levels", "empty"]),
        ({"levels": [0.1, -1]}, ["levels", "above 0", "-1"]),
        ({"levels": [0.1, "x"]}, ["levels[1]", "float"]),
        ({"experiment": "../elsewhere"}, ["experiment", "folder name"]),
        ({"experiment": ""}, ["experiment", "folder name"]),
        ({"epoch": 3}, ["epoch", "did you mean 'epochs'"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed_by_the_batch_and_in_the_notebook(
    notebook, values, words
):
    with pytest.raises(ParameterError) as in_batch:
        read(notebook, values)
    assert all(word in str(in_batch.value) for word in (*words, "01_small"))
    if "epoch" in values:  # a notebook knows what papermill injected from the kernel's history
        values = values | {"In": ["", CELL, "# Parameters\nepoch = 3\n"]}
    with pytest.raises(ParameterError) as in_notebook:
        checked(**values)
    assert all(word in str(in_notebook.value) for word in words)


@pytest.mark.parametrize(
    ("value", "number"), [("8/255", 8 / 255), ("1e-3", 1e-3), ("0.3", 0.3), (1, 1.0), (" 8 / 255 ", 8 / 255)]
)
def test_numbers_as_a_shell_or_yaml_hands_them_on_are_the_same_numbers(notebook, value, number):
    assert read(notebook, {"eps": value}).eps == number and isinstance(
        read(notebook, {"eps": value}).eps, float
    )


def test_names_of_ones_own_in_other_cells_are_nobodys_business():
    assert checked(x=3, In=["", CELL, "y = 3"]).as_dict() == checked().as_dict()


def test_none_is_allowed_where_the_type_says_so_only(notebook):
    assert (
        read(notebook, {"max_train": None}).max_train is None
        and read(notebook, {"max_train": "None"}).max_train is None
    )
    with pytest.raises(ParameterError, match="epochs"):
        read(notebook, {"epochs": None})


def test_smoke_replaces_what_the_check_says_and_nothing_else(notebook):
    smoke, full = read(notebook, {"smoke": True}).as_dict(), read(notebook).as_dict()
    assert {name for name in full if smoke[name] != full[name]} == {"smoke", "epochs", "max_train"}


def test_parameters_do_not_change_but_are_replaced():
    p = checked()
    with pytest.raises(AttributeError, match="replace"):
        p.epochs = 3
    assert p.replace(epochs=3).epochs == 3 and p.epochs == 6
    with pytest.raises(ParameterError, match="did you mean 'epochs'"):
        p.replace(epoch=3)
    json.dumps(p.as_dict(), allow_nan=False)


def test_fields_that_name_runs_tell_the_notebook_that_makes_them():
    assert checked().run_fields == {"classifier_run": run_of("01_train_classifier", adversarial=False)}
    assert runs_of().several


def test_a_rule_without_a_parameter_is_a_mistake_of_the_notebook():
    with pytest.raises(ParameterError, match="epoch.*did you mean 'epochs'"):
        check({"__annotations__": {"epochs": int}, "epochs": 1}, epoch=at_least(1))


def test_a_parameters_cell_that_was_not_run_is_said():
    with pytest.raises(ParameterError, match="run it first"):
        check({"x": 1})


def test_a_notebook_without_the_two_cells_is_refused(tmp_path):
    (path := tmp_path / "odd.ipynb").write_text(json.dumps({"cells": []}))
    with pytest.raises(ParameterError, match="odd.ipynb.*parameters"):
        read(path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"classifier": "resnet", "classifier_run": "a.pth"}, "package.module:function"),
        ({"classifier": "nets:make", "classifier_run": "latest"}, ".pth"),
        ({"classifier_options": {"width": 3}}, "belong to somebody's network"),
        ({"mean": [0.5], "classifier_run": "a.pth", "classifier": "nets:make"}, "belong together"),
        ({"mean": [0.5], "std": [0.0], "classifier_run": "a.pth", "classifier": "nets:make"}, "positive"),
    ],
)
def test_somebodys_own_weights_need_all_that_belongs_to_them(values, words):
    defaults = {
        "classifier_run": "latest",
        "classifier": "",
        "classifier_options": {},
        "mean": None,
        "std": None,
    }
    kinds = dict(zip(defaults, (str, str, dict, list[float] | None, list[float] | None), strict=True))
    check({"__annotations__": kinds, **defaults})
    with pytest.raises(ParameterError, match=words):
        check({"__annotations__": kinds, **defaults, **values})


def test_rules_at_their_borders():
    assert (between(0, 1)(0), between(0, 1)(1), at_least(1)(1), one_of(1, 2)(2), each(above(0))([1])) == (
        0,
        1,
        1,
        2,
        [1],
    )
    for rule, value in [(above(0), 0), (above(0, 1), 1.1), (at_least(1), 0.999)]:
        with pytest.raises(ValueError, match="got"):
            rule(value)
    assert convert("sizes", (1, 2), list[int]) == [1, 2]


def test_the_batch_reads_parameters_without_torch(notebook):
    code = f"import sys; from pathlib import Path; from atoplib import parameters, runs; parameters.read(Path({str(notebook)!r})); assert 'torch' not in sys.modules"  # noqa: E501
    subprocess.run([sys.executable, "-c", code], check=True)
