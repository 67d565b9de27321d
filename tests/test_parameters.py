"""A notebook's parameters are those of its dataclass, and a wrong one stops it with a sentence before it computes."""

import ast
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from atoplib.attacks import PGDSettings
from atoplib.defences import load_defence
from atoplib.evaluation import PROTOCOLS, Budget
from atoplib.parameters import (
    NOTEBOOKS,
    Ablate,
    Attack,
    Compare,
    FinetuneAtop,
    ParameterError,
    Parameters,
    PretrainPurifier,
    TrainClassifier,
    Visualize,
)
from atoplib.runs import open_run
from atoplib.transforms import TransformSettings

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def cells(name: str) -> list[dict]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def parameters_cell(name: str) -> dict[str, object]:
    """What the cell tagged ``parameters`` assigns: one literal a line, as papermill's inspection needs it."""
    (cell,) = (cell for cell in cells(name) if "parameters" in cell["metadata"].get("tags", []))
    values = {}
    for line in source(cell).splitlines():
        (statement,) = ast.parse(line).body
        assert isinstance(statement, ast.Assign), line
        (target,) = statement.targets
        assert target.id not in values, line
        values[target.id] = ast.literal_eval(statement.value)
    return values


def namespace(kind: type, injected: str = "", **changes: object) -> dict[str, object]:
    """A notebook's globals after its parameters cell and, if given, the cell that papermill injects."""
    changed = {}
    exec(injected, changed)
    changed.pop("__builtins__")
    cells = ["", "epochs = 1", f"# Parameters\n{injected}\n"]
    return {**kind().as_dict(), **changes, **changed, "In": cells, "torch": torch}


def test_every_notebook_has_its_parameters_and_the_other_way_round():
    assert sorted(NOTEBOOKS) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_parameters_cell_holds_exactly_the_fields_with_their_defaults(name):
    values, defaults = parameters_cell(name), NOTEBOOKS[name]().as_dict()
    assert values == defaults
    assert {key: type(value) for key, value in values.items()} == {key: type(value) for key, value in defaults.items()}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_checks_its_parameters_first(name):
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert "parameters" in code[0]["metadata"]["tags"]
    assert f"p = {NOTEBOOKS[name].__name__}.check(globals())" in source(code[1])
    assert len(source(code[1]).splitlines()) <= 4, "nothing slow should come before the check"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_is_committed_without_outputs_and_holds_no_machinery(name):
    for cell in cells(name):
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None
        tree = ast.parse("\n".join(line for line in source(cell).splitlines() if not line.startswith("%")))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.ClassDef | ast.While), source(cell)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 12, f"{node.name} belongs into atoplib"
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("backward", "zero_grad"), "training belongs into atoplib"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_opens_with_what_it_does_how_long_it_takes_and_what_to_expect(name):
    opening = source(cells(name)[0])
    assert opening.startswith("# ") and "CPU cores" in opening
    for row in ("needs", "takes", "expect"):
        assert f"| **{row}** |" in opening, row


@pytest.mark.parametrize("name, kind", NOTEBOOKS.items())
def test_the_defaults_pass_the_check(name, kind):
    assert kind.check(namespace(kind)) == kind()


@pytest.mark.parametrize("name, kind", NOTEBOOKS.items())
def test_smoke_shrinks_the_work_and_moves_the_run_elsewhere(name, kind):
    small, full = kind.check(namespace(kind, "smoke = True")), kind()
    assert small.smoke and small.max_test <= 64 and small.max_train <= 128
    assert small.experiment_dir.name == "mnist-smoke" and full.experiment_dir.name == "mnist"
    if hasattr(small, "training"):
        assert small.training.max_steps == 2 and small.training.batch_size <= small.max_train
    if hasattr(small, "num_draws"):
        assert small.steps == 2 and small.eot_samples == 2


@pytest.mark.parametrize(
    "injected, message",
    [
        ("epss = 1", r"01_train_classifier has no parameter 'epss' \(did you mean 'eps'\?\); allowed: adversarial, "),
        ("learning_rat = 1", "did you mean 'learning_rate'"),
        ("zzz = 1", "no parameter 'zzz'; allowed: "),
        ("epochs = 1\nSeed = 2", "no parameter 'Seed'.*did you mean 'seed'"),
    ],
)
def test_a_name_that_papermill_injected_and_nobody_knows_is_refused(injected, message):
    with pytest.raises(ParameterError, match=message):
        TrainClassifier.check(namespace(TrainClassifier, injected))


