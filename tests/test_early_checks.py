"""What would stop a recipe after hours is said before anything trains, and nothing that is read means something else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from atoplib import batch
from atoplib.batch import main, read_recipe
from atoplib.batch.ledger import Costs
from atoplib.data import load_dataset, read_image
from atoplib.parameters import FinetuneAtop, ParameterError, TrainClassifier
from atoplib.plain_yaml import NotPlainYAML, load_yaml
from atoplib.stages.build import frozen_classifier

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
TRAIN = "{01_train_classifier: {batch_size: 4}}"
PURIFY = "{01_train_classifier: {batch_size: 4}, 02_pretrain_purifier: {batch_size: 4}}"


def images(root: Path, *, classes: int = 2, size: tuple[int, int] = (32, 32), count: int = 4) -> str:
    """A folder of noise, (width, height); returns its name as a data set."""
    for split in ("train", "test"):
        for index in range(classes * count):
            path = root / split / f"class{index % classes}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    return f"folder:{root}"


def dry_run(tmp_path: Path, notebooks: str, *arguments: str) -> int:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"notebooks: {notebooks}")
    return main([str(path), "--dry-run", "--workspace", str(tmp_path / "workspace"), *arguments])


@pytest.mark.parametrize("text", ["010", "-010", "00.5", "1:30", "1:30.5", "0o10", "[1, 007]"])
def test_numbers_that_yaml_1_1_reads_otherwise_than_people_are_refused(text):
    with pytest.raises(NotPlainYAML, match="line 1 could mean .*: write a decimal number"):
        load_yaml(f"epochs: {text}")


def test_plain_numbers_and_quoted_text_are_read_and_only_true_and_false_are_truth_values():
    assert load_yaml("[0, 10, -3, 0.5, 1_000, 0x10, '010', true, False, no, yes, off]") == (
        [0, 10, -3, 0.5, 1000, 16, "010", True, False, "no", "yes", "off"]
    )


def test_none_is_taken_for_null_where_a_number_may_be_left_out():
    assert TrainClassifier.from_mapping({"image_size": "None"}).image_size is None
    with pytest.raises(ParameterError, match="'epochs' must be of type int, got 'None'"):
        TrainClassifier.from_mapping({"epochs": "None"})


def test_a_longer_name_of_a_parameter_is_told_which_one_is_meant(tmp_path, capsys):
    assert dry_run(tmp_path, "{01_train_classifier: }", "-p", "epsilon", "0.2") == 1
    assert "did you mean 'eps'?" in capsys.readouterr().err
    with pytest.raises(ParameterError, match="did you mean 'eps'"):
        TrainClassifier.from_mapping({"epsilon": 0.2})


def test_a_folder_that_is_not_there_is_refused_before_anything_trains(tmp_path, capsys):
    assert dry_run(tmp_path, TRAIN, "-p", "dataset", f"folder:{tmp_path / 'nowhere'}") == 1
    assert "names no folder that exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"classes": 1}, "one class only"),
        ({"count": 1}, "batch_size is 4, but 2 images are trained on"),
    ],
)
def test_too_few_classes_or_images_are_refused(tmp_path, capsys, arguments, sentence):
    assert dry_run(tmp_path, TRAIN, "-p", "dataset", images(tmp_path / "images", **arguments)) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "size, options, sentence",
    [
        ((36, 36), "{}", "cannot be cut into 8 x 8 equal patches"),
        ((40, 24), "{}", "divisible by 16, got 24 x 40"),
        ((40, 24), "{image_size: 64}", ""),
    ],
)
def test_an_image_size_that_grid_or_purifier_refuse_is_found_by_looking_at_an_image(
    tmp_path, capsys, size, options, sentence
):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"shared: {options}\nnotebooks: {PURIFY}")
    name = images(tmp_path / "images", size=size)
    code = main([str(path), "--dry-run", "--workspace", str(tmp_path / "workspace"), "-p", "dataset", name])
    assert code == (1 if sentence else 0)
    assert sentence in capsys.readouterr().err and not (tmp_path / "workspace").exists()


def test_a_device_that_is_not_there_is_refused_unless_the_runs_are_elsewhere(tmp_path, capsys):
    assert dry_run(tmp_path, TRAIN, "-p", "device", "cuda:77") == 1
    assert "device 'cuda:77' cannot be used here" in capsys.readouterr().err
    assert dry_run(tmp_path, TRAIN, "-p", "device", "cuda:77", "--engine", "slurm") == 0


def test_places_that_cannot_be_written_are_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert dry_run(tmp_path, TRAIN, "--results", str(tmp_path / "file" / "results")) == 1
    assert f"because {tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_a_cost_is_taken_from_runs_on_the_same_data_only(tmp_path):
    jobs = {}
    for name in ("mnist5k", "cifar10"):
        (tmp_path / "recipe.yaml").write_text("notebooks: {01_train_classifier: }")
        given = {"workspace": str(tmp_path), "dataset": name}
        (jobs[name],) = batch.make_plan(read_recipe(tmp_path / "recipe.yaml"), FOLDER, given)
    small, large = jobs["mnist5k"], jobs["cifar10"]
    small.run_dir.mkdir(parents=True)
    (small.run_dir / "manifest.json").write_text(json.dumps({"status": "complete", "stage": small.stage, "seconds": 16.0}))
    (small.run_dir / "parameters.json").write_text(json.dumps(small.parameters.as_dict()))
    costs = Costs([small, large])
    assert (costs.expected(small), costs.expected(large)) == (16.0, None)


def test_a_dry_run_of_runs_never_made_says_what_the_recipe_states(tmp_path, capsys):
    assert main(["cifar10", "--dry-run", "--workspace", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "time: unknown" in printed and "the recipe says of its cost: about 6 h on 2 CPU cores" in printed
    assert main(["cifar10", "--dry-run", "--workspace", str(tmp_path), "-p", "dataset", "mnist5k"]) == 0
    assert "the recipe says" not in capsys.readouterr().out, "it was stated for CIFAR-10"


def test_a_transparent_value_of_16_bits_is_composited_over_white(tmp_path):
    pixels = np.array([[1000, 1500], [0, 65535]], dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "gray.png", transparency=1000)
    assert read_image(tmp_path / "gray.png")[..., 0].tolist() == [[255, 6], [0, 255]]


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "lost+found"])
def test_what_systems_put_into_folders_is_no_image_and_no_class(tmp_path, name):
    dataset = images(tmp_path / "images")
    for folder in (tmp_path / "images/train", tmp_path / "images/train/class0"):
        (folder / name).mkdir()
        Image.new("RGB", (8, 8)).save(folder / name / "thumbnail.jpg")
    loaded = load_dataset(dataset, data_dir=tmp_path / "data")
    assert loaded.classes == ("class0", "class1") and len(loaded.train.labels) == 8


def scores(run: str, count: int, **parameters: object) -> dict:
    """A row as ``batch.score_rows`` makes it."""
    own = {"stage": "04_attack", "dataset": "mnist5k", "protocol": "demo", "norm": "linf", "seed": 0, **parameters}
    row = {"run": run, "defence": "AToP", "attack": "white-box", "images": count, "parameters": own}
    return {**row, "accuracy": 0.5, "low": 0.4, "high": 0.6}


def test_a_report_compares_only_runs_of_the_same_data_images_protocol_and_norm():
    alike = [scores("a", 200, seed=0), scores("b", 200, seed=1, attack_batch=50, dtype="float32")]
    others = [scores("c", 1, image=7), scores("d", 200, norm="l2"), scores("e", 200, dataset="cifar10")]
    groups = batch.comparable_groups([others[0], *alike, *others[1:]])
    assert groups[0] == alike and sorted(group[0]["run"] for group in groups[1:]) == ["c", "d", "e"]
    assert batch.axes_of(groups[0]) == ["seed"], "attack_batch and dtype are technical"
    assert "image 7 of mnist5k by protocol demo" in batch.group_name([others[0]])


class ForeignResNet(nn.Module):
    """A small ResNet for CIFAR as somebody might have written it: normalised outside of it, flattened by view."""

    def __init__(self, num_classes: int = 10, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.linear = nn.Linear(width * 16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)) + out)
        out = nn.functional.avg_pool2d(out, 8)
        return self.linear(out.view(out.size(0), -1))


def foreign(tmp_path: Path) -> tuple[nn.Module, dict]:
    """The network, and the parameters that name its weights."""
    torch.manual_seed(0)
    network = ForeignResNet(width=6).eval()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "weights.pth")
    return network, {
        "classifier_run": str(tmp_path / "weights.pth"),
        "classifier": f"{__name__}:ForeignResNet",
        "classifier_options": {"width": 6},
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.25],
        "device": "cpu",
    }


def test_somebodys_weights_are_the_frozen_classifier_of_notebook_3_by_parameters_alone(tmp_path):
    network, values = foreign(tmp_path)
    classifier, _, path = frozen_classifier(FinetuneAtop.from_mapping(values))
    x = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(values[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(classifier(x), network((x - mean) / std))
    assert path == tmp_path / "weights.pth"


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"classifier": "resnet"}, "must be 'package.module:function'"),
        ({"classifier_run": "latest"}, "classifier_run is 'latest': give the path"),
        ({"std": None}, "mean and std belong together"),
        ({"std": [0.2, 0.0, 0.2]}, "std must be a list of positive numbers"),
        ({"classifier": ""}, "belong to somebody's network"),
    ],
)
def test_parameters_of_somebodys_weights_that_do_not_fit_are_refused(tmp_path, change, sentence):
    with pytest.raises(ParameterError, match=sentence):
        FinetuneAtop.from_mapping({**foreign(tmp_path)[1], **change})
