"""Progress says what is done, how fast, and how long it still takes."""

import time

import pytest

from atoplib import progress
from atoplib.progress import Progress, format_seconds


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_seconds_read_naturally(seconds, text):
    assert format_seconds(seconds) == text


def test_rate_and_time_left_count_what_was_done_by_this_call_only(clock):
    lines = []
    report = Progress("training", lines.append)
    report(50, 100, "step")  # resumed in the middle
    clock[0] += 10
    report(75, 100, "step", {"loss": 0.25})
    assert all(
        text in lines[-1] for text in ("training", "75%", "75/100", "00:10<00:10", "2.50 step/s", "loss 0.25")
    )


def test_it_renews_itself_now_and_then_only_but_always_shows_the_end(clock):
    lines = []
    report = Progress("x", lines.append)
    for done in range(101):
        clock[0] += 0.01
        report(done, 100)
    assert 2 <= len(lines) <= 5 and "100/100" in lines[-1]


@pytest.mark.parametrize("terminal, begins", [(True, "\r"), (False, "")])
def test_in_a_terminal_one_line_renews_itself_and_without_one_or_a_kernel_nothing_is_written(
    monkeypatch, capsys, terminal, begins
):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal, raising=False)
    Progress("x", every=0)(1, 2)
    out, err = capsys.readouterr()
    assert (out, err[:1]) == ("", begins)
