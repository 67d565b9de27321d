"""An evaluation can be interrupted, resumed and read back to the last digit."""

import json
import re
import shutil

import pandas as pd
import pytest
import torch
from small_evaluation import (
    COLUMNS,
    IMAGES,
    LABELS,
    NAMES,
    PROTOCOL,
    ROWS,
    accuracy,
    assert_same,
    linear,
    purifying,
    run,
    setting,
)

from atoplib import evaluation
from atoplib.attacks import ATTACKS, losses
from atoplib.evaluation import measure


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr("atoplib.evaluation.pieces.PIECE", 20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory that holds a whole evaluation, and its result."""
    folder = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atoplib.evaluation.pieces.PIECE", 20)
        return folder, run(run_dir=folder)


@pytest.fixture
def result(finished):
    return finished[1]


@pytest.fixture
def directory(finished, tmp_path, small_pieces):
    return shutil.copytree(finished[0], tmp_path / "copy")


# what is kept


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_an_interrupted_evaluation_goes_on_and_ends_the_same(
    result, tmp_path, monkeypatch, small_pieces, share
):
    def stop(done, total, *_):
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(run_dir=tmp_path, progress=stop)
    kept = len(list(tmp_path.glob(".pieces/*.pt")))
    assert 0 < kept < 16
    calls, one = [], measure._measure
    monkeypatch.setattr(
        measure, "_measure", lambda *given, **options: (calls.append(given), one(*given, **options))[1]
    )
    assert_same(result, run(run_dir=tmp_path))
    assert len(calls) == 2 * (1 + 1 + 3 + 3) - kept, "what was finished is not done again"


def test_a_finished_evaluation_is_only_read_and_a_damaged_piece_measured_again(
    result, directory, monkeypatch
):
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_measure", None)
        again = run(run_dir=directory, notify=said.append)
    assert again.frame.equals(result.frame)
    assert len(said) == 1 and said[0].startswith("Loaded, not measured again")
    for path in sorted(directory.glob(".pieces/*.pt"))[::3]:
        path.write_bytes(path.read_bytes()[:-20])
    assert_same(result, run(run_dir=directory, notify=lambda sentence: pytest.fail(sentence)))


def another(defences):
    with torch.no_grad():
        defences["other"][1].bias[0] += 1e-3
    return defences


@pytest.mark.parametrize(
    "change, said, stay",
    [
        ({"defences": another(setting())}, r"defences\.other", 8),
        ({"defences": setting() | {"pipeline": purifying(noise=0.06)}}, r"defences\.pipeline", 8),
        ({"images": IMAGES.flip(0)}, "images", 0),
        ({"labels": LABELS.flip(0)}, "labels", 0),
        ({"seed": 3}, r"shared\.seed", 0),
        ({"eps": {"linf": 0.05, "l2": 0.6}}, r"eps\.l2", 10),
        ({"protocol": PROTOCOL._replace(votes=4)}, "protocol", 0),
        ({"protocol": PROTOCOL._replace(rows=ROWS[:2])}, r"eps\.l2; protocol\.rows", 10),
    ],
    ids=["weights", "transform", "images", "labels", "seed", "eps", "votes", "rows"],
)
def test_what_changed_is_said_measured_anew_and_the_old_archived(directory, change, said, stay):
    before, notes = (directory / "frame.csv").read_bytes(), []
    pieces = {path.name for path in directory.glob(".pieces/*")}
    assert_same(run(run_dir=directory, notify=notes.append, **change), run(**change))
    assert len(notes) == 1
    assert (directory / "superseded-1/frame.csv").read_bytes() == before
    archived = {path.name for path in directory.glob("superseded-1/.pieces/*")}
    assert archived | {path.name for path in directory.glob(".pieces/*")} >= pieces
    assert re.search(f"because it changed: {said}", notes[0]), notes[0]
    assert len(pieces - archived) >= stay


def test_another_environment_and_other_code_of_an_attack_count(result, directory, monkeypatch):
    notes = []
    monkeypatch.setattr(measure, "environment", lambda device: {"torch": "99", "device": "cuda"})
    run(run_dir=directory, notify=notes.append)
    assert "environment.torch" in notes[0] and "0 of 16 pieces" in notes[0]
    monkeypatch.setattr(measure, "ATTACKS", {**ATTACKS, "pgd": ATTACKS["pgd_ensemble"]})
    run(run_dir=directory, notify=notes.append)
    assert "attacks.pgd" in notes[1] and "2 of 16 pieces" in notes[1], "clean images were not attacked"


# tables and files


def test_all_files_can_be_read_back_and_say_the_same(result, tmp_path):
    result.write(tmp_path, caption="a_test & 5 %", indices=range(100, 140), published=True, costs={"a": 1})
    assert pd.read_csv(tmp_path / "frame.csv", keep_default_na=False)[["defence", "attack", "rule"]].equals(
        result.frame[["defence", "attack", "rule"]]
    )
    assert pd.read_csv(tmp_path / "frame.csv").accuracy.to_numpy() == pytest.approx(
        result.frame.accuracy.to_numpy()
    )
    content = json.loads((tmp_path / "results.json").read_text())
    assert (
        content["costs"] == {"a": 1}
        and content["indices"][0] == 100
        and content["protocol"]["name"] == "test"
    )
    assert content["frame"][4]["accuracy"] == result.frame.accuracy[4]
    images = pd.read_csv(tmp_path / "images.csv")
    assert len(images) == len(NAMES) * len(COLUMNS) * 40 and images["index"].between(100, 139).all()
    one = images[(images.defence == "pipeline") & (images.attack == "white-box")]
    assert one.majority.tolist() == result.correct["pipeline", "white-box"]["majority"].astype(int).tolist()
    assert one.label.tolist() == LABELS.tolist()
    markdown, latex = ((tmp_path / name).read_text() for name in ("table.md", "table.tex"))
    assert "72.85" in markdown and "72.85" in latex and "worst of N" in markdown
    assert r"a\_test \& 5 \%" in latex and latex.count(r"\begin{table}") == 4


def test_the_table_marks_the_best_and_what_is_missing(result):
    bold = result.table(bold=True)
    assert list(bold.index) == COLUMNS and list(bold.columns) == NAMES
    assert bold.loc["clean", "undefended"].startswith("**100.0**\N{NO-BREAK SPACE}[91.2,")
    assert "**" not in bold.loc["clean", "other"]
    assert "| clean | **100.0**" in result._repr_markdown_()
    met = (result.by_image.defence != "other") | (result.by_image.attack == "clean")
    alone = evaluation.Evaluation(result.by_image[met], LABELS.numpy())
    assert alone.table().loc["white-box", "other"] == "–"
    table = evaluation.markdown_table(pd.DataFrame({"a|b": ["c"], "n": [1 / 3], "none": [None]}), index=False)
    assert table.splitlines() == ["| a\\|b | n | none |", "| --- | ---: | --- |", "| c | 0.333 | – |"]


def test_a_further_worst_case_is_of_the_attacks_that_are_chosen(result):
    found = result.with_worst("worst unseen", ["white-box l2"])
    assert list(found.frame.attack[::4])[:7] == [*COLUMNS, "worst unseen"]
    right = found.correct["other", "clean"] & found.correct["other", "white-box l2"]
    assert found.correct["other", "worst unseen"].equals(right)
    with pytest.raises(KeyError, match="keep_images=True"):
        found.adversarial("other", "worst case")


# who is who, and what is refused before anything is moved


@pytest.mark.parametrize("name", [0.25, "long" * 100])
def test_any_name_serves_and_another_network_under_it_is_measured_anew(tmp_path, name):
    first, second = (run({name: linear(seed)}, run_dir=tmp_path) for seed in (0, 7))
    assert accuracy(first, str(name), "clean") == 100 > accuracy(second, str(name), "clean")


@pytest.mark.parametrize(
    "defences, options, message",
    [
        ({"the classifier": linear(7), "undefended": linear()}, {}, "names of their own"),
        ({"sister of a": linear(7), "a": linear()}, {}, "names of their own"),
        ({1: linear(), "1": linear(7)}, {}, "names of their own"),
        (None, {"seed": "a"}, "seed must be a whole number"),
        (None, {"dtype": "float32"}, "dtype a torch.dtype"),
        (None, {"eps": {"Linf": 0.1}}, "each norm of eps must be one of linf"),
    ],
)
def test_a_wrong_call_is_refused_and_moves_nothing(directory, defences, options, message):
    before = sorted(directory.rglob("*"))
    with pytest.raises(ValueError, match=message):
        run(defences, run_dir=directory, **options)
    assert sorted(directory.rglob("*")) == before


def test_a_loss_of_ones_own_in_the_table_counts(tmp_path, monkeypatch):
    before = run(run_dir=tmp_path)
    monkeypatch.setitem(losses.LOSSES, "ce", lambda logits, labels: -losses.margin(logits, labels))
    after = run(run_dir=tmp_path)
    assert accuracy(before, "undefended", "white-box") < accuracy(after, "undefended", "white-box")


@pytest.mark.parametrize("values, best", [([1, 3, 3], "b and c"), ([2, 1, 0], "a"), ([0, 0, 0], "nobody")])
def test_who_keeps_most_is_said_of_all_who_are_level(values, best):
    assert evaluation.leaders(pd.Series(values, index=["a", "b", "c"])) == best