def test_the_cell_that_papermill_really_injects_is_the_one_that_is_read():
    notebook = load_notebook_node(str(FOLDER / "01_train_classifier.ipynb"))
    injected = parameterize_notebook(notebook, {"epss": 0.1, "epochs": 2}).cells[2].source
    known = {**TrainClassifier().as_dict(), "epochs": 2}
    with pytest.raises(ParameterError, match="'epss'"):
        TrainClassifier.check({**known, "In": ["", injected]})
    injected = parameterize_notebook(notebook, {"epochs": 2}).cells[2].source
    assert TrainClassifier.check({**known, "In": ["", injected]}).epochs == 2


def test_names_of_ones_own_in_other_cells_are_nobodys_business():
    assert TrainClassifier.check({**namespace(TrainClassifier), "In": ["", "epss = 1"], "epss": 1}) == TrainClassifier()


def test_a_parameters_cell_that_was_not_run_is_named():
    with pytest.raises(ParameterError, match="the parameters cell was not run: adversarial, attack_alpha, .* Run it first"):
        TrainClassifier.check({"In": []})


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("epochs", True, "int"),
        ("epochs", 2.0, "int"),
        ("epochs", "2", "int"),
        ("epochs", None, "int"),
        ("max_train", "all", "int or None"),
        ("max_train", False, "int or None"),
        ("smoke", 1, "bool"),
        ("smoke", "true", "bool"),
        ("eps", True, "float"),
        ("eps", "small", "float"),
        ("eps", "8/0", "float"),
        ("eps", "8/", "float"),
        ("eps", "8/2/2", "float"),
        ("eps", "", "float"),
        ("eps", [0.3], "float"),
        ("eps", None, "float"),
        ("attack_alpha", "auto", "float or None"),
        ("classifier", 18, "str"),
        ("classifier_options", "width=2", "dict"),
        ("dataset", None, "str"),
    ],
)
def test_a_wrong_type_is_refused_with_the_right_one(name, value, wanted):
    with pytest.raises(ParameterError, match=rf"parameter '{name}' must be of type {wanted}, got "):
        TrainClassifier.check(namespace(TrainClassifier, **{name: value}))


@pytest.mark.parametrize(
    "value, number", [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("1e-3", 1e-3), ("0.25", 0.25), (1, 1.0)]
)
def test_numbers_as_a_shell_or_yaml_hands_them_on_are_understood(value, number):
    eps = TrainClassifier.check(namespace(TrainClassifier, eps=value)).eps
    assert isinstance(eps, float) and eps == number


def test_two_ways_to_write_a_number_name_the_same_run():
    for one, other in (("8/255", 8 / 255), (1, 1.0)):
        first, second = (TrainClassifier.from_mapping({"eps": eps}) for eps in (one, other))
        assert first.as_dict() == second.as_dict()


NAN = float("nan")


