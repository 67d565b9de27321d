"""A recipe is read as data, checked as a whole before anything runs, and asks for each run once."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from atoplib.batch import Job, RecipeError, cli, find_recipe, main, make_plan, read_recipe
from atoplib.batch.cli import parse_overrides
from atoplib.batch.plan import report_job, select
from atoplib.evaluation import PROTOCOLS, Score
from atoplib.parameters import NOTEBOOKS, Ablate, Attack, Compare
from atoplib.runs import run_name

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
RECIPES = sorted(path.stem for path in (FOLDER / "recipes").glob("*.yaml"))
STAGES = list(NOTEBOOKS)[:5]  # of every recipe without a grid
GRIDS = [name for name in RECIPES if read_recipe(FOLDER / "recipes" / f"{name}.yaml").axes]
COMPARISONS = ("compare", "reproduce", "cifar10")
EXTRA = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers, an optional extra, is not installed")
NEED_EXTRA = ("baselines",)
EVERY_RECIPE = [pytest.param(name, marks=EXTRA if name in NEED_EXTRA else ()) for name in RECIPES]
FIRST = "01_train_classifier"


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def plan(source: Path, overrides: Mapping[str, Any]) -> list[Job]:
    return make_plan(read_recipe(source), FOLDER, overrides)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in (*GRIDS, *COMPARISONS, *NEED_EXTRA)])
def test_every_recipe_is_whole_and_its_notebooks_use_each_others_runs(name, tmp_path):
    stages = plan(find_recipe(name, FOLDER), {"workspace": str(tmp_path)})
    assert [stage.name for stage in stages] == STAGES
    assert [len(stage.needs) for stage in stages] == [0, 1, 2, 3, 3]
    runs = {stage.name: stage.run_dir.name for stage in stages}
    classifier, pretrained, finetuned, attack, pictures = (stage.parameters for stage in stages)
    assert pretrained.classifier_run == finetuned.classifier_run == runs["01_train_classifier"]
    assert finetuned.purifier_run == runs["02_pretrain_purifier"]
    for judge in (attack, pictures):
        assert judge.classifier_run == runs["01_train_classifier"]
        assert (judge.ap_run, judge.atop_run) == (runs["02_pretrain_purifier"], runs["03_finetune_atop"])
    assert len({(p.dataset, p.image_size, p.experiment) for p in (stage.parameters for stage in stages)}) == 1
    assert pretrained.transform_settings == finetuned.transform_settings
    assert attack.eps == finetuned.eps == pictures.eps and finetuned.norm == pictures.norm


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_trains_what_it_compares(name, tmp_path):
    jobs = {job.name: job for job in plan(find_recipe(name, FOLDER), {"workspace": str(tmp_path)})}
    compared = jobs["06_compare"]
    trained = ("01_train_classifier", "at", *STAGES[1:3], *(name for name in ("robust", "at-pgd2") if name in jobs))
    assert set(compared.needs) == {jobs[name].run_dir for name in trained}
    asked = compared.parameters
    named = (asked.classifier_run, asked.at_run, asked.ap_run, asked.atop_run)
    assert named == tuple(jobs[name].run_dir.name for name in ("01_train_classifier", "at", *STAGES[1:3]))
    at, plain, tuned = (jobs[name].parameters for name in ("at", "01_train_classifier", "03_finetune_atop"))
    assert at.adversarial and (at.eps, at.norm) == (tuned.eps, tuned.norm) == (asked.eps, "linf")
    normal = replace(at, adversarial=False, attack_steps=plain.attack_steps, epochs=plain.epochs, max_steps=plain.max_steps)
    if at.start_run:
        assert at.start_run == jobs["01_train_classifier"].run_dir.name
        normal = replace(normal, start_run="", learning_rate=plain.learning_rate)
    assert normal == plain, "the same but for the attack, its length, and how far the training goes from where it starts"


def test_on_cifar_atop_is_tuned_before_a_robust_classifier_of_half_the_cost_of_the_at_of_its_kind(tmp_path):
    jobs = {job.name: job for job in plan(find_recipe("cifar10", FOLDER), {"workspace": str(tmp_path)})}
    at, same, robust, tuned = (jobs[name].parameters for name in ("at", "at-pgd2", "robust", "03_finetune_atop"))
    assert replace(robust, epochs=same.epochs) == same and 2 * robust.epochs == same.epochs
    assert replace(at, epochs=same.epochs, max_steps=None, attack_steps=same.attack_steps) == same
    assert tuned.classifier_run == jobs["robust"].run_dir.name and jobs["robust"].run_dir in jobs["03_finetune_atop"].needs


def test_the_recipe_compare_shares_the_runs_of_the_demo(tmp_path):
    demo, compared = (
        {job.name: job.run_dir for job in plan(find_recipe(name, FOLDER), {"workspace": str(tmp_path)})}
        for name in ("mnist", "compare")
    )
    assert all(demo[name] == compared[name] for name in STAGES[:3])


@EXTRA
def test_the_recipe_baselines_compares_every_purifier_that_it_trains(tmp_path):
    jobs = {job.name: job for job in plan(find_recipe("baselines", FOLDER), {"workspace": str(tmp_path)})}
    compared = jobs.pop("06_compare")
    assert set(compared.needs) == {job.run_dir for job in jobs.values()}
    named = compared.parameters.others
    assert named == {"autoencoder": jobs["autoencoder"].run_dir.name, "DiffPure": jobs["diffpure"].run_dir.name}
    demo = {job.name: job.parameters for job in plan(find_recipe("mnist", FOLDER), {"experiment": "baselines"})}
    for name in STAGES[:2]:
        assert replace(jobs[name].parameters, workspace="") == demo[name], "the demo's own, not another purifier's"
    assert jobs["03_finetune_atop"].parameters.purifier_run == jobs["02_pretrain_purifier"].run_dir.name
    diffpure = jobs["diffpure"].parameters
    assert (diffpure.purifier, diffpure.transform) == ("diffusion", "none"), "it makes its own noise"


def test_other_purifiers_are_named_by_the_entries_that_train_them(tmp_path):
    text = f"""notebooks:
  {FIRST}: {{}}
  one: {{notebook: 02_pretrain_purifier, seed: 1}}
  06_compare: {{others: {{A: one, B: /somewhere/else}}}}"""
    *_, one, compared = plan(recipe(tmp_path, text), {"workspace": str(tmp_path)})
    assert compared.parameters.others == {"A": one.run_dir.name, "B": "/somewhere/else"}
    assert one.run_dir in compared.needs
    text = text.replace("A: one, B: /somewhere/else", "A: {purifier: one, classifier: 01_train_classifier}")
    first, one, compared = plan(recipe(tmp_path, text), {"workspace": str(tmp_path)})
    assert compared.parameters.others == {"A": {"purifier": one.run_dir.name, "classifier": first.run_dir.name}}
    late = "notebooks: {06_compare: {others: {A: one}}, one: {notebook: 02_pretrain_purifier}}"
    with pytest.raises(RecipeError, match="06_compare asks for others = 'one', which comes after it: change their order"):
        plan(recipe(tmp_path, late), {"workspace": str(tmp_path)})
    with pytest.raises(RecipeError, match="others must name runs by text"):
        plan(recipe(tmp_path, "notebooks: {06_compare: {others: {A: 1}}}"), {"workspace": str(tmp_path)})


def test_without_an_entry_called_at_a_comparison_looks_for_one_that_was_trained_before(tmp_path):
    source = recipe(tmp_path, "notebooks: {01_train_classifier: {}, 06_compare: {}}")
    *_, compared = plan(source, {"workspace": str(tmp_path)})
    assert compared.parameters.at_run == "latest"


def test_the_ablation_trains_one_classifier_and_attacks_every_variant_once(tmp_path):
    jobs = plan(find_recipe("ablate", FOLDER), {"workspace": str(tmp_path)})
    by_stage = {stage: [job.parameters for job in jobs if job.stage == stage] for stage in STAGES[:4]}
    assert [len(group) for group in by_stage.values()] == [1, 4, 8, 8]
    assert [p.transform for p in by_stage["02_pretrain_purifier"]] == ["none", "rt1", "rt2", "rt3"]
    assert len({(p.transform, p.variant) for p in by_stage["03_finetune_atop"]}) == 8
    assert len({p.atop_run for p in by_stage["04_attack"]}) == 8
    assert all(p.transform_changes == {} for p in by_stage["04_attack"])
    assert {p.experiment for group in by_stage.values() for p in group} == {Ablate().trained}


@pytest.mark.parametrize("name", EVERY_RECIPE)
@pytest.mark.parametrize("smoke", [{}, {"smoke": True}])
def test_a_notebook_names_its_run_as_the_recipe_expects(name, smoke, tmp_path):
    for stage in plan(find_recipe(name, FOLDER), {"workspace": str(tmp_path), **smoke}):
        # What papermill hands on, and the defaults of the notebook's own cell for the rest.
        handed_on = yaml.safe_load(yaml.safe_dump(dict(stage.values)))
        cell = f"# Parameters\nworkspace = {str(tmp_path)!r}"
        namespace = {**type(stage.parameters)().as_dict(), **handed_on, "In": [cell]}
        inside = type(stage.parameters).check(namespace)
        assert inside.experiment_dir / run_name(inside.STAGE, inside.as_dict()) == stage.run_dir


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_opens_with_command_cost_and_expected_result(name):
    head = (FOLDER / "recipes" / f"{name}.yaml").read_text().split("shared:")[0]
    command = "make demo" + ("" if name == "mnist" else f" RECIPE={name}")
    assert command in head and "#   cost" in head and "#   expect" in head


def test_own_parameters_win_over_shared_ones_and_overrides_over_both(tmp_path):
    text = f"shared: {{eps: 0.1, epochs: 3, seed: 1}}\nnotebooks: {{{FIRST}: {{epochs: 4, seed: 2}}, 04_attack: }}"
    first, attack = plan(recipe(tmp_path, text), {"seed": 9, "workspace": str(tmp_path)})
    assert (first.parameters.eps, first.parameters.epochs, first.parameters.seed) == (0.1, 4, 9)
    assert (attack.parameters.eps, attack.parameters.seed) == (0.1, 9)
    assert "epochs" not in attack.values
    assert attack.parameters.ap_run == "latest", "a notebook that the recipe leaves out is looked for"


def test_another_setting_of_an_early_notebook_gives_every_later_one_a_new_run(tmp_path):
    path = find_recipe("mnist", FOLDER)
    names = [
        [stage.run_dir.name for stage in plan(path, {"workspace": str(tmp_path), "epochs": epochs})] for epochs in (2, 3)
    ]
    assert not set(names[0]) & set(names[1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must hold 'notebooks'"),
        ("- a", "must hold 'notebooks'"),
        ("notebooks: {}", "must hold 'notebooks'"),
        ("notebook: {a: {}}", "must hold 'notebooks'"),
        (f"notebooks: [{FIRST}]", "must be a mapping"),
        (f"shared: [1]\nnotebooks: {{{FIRST}: }}", "must be a mapping"),
        ("notebooks: {01_train: }", "unknown notebook '01_train'; allowed: 01_train_classifier, 02_pretrain_purifier"),
        ("notebooks: {1: }", "'notebooks' holds the name 1: names must be text"),
        (f"notebooks: {{{FIRST}: [1]}}", rf"'{FIRST}' must be a mapping, got \[1\]"),
        (f"notebooks: {{{FIRST}: {{epoch: 1}}}}", r"has no parameter 'epoch' \(did you mean 'epochs'\?\)"),
        (f"notebooks: {{{FIRST}: {{1: 1}}}}", rf"'{FIRST}' holds the name 1: names must be text"),
        (f"notebooks: {{{FIRST}: {{epochs: 1.5}}}}", "parameter 'epochs' must be of type int, got 1.5"),
        (f"notebooks: {{{FIRST}: {{eps: 2024-01-01}}}}", "parameter 'eps' must be of type float"),
        (f"notebooks: {{{FIRST}: {{eps: 8}}}}", "eps of the linf norm must be at most 1"),
        (f"shared: {{ep: 1, 2: 3}}\nnotebooks: {{{FIRST}: }}", "'shared' holds the name 2: names must be text"),
        (f"shared: {{ep: 1, sed: 3}}\nnotebooks: {{{FIRST}: }}", "no notebook has the parameter 'ep', 'sed'"),
        (f"notebooks: {{{FIRST}: }}\ngrid: {{{FIRST}: {{2: [1]}}}}", "holds the name 2"),
        ("notebooks: {a: {notebook: [1]}}", r"unknown notebook \[1\]"),
        (f"shared: {{variant: ap}}\nnotebooks: {{{FIRST}: }}", "no notebook has the parameter 'variant'"),
        ("notebooks: {02_pretrain_purifier: {purifier: unet}}", "unknown purifier 'unet'"),
        ("notebooks: {", "cannot be read as YAML"),
        ("notebooks: {[1]: 2}", "cannot be read as YAML"),
        ("notebooks: {? {a: 1} : 2}", "cannot be read as YAML"),
        ("notebooks: &a {b: *a}", r"an alias \(\*a\) is not allowed"),
        (f"notebooks: {{{FIRST}: {{epochs: 1, epochs: 2}}}}", "'epochs' stands twice in one mapping, at line 1"),
        ("[" * 5000, "nested too deeply"),
        (f"notebooks: {{{FIRST}: {{epochs: {'9' * 5000}}}}}", "cannot be read as YAML"),
        (f"notebooks: {{{FIRST}: {{eps: 2024-99-99}}}}", "cannot be read as YAML"),
        ("#" * 1_000_001, "larger than 1 MB"),
        (f"notebooks: {{{FIRST}: }}\ngrid: [1]", "'grid' must be a mapping"),
        (f"notebooks: {{{FIRST}: }}\ngrid: {{seed: 1}}", "the grid's 'seed' must be a list of values, got 1"),
        (f"notebooks: {{{FIRST}: }}\ngrid: {{seed: []}}", r"the grid's 'seed' must be a list of values, got \[\]"),
        (f"notebooks: {{{FIRST}: }}\ngrid: {{04_attack: {{eps: [1]}}}}", "the grid names '04_attack', which is no entry"),
        (f"notebooks: {{{FIRST}: }}\ngrid: {{steps: [1, 2]}}", "no notebook has the parameter 'steps'"),
        (f"notebooks: {{{FIRST}: {{eps: 0.1}}}}\ngrid: {{eps: [0.1]}}", "'eps', or each has a value of its own for it"),
        (f"notebooks: {{{FIRST}: }}\ngrid: {{{FIRST}: {{step: [1]}}}}", "01_train_classifier has no parameter 'step'"),
        (f"notebooks: {{{FIRST}: }}\ngrid: {{seed: [0, -1]}}", "seed must lie in"),
        (f"notebooks: {{{FIRST}: }}\ngrid: {{seed: {list(range(101))}, epochs: {list(range(100))}}}", "10100 combinations"),
        ("notebooks: {08_report: }", "unknown notebook '08_report'; allowed: 01_train_classifier"),
        ("notebooks: {rival: {epochs: 2}}", "unknown notebook 'rival'"),
        (f"notebooks: {{04_attack: {{notebook: {FIRST}}}}}", f"give {FIRST} another name"),
        (f"notebooks: {{04_attack: , {FIRST}: }}", f"asks for classifier_run = '{FIRST}', which comes after it"),
        (
            f"notebooks: {{04_attack: {{classifier_run: f}}, f: {{notebook: {FIRST}}}}}",
            "classifier_run = 'f', which comes after",
        ),
        ("\x00", "cannot be read as YAML"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        plan(recipe(tmp_path, text), {"workspace": str(tmp_path)})
    assert "recipe.yaml" in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("where", ["recipe", "override"])
def test_yaml_that_would_run_code_is_refused_and_runs_nothing(tmp_path, where):
    tag = f"!!python/object/apply:os.mkdir [{tmp_path / 'it-ran'}]"
    yaml.unsafe_load(tag)
    (tmp_path / "it-ran").rmdir()  # so it could
    with pytest.raises(RecipeError, match="YAML"):
        if where == "recipe":
            plan(recipe(tmp_path, f"notebooks: {{{FIRST}: {{eps: {tag}}}}}"), {})
        else:
            parse_overrides([("eps", tag)])
    assert not (tmp_path / "it-ran").exists()


def test_a_recipe_is_found_by_name_or_path_and_a_missing_one_lists_those_there(tmp_path):
    path = recipe(tmp_path, "")
    assert find_recipe(str(path), FOLDER) == path
    assert find_recipe("mnist", FOLDER) == FOLDER / "recipes" / "mnist.yaml"
    with pytest.raises(RecipeError, match=f"there is no recipe 'mnits'; allowed: {', '.join(RECIPES)}, or the path"):
        find_recipe("mnits", FOLDER)


def test_overrides_are_read_as_yaml():
    pairs = [("a", "true"), ("b", "3"), ("c", "0.5"), ("d", "null"), ("e", "8/255"), ("f", "folder:/a b"), ("g", "{w: 2}")]
    pairs += [("h", "folder:/my #1 pics"), ("i", "3 # three")]
    values = {"a": True, "b": 3, "c": 0.5, "d": None, "e": "8/255", "f": "folder:/a b", "g": {"w": 2}}
    values |= {"h": "folder:/my #1 pics", "i": 3}
    assert parse_overrides(pairs) == values and parse_overrides(None) == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nope"], "there is no recipe 'nope'; allowed: "),
        (["mnist", "-p", "epochz", "3"], "no notebook has the parameter 'epochz'"),
        (["mnist", "-p", "eps", "8"], "eps of the linf norm must be at most 1"),
        (["mnist", "-p", "eps", "{"], "a value given by -p: it cannot be read as YAML"),
        (["mnist", "-p", "workspace", "/big"], "the workspace of a batch is given by --workspace DIR"),
        (["mnist", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["mnist", "--retry", "-1"], "--retries must be at least 0, got -1"),
        (["mnist", "--timeout", "nan"], "--timeout must be a number of seconds above 0, got nan"),
        (["mnist", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["mnist", "--only", "06*"], "--only 06* matches no run of this recipe; it has 01_train_classifier, 02_"),
    ],
)
def test_a_wrong_call_ends_with_a_sentence_before_anything_runs(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(cli, "run_jobs", lambda *_, **__: pytest.fail("it ran"))
    assert main([*arguments, "--workspace", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_has_the_exit_code_that_shells_expect(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_jobs", interrupted)
    assert main(["mnist", "--workspace", str(tmp_path)]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


GRID = """
shared: {batch_size: 16}
grid: {seed: [0, 1], 03_finetune_atop: {classification_weight: [1.0, 4.0]}, 04_attack: {steps: [1, 2, 3]}}
notebooks:
  01_train_classifier: {seed: 5}
  02_pretrain_purifier: {}
  03_finetune_atop: {}
  04_attack: {}
