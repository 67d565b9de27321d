"""Protocols are data: rows of attacks that scale with eps; what is wrong with them is said in a sentence."""

import numpy as np
import pytest
import torch
from small_evaluation import IMAGES, LABELS, PGD, PROTOCOL, linear, purifying, run
from torch import nn

from atoplib.attacks import Ball
from atoplib.evaluation import PROTOCOLS, Row, images_of, radii, single
from atoplib.evaluation.protocols import check_protocol

LONG = ("compare", "cpu", "lee-kim", "standard")  # whose rows those of strict and quick are, too


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in PROTOCOLS]
)
def test_every_protocol_runs_and_its_attacks_stay_within_their_radii(name):
    classifier = linear(classes=5)
    defences = {"undefended": classifier, "pipeline": purifying(classifier)}
    wanted = {"steps": 2, "eot_samples": 2, "queries": 5, "votes": 3}
    known = {"votes"}.union(*(row.options for row in PROTOCOLS[name].rows))
    wanted = {key: value for key, value in wanted.items() if key in known}
    images, labels = IMAGES[:2], classifier(IMAGES[:2]).argmax(dim=1)
    sisters = {"pipeline": purifying(linear(1, 5))}
    found = run(defences, images, labels, protocol=name, sisters=sisters, **wanted)
    for row in check_protocol(name, **wanted).rows:
        columns = {who for who, attack in found.correct if attack == row.heading}
        few = row.random_only or row.threat_model in ("bpda", "sister")
        assert columns == ({"pipeline"} if few else set(defences))
        if row.norm in ("linf", "l2", "l1"):
            Ball(images, found.facts["eps"][row.norm][0], row.norm).check(
                found.adversarial("pipeline", row.heading)
            )


# what is refused