@pytest.mark.parametrize(
    "kind, values, message",
    [
        (TrainClassifier, {"experiment": "../up"}, "experiment must be a plain folder name, got '../up'"),
        (TrainClassifier, {"experiment": ""}, "experiment must be a plain folder name"),
        (TrainClassifier, {"experiment": ".."}, "experiment must be a plain folder name"),
        (TrainClassifier, {"seed": -1}, r"seed must lie in 0\.\.2147483647, got -1"),
        (TrainClassifier, {"image_size": 0}, "image_size must be at least 1"),
        (TrainClassifier, {"max_train": 0}, "max_train must be at least 1"),
        (TrainClassifier, {"max_test": -5}, "max_test must be at least 1"),
        (TrainClassifier, {"epochs": 0}, "epochs and batch_size must be at least 1, got 0"),
        (TrainClassifier, {"batch_size": 0}, "epochs and batch_size must be at least 1, got 6 and 0"),
        (TrainClassifier, {"max_steps": 0}, "max_steps must be at least 1 or None"),
        (TrainClassifier, {"optimizer": "adamw"}, "unknown optimizer 'adamw'; allowed: sgd, adam"),
        (TrainClassifier, {"schedule": "step"}, "unknown schedule 'step'; allowed: one_cycle, cosine, constant"),
        (TrainClassifier, {"dtype": "float16"}, "unknown dtype 'float16'; allowed: auto, float32, bfloat16"),
        (TrainClassifier, {"learning_rate": 0}, "learning_rate must be above 0"),
        (TrainClassifier, {"learning_rate": "inf"}, "learning_rate must be above 0"),
        (TrainClassifier, {"weight_decay": NAN}, "weight_decay must be 0 or more and finite, got nan"),
        (TrainClassifier, {"grad_clip": -1}, "grad_clip must be 0 or more"),
        (TrainClassifier, {"padding": -1}, "padding must be 0 or more"),
        (TrainClassifier, {"ema_decay": 1}, r"ema_decay must lie in \[0, 1\)"),
        (TrainClassifier, {"label_smoothing": 1}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        (TrainClassifier, {"eps": 8}, "eps of the linf norm must be at most 1.*got 8.0; 8/255"),
        (TrainClassifier, {"eps": NAN}, "eps must be above 0, got nan"),
        (TrainClassifier, {"norm": "l1"}, "unknown norm 'l1'; allowed: linf, l2"),
        (TrainClassifier, {"attack_steps": 0}, "steps and eot_samples must be at least 1"),
        (TrainClassifier, {"classifier": "resnet19"}, "unknown classifier 'resnet19'; allowed: small_resnet, resnet18"),
        (TrainClassifier, {"classifier_options": {"depth": 3}}, "does not take the options {'depth': 3}"),
        (TrainClassifier, {"classifier_options": {"width": 10**9}}, "01_train_classifier: "),
        (TrainClassifier, {"classifier_options": {"mean": 0}}, "mean and std come from the data"),
        (PretrainPurifier, {"purifier": "unet"}, "unknown purifier 'unet'; allowed: gated_unet, deepfill_v2"),
        (PretrainPurifier, {"purifier": "deepfill_v2"}, "does not take the options {'width': .*'fold'"),
        (PretrainPurifier, {"weights": "a.pth"}, "they need purifier = 'deepfill_v2', got 'gated_unet'"),
        (PretrainPurifier, {"transform": "rt4"}, "unknown transform 'rt4'; allowed: none, rt1, rt2, rt3"),
        (PretrainPurifier, {"missing_rate": 1}, r"missing_rate must lie in \[0, 1\)"),
        (PretrainPurifier, {"noise_std": NAN}, "noise_std must lie in"),
        (PretrainPurifier, {"num_masks": 1}, "num_masks must lie in"),
        (PretrainPurifier, {"gan_loss": "wasserstein"}, "unknown gan_loss 'wasserstein'; allowed: hinge, least_squares"),
        (PretrainPurifier, {"discriminator_width": 0}, "discriminator_width must be at least 1"),
        (FinetuneAtop, {"variant": "ft"}, "unknown variant 'ft'; allowed: ap, ft_clean, ft_adv"),
        (FinetuneAtop, {"attack_sees": "all"}, "unknown sees 'all'; allowed: classifier, pipeline"),
        (FinetuneAtop, {"classification_weight": -1}, "classification_weight must be 0 or more"),
        (FinetuneAtop, {"ramp_epochs": "inf"}, "ramp_epochs must be 0 or more"),
        (Attack, {"max_batch": 0}, "max_batch must be at least 1, got 0"),
        (Attack, {"num_draws": 0}, "num_draws must be at least 1 .or None: the protocol's., got 0"),
        (Attack, {"eot_samples": 0}, "eot_samples must be at least 1 .or None: the protocol's., got 0"),
        (Attack, {"num_seeds": 0}, "num_seeds must be at least 1, got 0"),
        (Attack, {"attack_batch": 0}, "attack_batch must be at least 1, got 0"),
        (Compare, {"protocol": "best"}, "unknown protocol 'best'; allowed: demo"),
        (Compare, {"others": {"AP": "x"}}, "others need names other than undefended, AT, AP, AToP and runs by name or path"),
        (Compare, {"others": {"DAE": "latest"}}, "not 'latest'; got {'DAE': 'latest'}"),
        (Compare, {"others": {"DAE": 3}}, "others must name runs by text, {NAME: RUN} or .*, got {'DAE': 3}"),
        (Compare, {"others": {"DAE": {"purifer": "x"}}}, "others must name runs by text"),
        (Compare, {"others": {"DAE": {}}}, "others must name runs by text"),
        (Compare, {"others": {"DAE": {"purifier": "x", "classifier": "latest"}}}, "not 'latest'"),
        (Attack, {"protocol": "best"}, "unknown protocol 'best'; allowed: demo"),
        (Attack, {"eps": 8}, "eps of the linf norm must be at most 1.*got 8.0; 8/255"),
        (Attack, {"eps_l2": 0}, "the budget l2 must be above 0"),
        (Attack, {"dtype": "float16"}, "unknown dtype 'float16'; allowed: auto, float32, bfloat16"),
        (Visualize, {"num_draws": 0}, "num_draws must be at least 1, got 0"),
        (Visualize, {"eot_samples": 0}, "steps and eot_samples must be at least 1"),
        (Visualize, {"alpha": 0}, "alpha must be above 0"),
        (Visualize, {"show": "all"}, "unknown show 'all'; allowed: ap, atop"),
    ],
)
def test_an_impossible_value_is_refused_with_what_is_allowed(kind, values, message):
    with pytest.raises(ParameterError, match=message):
        kind.check(namespace(kind, **values))


def test_public_weights_go_with_their_purifier():
    parameters = PretrainPurifier(purifier="deepfill_v2", purifier_options={"width": 48}, weights="states_pt_places2.pth")
    assert parameters.weights == "states_pt_places2.pth"


@pytest.mark.parametrize("device", ["cuda:9", "meta", "gpu", ""])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ParameterError, match=f"device '{device}' cannot be used here .*; allowed: auto, cpu"):
        _ = TrainClassifier(device=device).torch_device