"""


def test_what_the_combinations_of_a_grid_share_is_run_once(tmp_path):
    jobs = plan(recipe(tmp_path, GRID), {"workspace": str(tmp_path)})
    count = {stage: sum(job.name == stage for job in jobs) for stage in STAGES}
    assert count == {**dict.fromkeys(STAGES, 0), FIRST: 1, "02_pretrain_purifier": 2, "03_finetune_atop": 4, "04_attack": 12}
    assert len({job.run_dir for job in jobs}) == len(jobs) == 19
    attacks = {(j.parameters.seed, j.parameters.atop_run, j.parameters.steps) for j in jobs if j.name == "04_attack"}
    assert len(attacks) == 12


def test_every_job_comes_after_those_it_needs_and_names_exactly_their_runs(tmp_path):
    jobs = plan(recipe(tmp_path, GRID), {"workspace": str(tmp_path)})
    before: dict[Path, Job] = {}
    for job in jobs:
        named = {value for key, value in job.parameters.as_dict().items() if key.endswith("_run")} - {"", "own"}
        assert named == {need.name for need in job.needs} and all(need in before for need in job.needs)
        purifiers = [before[need] for need in job.needs if before[need].name in ("02_pretrain_purifier", "03_finetune_atop")]
        assert {purifier.parameters.seed for purifier in purifiers} <= {job.parameters.seed}, "seeds were mixed"
        before[job.run_dir] = job


def test_a_job_is_labelled_by_what_tells_it_from_its_neighbours(tmp_path):
    labels = [job.label for job in plan(recipe(tmp_path, GRID), {"workspace": str(tmp_path)})]
    assert len(set(labels)) == len(labels)
    assert labels[:4] == [
        FIRST,
        "02_pretrain_purifier seed=0",
        "03_finetune_atop seed=0 classification_weight=1",
        labels[3],
    ]
    assert labels[3].startswith("04_attack seed=0 steps=1 (")  # the two weights differ only in the run they name


def test_an_override_wins_over_the_grid_and_merges_what_it_makes_equal(tmp_path):
    jobs = plan(recipe(tmp_path, GRID), {"workspace": str(tmp_path), "seed": 9, "steps": 7})
    assert [job.name for job in jobs] == [FIRST, "02_pretrain_purifier", *["03_finetune_atop", "04_attack"] * 2]
    assert {job.parameters.seed for job in jobs} == {9}


def test_a_notebook_may_run_under_other_names_which_others_ask_for(tmp_path):
    text = f"notebooks: {{{FIRST}: , rival: {{notebook: {FIRST}, adversarial: true}}, 02_pretrain_purifier: , "
    text += "of_rival: {notebook: 02_pretrain_purifier, classifier_run: rival}}"
    first, rival, plain, other = plan(recipe(tmp_path, text), {"workspace": str(tmp_path)})
    assert not first.parameters.adversarial and rival.parameters.adversarial and rival.stage == FIRST
    assert plain.needs == (first.run_dir,) and other.needs == (rival.run_dir,)
    assert other.parameters.classifier_run == rival.run_dir.name


def test_only_takes_what_matches_and_what_that_needs(tmp_path):
    jobs = plan(recipe(tmp_path, GRID), {"workspace": str(tmp_path)})
    chosen = select(jobs, ["03*seed=1*weight=4"])
    assert [job.label for job in chosen] == [
        FIRST,
        "02_pretrain_purifier seed=1",
        "03_finetune_atop seed=1 classification_weight=4",
    ]
    assert select(jobs, ["04_attack"]) == jobs and select(jobs, [FIRST, "02*"]) == [j for j in jobs if j.name < "03"]
    assert select(jobs, [jobs[1].run_dir.name]) == jobs[:2]


def test_the_report_names_every_run_in_any_order(tmp_path):
    jobs = plan(recipe(tmp_path, GRID), {"workspace": str(tmp_path), "smoke": True})
    report = report_job(jobs, FOLDER)
    assert report.parameters.runs == sorted(job.run_dir.name for job in jobs)
    assert report.run_dir == report_job(jobs[::-1], FOLDER).run_dir and report.run_dir.parent == jobs[0].run_dir.parent
    assert report.run_dir != report_job(jobs[:-1], FOLDER).run_dir
    assert report.notebook.is_file()


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path, capsys):
    workspace = tmp_path / "workspace"
    assert main([str(recipe(tmp_path, GRID)), "--dry-run", "--jobs", "2", "--workspace", str(workspace)]) == 0
    printed = capsys.readouterr().out
    assert "[1/19] 01_train_classifier " in printed and printed.count("to run, cost unknown") == 19
    assert "19 runs, 0 of them done; 19 to run\ntime: unknown" in printed and "free" in printed
    assert not workspace.exists()


@pytest.mark.parametrize(
    "parameters, sentence, seen",
    [
        (
            {},
            "200 test images of mnist5k; protocol demo, l_inf eps 0.3.",
            "transfer: the attack sees the classifier alone; white-box: it sees the whole pipeline.",
        ),
        (
            {"protocol": "lee-kim", "eps": 8 / 255, "eps_l2": 0.5},
            "protocol lee-kim, l_inf eps 0.03137, l_2 eps 0.5.",
            "transfer PGD-200: the attack sees the classifier alone; the others meet the whole pipeline.",
        ),
        (
            {"protocol": "authors-log", "steps": 7},
            "protocol authors-log (steps 7), l_inf eps 0.3.",
            "FGSM on f, PGD-7 on f, AutoAttack on f: the attack sees the classifier alone.",
        ),
    ],
)
def test_the_table_is_introduced_by_its_protocol_with_the_norms_and_the_sight_of_its_attacks(parameters, sentence, seen):
    first, second = cli.measured(Attack(**parameters), 200)
    assert first.endswith(sentence) and second == seen


def test_a_comparison_is_introduced_with_all_its_radii():
    first, second = cli.measured(Compare(), 200)
    assert first.endswith("protocol compare, l_inf eps 0.3, l_2 eps 2, flow 0.05.") and second.startswith(
        "transfer: the attack"
    )


def test_the_end_of_a_recipe_shows_the_table_of_each_notebook_that_measured_once(tmp_path):
    jobs = plan(recipe(tmp_path, "notebooks: {04_attack: {}, 06_compare: {}}"), {"workspace": str(tmp_path)})
    for job, share in zip(jobs, (0.25, 0.5), strict=True):
        cell = score_of(share)
        job.run_dir.mkdir(parents=True)
        (job.run_dir / "metrics.json").write_text(json.dumps({"scores": [asdict(cell)]}))
    printed = "\n".join([*cli.score_tables(jobs), *cli.places(jobs, tmp_path / "table.csv")])
    assert printed.count("| AToP") == 2 and "protocol demo" in printed and "protocol compare" in printed
    assert "\n".join(cli.score_tables([jobs[0], *jobs])).count("| AToP") == 1


def score_of(share: float) -> Score:
    """A score of which all verdicts are the same."""
    return Score("AToP", "clean", 8, 1, 1, share, 0.0, 1.0, None, share, share, share, share)


def test_a_table_without_an_attack_on_the_classifier_alone_speaks_of_none(monkeypatch):
    whole = replace(PROTOCOLS["demo"], attacks=PROTOCOLS["demo"].attacks[1:])
    monkeypatch.setitem(PROTOCOLS, "demo", whole)
    assert len(list(cli.measured(Attack(), 200))) == 1


@pytest.mark.parametrize("axis", ["device: [cpu, cuda]", "01_train_classifier: {processes: [1, 2]}"])
def test_a_grid_over_what_changes_no_result_is_refused(tmp_path, axis):
    text = f"grid: {{{axis}}}\nnotebooks: {{01_train_classifier: {{}}}}"
    with pytest.raises(RecipeError, match="changes no result, so a grid over it would be one run"):
        plan(recipe(tmp_path, text), {"workspace": str(tmp_path)})


def test_more_images_than_a_folder_has_are_refused_before_anything_is_trained(tmp_path, capsys):
    for split, count in (("train", 3), ("test", 2)):
        for index in range(2 * count):
            folder = tmp_path / "images" / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(folder / f"{index}.png")
    path = recipe(tmp_path, "notebooks: {01_train_classifier: {batch_size: 4}, 05_visualize: , 06_compare: {max_test: 128}}")
    arguments = [str(path), "--workspace", str(tmp_path), "--dry-run", "-p", "dataset", f"folder:{tmp_path / 'images'}"]
    assert main(arguments) == 1
    assert "max_test of 06_compare is 128, but folder:" in (said := capsys.readouterr().err)
    assert "has 4 test images: ask for at most so many (-p max_test 4)" in said
    assert main([*arguments, "-p", "max_test", "4"]) == main([*arguments, "--only", "05_visualize"]) == 0
