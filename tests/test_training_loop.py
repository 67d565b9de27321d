"""What the training loop does in a step and an epoch, what it refuses, and what it is made of."""

import copy
import math

import pytest
import torch
from tiny_trainings import (
    KINDS,
    RT2,
    SETTINGS,
    STEPS,
    Training,
    a_run,
    colourful_split,  # noqa: F401
    one_thread_and_a_look_at_every_step,  # noqa: F401
    same,
    state_of,
    tiny_classifier,
    weighted,
)
from torch import nn
from torch.nn import functional as F
from zoo import ExtraState

from atoplib import checkpoints, purifiers
from atoplib.checkpoints import CheckpointError
from atoplib.data import Split, to_float
from atoplib.pipeline import AToPPipeline
from atoplib.training import TrainingDiverged, accuracy, compute_dtype, fit, flops, parts
from atoplib.training.parts import learning_rate_at, make_optimizer

CPU = torch.device("cpu")


# --- what goes wrong


@pytest.mark.parametrize("how", ["loss", "statistics"])
def test_a_training_that_diverges_stops_keeps_the_last_good_state_and_says_where(split, tmp_path, how):
    network, steps = tiny_classifier(), []

    def step(x, y, epoch):
        steps.append(x)
        if epoch == 1.2 and how == "statistics":  # which no loss shows in train mode
            network[1].stem[1].running_mean.fill_(math.inf)
        return F.cross_entropy(network(x), y) * (math.nan if epoch == 1.2 and how == "loss" else 1)

    message = r"diverged near step 7 of 10.*state is kept in .*state\.pt.*lower learning_rate \(now 0\.01\)"
    with pytest.raises(TrainingDiverged, match=message), a_run(tmp_path) as run:
        fit(step, network, split, **SETTINGS, run=run, save_every=-1)
    assert state_of(tmp_path)["step"] == 6 and len(steps) == 7
    assert all(torch.isfinite(tensor).all() for tensor in state_of(tmp_path)["networks"]["network"].values())


def test_weights_that_are_not_finite_are_never_a_result_even_where_no_state_is_kept(split):
    network = tiny_classifier()

    def step(x, y, epoch):
        with torch.no_grad():
            network[1].head.bias.fill_(math.nan)
        return F.cross_entropy(torch.nan_to_num(network(x)), y)

    with pytest.raises(TrainingDiverged, match="No state was saved yet"):
        fit(step, network, split, **{**SETTINGS, "max_steps": 1})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 45}, "batch_size must lie in 1..44, got 45"),
        ({"optimizer": "adamw"}, "optimizer must be one of sgd, adam, got 'adamw'"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
    ],
)
def test_what_cannot_be_is_refused(split, change, message):
    with pytest.raises(ValueError, match=message):
        fit(*reversed(weighted(1.0)), split, **{**SETTINGS, **change})


@pytest.mark.parametrize(
    "result", [None, torch.zeros(()), {"accuracy": torch.ones(())}, {"loss": 3.0}], ids=repr
)
def test_a_step_without_a_loss_is_told_what_it_must_return(split, result):
    with pytest.raises(ValueError, match="the step must return the loss of 'network'"):
        fit(lambda x, y, epoch: result, tiny_classifier(), split, **SETTINGS)


def test_what_cannot_be_saved_or_trained_is_refused_before_the_first_step(split):
    network, step = weighted(1.0)
    with pytest.raises(ValueError, match="nothing to train in it"):
        fit(step, network.requires_grad_(False), split, **SETTINGS)
    with pytest.raises(CheckpointError, match="cannot be saved"):
        fit(step, ExtraState(object()), split, **SETTINGS)


# --- the loop


def test_the_history_has_an_entry_an_epoch_and_progress_tells_images(split):
    calls = []
    history = Training(KINDS[0], split, seed=1).run(progress=lambda *call: calls.append(call))
    assert [entry["epoch"] for entry in history] == [1, 2]
    assert {"epoch", "loss", "accuracy", "seconds"} == set(history[0]) and history[1]["seconds"] >= history[
        0
    ]["seconds"]
    assert [call[:3] for call in calls] == [(8 * step, 80, "images") for step in range(STEPS + 1)]
    assert history[0]["loss"] == pytest.approx(sum([call[3]["loss"] for call in calls[1:]][:5]) / 5)


def test_a_term_that_only_some_steps_report_is_averaged_over_these(split):
    network, late = tiny_classifier(), ({}, {"late": 1.0})
    network.register_buffer("mask", torch.full((2, 2), -torch.inf))  # of an attention: no divergence
    assert fit(
        lambda x, y, epoch: {"loss": F.cross_entropy(network(x), y), **late[epoch >= 0.5]},
        network, split, epochs=1, batch_size=8, learning_rate=0.01,
    )[0]["late"] == 1  # fmt: skip
    with pytest.raises(ValueError, match=r"must report numbers; 'each' has the shape \(8,\)"):
        fit(lambda x, y, _: {"loss": network(x).sum(), "each": y.float()}, network, split, **SETTINGS)