def test_devices_that_are_there_are_found():
    assert TrainClassifier(device="cpu").torch_device == torch.device("cpu")
    assert TrainClassifier(device="auto").torch_device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_parameters_are_json_values():
    for kind in NOTEBOOKS.values():
        assert json.loads(json.dumps(kind().as_dict())) == kind().as_dict()


def test_the_settings_are_made_of_the_parameters():
    tuned = FinetuneAtop(
        eps=0.1, norm="l2", attack_steps=5, attack_alpha=0.05, attack_eot=3, ramp_epochs=2, attack_sees="classifier",
        variant="ft_clean", target="adversarial", classification_weight=0.5, warmup_epochs=1.5, gan_weight=0.25,
        gan_loss="least_squares", transform="rt3", missing_rate=0.5, noise_std=0.2, num_masks=8, grid_size=4,
        epochs=7, seed=3, padding=1, flip=True,
    )  # fmt: skip
    assert tuned.attack.attack == PGDSettings(eps=0.1, norm="l2", steps=5, alpha=0.05, eot_samples=3, start="random")
    assert (tuned.attack.sees, tuned.attack.ramp_epochs) == ("classifier", 2)
    objective = tuned.objective
    assert (objective.variant, objective.target, objective.warmup_epochs) == ("ft_clean", "adversarial", 1.5)
    assert (objective.classification_weight, objective.gan_weight, objective.gan_loss) == (0.5, 0.25, "least_squares")
    assert tuned.transform_settings == TransformSettings("rt3", 0.5, 0.2, 8, 4)
    training = tuned.training
    names = {item.name for item in fields(training)} - {"betas"}
    assert {name: getattr(training, name) for name in names} == {name: getattr(tuned, name) for name in names}


def test_the_attack_takes_another_transform_only_where_it_is_told_to():
    assert Attack().transform_changes == {} and Attack().image is None
    told = Attack(transform="rt3", noise_std=0.0, num_masks=8)
    assert told.transform_changes == {"name": "rt3", "noise_std": 0.0, "num_masks": 8}


@pytest.mark.parametrize(
    "kind, wrong, said",
    [
        (Attack, {"image": -1}, "image must be 0 or above"),
        (Attack, {"transform": "rt4"}, "unknown transform 'rt4'"),
        (Attack, {"missing_rate": 1.0}, "missing_rate must lie in"),
        (Visualize, {"rows": 0}, "rows must be at least 1"),
        (Ablate, {"missing_rates": ["0.1"]}, r"missing_rates must be a list of numbers, got \['0.1'\]"),
        (Ablate, {"missing_rates": [1.0]}, "missing_rate must lie in"),
        (Ablate, {"mask_counts": []}, "give at least one of each"),
        (Ablate, {"mask_counts": [1.5]}, "mask_counts must be a list of whole numbers"),
        (Ablate, {"vote_counts": [0]}, "vote_counts must be at least 1"),
        (Ablate, {"partitions": [1]}, "num_masks must lie in"),
        (Ablate, {"noise_stds": [-0.1]}, "noise_std must lie in"),
        (Ablate, {"transform": "rt3"}, "for rt1 and rt2, not for 'rt3'"),
        (Ablate, {"average": "votes"}, "unknown average 'votes'; allowed: images, logits"),
        (Ablate, {"down": "transfrom"}, "no training has the parameter 'transfrom'"),
        (Ablate, {"trained": "a/b"}, "experiment must be a plain folder name, got 'a/b'"),
        (Ablate, {"num_draws": 0}, "num_draws must be at least 1"),
    ],
)
def test_what_the_pictures_and_the_attack_cannot_do_is_refused(kind, wrong, said):
    with pytest.raises(ParameterError, match=said):
        kind.from_mapping(wrong)


