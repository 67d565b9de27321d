"""The line of progress says what is done, how fast, and how long it still takes; and the library prints nothing itself."""

import sys
from types import SimpleNamespace

import pytest

from atoplib import progress
from atoplib.progress import ProgressLine, format_seconds


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    return now


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (12.3, "12 s"),
        (99.4, "99 s"),
        (99.6, "1 min 40 s"),
        (185, "3 min 05 s"),
        (5999, "99 min 59 s"),
        (5999.7, "1 h 40 min"),
        (7620, "2 h 07 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_seconds_read_naturally(seconds, text):
    assert format_seconds(seconds) == text


def test_the_line_tells_share_numbers_speed_and_time_left(clock):
    lines = []
    line = ProgressLine("training", listener=lines.append)
    line(0, 1000, "images", {})
    clock.seconds += 10
    line(250, 1000, "images", {"loss": 0.123456})
    clock.seconds += 30
    line(1000, 1000, "images", {"loss": 0.1})
    assert lines == [
        "training:   0 % (0/1000 images), 0 s",
        "training:  25 % (250/1000 images), loss 0.123, 25 images/s, 10 s, 30 s left",
        "training: 100 % (1000/1000 images), loss 0.1, 25 images/s, 40 s",
    ]


def test_what_was_done_before_it_began_does_not_count_as_speed(clock):
    lines = []
    line = ProgressLine("training", listener=lines.append)
    line(900, 1000, "images")
    clock.seconds += 10
    line(950, 1000, "images")
    assert lines[-1] == "training:  95 % (950/1000 images), 5 images/s, 10 s, 10 s left"


def test_it_renews_itself_now_and_then_only_but_always_shows_the_end(clock):
    lines = []
    line = ProgressLine("training", every=0.5, listener=lines.append)
    for done in range(11):
        line(done, 10)
        clock.seconds += 0.1
    assert [text.split("(")[1].split("/")[0] for text in lines] == ["0", "5", "10"]


def test_nothing_to_do_is_no_error(clock):
    lines = []
    ProgressLine("training", listener=lines.append)(0, 0)
    assert lines == ["training:   0 % (0/0 it), 0 s"]


def test_a_log_is_not_flooded(clock, capsys):
    ProgressLine("training")(1, 2)
    assert capsys.readouterr() == ("", "")


def test_in_a_terminal_one_line_renews_itself(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = ProgressLine("training")
    line(0, 2)
    clock.seconds += 1
    line(2, 2)
    out, err = capsys.readouterr()
    assert out == "" and "\n" not in err and err.count("\r\x1b[2K") == 2 and err.endswith("(2/2 it), 2 it/s, 1 s")


def test_in_a_notebook_one_output_is_updated(clock, monkeypatch, capsys):
    shown = []

    def display(data, *, raw, display_id):
        shown.append(data)
        return SimpleNamespace(update=lambda data, raw: shown.append(data))

    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setattr("IPython.display.display", display)
    line = ProgressLine("training")
    line(0, 2)
    clock.seconds += 1
    line(2, 2)
    lines = [text["text/plain"] for text in shown]
    assert lines == ["training:   0 % (0/2 it), 0 s", "training: 100 % (2/2 it), 2 it/s, 1 s"]
    assert capsys.readouterr() == ("", "")
