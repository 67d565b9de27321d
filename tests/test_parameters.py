"""Parameters: stated in one cell, checked by the next, the same for a notebook and for a batch."""

import json

import pytest

from atoplib.parameters import (
    ParameterError,
    above,
    at_least,
    between,
    check,
    convert,
    read,
    run_of,
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
    # names of one's own in other cells are nobody's business
    assert checked(x=3, In=["", CELL, "y = 3"]).as_dict() == checked().as_dict()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": 0}, ["epochs", "at least 1", "0"]),
        ({"epochs": 2.5}, ["epochs", "int", "2.5"]),
        ({"epochs": True}, ["epochs", "int", "bool"]),
        ({"epochs": None}, ["epochs", "int"]),
        ({"flip": 1}, ["flip", "bool"]),
        ({"eps": 1.5}, ["eps", "0..1", "1.5"]),
        ({"eps": float("nan")}, ["eps", "0..1", "nan"]),
        ({"eps": "a lot"}, ["eps", "float", "a lot"]),
        ({"eps": "1/0"}, ["eps", "float"]),
        ({"norm": "linff"}, ["norm", "linf, l2", "linff"]),
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
    # IPython shows the sentence alone
    assert in_notebook.value._render_traceback_() == [f"ParameterError: {in_notebook.value}"]


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [("eps", "8/255", 8 / 255), ("eps", "1e-3", 1e-3), ("eps", "0.3", 0.3), ("eps", 1, 1.0)]
    + [("eps", " 8 / 255 ", 8 / 255), ("max_train", None, None), ("max_train", "None", None)],
)
def test_numbers_and_none_as_a_shell_or_yaml_hands_them_on_are_the_same(notebook, name, written, value):
    found = getattr(read(notebook, {name: written}), name)
    assert found == value and type(found) is type(value)


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
    assert p.run_fields == {"classifier_run": run_of("01_train_classifier", adversarial=False)}


@pytest.mark.parametrize(
    "namespace, rules, words",
    [
        ({"__annotations__": {"epochs": int}, "epochs": 1}, {"epoch": at_least(1)}, "did you mean 'epochs'"),
        ({"x": 1}, {}, "run it first"),
    ],
)
def test_a_rule_without_a_parameter_or_a_cell_that_was_not_run_is_said(namespace, rules, words):
    with pytest.raises(ParameterError, match=words):
        check(namespace, **rules)


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
    others = {"others": {"mine": {"classifier": "a.pth"}}, "classifier": "nets:make"}
    check({"__annotations__": kinds | {"others": dict}, **defaults, **others})
    with pytest.raises(ParameterError, match=words):
        check({"__annotations__": kinds, **defaults, **values})


def test_rules_at_their_borders():
    for rule, value in [(between(0, 1), 0), (between(0, 1), 1), (at_least(1), 1), (above(0, 1), 1)]:
        assert rule(value) == value
    for rule, value in [(above(0), 0), (above(0, 1), 1.1), (at_least(1), 0.999), (between(0, 1), 1.1)]:
        with pytest.raises(ValueError, match="got"):
            rule(value)
    assert convert("sizes", (1, 2), list[int]) == [1, 2]