def test_an_ablation_keeps_what_it_does_not_ask_about_as_it_was_trained():
    asked = Ablate(missing_rates=[0.3], mask_counts=[2], partitions=[4], noise_stds=[0.25])
    trained = TransformSettings("rt3", 0.15, 0.05, num_masks=8, grid_size=16)
    masks, partition = asked.surface(trained)
    assert masks.transform == replace(trained, name="rt2", missing_rate=0.3) and masks.copies == 2
    assert partition.transform == replace(trained, name="rt3", num_masks=4)
    (level,) = asked.sweep(trained)
    assert level.transform == replace(trained, name="rt2", noise_std=0.25) and level.copies == 1
    assert asked.trained_dir == asked.experiment_dir.with_name("ablate")


def test_the_papers_attack_is_fgsm_from_the_image_itself():
    assert FinetuneAtop(attack_sees="classifier", attack_steps=1).attack.attack.start == "clean"
    assert FinetuneAtop(attack_sees="pipeline", attack_steps=1).attack.attack.start == "random"


def test_pretraining_never_classifies_whatever_fine_tuning_is_told():
    assert PretrainPurifier(gan_weight=0.5).objective.variant == "ap"
    assert PretrainPurifier(gan_weight=0.5).objective.gan_weight == 0.5


def test_adversarial_training_is_an_option_of_the_classifier():
    assert TrainClassifier().attack is None
    assert TrainClassifier(adversarial=True, eps=0.1, attack_steps=3).attack == PGDSettings(eps=0.1, steps=3)


def test_data_are_loaded_as_asked(tmp_path):
    parameters = TrainClassifier(max_train=20, max_test=10, image_size=16, data_dir=str(tmp_path / "data"), device="cpu")
    dataset = parameters.load_data()
    assert dataset.train.images.shape == (20, 3, 16, 16) and dataset.test.images.shape == (10, 3, 16, 16)
    TrainClassifier(max_train=20, max_test=10, image_size=16, workspace=str(tmp_path / "space"), device="cpu").load_data()
    assert (tmp_path / "data" / "cache").is_dir() and (tmp_path / "space" / "data" / "cache").is_dir()


def test_a_protocol_can_be_changed_and_says_so():
    plain, changed = Attack(), Attack(steps=7, eot_samples=2, num_draws=5, max_test=30, num_seeds=3, seed=4)
    assert plain.plan == PROTOCOLS["demo"] and plain.test_choice == 200
    assert changed.plan.name == "demo (steps 7, eot_samples 2, num_draws 5)"
    assert all(item.settings["steps"] == 7 and item.settings["eot_samples"] == 2 for item in changed.plan.attacks)
    assert changed.plan.num_draws == 5 and changed.test_choice == 30 and changed.seeds == (4, 5, 6)


def test_one_attack_can_take_the_place_of_the_protocols():
    alone = Attack(attack="pgd", attack_sees="classifier", norm="l2", eps=3.0, steps=5, queries=9)
    assert alone.plan.name == "pgd alone (l2, steps 5)" and alone.budget.l2 == 3.0
    (planned,) = alone.plan.attacks
    assert (planned.label, planned.sees, dict(planned.settings)) == ("transfer", "classifier", {"steps": 5})
    assert Attack(attack="none").plan == PROTOCOLS["demo"]


