"""The speed benchmark counts the work that is done, and its tables say what was measured."""

import re
from argparse import ArgumentTypeError
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from atoplib import runs
from atoplib.attacks import PGDSettings
from atoplib.checkpoints import save_checkpoint
from atoplib.classifiers import build_classifier
from atoplib.purifiers import GatedUNet
from benchmarks import adaptive_attacks, attack_speed, explorer_latency
from benchmarks import training_speed as speed
from benchmarks.report import radius

CPU = torch.device("cpu")
NCHW, CHANNELS_LAST, BFLOAT16 = speed.FORMATS


def forward_flops(network, *shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.rand(*shape))
    return counter.get_total_flops()


def small_native():
    return speed.smoke_sized(speed.recipe_settings("cifar10", **speed.THROUGH_THE_PIPELINE))


def measured(name="step", form=NCHW, images=10, flops=4_000_000_000, seconds=(2.0, 1.0, 4.0)):
    return speed.Measurement(name, form, images, flops, seconds)


def rows_of(text):
    """Every table of a Markdown text as a list of dicts, by the first column's header."""
    tables, header = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            header = None
        elif header is None:
            header = cells
            tables[header[0]] = []
        elif set(cells) != {"---"}:
            tables[header[0]].append(dict(zip(header, cells, strict=True)))
    return tables


def first_number(text):
    return float(re.match(r"[0-9.]+", text)[0])


@pytest.mark.parametrize("form", speed.FORMATS, ids=lambda form: form.name)
def test_the_convolution_does_the_work_it_claims_in_its_format(form):
    workload = speed.convolution(form, CPU, channels=4, size=6, batch=2)
    assert workload.flops == 3 * forward_flops(torch.nn.Conv2d(4, 4, 3, padding=1, bias=False), 2, 4, 6, 6)
    assert speed.count_flops(workload.call) == workload.flops


