"""Defences are compared on equal terms: each attack says who knows it, each training and each decision what it costs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from atoplib import evaluation
from atoplib.batch import find_recipe, make_plan, read_recipe
from atoplib.classifiers import build_classifier, fold_batch_norms
from atoplib.data import Split
from atoplib.evaluation import PROTOCOLS, Budget, Cost, Outcomes, PlannedAttack, Protocol
from atoplib.front import Front
from atoplib.pipeline import AToPPipeline, for_attacks
from atoplib.purifiers import build_purifier
from atoplib.training import classifier_step, purifier_step, training_flops
from atoplib.transforms import TransformSettings
from atoplib.verdicts import VERDICTS, wilson_interval

ROOT = Path(__file__).resolve().parents[1]
IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).eval()


class Identity(nn.Module):
    """A purifier that hands its colours on."""

    def forward(self, given):
        return given[:, :3]


# who knows which attack


def labels(protocol: Protocol, norms: list[str]) -> list[str]:
    return [item.heading.partition(":")[0] for item in evaluation.with_seen(protocol, norms).attacks]


def test_the_columns_of_the_protocol_compare_say_what_was_seen_in_training():
    assert labels(PROTOCOLS["compare"], ["linf"]) == ["blind", "known", "unseen", "unseen", "unseen"]
    assert labels(PROTOCOLS["compare"], ["l2"]) == ["blind", "unseen", "known", "unseen", "unseen"]
    assert labels(PROTOCOLS["compare"], []) == ["blind", *["unseen"] * 4]
    named = evaluation.with_seen(PROTOCOLS["compare"], ["linf"])
    assert named.attacks[1].heading == "known: PGD-40 + EOT-10 linf" and named.name == "compare"
    assert replace(named.attacks[1], label=PROTOCOLS["compare"].attacks[1].label) == PROTOCOLS["compare"].attacks[1]


def test_a_short_cut_around_the_purifier_is_not_the_attack_of_the_training():
    bpda = PlannedAttack("BPDA", "pgd", sees="bpda")
    assert labels(Protocol("p", "", (bpda, PlannedAttack("FGSM", "fgsm"))), ["linf"]) == ["unseen", "known"]


def outcome(defence: str, attack: str, right: list[int], norm: str = "linf") -> Outcomes:
    verdict = torch.tensor([right], dtype=torch.bool)
    return Outcomes(defence, attack, norm, 1, dict.fromkeys(VERDICTS, verdict), verdict.float(), 1.0)


def test_the_worst_unseen_case_stands_in_place_of_those_of_single_norms():
    of_one = [
        ("clean", [1, 1, 1, 1]),
        ("blind: transfer", [0, 0, 0, 0]),
        ("known: PGD", [1, 0, 0, 0]),
        ("unseen: l2", [1, 1, 0, 1]),
        ("unseen: StAdv", [1, 1, 1, 0]),
        ("worst case linf", [0, 0, 0, 0]),
        ("worst case", [0, 0, 0, 0]),
    ]
    found = evaluation.with_worst_unseen([outcome(name, attack, right) for name in "ab" for attack, right in of_one])
    columns = ["clean", "blind: transfer", "known: PGD", "unseen: l2", "unseen: StAdv", "unseen: worst case", "worst case"]
    assert [(item.defence, item.attack) for item in found] == [(name, column) for name in "ab" for column in columns]
    assert found[5].right["majority"].tolist() == [[True, True, False, False]]
    single = [outcome("a", attack, right) for attack, right in of_one[:4]]
    assert [item.attack for item in evaluation.with_worst_unseen(single)] == columns[:4], "one attack is its own worst case"


def test_what_an_evaluation_measures_gets_its_worst_unseen_case():
    planned = (PlannedAttack("FGSM", "fgsm"), PlannedAttack("Square", "square", settings={"queries": 3}))
    protocol = evaluation.with_seen(Protocol("p", "", (*planned, PlannedAttack("l2", "fgsm", "l2"))), ["linf"])
    model = linear()
    truth = model(IMAGES).argmax(dim=1)
    found = evaluation.evaluate({"f": model}, IMAGES, truth, protocol, Budget(0.1, 0.5), classifier=model)
    attacks = [item.attack for item in evaluation.with_worst_unseen(found.outcomes)]
    assert attacks == ["clean", "known: FGSM", "unseen: Square", "unseen: l2", "unseen: worst case", "worst case"]


def test_a_table_by_vote_has_the_intervals_of_the_vote():
    item = evaluation.score(outcome("a", "PGD", [1, 1, 1, 0]))
    item = replace(item, majority=0.5)
    (cell,) = evaluation.voted([item])
    assert cell == {
        "defence": "a",
        "attack": "PGD",
        "accuracy": 0.5,
        **dict(zip(("low", "high"), wilson_interval(2, 4), strict=True)),
    }
    (cell,) = evaluation.voted([item], "worst_of_n")
    assert cell["accuracy"] == 0.75


def test_every_protocol_stands_in_the_docs_and_in_notebook_4():
    for source in ("docs/protocols.md", "notebooks/04_attack.ipynb"):
        named = re.findall(r"\| `([a-z-]+)` \| [a-zP0-9]", (ROOT / source).read_text())
        assert set(PROTOCOLS) <= set(named), source


# what checkpoints tell


PLAIN = {"dataset": "mnist5k", "padding": 2, "classifier": "small_resnet", "adversarial": False, "norm": "linf", "eps": 0.3}
HEADERS = {
    "undefended": {"kind": "classifier", "parameters": PLAIN, "metrics": {"train_flops": 2}},
    "AT": {
        "kind": "classifier",
        "parameters": {**PLAIN, "adversarial": True, "attack_steps": 5},
        "metrics": {"train_flops": 30},
    },
    "AP": {"kind": "purifier", "parameters": {"dataset": "mnist5k", "padding": 2}, "metrics": {"train_flops": 400}},
    "AToP": {
        "kind": "purifier",
        "parameters": {
            "dataset": "mnist5k",
            "padding": 2,
            "variant": "ft_adv",
            "norm": "l2",
            "eps": 1.5,
            "attack_steps": 1,
            "attack_sees": "pipeline",
        },
        "metrics": {"train_flops": 5000, "pretrain_flops": 400},
    },
}


def test_the_attack_of_a_training_is_named_and_a_classifier_trained_normally_saw_none():
    assert [evaluation.training_attack(header) for header in HEADERS.values()] == [
        "none",
        "PGD-5, linf 0.3, on the classifier",
        "none",
        "FGSM, l2 1.5, through the whole pipeline",
    ]
    assert evaluation.attacked_norms(HEADERS) == ["linf", "l2"]
    assert evaluation.attacked_norms({"undefended": HEADERS["undefended"]}) == []
    assert evaluation.training_attack({}) == "none", "a checkpoint of somebody else's"


def test_what_was_trained_on_other_terms_is_named():
    assert evaluation.differences(HEADERS) == []
    other = {**HEADERS["AT"], "parameters": {**HEADERS["AT"]["parameters"], "padding": 4, "classifier": "resnet18"}}
    assert evaluation.differences({**HEADERS, "AT": other}) == [
        "AT was trained with padding 4, undefended with 2",
        "AT was trained with classifier resnet18, undefended with small_resnet",
    ]
    assert evaluation.differences({**HEADERS, "AT": HEADERS["undefended"]}) == ["AT was not trained on attacks"]


def test_training_costs_are_added_up_the_pre_training_apart_and_unknown_ones_stay_unknown():
    assert evaluation.training_costs(HEADERS) == {"undefended": (2, 0), "AT": (30, 0), "AP": (2, 400), "AToP": (5002, 400)}
    old = {name: {**header, "metrics": {}} for name, header in HEADERS.items()}
    assert evaluation.training_costs(old) == {
        "undefended": (None, 0),
        "AT": (None, 0),
        "AP": (None, None),
        "AToP": (None, None),
    }
    assert evaluation.training_costs({**HEADERS, "undefended": old["undefended"]})["AToP"] == (None, 400)
    assert list(evaluation.training_costs({"undefended": HEADERS["undefended"]})) == ["undefended"]


def test_a_further_purifier_costs_what_its_kind_of_training_costs():
    headers = {**HEADERS, "mine": {**HEADERS["AP"], "metrics": {"train_flops": 7}}, "tuned": HEADERS["AToP"]}
    found = evaluation.training_costs(headers)
    assert list(found) == list(headers) and found["mine"] == (2, 7) and found["tuned"] == found["AToP"]


@pytest.mark.parametrize(
    "name, before, small",
    [
        ("compare", "01_train_classifier", {"max_train": 4_000}),  # both end after a number of steps
        ("reproduce", "robust", {"batch_size": 4}),
        ("cifar10", "robust", {}),  # whose fine-tuning ends after a number of steps, so that their size matters
    ],
)
def test_in_the_recipe_at_is_trained_for_as_many_flops_as_classifier_and_fine_tuning_together(name, before, small, tmp_path):
    recipe = read_recipe(find_recipe(name, ROOT / "notebooks"))
    p = {job.name: job.parameters for job in make_plan(recipe, ROOT / "notebooks", {"workspace": str(tmp_path), **small})}
    count = small.get("max_train", 400 if small else 50_000)  # the count is proportional to the images
    digits = Split(torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(count, -1, -1, -1), torch.zeros(count).long())

    def classifier() -> nn.Module:
        options = {"num_classes": 10, "mean": (0.1,) * 3, "std": (0.3,) * 3, **p["at"].classifier_options}
        return build_classifier(p["at"].classifier, **options).eval()

    tuning, purifier = p["03_finetune_atop"], build_purifier("gated_unet", **p["02_pretrain_purifier"].purifier_options)

    def cost(name: str) -> int:
        network, front = classifier(), None
        if p[name].purifier_run:
            front = Front(for_attacks(AToPPipeline(tuning.transform_settings, purifier.eval(), nn.Identity()).eval()))
        step = classifier_step(network, attack=p[name].attack, front=front)
        return training_flops(step, {"classifier": network}, digits, p[name].training)

    pipeline = AToPPipeline(tuning.transform_settings, purifier, fold_batch_norms(classifier()))
    step = purifier_step(pipeline, tuning.objective, attack=tuning.attack)
    finetuned = training_flops(step, {"purifier": purifier}, digits, tuning.training)
    assert cost("at") == pytest.approx(cost(before) + finetuned, rel=0.02)


# what decisions cost


def test_a_defence_without_dice_decides_in_one_pass_and_a_random_one_votes():
    model = linear()
    calm = evaluation.measure_cost("f", model, IMAGES, training=7, num_draws=4)
    assert (calm.defence, calm.training, calm.pretraining, calm.passes) == ("f", 7, 0, 1)
    assert calm.forward == 2 * 3 * 8 * 8 * 5 and calm.milliseconds == calm.vote_milliseconds > 0
    dice = AToPPipeline(TransformSettings("rt2", noise_std=0.5, grid_size=4), Identity(), model).eval()
    random = evaluation.measure_cost("AP", dice, IMAGES, pretraining=None, num_draws=4, max_batch=5)
    assert (random.passes, random.pretraining, random.forward) == (4, None, calm.forward)
    assert random.vote_milliseconds > 0 and random.milliseconds > 0


def test_the_table_of_costs_shows_a_dash_where_nothing_was_recorded():
    known = Cost("AToP", 2_190_000_000_000, 166_000_000_000, 11_000_000, 10, 0.5, 4.25)
    table = evaluation.cost_table([known, replace(known, defence="AP", training=None, pretraining=None)]).splitlines()
    assert table[2] == "| AToP | 2.19 | 0.166 | 11 | 0.5 | 10 | 4.25 |"
    assert table[3] == "| AP | – | – | 11 | 0.5 | 10 | 4.25 |"
    assert table[0].count("|") == table[1].count("|") == table[2].count("|")


def test_a_defence_before_another_classifier_costs_that_one():
    headers = {**HEADERS, "AP before AT": HEADERS["AP"], "AT alone": HEADERS["AT"]}
    found = evaluation.training_costs(headers, {"AP before AT": HEADERS["AT"], "AToP": HEADERS["AT"]})
    assert found["AP before AT"] == (30, 400) and found["AT alone"] == (30, 0) and found["AToP"] == (5030, 400)