@pytest.mark.parametrize("place", ["a", "undefended", "sister"])
def test_a_model_in_train_mode_is_refused_before_its_statistics_move(place):
    norm = nn.BatchNorm2d(3)
    wrong = nn.Sequential(norm, linear()).eval()
    norm.train()
    with pytest.raises(ValueError, match="is in train mode"):
        run({"a": linear(), place: wrong} if place != "sister" else {"a": linear()}, sisters={"a": wrong})
    assert norm.num_batches_tracked == 0 and (norm.running_mean == 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": IMAGES * 255}, r"\[0, 1\]"),
        ({"labels": LABELS + 1}, r"labels must lie in 0\.\.2"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"protocol": "demmo"}, "protocol must be one of demo, quick, .* got 'demmo'"),
        ({"protocol": single("pdg")}, "attack must be one of .*pgd.* got 'pdg'"),
        ({"protocol": single("square"), "norm": "l1"}, "norm of square must be one of .*linf.* got 'l1'"),
        (
            {"protocol": single("pgd", threat_model="blind")},
            "threat_model must be one of white-box.* got 'blind'",
        ),
        (
            {"protocol": PROTOCOL._replace(rows=(Row("pgd", options={"queries": 3}),))},
            "option queries of pgd must be one of steps",
        ),
        ({"protocol": PROTOCOL._replace(rows=(Row("pgd"), Row("pgd", step=1.0)))}, "have the same name"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"queries": 9}, "protocol 'test' takes the options eot_samples, steps, votes"),
        ({"eps": 8.0}, "eps of linf .*at most 1.* got 8.0"),
        ({"eps": -0.1}, "eps of linf must be above 0"),
        ({"eps": []}, "ascending list of at least one"),
        ({"eps": [0.2, 0.1]}, "ascending list"),
        ({"eps": [[0.1, 0.2]]}, r"eps of linf\[0\]' must be of type float"),
        ({"eps": True}, "eps of linf' must be of type float or list, got True"),
        ({"steps": "3"}, "steps must be at least 1, got '3'"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"protocol": PROTOCOL._replace(rows=())}, "rows must be at least 1"),
        ({"protocol": PROTOCOL._replace(votes=0)}, "votes must be at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        run({"a": linear()}, **change)


# protocols are data


def test_a_deterministic_model_gets_the_passes_of_a_long_run_as_more_starts():
    rows = [row for protocol in PROTOCOLS.values() for row in protocol.rows if row.equal_passes]
    for row in (Row("pgd_ensemble", step=0.1, options={**PGD, "restarts": 1}, equal_passes=True), *rows):
        random, calm = (row.keywords(0.5, random=value, rule="any", votes=50) for value in (True, False))
        passes = [given["steps"] * given["eot_samples"] * given["restarts"] for given in (random, calm)]
        assert passes[0] == passes[1] and calm["eot_samples"] == 1, row
        assert (random["votes"], calm["votes"]) == (50, 1), "an attack decides by no fewer votes than its row"
        assert calm["steps"] < (160 if row.norm in ("l1", "l2") else 80) and calm.get("alpha") == (
            row.step and 0.05
        )
        if row.attack == "pgd_ensemble":
            targets = None if row.norm in ("l1", "l2") else ("mean_softmax", *["likely_targets"] * 9)
            assert calm.get("loss") == targets and "loss" not in random


def test_a_changed_protocol_says_so_and_its_columns_what_was_run():
    changed = check_protocol("compare", steps=2, eot_samples=3, votes=4)
    assert changed.name == "compare (steps 2, eot_samples 3, votes 4)" and changed.num_votes == 4
    heads = [row.heading for row in changed.rows]
    assert heads[:4] == ["transfer", "PGD-2 + EOT-3 linf", "PGD-2 + EOT-3 l2", "flow + EOT-3"]
    assert [row.votes for row in check_protocol("strict", votes=3).rows if row.threat_model == "bpda"] == [
        None
    ]
    assert check_protocol("demo", steps=None) == check_protocol("demo")


def test_the_norm_asked_for_is_that_of_all_rows_that_name_none():
    rows = check_protocol("quick", "l2").rows
    assert [row.norm for row in rows] == ["l2", "l2", "l2", "l2", "flow", "l2"]
    assert len(rows) == len(PROTOCOLS["quick"].rows) - 1, "what l2 has anyhow is not run twice"


def test_published_protocols_have_their_published_numbers_and_images():
    rows = [row for row in PROTOCOLS["lee-kim"].rows if row.threat_model == "white-box"]
    assert [row.step for row in rows] == pytest.approx([0.007 / (8 / 255), 0.005 / 0.5])
    assert not any(row.options["shrink"] for row in rows), "all in the ball"
    assert [row.votes for row in PROTOCOLS["strict"].rows if row.threat_model == "bpda"] == [150], "Hill"
    assert PROTOCOLS["strict"].num_votes == 20, "as many as EOT samples"
    first = np.random.RandomState(0).permutation(10_000)[:5].tolist()
    assert images_of(PROTOCOLS["lee-kim"], "cifar10", 5) == first
    assert images_of(PROTOCOLS["lee-kim"], "mnist") == 512


def test_an_option_that_no_attack_has_is_refused_and_one_that_this_one_lacks_is_left_out():
    assert single("square", queries=5, steps=3).rows[0].options == {"queries": 5}
    with pytest.raises(ValueError, match="no attack has 'eot_sample' .*did you mean 'eot_samples'"):
        single("pgd", eot_sample=9)


def test_usual_radii_depend_on_whether_images_are_grey():
    grey = IMAGES[:, :1].expand(-1, 3, -1, -1)
    assert radii(grey)["linf"] == (0.3,) and radii(IMAGES)["linf"] == (8 / 255,)
    assert radii(grey)["l2"] == (2.0,) and radii(IMAGES, 1.0, "l2")["l2"] == (1.0,)
    assert radii(IMAGES, [0.1, 0.2]) == {"linf": (0.1, 0.2)}, "a list is of one norm alone"
    assert radii(IMAGES, torch.tensor([0.25, 0.5])) == {"linf": (0.25, 0.5)}
    assert radii(IMAGES, np.array([0.25, 0.5])) == {"linf": (0.25, 0.5)}
    assert radii(IMAGES, "8/255") == radii(IMAGES)
    assert radii(IMAGES, {"l2": [0.1, 1]})["l2"] == (0.1, 1) and radii(IMAGES, {"l2": 1})["linf"] == (
        8 / 255,
    )