def test_a_step_through_the_pipeline_costs_what_its_passes_cost():
    setting = small_native()
    assert setting.attack.sees == "pipeline" and not setting.objective.gan_weight
    batch, options = setting.training.batch_size, setting.purifier_options
    network = GatedUNet(**options)
    purifier = forward_flops(network, batch, 5, 32, 32)
    first = forward_flops(network.encode1, batch, 5 * network.fold**2, 32 // network.fold, 32 // network.fold)
    unit = {"num_classes": 10, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    frozen = build_classifier(setting.classifier, **unit, **setting.classifier_options)
    classifier = forward_flops(frozen, batch, 3, 32, 32)
    # forward and the gradient at the input, through both, for every step of the attack
    attack = setting.attack.attack.steps * 2 * (purifier + classifier)
    # the purifier's weights too, but no gradient at its input
    learning = 3 * purifier - first + 2 * classifier
    assert speed.count_flops(speed.fine_tuning(setting, NCHW, CPU).call) == attack + learning

    alone = speed.fine_tuning(speed.on_the_classifier_alone(setting), NCHW, CPU)
    assert speed.count_flops(alone.call) == 2 * classifier + learning


@pytest.mark.parametrize("form", speed.FORMATS, ids=lambda form: form.name)
def test_every_convolution_of_a_step_computes_in_the_format(form, monkeypatch):
    outputs = []

    def forward(self, images):
        outputs.append(self._conv_forward(images, self.weight, self.bias))
        return outputs[-1]

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    speed.fine_tuning(small_native(), form, CPU).call()
    assert {output.dtype for output in outputs} == {form.dtype}
    assert all(output.is_contiguous(memory_format=form.memory) for output in outputs)


def test_a_loss_that_is_not_finite_is_not_timed():
    setting = small_native()
    broken = replace(setting, training=replace(setting.training, learning_rate=1e30, grad_clip=0.0))
    call = speed.fine_tuning(broken, NCHW, CPU).call
    with pytest.raises(RuntimeError, match="not finite"):
        for _ in range(3):
            call()


def test_the_paper_s_setting_is_the_paper_s():
    setting = speed.with_batch(speed.recipe_settings("cifar10-paper"), 2)
    assert setting.name == "DeepFillV2 (width 48) + resnet18_large, 256 px, FGSM on the classifier alone, batch 2"
    assert setting.objective.gan_weight == 1 and setting.discriminator_width == 64
    assert setting.transform.name == "rt2"


def test_workloads_take_turns_and_emulated_ones_fewer():
    calls = []
    usual = speed.Workload("usual", NCHW, 1, lambda: calls.append("u"), flops=6)
    rare = speed.Workload("rare", BFLOAT16, 1, lambda: calls.append("r"), flops=6, max_repetitions=2)
    results = speed.measure([usual, rare], repetitions=3, device=CPU, min_seconds=0)
    assert "".join(calls) == "uur" + "ur" + "ur" + "u"
    assert [len(result.seconds) for result in results] == [3, 2]
    assert all(second >= 0 for result in results for second in result.seconds)


def test_tables_say_median_and_range_and_share_of_the_faster_layout_in_the_same_dtype():
    peaks = [
        measured("peak", NCHW, flops=8_000_000_000, seconds=(1.0, 2.0, 4.0)),  # 4 GFLOP/s
        measured("peak", CHANNELS_LAST, flops=8_000_000_000, seconds=(0.8, 0.8, 4.0)),  # 10 GFLOP/s
        measured("peak", BFLOAT16, flops=8_000_000_000, seconds=(0.2,)),  # 40 GFLOP/s
    ]
    steps = [measured(), measured(form=BFLOAT16, seconds=(0.5,)), measured("paper's", images=1, seconds=(8.0,))]
    steps.append(measured("paper's", form=BFLOAT16, images=1, seconds=(4.0,)))
    (peak_rows,) = rows_of(speed.peak_table(peaks, CPU)).values()
    assert [row["GFLOP/s"] for row in peak_rows[:2]] == ["4.00 (2.00 to 8.00)", "10.0 (2.00 to 10.0)"]
    assert [row["repetitions"] for row in peak_rows] == ["3", "3", "1"]

    (step_rows,) = rows_of(speed.step_table(steps, peaks)).values()
    assert step_rows[0] == {
        "fine-tuning step": "step",
        "format": "float32 NCHW",
        "images/s": "5.00 (2.50 to 10.0)",
        "GFLOP/image": "0.400",
        "GFLOP/s": "2.00",
        "share of the peak": "20.0 %",
    }
    assert [row["share of the peak"] for row in step_rows] == ["20.0 %", "20.0 %", "5.0 %", "2.5 %"]

    (ratios,) = rows_of(speed.ratio_table(steps, "paper's")).values()
    assert [tuple(row.values()) for row in ratios] == [
        ("step", "bfloat16 channels-last over float32 NCHW", "4.00"),
        ("paper's", "bfloat16 channels-last over float32 NCHW", "2.00"),
        ("step", "float32 NCHW over the paper's setting at its fastest", "20.0"),
        ("step", "bfloat16 channels-last over the paper's setting at its fastest", "80.0"),
    ]
    assert len(rows_of(speed.ratio_table(steps, None))["images/s of"]) == 2


@pytest.mark.parametrize(
    "value, text", [(0.01234, "0.0123"), (0.9996, "1.00"), (9.996, "10.0"), (42.04, "42.0"), (1234.5, "1230"), (0, "0")]
)
def test_numbers_have_three_digits(value, text):
    assert speed.number(value) == text


def test_smoke_prints_machine_facts_and_tables_that_agree_with_each_other(capsys):
    threads = torch.get_num_threads()
    speed.main(["--smoke", "--repetitions", "2", "--device", "cpu"])
    text = capsys.readouterr().out
    assert torch.get_num_threads() == threads
    assert "numbers mean nothing" in text
    assert f"- threads: {threads}" in text and torch.__version__ in text

    tables = rows_of(text)
    peak_rows, step_rows = tables["convolution peak, forward and backward"], tables["fine-tuning step"]
    assert [row["format"].removesuffix(", emulated") for row in peak_rows] == [form.name for form in speed.FORMATS]
    forms = [form.name for form in speed.FORMATS if speed.is_native(form, CPU)]
    assert [row["format"] for row in step_rows] == 3 * forms
    for row in step_rows:
        dtype = row["format"].split()[0]
        peak = max(first_number(line["GFLOP/s"]) for line in peak_rows if line["format"].startswith(dtype))
        rate, share = first_number(row["GFLOP/s"]), first_number(row["share of the peak"])
        assert share == pytest.approx(100 * rate / peak, rel=0.02, abs=0.1)
        assert rate == pytest.approx(first_number(row["images/s"]) * first_number(row["GFLOP/image"]), rel=0.03)
    speeds = {(row["fine-tuning step"], row["format"]): first_number(row["images/s"]) for row in step_rows}
    (paper,) = {name for name, _ in speeds if name.startswith("DeepFillV2")}
    assert len(tables["images/s of"]) == 3 * (len(forms) - 1) + 2 * len(forms)
    for row in tables["images/s of"]:
        name, compared = row["images/s of"], row["compared"]
        form, other = compared.split(" over ")
        papers = max(speeds[paper, each] for each in forms)
        expected = speeds[name, form] / (papers if "paper" in other else speeds[name, other])
        assert first_number(row["ratio"]) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--repetitions", "0"], "whole number of at least 1, got '0'"),
        (["--threads", "two"], "whole number of at least 1, got 'two'"),
        (["--paper-batch", "-1"], "whole number of at least 1, got '-1'"),
        (["--device", "abacus"], "'abacus' cannot be used here"),
    ],
)
def test_a_wrong_argument_is_refused_with_a_sentence(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        speed.main(argv)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.fixture
def experiment(tmp_path):
    """A folder of runs with a tiny classifier and a tiny fine-tuned purifier."""
    folder = tmp_path / "runs" / "tiny"
    options = {"num_classes": 10, "mean": (0.5,) * 3, "std": (0.25,) * 3, "width": 4}
    with runs.open_run(folder, "01_train_classifier", {"adversarial": False}, device=CPU) as run:
        save_checkpoint(
            run.path / "classifier.safetensors",
            build_classifier("small_resnet", **options),
            kind="classifier",
            architecture="small_resnet",
            options=options,
        )
    with runs.open_run(folder, "03_finetune_atop", {}, device=CPU) as run:
        save_checkpoint(
            run.path / "purifier.safetensors",
            GatedUNet(width=4, blocks=0),
            kind="purifier",
            architecture="gated_unet",
            options={"width": 4, "blocks": 0},
            transform={"name": "rt2", "noise_std": 0.1},
        )
    return folder


def test_the_attack_benchmark_times_every_row_on_a_trained_pipeline(experiment, capsys):
    attack_speed.main([str(experiment), "--images", "6", "--steps", "2", "--eot", "3", "--device", "cpu"])
    printed = capsys.readouterr().out
    (rows,) = rows_of(printed).values()
    in_float32 = [row for row in rows if "bfloat16" not in row["pipeline"]]  # the others where the processor has it
    assert [row["attack"].split()[0] for row in in_float32] == ["torchattacks", "torchattacks", "atoplib", "atoplib"]
    assert first_number(rows[0]["ratio"]) == 1 and all(first_number(row["images/s"]) > 0 for row in rows)
    assert all(re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", row["robust accuracy %"]) for row in rows)
    assert "PGD-2 + EOT-3, l_inf 0.3, 6 images" in printed


def test_the_pipeline_that_is_attacked_fast_is_the_plain_one(experiment):
    images = torch.rand(2, 3, 32, 32)
    plain, fast = (attack_speed.load(experiment, CPU, fast=fast) for fast in (False, True))
    with plain.fixed_draws(1), fast.fixed_draws(1), torch.no_grad():
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-4)


def test_the_explorers_latency_is_measured_until_the_right_picture_is_shown(capsys):
    explorer_latency.main(["--smoke"])
    printed = capsys.readouterr().out
    (rows,) = rows_of(printed).values()
    assert [row["from the control to the pictures"] for row in rows] == list(explorer_latency.AIMS)
    for row in rows:
        assert 0 < float(row["fastest ms"]) <= float(row["median ms"]) <= float(row["slowest ms"])
        assert float(row["processor ms"]) > 0


def test_the_attack_benchmark_takes_a_pipeline_that_comes_with_the_kit():
    images = torch.rand(2, 3, 32, 32)
    plain, fast = (attack_speed.load("pretrained:mnist", CPU, fast=fast) for fast in (False, True))
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    with torch.no_grad():
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-4)


