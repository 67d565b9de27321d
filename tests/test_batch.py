"""Recipes mean the jobs that they say; what cannot be run is refused with a sentence before anything runs."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_evaluation import pooled

from atoplib.batch import __main__ as command
from atoplib.batch.checks import check
from atoplib.batch.recipe import Job, RecipeError, find_recipe, make_plan, report_job, select
from atoplib.files import read_yaml, write_json

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "notebooks/recipes").glob("*.yaml"))
FIRST, SECOND, THIRD, ATTACK = "01_train_classifier", "02_pretrain_purifier", "03_finetune_atop", "04_attack"
CHAIN = f"notebooks: {{{FIRST}: , {SECOND}: , {THIRD}: , {ATTACK}: }}"


def plan(notebooks: Path, text: str, **overrides: object) -> list[Job]:
    path = notebooks / "recipe.yaml"
    path.write_text(text)
    return make_plan(path, notebooks, {"workspace": str(notebooks.parent), **overrides})


def call(notebooks: Path, text: str, *arguments: str) -> int:
    (notebooks / "recipe.yaml").write_text(text)
    return command.main(
        [str(notebooks / "recipe.yaml"), "--workspace", str(notebooks.parent / "workspace"), *arguments]
    )


# ---------------------------------------------------------------------------------------- the kit's recipes


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_whole_and_its_notebooks_use_each_others_runs(name, tmp_path):
    source = ROOT / "notebooks/recipes" / f"{name}.yaml"
    jobs = make_plan(source, ROOT / "notebooks", {"workspace": str(tmp_path)})
    assert len({job.run_dir for job in jobs}) == len(jobs) > 0
    made: set[Path] = set()
    for job in jobs:  # each after those it needs
        assert set(job.needs) <= made
        assert job.parameters.get("classifier_run") != "latest" or FIRST not in {
            other.stage for other in jobs
        }
        made.add(job.run_dir)
    assert "#   cost" in source.read_text() and "#   expect" in source.read_text()


# ---------------------------------------------------------------------------------------------------- plans


def test_own_parameters_override_shared_ones_and_the_command_overrides_both(notebooks):
    first, second = plan(
        notebooks,
        f"shared: {{eps: 0.1, seed: 1}}\nnotebooks: {{{FIRST}: {{eps: 8/255, epochs: 5}}, {SECOND}: }}",
        seed=7,
    )
    assert first.parameters["eps"] == pytest.approx(8 / 255) and first.parameters["epochs"] == 5
    assert (first.parameters["seed"], second.parameters["eps"], second.parameters["seed"]) == (7, 0.1, 7)


def test_another_setting_of_an_early_notebook_gives_every_later_one_a_new_run_and_a_place_none(notebooks):
    before, after, moved = (
        [job.run_dir for job in plan(notebooks, text, **places)]
        for text, places in (
            (CHAIN, {}),
            (CHAIN.replace(f"{FIRST}: ", f"{FIRST}: {{epochs: 3}}"), {}),
            (CHAIN, {"device": "cuda", "data_dir": "/somewhere"}),
        )
    )
    assert not {*before} & {*after} and moved == before


def test_what_the_combinations_of_a_grid_share_is_run_once_and_labelled_by_what_differs(notebooks):
    jobs = plan(
        notebooks,
        f"{CHAIN}\ngrid: {{{SECOND}: {{noise_std: [0.1, 0.2]}}, {THIRD}: {{variant: [ft_adv, ft_clean]}}}}",
    )
    assert [sum(job.name == name for job in jobs) for name in (FIRST, SECOND, THIRD, ATTACK)] == [1, 2, 4, 4]
    assert {job.label for job in jobs if job.name == SECOND} == {
        f"{SECOND} noise_std=0.1",
        f"{SECOND} noise_std=0.2",
    }
    assert len({job.label for job in jobs}) == len(jobs)
    for job in jobs:  # the runs that it needs are the ones that its parameters name
        named = {value for field, value in job.parameters.items() if field.endswith("_run") and value}
        assert named == {need.name for need in job.needs}


def test_a_notebook_that_fixes_a_parameter_takes_no_part_in_the_grid_over_it(notebooks):
    jobs = plan(notebooks, f"notebooks: {{{FIRST}: {{seed: 5}}, {SECOND}: }}\ngrid: {{seed: [0, 1]}}")
    assert [(job.name, job.parameters["seed"]) for job in jobs] == [(FIRST, 5), (SECOND, 0), (SECOND, 1)]


def test_notebooks_run_under_other_names_and_others_ask_for_them(notebooks):
    text = f"""notebooks:
      {FIRST}:
      at: {{notebook: {FIRST}, adversarial: true}}
      rival: {{notebook: {FIRST}, epochs: 9}}
      06_compare: {{others: {{mine: {{classifier: rival}}, theirs: pretrained}}}}"""
    first, at, rival, compare = plan(notebooks, text)
    own = compare.parameters
    assert (own["classifier_run"], own["at_run"]) == (first.run_dir.name, at.run_dir.name)
    assert own["others"] == {"mine": {"classifier": rival.run_dir.name}, "theirs": "pretrained"}
    assert set(compare.needs) == {first.run_dir, at.run_dir, rival.run_dir}


def test_latest_is_resolved_to_a_run_that_is_there_before_anything_is_hashed(notebooks):
    (alone,) = plan(notebooks, f"notebooks: {{{SECOND}: }}")
    assert alone.parameters["classifier_run"] == "latest"
    (first,) = plan(notebooks, f"notebooks: {{{FIRST}: }}")
    write_json(first.run_dir / "parameters.json", dict(first.parameters))
    write_json(
        first.run_dir / "manifest.json", {"stage": FIRST, "status": "complete", "ended": "now", "number": 1}
    )
    (resolved,) = plan(notebooks, f"notebooks: {{{SECOND}: }}")
    assert resolved.parameters["classifier_run"] == first.run_dir.name and resolved.run_dir != alone.run_dir
    (same,) = [job for job in plan(notebooks, f"notebooks: {{{FIRST}: , {SECOND}: }}") if job.name == SECOND]
    assert same.run_dir == resolved.run_dir, (
        "a run that the recipe makes and the same one found by latest are one"
    )


def test_only_takes_what_matches_and_what_that_needs(notebooks):
    jobs = plan(notebooks, f"{CHAIN}\ngrid: {{seed: [0, 1]}}")
    assert [job.label for job in select(jobs, ["03*seed=1"])] == [
        f"{name} seed=1" for name in (FIRST, SECOND, THIRD)
    ]
    with pytest.raises(RecipeError, match="--only 05 matches no run of this recipe; it has 01_train"):
        select(jobs, ["05"])


def test_the_report_is_one_run_of_the_runs_that_it_names_in_any_order(notebooks):
    jobs = plan(notebooks, CHAIN)
    one, other = report_job(jobs, notebooks), report_job(jobs[::-1], notebooks)
    assert one.run_dir == other.run_dir and sorted(one.parameters["runs"]) == sorted(
        job.run_dir.name for job in jobs
    )


# ------------------------------------------------------------------------------------------------- refusals

REFUSED = [
    ("\0", "cannot be read as YAML"),
    ("", "must hold 'notebooks'"),
    ("[1]", "'the recipe' must be a mapping, got .1."),
    (f"notebooks: {{{FIRST}: }}\nnetwork: 3", "nothing else"),
    ("notebooks: {10_what: }", "unknown notebook '10_what'; allowed: 01_train_classifier"),
    ("notebooks: {08_report: }", "unknown notebook"),
    (f"notebooks: {{{FIRST}: 3}}", "must be a mapping, got 3"),
    (f"notebooks: {{{FIRST}: {{1: 2}}}}", "has no parameter"),
    (f"notebooks: {{{FIRST}: {{epochz: 2}}}}", "no parameter 'epochz' .did you mean 'epochs'"),
    (f"notebooks: {{{FIRST}: {{epochs: 0}}}}", "epochs must be at least 1, got 0"),
    (f"notebooks: {{{FIRST}: {{epochs: many}}}}", "'epochs' must be of type int"),
    (
        f"shared: {{epochz: 2}}\nnotebooks: {{{FIRST}: }}",
        "no notebook has the parameter 'epochz' .did you mean 'epochs'",
    ),
    (
        f"notebooks: {{{SECOND}: {{classifier_run: late}}, late: {{notebook: {FIRST}}}}}",
        "comes after it: change their order",
    ),
    (f"notebooks: {{{SECOND}: , {FIRST}: }}", "comes after it: change their order"),
    (f"grid: {{seed: 3}}\nnotebooks: {{{FIRST}: }}", "must be a list of values, got 3"),
    (f"grid: {{seed: []}}\nnotebooks: {{{FIRST}: }}", "must be a list of values"),
    (f"grid: {{device: [cpu, cuda]}}\nnotebooks: {{{FIRST}: }}", "the grid's device changes no run"),
    (f"grid: {{at: {{seed: [1]}}}}\nnotebooks: {{{FIRST}: }}", "names 'at', which is no entry"),
    (f"grid: {{seed: [0, 1]}}\nnotebooks: {{{FIRST}: {{seed: 3}}}}", "the grid's seed changes no run"),
    (f"shared: {{workspace: here}}\nnotebooks: {{{FIRST}: }}", "give it by --workspace DIR"),
    (f"notebooks: {{{SECOND}: {{classifier_run: nothere}}}}", "there is no run 'nothere' in "),
    ("notebooks: {06_compare: {others: {mine: {purifier: nothere}}}}", "there is no run 'nothere' in "),
    ("notebooks: !!python/object/apply:os.system ['touch /tmp/never']", "cannot be read as YAML"),
]


@pytest.mark.parametrize("text, message", REFUSED)
def test_a_recipe_that_cannot_be_run_is_refused_by_name(notebooks, text, message):
    with pytest.raises(RecipeError, match=f"recipe.yaml: .*{message}"):
        plan(notebooks, text)


def test_a_recipe_is_found_by_name_or_path_and_a_missing_one_lists_those_that_are_there():
    assert find_recipe("mnist", ROOT / "notebooks").name == "mnist.yaml"
    assert find_recipe(str(ROOT / "notebooks/recipes/cifar10.yaml"), ROOT / "notebooks").stem == "cifar10"
    with pytest.raises(RecipeError, match="there is no recipe 'nothing'; allowed: .*mnist"):
        find_recipe("nothing", ROOT / "notebooks")


@pytest.mark.parametrize(
    "text", ["{a: 1, a: 2}", "x: [" * 3000, "*alias", "!!python/object/apply:os.system [ls]"]
)
def test_yaml_that_is_damaged_says_a_thing_twice_or_runs_code_is_refused(text):
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        read_yaml(text)


def test_yaml_1_2_is_read_whose_truth_values_are_true_and_false_alone():
    text = "[0, 010, -3, 0.5, 1e-3, '010', 1:30, true, False, no, yes, off]"
    assert read_yaml(text) == [0, 10, -3, 0.5, 1e-3, "010", "1:30", True, False, "no", "yes", "off"]


def test_overrides_are_read_as_yaml_but_for_comments():
    texts = ["3", "true", "8/255", "null", "/images #1", "1e-3"]
    assert list(command.parse_pairs(enumerate(texts)).values()) == [
        3,
        True,
        "8/255",
        None,
        "/images #1",
        1e-3,
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-p", "epochz", "3"], "no notebook has the parameter 'epochz'"),
        (["--only", "nothing"], "--only nothing matches no run"),
        (["-p", "epochs", "1:30"], "must be of type int, got '1:30'"),
        (["--engine-option", "partition", "long"], "--engine-option is for --engine slurm, got partition"),
    ],
)
def test_a_wrong_call_ends_with_a_sentence_and_makes_nothing(notebooks, capsys, arguments, message):
    assert call(notebooks, CHAIN, *arguments) == 1
    assert message in capsys.readouterr().err and not (notebooks.parent / "workspace").exists()


# ---------------------------------------------------------------------------------------- checks before all


def images(root: Path, *, classes: int = 2, size: tuple[int, int] = (32, 32), count: int = 4) -> str:
    """A folder of noise, (width, height); returns its name as a data set."""
    for split in ("train", "test"):
        for index in range(classes * count):
            path = root / split / f"class{index % classes}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise(size, 50).convert("RGB").save(path)
    return f"folder:{root}"


TRAINING = {"device": "cpu", "batch_size": 4, "image_size": None}
ALONE = {"device": "cpu", "attack": None, "norm": "linf"}
FOREIGN = ALONE | {"classifier_run": "three.pth", "classifier": "small_evaluation:pooled"}
PURIFIER = TRAINING | {"purifier": "gated_unet", "purifier_options": {}, "transform": "rt2", "grid_size": 8}


@pytest.mark.parametrize(
    "folder, parameters, sentence",
    [
        ({}, TRAINING, ""),
        ({"classes": 1}, TRAINING, "class"),
        ({"count": 1}, TRAINING, "batch_size is 4, but 2 images are trained on"),
        ({}, {"device": "cpu", "max_test": 9}, "max_test is 9, but .* has 8 test images"),
        ({}, {"device": "cuda:77"}, "cuda:77"),
        ({}, {"device": "cuda:x"}, "device must be one of auto, cpu, cuda, got 'cuda:x'"),
        ({}, ALONE | {"attack": "nope"}, "attack must be one of fgsm"),
        ({}, ALONE | {"attack": "square", "norm": "l1"}, "norm of square must be one of linf, l2"),
        ({}, ALONE | {"others": {"mine": {"purifier": "gone.pth"}}}, "there is no file gone.pth"),
        ({}, ALONE | {"classifier_run": "pretrained:away"}, "no weights of 'undefended' for 'away'"),
        ({"classes": 3}, FOREIGN, ""),
        ({}, FOREIGN, "tells 3 classes apart, but .* has 2"),
        ({"size": (36, 36)}, PURIFIER, "8 x 8"),
        ({"size": (40, 24)}, PURIFIER | {"purifier_options": {"fold": 4}}, "divisible by 16, got 24 x 40"),
        ({"size": (40, 24)}, PURIFIER | {"purifier_options": {"fold": 4}, "image_size": 64}, ""),
        (
            {},
            TRAINING | {"label_smoothing": 0.1, "classifier": "nothing", "classifier_options": {}},
            "nothing",
        ),
    ],
)
def test_what_data_sizes_and_device_refuse_is_known_before_anything_trains(
    tmp_path, monkeypatch, folder, parameters, sentence
):
    p = {"dataset": images(tmp_path / "images", **folder), **parameters}
    torch.save(pooled().state_dict(), tmp_path / "three.pth")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=sentence) if sentence else nullcontext():
        check(p)


def test_a_dry_run_says_what_would_be_run_and_what_is_there_checks_all_and_touches_nothing(notebooks, capsys):
    text = f"# A trial.\n#   cost      a second\n{CHAIN}"
    assert call(notebooks, text, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert printed.count(": to run\n") == 4 and "cost      a second" in printed and "are checked" in printed
    assert call(notebooks, text, "--dry-run", "-p", "dataset", "cifar10", "-p", "data_dir", "away") == 0
    assert "cifar10 is not in away: its 170 MB would be downloaded" in capsys.readouterr().out
    assert call(notebooks, text, "--dry-run", "-p", "dataset", f"folder:{notebooks}/nowhere") == 1
    told = capsys.readouterr().err
    assert f"{FIRST}: " in told and "nowhere" in told and "Traceback" not in told
    assert not (notebooks.parent / "workspace").exists()


def test_a_batch_plans_without_torch_and_in_less_than_three_seconds_of_computing(tmp_path):
    program = (
        "import resource, sys\n"
        "from atoplib.batch import __main__ as command, recipe, runner\n"
        "source = recipe.find_recipe('mnist', command.NOTEBOOKS)\n"
        f"jobs = recipe.make_plan(source, command.NOTEBOOKS, {{'workspace': {str(tmp_path)!r}}})\n"
        "states = [runner.job_state(job) for job in jobs]\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(len(jobs), 'torch' in sys.modules, used.ru_utime + used.ru_stime)\n"
    )
    count, torch, seconds = subprocess.check_output(
        [sys.executable, "-c", program], text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ).split()
    assert (count, torch) == ("5", "False") and float(seconds) < 3
