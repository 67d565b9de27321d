"""Results can be read back by others: JSON, CSV, Markdown, LaTeX."""

import csv
import io
import json
from dataclasses import replace

import pytest
import torch

from atoplib.evaluation import Outcomes, score
from atoplib.evaluation.tables import (
    PUBLISHED,
    Published,
    escape,
    images_csv,
    latex_table,
    latex_tables,
    published_table,
    scores_csv,
    verdict_table,
    write_results,
)
from atoplib.verdicts import VERDICTS

RIGHT = torch.tensor([[True, False, True, True], [True, False, False, True]])
OUTCOMES = (
    Outcomes("AP & more", "clean", "", 3, dict.fromkeys(VERDICTS, RIGHT), RIGHT.float(), 2.0),
    Outcomes("AP & more", "PGD_40 100%", "linf", 3, dict.fromkeys(VERDICTS, ~RIGHT), 1 - RIGHT.float(), 8.0),
    Outcomes("AToP", "clean", "", 3, dict.fromkeys(VERDICTS, RIGHT[:1]), RIGHT[:1].float(), 0.0),
)
SCORES = tuple(score(item) for item in OUTCOMES)
LABELS = torch.tensor([3, 1, 4, 1])


def test_the_markdown_has_a_line_for_each_cell_with_every_verdict():
    lines = verdict_table(SCORES).splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[2].startswith("| AP & more | clean | 62.5 [21.9, 90.8] | 62.5 | 62.5 | 62.5 | 62.5 | 3 | 17.7 | 2.0 | 4 |")
    assert "| – | 0.0 | – |" in lines[4], "one seed has no deviation, no time no speed"
    assert lines[-1].endswith("N: draws of a vote; 1 for a defence that throws no dice.")
    longer = [*SCORES, replace(SCORES[0], attack="BPDA", draws=150)]
    assert "N: draws of a vote, of 3 draws for worst-of-N," in verdict_table(longer).splitlines()[-1]
    assert "worst of N, N = 3" in (text := latex_tables(longer, caption="a test")) and "majority, N = 3 or 150" in text


def test_the_latex_table_escapes_names_and_marks_what_is_missing():
    text = latex_table(SCORES, caption="l_inf 8/255", published=PUBLISHED[:1])
    assert r"AP \& more & 62.5 [21.9, 90.8] & 37.5 [9.2, 78.1] \\" in text
    assert r"AToP & 75.0 [30.1, 95.4] & -- \\" in text
    assert r"PGD\_40 100\%" in text and r"\caption{l\_inf 8/255}" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert "AToP, GAN purifier, RT2 & -- & 72.85 &" in text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a_b", r"a\_b"),
        ("5 %", r"5 \%"),
        ("a\\b", r"a\textbackslash{}b"),
        ("x^2~", r"x\textasciicircum{}2\textasciitilde{}"),
    ],
)
def test_special_characters_are_harmless_in_latex(text, expected):
    assert escape(text) == expected


def test_published_numbers_name_their_protocol():
    table = published_table((Published("A", None, 50.0, "PGD"), Published("B", 90.0, 60.0, "AutoAttack")))
    assert table.splitlines()[2:] == ["| A | – | 50.00 | PGD |", "| B | 90.00 | 60.00 | AutoAttack |"]
    assert all(item.protocol and 0 < item.robust < 100 for item in PUBLISHED)


def test_the_scores_come_back_from_csv():
    rows = list(csv.DictReader(io.StringIO(scores_csv(SCORES))))
    assert [row["attack"] for row in rows] == ["clean", "PGD_40 100%", "clean"]
    for row, item in zip(rows, SCORES, strict=True):
        assert float(row["one_shot"]) == item.one_shot and float(row["high"]) == item.high
        assert row["spread"] == ("" if item.spread is None else repr(item.spread))


def test_every_image_is_told_by_its_place_in_the_data_set():
    rows = list(csv.DictReader(io.StringIO(images_csv(OUTCOMES, LABELS, torch.tensor([70, 2, 9, 11])))))
    assert len(rows) == 4 * (2 + 2 + 1)
    one = next(row for row in rows if row["attack"] == "PGD_40 100%" and row["repetition"] == "1" and row["index"] == "9")
    assert (one["label"], one["majority"], one["average"]) == ("4", "1", "1.0")
    assert [row["index"] for row in csv.DictReader(io.StringIO(images_csv(OUTCOMES[2:], LABELS)))] == ["0", "1", "2", "3"]


def test_all_files_are_written_and_say_the_same(tmp_path):
    write_results(tmp_path, SCORES, OUTCOMES, LABELS, caption="a test", published=PUBLISHED, facts={"seeds": [0, 1]})
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["scores"][0]["one_shot"] == SCORES[0].one_shot and content["seeds"] == [0, 1]
    assert (tmp_path / "scores.csv").read_text() == scores_csv(SCORES)
    assert (tmp_path / "images.csv").read_text() == images_csv(OUTCOMES, LABELS)
    assert verdict_table(SCORES) in (tmp_path / "table.md").read_text()
    assert "72.85" in (tmp_path / "table.md").read_text() and "72.85" in (tmp_path / "table.tex").read_text()


def test_every_verdict_has_its_interval_and_its_latex_table():
    (row, *_) = csv.DictReader(io.StringIO(scores_csv(SCORES)))
    for name in VERDICTS:
        assert (float(row[f"{name}_low"]), float(row[f"{name}_high"])) == SCORES[0].interval(name)
    text = latex_tables(SCORES, caption="a test")
    assert text.count(r"\begin{table}") == len(VERDICTS) and "a test; worst of N, N = 3" in text
    calm = [replace(item, draws=1) for item in SCORES]
    assert latex_tables(calm, caption="a test") == latex_table(calm, caption="a test")