def test_fewer_steps_shorten_the_schedule_too(split, monkeypatch):
    asked = []

    def known(step, total, **how):
        asked.append((step, total))
        return learning_rate_at(step, total, **how)

    monkeypatch.setattr(parts, "learning_rate_at", known)
    history = fit(*reversed(weighted(1.0)), split, **SETTINGS, max_steps=8)
    assert asked == [(step, 8) for step in range(8)] and history[1]["epoch"] == 1.6


def test_a_step_is_given_images_in_0_1_the_epoch_and_networks_in_train_mode_validated_in_eval_mode(split):
    network, seen = tiny_classifier().eval(), []

    def step(x, y, epoch):
        seen.append(
            (x.min() >= 0 and x.max() <= 1 and x.is_contiguous(), y.dtype, epoch, network[1].head.training)
        )
        return F.cross_entropy(network(x), y)

    history = fit(
        step, network, split, **SETTINGS, validate=lambda shown: {"training": float(shown.training)}
    )
    assert seen == [(True, torch.int64, number / 5, True) for number in range(10)]
    assert all(entry["training"] == 0 for entry in history) and not network.training


def test_every_network_follows_its_own_loss_alone_and_its_gradient_is_clipped(split):
    first, second = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
    before = first.weight.detach().clone(), second.weight.detach().clone()

    def step(x, y, epoch):
        colour = x.mean(dim=(0, 2, 3))
        both = (first(colour) + second(colour)).sum()
        return {"loss": 100 * both, "second": 0.1 * -both}

    fit(
        step, {"first": first, "second": second}, split, epochs=1, batch_size=8, max_steps=1,
        learning_rate=1.0, schedule="constant", optimizer="sgd", grad_clip=0.5, dtype="float32",
    )  # fmt: skip
    moved = (first.weight - before[0]).detach(), (second.weight - before[1]).detach()
    assert float(moved[0].norm()) == pytest.approx(0.5 * 1.9, rel=1e-4), (
        "Nesterov's first step: (1 + momentum) * gradient"
    )
    assert moved[0].max() < 0 and moved[1].min() > 0 and float(moved[1].norm()) < 0.2


def test_checkpoints_are_kept_every_so_many_epochs_of_what_would_be_the_result(split, tmp_path):
    network, step = weighted(1.0)

    def save(shown, path, **facts):
        checkpoints.save(path, shown, kind="classifier", architecture="custom: net", options={}, **facts)

    with a_run(tmp_path) as run:
        fit(step, {"classifier": network}, split, **SETTINGS, run=run, save=save, keep_every=1, ema_decay=0.5)
    found = sorted(run.path.glob("*.safetensors"))
    assert [path.name for path in found] == [
        "classifier-epoch0001.safetensors",
        "classifier-epoch0002.safetensors",
    ]
    kept = checkpoints.load(found[1], kind="classifier", build=tiny_classifier)[0]
    assert same(kept.state_dict(), network.state_dict()) and checkpoints.read_header(found[0])["epoch"] == 1


@pytest.mark.parametrize(
    ("shares", "epochs", "classes", "said"),
    [
        (
            [0.43, 0.07, 0.05],
            3,
            10,
            "it classified 5.0 % of its training images correctly, and guessing does 10.0 % (43.0 %",
        ),
        ([0.02, 0.011], 2, 100, "it classified 1.1 % of its training images"),
        ([0.05, 0.16], 2, 10, ""),
        ([0.7], 1, 2, ""),
        ([0.01], 0.2, 10, ""),
        ([None, None], 2, 10, ""),
    ],
)
def test_a_training_that_ends_no_better_than_guessing_is_said_to_have_collapsed(
    shares, epochs, classes, said
):
    history = [
        {"loss": 2.0, "epoch": epochs} | ({} if share is None else {"accuracy": share}) for share in shares
    ]
    sentence = parts.collapse_warning(history, classes)
    assert said in sentence and bool(sentence) == bool(said)


def test_the_sentence_of_a_collapse_is_said_and_recorded(split, tmp_path):
    training, said = Training(KINDS[0], split, seed=1), []
    training.settings["learning_rate"] = 1e-9
    with torch.no_grad():
        training.network[1].head.bias.copy_(
            torch.tensor([0.0, 60.0, 0.0])
        )  # always the class that is not there
    training.split = Split(split.images[split.labels != 1], split.labels[split.labels != 1])
    training.run(tmp_path, notify=said.append)
    assert said[0].startswith("This training has collapsed") and len(said) == 1
    assert said[0] in next(tmp_path.glob("runs/test/*/metrics.json")).read_text()