def test_stadv_alone_takes_eps_as_the_bound_of_its_flow_and_is_checked_for_masking_in_l2():
    alone = Attack(attack="stadv", norm="flow", eps=0.1)
    assert alone.budget.flow == 0.1 and alone.eps_norm == "flow" and alone.plan.attacks[0].norm == "flow"
    assert (alone.masking.norm, alone.masking.eps) == ("l2", alone.eps_l2)
    assert Attack(norm="l2").eps_norm == "linf" and Attack(norm="l2").masking.norm == "linf"


def test_an_image_that_was_not_loaded_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="there is no image 30: 30 test images are loaded, counted from 0"):
        Attack(image=30, max_test=30, data_dir=str(tmp_path)).load_data()


def test_before_anything_is_trained_the_weights_of_the_kit_are_shown(tmp_path):
    source = Visualize(workspace=str(tmp_path)).or_pretrained()
    assert (source.classifier_run, source.ap_run, source.atop_run) == ("pretrained",) * 3
    assert source.weights("undefended").name == "mnist-undefended.safetensors"
    assert {name: path.name for name, path in source.purifiers.items()} == {
        "AP": "mnist-ap.safetensors",
        "AToP": "mnist-atop.safetensors",
    }
    assert Attack(classifier_run="pretrained", workspace=str(tmp_path)).weights("undefended").is_file()
    assert source.weights("at").name == "mnist-at.safetensors"
    cifar = Visualize(dataset="cifar10", workspace=str(tmp_path)).or_pretrained()
    assert cifar.classifier_of("atop").name == "cifar10-frozen.safetensors" != cifar.classifier_of("ap").name
    with pytest.raises(ValueError, match="no weights of 'at' for 'fashion_mnist' come with the kit"):
        Attack(dataset="fashion_mnist", classifier_run="pretrained", workspace=str(tmp_path)).weights("at")


def trained(parameters: Parameters, stage: str, **values: object) -> str:
    """The name of a complete run of a stage, which holds nothing."""
    with open_run(
        parameters.experiment_dir, stage, {"dataset": parameters.dataset, **values}, device=torch.device("cpu")
    ) as run:
        return run.path.name


def test_a_comparison_takes_the_runs_there_are_and_says_of_each_other_what_makes_it(tmp_path):
    asked = Compare(workspace=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run the notebook 01_train_classifier.ipynb first"):
        asked.found()
    plain = trained(asked, "01_train_classifier", adversarial=False)
    tuned = trained(asked, "03_finetune_atop", seed=0)
    there, missing = asked.or_pretrained().found()
    assert {name: path.parent.name for name, path in there.items()} == {"undefended": plain, "AToP": tuned}
    assert list(missing) == ["AT", "AP"] and all("The recipe compare makes all of them" in said for said in missing.values())
    assert "no complete run of 01_train_classifier, adversarial = True, dataset = 'mnist5k'" in missing["AT"]
    assert f"({plain} has adversarial = False, not True): run the notebook" in missing["AT"]
    attacked = trained(asked, "01_train_classifier", adversarial=True)
    there, missing = asked.found()
    assert there["AT"].parent.name == attacked and there["undefended"].parent.name == plain and list(missing) == ["AP"]
    assert list(there) == ["undefended", "AT", "AToP"]
    assert replace(asked, at_run=plain).found()[0]["AT"].parent.name == plain, "a run that is named is taken"


def test_before_anything_is_trained_the_weights_of_the_kit_are_compared_as_far_as_there_are_any(tmp_path):
    there, missing = Compare(workspace=str(tmp_path)).or_pretrained().found()
    assert [path.name for path in there.values()] == [
        f"mnist-{name}.safetensors" for name in ("undefended", "at", "ap", "atop")
    ]
    assert not missing
    there, missing = Compare(dataset="cifar10", workspace=str(tmp_path)).or_pretrained().found()
    assert list(there) == ["undefended", "AT", "AP", "AToP"] and not missing


def test_a_comparison_has_a_radius_for_every_norm():
    assert Compare(eps=0.1, eps_l2=1.0, eps_flow=0.02).budget == Budget(linf=0.1, l2=1.0, flow=0.02)
    with pytest.raises(ParameterError, match="the budget flow must be above 0"):
        Compare.from_mapping({"eps_flow": 0})


def test_of_the_weights_of_the_kit_those_are_shown_that_there_are(tmp_path):
    source = Visualize(dataset="cifar10_jpeg", workspace=str(tmp_path)).or_pretrained()
    assert source.purifiers["AP"].name == "cifar10-ap.safetensors"
    assert set(source.purifiers) <= {"AP", "AToP"}


@pytest.mark.parametrize(
    "asked",
    [{"dataset": "fashion_mnist"}, {"image_size": 64}, {"ap_run": "02_pretrain_purifier-12345678"}],
    ids=lambda asked: next(iter(asked)),
)
def test_what_the_weights_of_the_kit_do_not_fit_says_which_notebook_to_run_first(asked, tmp_path):
    source = Visualize(workspace=str(tmp_path), **asked).or_pretrained()
    with pytest.raises(FileNotFoundError, match="run the notebook 01_train_classifier.ipynb first"):
        source.weights("undefended")


def test_a_run_is_preferred_to_the_weights_of_the_kit(tmp_path):
    plain = Visualize(workspace=str(tmp_path))
    with open_run(plain.experiment_dir, "01_train_classifier", {"dataset": "mnist5k"}, device=plain.torch_device) as run:
        pass
    assert plain.or_pretrained() == plain
    assert plain.weights("undefended") == run.path / "classifier.safetensors"
    with pytest.raises(FileNotFoundError, match="run the notebook 02_pretrain_purifier.ipynb first"):
        _ = plain.purifiers


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"attack": "pdg"}, "unknown attack 'pdg'; allowed: fgsm, pgd"),
        ({"attack": "pgd", "norm": "l1"}, "pgd knows the norms linf, l2, not 'l1'"),
        ({"attack_sees": "all"}, "unknown attack_sees 'all'; allowed: pipeline, bpda, classifier"),
        ({"masking_images": 3}, "masking_images must be 0 .no checks. or at least 8, got 3"),
    ],
)
def test_an_attack_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(ParameterError, match=said):
        Attack.from_mapping(wrong)


