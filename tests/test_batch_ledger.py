"""A finished run is done again when its code or its inputs have changed, and only then; and its numbers find the table."""

import ast
import csv
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

from atoplib.batch import (
    Job,
    NotebookFailed,
    comparison,
    complete_runs,
    crossed,
    ledger,
    make_plan,
    markdown_table,
    read_recipe,
    run_row,
    score_rows,
    sources,
    training_rows,
    varied,
    worker,
    write_table,
)
from atoplib.batch.ledger import Costs, note_start, set_aside, standing
from atoplib.batch.sources import PACKAGE, code_hash
from atoplib.runs import PLANNED_NAME, locked, open_run, read_json
from atoplib.verdicts import wilson_interval

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("0[1-5]*.ipynb"))
CHAIN = "notebooks: {01_train_classifier: , 02_pretrain_purifier: , 03_finetune_atop: , 04_attack: }"


@pytest.fixture(scope="module")
def hashes() -> dict[Path, str]:
    """Of the notebooks, with the library as it is."""
    return {path: code_hash(path) for path in NOTEBOOKS}


@pytest.fixture
def copied(tmp_path, monkeypatch, without_shape_checks) -> Iterator[Path]:
    """A copy of the library whose code may be changed; returns its folder."""
    package = shutil.copytree(PACKAGE, tmp_path / "atoplib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sources, "PACKAGE", package)
    forget()
    yield package
    forget()


def forget() -> None:
    """Have the code read again, as a new process would."""
    for function in (sources.code_hash, sources.definition, sources.module_file, sources.read_module):
        function.cache_clear()


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that must be there once."""
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))
    forget()


def changed(hashes: dict[Path, str]) -> str:
    """The first digits of the notebooks whose hash is another one now."""
    return "".join(path.name[1] for path in NOTEBOOKS if code_hash(path) != hashes[path])


@pytest.mark.parametrize(
    "file, old, new, notebooks",
    [
        ("training/loop.py", "factor = done / 0.2 if done < 0.2", "factor = done / 0.3 if done < 0.2", "123"),
        ("training/loop.py", "CHECK_EVERY = 10", "CHECK_EVERY = 20", "123"),
        ("training/classifier.py", "loss = F.cross_entropy(", "loss = 2 * F.cross_entropy(", "1"),
        ("training/purifier.py", 'SEES = ("classifier", "pipeline")', 'SEES = ("classifier", "pipeline", "x")', "2345"),
        ("verdicts.py", "spread = successes / trials, z * z / trials", "spread = successes / trials, 2 * z / trials", "45"),
        ("parameters/looking.py", '    show: str = "atop"', '    show: str = "ap"', "5"),
        ("purifiers/gated_unet.py", "return 0.9 * F.hardtanh", "return 0.8 * F.hardtanh", "2345"),
        ("training/loop.py", '"""The learning rate of step', '"""It is the learning rate of step', ""),
        ("training/loop.py", "  # steps between two looks at the loss", "  # a comment of another kind", ""),
        ("figures/curves.py", "columns = min(3, len(names))", "columns = min(4, len(names))", ""),
        ("drawing.py", "DPI = 160", "DPI = 200", ""),
        ("front.py", "nn.Identity()", "nn.Flatten()", ""),  # a purifier's code counts in the run that trained it
        ("heatmaps.py", "DARKEST_FOR_DARK_TEXT = 0.18", "DARKEST_FOR_DARK_TEXT = 0.2", ""),
        ("progress.py", 'return f"{seconds} s"', 'return f"{seconds} sec"', ""),
    ],
)
def test_a_change_of_code_is_seen_by_the_notebooks_that_reach_it(copied, hashes, file, old, new, notebooks):
    edit(copied / file, old, new)
    assert changed(hashes) == notebooks


def test_a_new_module_beside_others_changes_nothing(copied, hashes):
    (copied / "attacks" / "new.py").write_text("def new():\n    return 1\n")
    init = copied / "attacks" / "__init__.py"
    init.write_text(init.read_text() + "from atoplib.attacks.new import new\n")
    assert changed(hashes) == ""


def test_a_notebooks_own_code_counts_and_its_words_magics_and_parameters_do_not(tmp_path, hashes, without_shape_checks):
    content = json.loads(NOTEBOOKS[0].read_text())

    def hashed(change: Callable[[dict], None]) -> str:
        changed = json.loads(json.dumps(content))
        change(changed)
        (tmp_path / "notebook.ipynb").write_text(json.dumps(changed))
        code_hash.cache_clear()
        return code_hash(tmp_path / "notebook.ipynb")

    plain = hashed(lambda notebook: None)
    assert plain == hashes[NOTEBOOKS[0]]
    parameters, *code = (i for i, cell in enumerate(content["cells"]) if cell["cell_type"] == "code")
    assert hashed(lambda notebook: notebook["cells"][0].update(source="other words")) == plain
    assert hashed(lambda notebook: notebook["cells"][parameters].update(source="epochs = 99")) == plain
    assert hashed(lambda notebook: notebook["cells"][code[1]]["source"].insert(0, "%time\n")) == plain
    assert hashed(lambda notebook: notebook["cells"][code[1]]["source"].append("\nx = 1")) != plain


def test_threads_that_ask_at_once_parse_one_after_the_other_and_get_the_same_hash(monkeypatch):
    parse, parsing, most = ast.parse, [], 0

    def watched(source: str, *rest: str) -> ast.Module:
        nonlocal most
        parsing.append(source)
        most = max(most, len(parsing))
        time.sleep(0.001)  # long enough for another thread to come in
        tree = parse(source, *rest)
        parsing.remove(source)
        return tree

    forget()
    monkeypatch.setattr(ast, "parse", watched)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(code_hash, [NOTEBOOKS[-1]] * 8))
    assert len(set(found)) == 1 and len(found[0]) == 16
    assert most == 1


def test_the_library_imports_itself_by_full_names_as_the_hash_needs_it():
    for path in PACKAGE.rglob("*.py"):
        assert "from ." not in path.read_text() and 'import_module("atoplib' not in path.read_text()


def plan(tmp_path: Path, text: str = CHAIN) -> list[Job]:
    (tmp_path / "recipe.yaml").write_text(text)
    return make_plan(read_recipe(tmp_path / "recipe.yaml"), FOLDER, {"workspace": str(tmp_path)})


def make(job: Job, *, weights: bytes = b"weights", seconds: float = 1.0, status: type[BaseException] | None = None) -> None:
    """What a notebook and the batch leave of a job."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    note_start(job)
    try:
        with (
            mock.patch.dict(os.environ, {PLANNED_NAME: job.run_dir.name}),  # as the batch does
            open_run(job.run_dir.parent, job.stage, job.parameters.as_dict(), device=torch.device("cpu")) as run,
        ):
            assert run.path == job.run_dir
            (run.path / "purifier.safetensors").write_bytes(weights)
            run.input(**{need.name[:2]: need / "purifier.safetensors" for need in job.needs})
            if status is not None:
                raise status
    except BaseException as error:
        assert type(error) is status
    else:
        job.executed.write_text("{}")
    ledger.note_end(job, seconds)


def test_a_run_is_new_then_unfinished_then_done(tmp_path):
    job = plan(tmp_path)[0]
    assert standing(job).name == "new"
    for status in (KeyboardInterrupt, ValueError):
        make(job, status=status)
        assert standing(job).name == "unfinished"
    make(job)
    assert standing(job).name == "done"
    job.executed.unlink()
    assert standing(job).name == "unfinished", "there is no executed notebook to show"


def test_changed_code_is_noticed_of_finished_and_of_unfinished_runs_unless_they_are_to_be_reused(tmp_path, monkeypatch):
    done, unfinished, *_ = plan(tmp_path)
    make(done)
    make(unfinished, status=KeyboardInterrupt)
    monkeypatch.setattr(ledger, "code_hash", lambda notebook: "another")
    for job, name in ((done, "done"), (unfinished, "unfinished")):
        assert standing(job) == ledger.Standing("changed", "the code has changed")
        assert standing(job, reuse=True).name == name
        make(job)  # reused and finished: it is still of the old code
        assert standing(job).name == "changed"


def test_an_input_that_came_out_otherwise_is_noticed_and_one_that_came_out_the_same_is_not(tmp_path):
    jobs = plan(tmp_path)
    for job in jobs:
        make(job)
    make(jobs[1], weights=b"weights")  # done again, with the same result
    assert [standing(job).name for job in jobs] == ["done"] * 4
    make(jobs[1], weights=b"others!")
    assert [standing(job).name for job in jobs] == ["done", "done", "changed", "changed"]
    assert standing(jobs[2]).reason == "its input 02 has changed"


def test_a_folder_of_images_and_a_file_of_weights_are_inputs(tmp_path):
    images, weights = tmp_path / "images", tmp_path / "weights.pth"
    (images / "train").mkdir(parents=True)
    (images / "train" / "a.png").write_bytes(b"a")
    weights.write_bytes(b"w")
    options = f"purifier: deepfill_v2, purifier_options: {{width: 4}}, weights: {weights}"
    text = (
        f"shared: {{dataset: 'folder:{images}'}}\nnotebooks: {{01_train_classifier: , 02_pretrain_purifier: {{{options}}}}}"
    )
    jobs = plan(tmp_path, text)
    for job in jobs:
        make(job)
    assert [standing(job).name for job in jobs] == ["done", "done"]
    weights.write_bytes(b"other")
    assert [standing(job).reason for job in jobs] == ["", "its input weights has changed"]
    (images / "train" / "b.png").write_bytes(b"b")
    ledger.folder_hash.cache_clear()
    assert [standing(job).reason for job in jobs] == ["its input dataset has changed"] * 2


def test_of_a_folder_the_images_are_an_input_and_what_else_lies_there_is_not(tmp_path):
    images, other = tmp_path / "images", tmp_path / "other"
    for folder in (images / "test" / "a", other / "a"):
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(b"1")
    (images / "train").symlink_to(other)
    before = ledger.folder_hash(images)

    def now() -> str:
        ledger.folder_hash.cache_clear()
        return ledger.folder_hash(images)

    (images / "runs").mkdir()
    (images / "runs" / "progress.txt").write_text("a workspace of its own")
    (images / "README").write_text("words")
    assert now() == before
    (other / "a" / "2.png").write_bytes(b"2")
    assert now() != before, "what a link of a split leads to is read, too"


def test_weights_that_no_job_makes_are_inputs_by_whatever_name(tmp_path):
    first, second = plan(tmp_path, "notebooks: {01_train_classifier: {seed: 1}}") + plan(
        tmp_path, "notebooks: {01_train_classifier: {seed: 2}}"
    )
    weights, end = tmp_path / "own.safetensors", ".safetensors"
    weights.write_bytes(b"w")

    def train(job: Job, content: bytes) -> None:
        make(job)
        (job.run_dir / f"classifier{end}").write_bytes(content)

    train(first, b"1")
    latest, named, kit, path = (
        plan(tmp_path, f"notebooks: {{02_pretrain_purifier: {{classifier_run: {value}}}}}")[0]
        for value in ("latest", weights, "pretrained", first.run_dir)
    )
    others = f"others: {{mine: {{purifier: pretrained, classifier: {weights}}}}}"
    (compared,) = plan(tmp_path, f"notebooks: {{06_compare: {{{others}, classifier_run: {first.run_dir.name}}}}}")
    for job in (latest, named, kit, path, compared):
        make(job)
        assert standing(job).name == "done"
    train(second, b"2")
    assert standing(latest).reason == "its input classifier_run has changed", "latest is another run by now"
    weights.write_bytes(b"others")
    assert standing(named).reason == "its input classifier_run has changed"
    assert standing(compared).reason == "its input others: mine: classifier has changed"
    assert standing(kit).name == standing(path).name == "done"
    train(first, b"3")
    assert standing(path).reason == "its input classifier_run has changed"


def test_latest_that_is_written_out_means_what_it_means_by_default(tmp_path):
    text = "notebooks: {01_train_classifier: , 02_pretrain_purifier: {classifier_run: latest}}"
    classifier, purifier = plan(tmp_path, text)
    assert purifier.needs == (classifier.run_dir,) and purifier.parameters.classifier_run == classifier.run_dir.name


def test_a_run_that_no_batch_made_is_taken_as_it_is(tmp_path, monkeypatch):
    job = plan(tmp_path)[0]
    make(job)
    (job.run_dir / ledger.NOTES).unlink()
    monkeypatch.setattr(ledger, "code_hash", lambda notebook: "another")
    assert standing(job).name == "done"


def test_a_changed_run_is_set_aside_whole_and_no_longer_found(tmp_path):
    job = plan(tmp_path)[0]
    for number in (1, 2):
        make(job, weights=b"%d" % number)
        moved = set_aside(job)
        assert moved == job.run_dir.parent / "replaced" / f"{job.run_dir.name}-{number}" and not job.run_dir.exists()
        assert (moved / "purifier.safetensors").read_bytes() == b"%d" % number
    assert standing(job).name == "new" and Costs([job]).expected(job) is None


@pytest.mark.parametrize("name", ["run.lock", "batch.lock"])
def test_a_changed_run_that_is_in_use_is_not_moved(tmp_path, monkeypatch, name):
    job = plan(tmp_path)[0]
    make(job)
    monkeypatch.setattr(ledger, "code_hash", lambda notebook: "another")
    monkeypatch.setattr(worker, "run_process", lambda *_: pytest.fail("it ran"))
    with locked(job.run_dir / name), pytest.raises(NotebookFailed, match="in use by"):
        worker.execute(job)
    assert job.executed.exists()


def test_a_changed_run_starts_from_nothing_and_an_unfinished_one_from_what_is_there(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(worker, "run_process", lambda job, *_: found.append((job.run_dir / "purifier.safetensors").exists()))
    job = plan(tmp_path)[0]
    make(job, status=KeyboardInterrupt)
    worker.execute(job)
    monkeypatch.setattr(ledger, "code_hash", lambda notebook: "another")
    worker.execute(job, reuse=True)
    worker.execute(job)
    assert found == [True, True, False]


def test_the_cost_is_that_of_the_most_similar_run_of_the_notebook(tmp_path):
    jobs = plan(tmp_path, CHAIN + "\ngrid: {01_train_classifier: {epochs: [1, 10], seed: [0, 1]}}")
    first = [job for job in jobs if job.name == "01_train_classifier"]
    assert [Costs(jobs).expected(job) for job in first] == [None] * 4
    make(first[0], seconds=2.0)
    make(first[2], seconds=20.0)
    assert [Costs(jobs).expected(job) for job in first] == [2.0, 2.0, 20.0, 20.0]
    assert Costs(jobs).expected(next(job for job in jobs if job.name == "04_attack")) is None


def test_a_cost_is_that_of_the_nearest_run_however_often_and_early_it_is_asked_for(tmp_path):
    text = "{notebooks: {01_train_classifier: }, grid: {epochs: [1, 2], batch_size: [8, 16], seed: [0, 1]}}"
    jobs = plan(tmp_path, text)
    asked = Costs(jobs)
    assert [asked.expected(job) for job in jobs] == [None] * 8
    for count, job in enumerate(jobs[:5], start=1):
        asked.add(job, float(count))
        afresh = Costs(jobs)
        for earlier in range(count):
            afresh.add(jobs[earlier], earlier + 1.0)
        assert [asked.expected(job) for job in jobs] == [afresh.expected(job) for job in jobs]
    assert [asked.expected(job) for job in jobs] == [1.0, 1.0, 3.0, 3.0, 5.0, 5.0, 3.0, 3.0]


def test_an_unfinished_run_tells_no_cost_and_attempts_add_up(tmp_path):
    job = plan(tmp_path)[0]
    make(job, seconds=3.0, status=KeyboardInterrupt)
    assert Costs([job]).expected(job) is None
    make(job, seconds=4.0)
    assert Costs([job]).expected(job) == 7.0 and read_json(job.run_dir / ledger.NOTES)["attempts"] == 2


def test_a_row_holds_parameters_of_the_run_and_of_all_it_was_computed_from_and_flat_metrics(tmp_path):
    jobs = plan(tmp_path, CHAIN + "\ngrid: {03_finetune_atop: {epochs: [1, 2]}}")
    for job in jobs:
        make(job)
    metrics = {
        "scores": [{"defence": "AP", "attack": "white-box", "one_shot": 0.5}],
        "history": [{"loss": 2.0}, {"loss": 1.0, "sub": {"a": 3}}],
        "accuracy": 0.25,
    }
    attack = jobs[-1]
    (attack.run_dir / "metrics.json").write_text(json.dumps(metrics))
    row = run_row(attack.run_dir)
    assert row["run"] == attack.run_dir.name and row["status"] == "complete" and row["protocol"] == "demo"
    assert row["03_finetune_atop.epochs"] == 2 and row["01_train_classifier.classifier"] == "small_resnet"
    measured = {name: value for name, value in row.items() if name.startswith("metrics.")}
    assert measured == {
        "metrics.scores.AP.white-box.one_shot": 0.5,
        "metrics.history.last.loss": 1.0,
        "metrics.history.last.sub.a": 3,
        "metrics.accuracy": 0.25,
    }
    assert not {"workspace", "data_dir", "device.x"} & set(row)
    attacks = [run_row(job.run_dir) for job in jobs if job.name == "04_attack"]
    assert varied(attacks) == ["03_finetune_atop.epochs"]
    path = tmp_path / "table.csv"
    assert write_table(path, [job.run_dir for job in jobs]) == [run_row(job.run_dir) for job in jobs]
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [line["run"] for line in read] == [job.run_dir.name for job in jobs]
    assert read[-1]["metrics.accuracy"] == "0.25" and read[0]["metrics.accuracy"] == ""


def test_a_damaged_run_is_a_row_with_gaps(tmp_path):
    (tmp_path / "04_attack-1").mkdir()
    for name in ("manifest", "parameters", "metrics"):
        (tmp_path / "04_attack-1" / f"{name}.json").write_text("{")
    assert run_row(tmp_path / "04_attack-1")["run"] == "04_attack-1"
    assert len(write_table(tmp_path / "table.csv", [tmp_path / "04_attack-1", tmp_path / "nowhere"])) == 2


def attacked(tmp_path: Path) -> list[Path]:
    """Four complete runs of notebook 4, over two seeds and two weights, and all that they were computed from."""
    jobs = plan(tmp_path, CHAIN + "\ngrid: {seed: [0, 1], 03_finetune_atop: {classification_weight: [1.0, 4.0]}}")
    for number, job in enumerate(jobs):
        make(job)
        score = {"defence": "AToP", "attack": "white-box", "one_shot": 0.5, "low": 0.25, "high": 0.75 + number / 1000}
        score["images"] = 100
        clean = {**score, "attack": "clean", "one_shot": 0.75}
        metrics = {"scores": [clean, score]} if job.name == "04_attack" else {"test_accuracy": 0.875, "train_seconds": 2.0}
        (job.run_dir / "metrics.json").write_text(json.dumps(metrics))
    return [job.run_dir for job in jobs]


def test_a_comparison_has_a_line_a_run_and_defence_and_a_column_an_attack(tmp_path):
    run_dirs = attacked(tmp_path)
    rows = score_rows(run_dirs)
    assert len(rows) == 4 * 2 and {row["accuracy"] for row in rows} == {0.5, 0.75}
    assert varied([row["parameters"] for row in rows]) == ["seed", "03_finetune_atop.classification_weight"]
    lines = comparison(rows)
    assert [(line["seed"], line["03_finetune_atop.classification_weight"]) for line in lines] == [
        (seed, weight) for seed in (0, 1) for weight in (1.0, 4.0)
    ]
    assert all(line["white-box %"].startswith("50.0 [25.0, 7") and line["clean %"].startswith("75.0 [") for line in lines)
    assert score_rows([]) == [] == comparison([])


def test_two_parameters_of_the_trainings_are_crossed_and_runs_that_share_both_are_averaged(tmp_path):
    grid = "\ngrid: {transform: [rt2, none], seed: [0, 1], 03_finetune_atop: {variant: [ft_clean, ft_adv]}}"
    jobs = plan(tmp_path, CHAIN.replace("04_attack: }", "04_attack: {transform: null}}") + grid)
    for job in jobs:
        make(job)
        if job.name == "04_attack":
            share = {"one_shot": 0.5 if job.parameters.seed else 0.3, "low": 0.0, "high": 1.0, "images": 100}
            scores = [{"defence": name, "attack": "white-box", **share} for name in ("undefended", "AP", "AToP")]
            (job.run_dir / "metrics.json").write_text(json.dumps({"scores": scores}))
    rows = score_rows(job.run_dir for job in reversed(jobs))
    (surface,) = crossed(rows, down="transform", across="variant").values()
    assert (surface.rows, surface.columns) == (("none", "rt2"), ("none (AP)", "ft_clean", "ft_adv"))
    assert len(surface.cells) == 6
    low, high = wilson_interval(40, 100)
    for cell in surface.cells.values():
        assert cell == pytest.approx({"accuracy": 0.4, "accuracy_low": low, "accuracy_high": high, "images": 100})
    (weights,) = crossed(rows, down="seed", across="attack_sees").values()
    assert (weights.rows, weights.columns) == (("0", "1"), ("pipeline",)), "AP is not fine-tuned against anything"
    for noise_std, kept in ((0.05, 6), (0.5, 0)):  # that of the training, and another one
        told = [{**row, "parameters": {**row["parameters"], "noise_std": noise_std}} for row in rows]
        surfaces = crossed(told, down="transform", across="variant")
        assert sum(len(surface.cells) for surface in surfaces.values()) == kept
    assert crossed([], down="seed", across="variant") == {}


def test_trainings_are_listed_with_what_tells_those_of_a_notebook_apart(tmp_path):
    lines = training_rows(attacked(tmp_path))
    assert [line["varied"] for line in lines if line["run"].startswith("03")] == [
        f"classification_weight = {weight}, seed = {seed}" for seed in (0, 1) for weight in (1, 4)
    ]
    assert {(line["clean %"], line["seconds"]) for line in lines} == {(87.5, 2.0)} and len(lines) == 2 + 2 + 4


def test_complete_runs_are_found_and_reports_and_failures_are_not(tmp_path):
    run_dirs = attacked(tmp_path)
    experiment = run_dirs[0].parent
    (report := experiment / "08_report-1").mkdir()
    (report / "manifest.json").write_text('{"status": "complete", "stage": "08_report"}')
    make(plan(tmp_path, "notebooks: {01_train_classifier: {seed: 9}}")[0], status=KeyboardInterrupt)
    assert complete_runs(experiment) == sorted(run_dirs)


def test_a_table_is_aligned_markdown():
    rows = [{"a": "x|y", "b": 1}, {"a": "long text", "b": 2.5, "c": None}]
    assert markdown_table(rows).splitlines() == [
        "| a         |   b | c   |",
        "| --------- | --: | --- |",
        "| x\\|y      |   1 |     |",
        "| long text | 2.5 |     |",
    ]