# --- parts


@pytest.mark.parametrize(
    "schedule, values",
    [
        ("constant", {0: 1, 50: 1, 99: 1}),
        ("cosine", {0: 0.99994, 49: 0.50785, 99: 0.00006}),
        ("one_cycle", {0: 0.025, 9: 0.475, 19: 0.975, 20: 0.99375, 59: 0.50625, 99: 0.00625}),
    ],
)
def test_the_learning_rate_follows_its_schedule_and_is_never_0_nor_above_its_peak(schedule, values):
    for step, factor in values.items():
        assert learning_rate_at(step, 100, peak=2.0, schedule=schedule) == pytest.approx(2 * factor, abs=2e-5)
    rates = [
        learning_rate_at(step, total, peak=0.01, schedule=schedule)
        for total in (1, 2, 7)
        for step in range(total)
    ]
    assert all(0 < rate <= 0.01 for rate in rates)


@pytest.mark.parametrize("name, kept", [("sgd", 1 - 0.01 * 0.1 * 1.9), ("adam", 1 - 0.01 * 0.1)])
def test_weight_decay_shrinks_kernels_and_matrices_by_themselves_but_no_bias_and_no_norm(name, kept):
    """Decoupled for adam: L2 would give 1 - 0.01, whatever the decay."""
    module = tiny_classifier()
    optimizer = make_optimizer(module, name, learning_rate=0.01, weight_decay=0.1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for label, parameter in module.named_parameters():
        expected = torch.full_like(parameter, kept if parameter.ndim > 1 else 1.0)
        assert torch.allclose(parameter, expected, atol=1e-6), label


def test_the_average_is_the_one_computed_by_hand(split):
    training, seen = Training(KINDS[0], split, seed=1), []
    training.settings["ema_decay"] = 0.4
    training.run(progress=lambda done, *_: done and seen.append(copy.deepcopy(training.network.state_dict())))
    expected = seen[0]
    for count, current in enumerate(seen[1:], start=1):
        rate = min(0.4, (1 + count) / (10 + count))  # 2/11, 3/12, 4/13, ... until it reaches the decay
        for name, value in current.items():
            expected[name] = (
                rate * expected[name] + (1 - rate) * value if value.is_floating_point() else value
            )
    result = training.network.state_dict()
    assert all(torch.allclose(result[name], expected[name], atol=1e-6) for name in expected)
    assert not torch.allclose(result["1.head.weight"], seen[-1]["1.head.weight"], atol=1e-4)


@pytest.mark.parametrize(
    "abilities, dtype",
    [
        ({}, torch.float32),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_has_it(monkeypatch, abilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert compute_dtype("auto", CPU) == dtype
    assert compute_dtype("float32", CPU) == torch.float32 and compute_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_keeps_float32_weights_and_computes_in_bfloat16(kind, split):
    training, seen = Training(kind, split, seed=1), []
    conv = next(part for part in training.network.modules() if isinstance(part, nn.Conv2d))
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    training.settings |= dict(dtype="bfloat16", max_steps=3)
    history = training.run()
    assert set(seen) == {torch.bfloat16} and math.isfinite(history[-1]["loss"])
    assert all(
        tensor.dtype != torch.bfloat16 and torch.isfinite(tensor).all()
        for tensor in training.weights.values()
    )


def test_accuracy_counts_every_image_once_in_batches_of_any_size_and_puts_random_numbers_back(split):
    model = tiny_classifier().eval()
    expected = (model(to_float(split.images)).argmax(dim=1) == split.labels).float().mean().item()
    for max_batch in (None, 44, 7, 1):
        assert accuracy(model, split, max_batch=max_batch) == pytest.approx(expected)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    pipeline = AToPPipeline(RT2, purifiers.build("gated_unet", width=4, fold=4), linear, seed=None).eval()
    torch.manual_seed(5)
    shares = [accuracy(pipeline, split, num_samples=20, seed=seed) for seed in (0, 0, 1)]
    assert shares[0] == shares[1] != shares[2] and pipeline.seed is None
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("max_steps", [None, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_the_flops_that_are_recorded_are_those_that_a_whole_training_spends(kind, max_steps, split, tmp_path):
    """The classification term of the third joins in half an epoch late, which the first step of the epoch
    does not show."""
    training = Training(kind, split, seed=1)
    training.settings["max_steps"] = max_steps
    with a_run(tmp_path) as run:
        fit(training.step, training.networks, training.split, run=run, **training.settings)
    counted = flops(Training(kind, split, seed=1).run) if max_steps is None else run.metrics["train_flops"]
    assert run.metrics["train_flops"] > 0
    assert (
        run.metrics["train_flops"] == counted
        if kind != KINDS[2]
        else 0.7 * counted < run.metrics["train_flops"] <= counted
    )
