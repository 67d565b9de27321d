"""Many runs leave nothing behind: the short version of benchmarks/batch_scale.py."""

from benchmarks import batch_scale


def test_runs_leave_no_process_and_no_open_file_behind(capsys):
    rows = batch_scale.measure(12, 2)
    (_, _, _, files, _), *_, (last, _, _, files_at_the_end, children) = rows
    assert last == 12 and children == 0 and files_at_the_end <= files
    assert batch_scale.main(["--runs", "4"]) == 0
    assert capsys.readouterr().out.count("| 0 |\n") == 4