def test_the_adaptive_benchmark_attacks_in_every_way_and_pairs_by_image(experiment, capsys):
    adaptive_attacks.main(
        [str(experiment), "--images", "6", "--steps", "2", "--eot", "2", "--draws", "3", "--eps", "8/255", "--device", "cpu"]
    )
    printed = capsys.readouterr().out
    (rows,) = rows_of(printed).values()
    assert [row["attack"] for row in rows] == list(adaptive_attacks.variants(PGDSettings(0.1)))
    for row in rows:
        better, alone = float(row["the better of both %"]), float(row["accuracy %"])
        assert 0 <= better <= min(alone, float(rows[0]["accuracy %"])) + 0.05
    assert "linf 0.03137, 2 steps of 0.01046, 2 draws a gradient, 6 images, 3 fresh draws each" in printed


def test_an_adaptive_attacks_difference_is_that_of_the_images():
    share = torch.tensor([1.0, 0.5, 0.0, 0.5])
    rows = [adaptive_attacks.Row("PGD + EOT", 1.0, share), adaptive_attacks.Row("other", 2.0, share.flip(0))]
    (_, other) = next(iter(rows_of(adaptive_attacks.table(rows)).values()))
    half = 1.959964 * 100 * (share.flip(0) - share).std() / 2
    assert other["against PGD + EOT"] == f"+0.0 ± {half:.1f}" and other["the better of both %"] == "25.0"


@pytest.mark.parametrize("text, value", [("0.3", 0.3), ("8/255", 8 / 255), ("2", 2.0)])
def test_a_radius_is_a_number_or_a_ratio(text, value):
    assert radius(text) == value


@pytest.mark.parametrize("text", ["", "eight", "8/0", "-1/255", "0", "nan", "inf", "1/2/3"])
def test_another_radius_is_refused(text):
    with pytest.raises(ArgumentTypeError, match="must be a number above 0, such as 0.3 or 8/255"):
        radius(text)