def test_published_numbers_stand_beside_comparable_ones_only():
    assert Attack(dataset="cifar10", eps=8 / 255).published
    assert not Attack(dataset="cifar10", eps=4 / 255).published and not Attack(eps=8 / 255).published


@pytest.mark.parametrize("kind", [Attack, Visualize])
def test_more_images_than_there_are_are_refused_when_asked_for_and_taken_as_they_come_when_not(kind, tmp_path):
    with pytest.raises(ParameterError, match="is 1001, but mnist5k has 1000 test images: ask for at most"):
        kind.from_mapping({"max_test": 1001, "data_dir": str(tmp_path)}).load_data()
    assert len(kind.from_mapping({"max_test": 1000, "data_dir": str(tmp_path)}).load_data().test.labels) == 1000


def test_a_further_defence_is_a_purifier_before_any_classifier_or_a_classifier_alone(tmp_path):
    kit = Path(__file__).resolve().parents[1] / "data" / "pretrained"
    robust = str(kit / "cifar10-frozen.safetensors")
    asked = Compare(
        dataset="folder:/somewhere",
        workspace=str(tmp_path),
        **dict.fromkeys(("classifier_run", "at_run", "ap_run", "atop_run"), "pretrained:cifar10"),
        others={
            "AP before it": {"purifier": str(kit / "cifar10-ap.safetensors"), "classifier": robust},
            "f of AToP": {"classifier": robust},
            "AP again": "pretrained:cifar10",
        },
    )
    there, missing = asked.found()
    assert not missing and {name: path.stem for name, path in there.items()} == {
        "undefended": "cifar10-undefended",
        "AT": "cifar10-at",
        "AP": "cifar10-ap",
        "AToP": "cifar10-atop",
        "AP before it": "cifar10-ap",
        "f of AToP": "cifar10-frozen",
        "AP again": "cifar10-ap",
    }
    assert {name: path.stem.removeprefix("cifar10-") for name, path in asked.classifiers(there).items()} == {
        "undefended": "undefended",
        "AT": "at",
        "AP": "undefended",
        "AToP": "frozen",
        "AP before it": "frozen",
        "f of AToP": "frozen",
        "AP again": "undefended",
    }
    assert set(asked.purifiers) == {"AP", "AToP"}
    images = torch.rand(2, 3, 32, 32)
    alone = load_defence(there["f of AToP"], there["f of AToP"])(images)
    assert torch.equal(alone, load_defence(there["AP before it"], Path(robust)).classifier(images))
    with pytest.raises(ValueError, match="no weights of 'at' for 'imagenette'"):
        replace(asked, at_run="pretrained:imagenette").weights("at")
