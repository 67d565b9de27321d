"""Any set of runs as one table: a row a run, its parameters, those of the runs that it was computed from, its metrics."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoplib.checkpoints import write_atomically
from atoplib.parameters import REPORT, SEES, FinetuneAtop, PretrainPurifier
from atoplib.runs import PLACES, read_json, recorded_inputs
from atoplib.transforms import TRANSFORMS
from atoplib.verdicts import wilson_interval

if TYPE_CHECKING:
    from atoplib.heatmaps import Surface

Row = dict[str, Any]
NOT_TUNED = "none (AP)"
ORDER = (*TRANSFORMS, NOT_TUNED, "ft_clean", "ft_adv", *SEES)
CHANGES = ("transform", "missing_rate", "noise_std", "num_masks")  # of 04_attack: measured otherwise than trained
COMPARABLE = ("dataset", "image_size", "image", "max_test", "smoke", "protocol", "attack", "norm")
"""Parameters that say what was measured; accuracies stand side by side only where they agree, and the images do."""
TECHNICAL = ("attack_batch", "max_batch", "dtype", "device", "processes", "keep_every", "keep_images", "masking_images")
"""Parameters that change how something is computed, not what a comparison is about."""
HEAD = ("run", "stage", "status", "seconds", "device", "revision")


def run_row(run_dir: Path) -> Row:
    """A run as one flat row.

    Its own parameters stand under their names, those of the runs it was computed from under ``STAGE.name``, its metrics
    under ``metrics.name``; nested values are joined by dots, a list of measurements by what they are named, and of a
    history its last entry stands there.
    """
    manifest = read_json(run_dir / "manifest.json") or {}
    row: Row = {"run": run_dir.name, **{name: manifest.get(name) for name in HEAD[1:]}}
    row |= own_parameters(run_dir)
    for ancestor in ancestors(run_dir):
        stage = (read_json(ancestor / "manifest.json") or {}).get("stage", ancestor.name)
        row |= {f"{stage}.{name}": value for name, value in own_parameters(ancestor).items()}
    row |= {f"metrics.{name}": value for name, value in flat(read_json(run_dir / "metrics.json") or {})}
    return row


def own_parameters(run_dir: Path) -> Row:
    """A run's parameters without the places they name."""
    parameters = read_json(run_dir / "parameters.json") or {}
    return {name: value for name, value in parameters.items() if name not in PLACES}


def ancestors(run_dir: Path) -> list[Path]:
    """The runs beside this one that it was computed from, and theirs; each once, the nearest first."""
    found: list[Path] = []
    queue = [run_dir]
    while queue:
        manifest = read_json(queue.pop(0) / "manifest.json") or {}
        for entry in recorded_inputs(manifest).values():
            path = run_dir.parent / Path(str(entry.get("file"))).parent.name
            if path != run_dir and path not in found and (path / "manifest.json").is_file():
                found.append(path)
                queue.append(path)
    return found


def flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested metrics as (name, value), names joined by dots."""
    for name, value in metrics.items():
        name = f"{prefix}{name}"
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            if all("defence" in entry and "attack" in entry for entry in value):
                for entry in value:
                    rest = {key: number for key, number in entry.items() if key not in ("defence", "attack")}
                    yield from flat(rest, f"{name}.{entry['defence']}.{entry['attack']}.")
            else:
                yield from flat(value[-1], f"{name}.last.")
        elif isinstance(value, dict):
            yield from flat(value, f"{name}.")
        else:
            yield name, value


def columns(rows: Sequence[Row]) -> list[str]:
    """All columns of some rows: what a run is, then parameters, then metrics, in the order in which they first appear."""
    names = dict.fromkeys([*HEAD, *(name for row in rows for name in row)])
    return sorted(names, key=lambda name: name.startswith("metrics."))


def varied(rows: Sequence[Row]) -> list[str]:
    """The parameters in which the rows differ: the axes of a comparison. Names of runs are none, nor are parameters that not
    every one of several notebooks takes; one that always equals that of the same name in another notebook stands there once.
    """
    skipped = {*HEAD, *(name for row in rows for name in row if name.startswith("metrics.") or name.endswith("_run"))}
    if len({row.get("stage") for row in rows}) > 1:
        skipped |= {name for row in rows for name in row if "." not in name and any(name not in other for other in rows)}
    axes: dict[tuple[str, tuple[str, ...]], str] = {}
    for name in columns(rows):
        values = tuple(repr(row.get(name)) for row in rows)
        if name not in skipped and len(set(values)) > 1:
            axes.setdefault((name.rpartition(".")[2], values), name)
    return list(axes.values())


def write_table(path: Path, run_dirs: Iterable[Path]) -> list[Row]:
    """Write the rows of some runs as CSV, replacing the file atomically; an absent value is an empty cell."""
    rows = [run_row(run_dir) for run_dir in run_dirs]

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns(rows), restval="")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
    return rows


def complete_runs(experiment_dir: Path) -> list[Path]:
    """Every complete run of an experiment but reports, by name."""
    manifests = {path.parent: read_json(path) or {} for path in sorted(experiment_dir.glob("*-*/manifest.json"))}
    return [path for path, found in manifests.items() if found.get("status") == "complete" and found.get("stage") != REPORT]


def score_rows(run_dirs: Iterable[Path]) -> list[Row]:
    """What attacks measured: a row a run, defence and attack, with ``accuracy`` (one draw an image), ``low``, ``high``, and
    under ``parameters`` the run's row, in which ``varied`` finds the axes of the comparison.
    """
    found = []
    for run_dir in run_dirs:
        scores = (read_json(run_dir / "metrics.json") or {}).get("scores")
        parameters = run_row(run_dir) if isinstance(scores, list) else {}
        for entry in scores if isinstance(scores, list) else ():
            names = ("defence", "attack", "images", "low", "high")
            row = {"run": run_dir.name, "accuracy": entry["one_shot"], **{name: entry[name] for name in names}}
            found.append({**row, "parameters": parameters})
    return found


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, readable as plain text; columns in the order in which they first appear, numbers right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([cell(row.get(name, "")) for name in names] for row in rows)]
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    right = [all(isinstance(row.get(name, 0), int | float) for row in rows) for name in names]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(names))]
    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)]
    padded = [
        [text.rjust(width) if r else text.ljust(width) for text, width, r in zip(line, widths, right, strict=True)]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def cell(value: Any) -> str:
    """A value in a cell."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def comparison(rows: Sequence[Row]) -> list[Row]:
    """The rows of ``score_rows`` to print: a line a run and defence, its varied parameters, a column an attack."""
    axes = axes_of(rows)
    lines: dict[tuple[str, str], Row] = {}
    for row in rows:
        line = lines.setdefault((row["run"], row["defence"]), {name: row["parameters"].get(name) for name in axes})
        line["defence"] = row["defence"]
        line[f"{row['attack']} %"] = f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    return list(lines.values())


def comparable_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of ``score_rows`` by what was measured: data set, images, protocol and norm agree in a group. The group of
    the most runs comes first, of several such the one with more images.
    """
    images = {row["run"]: max(other["images"] for other in rows if other["run"] == row["run"]) for row in rows}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        key = [images[row["run"]], row["parameters"].get("stage"), *(row["parameters"].get(name) for name in COMPARABLE)]
        groups.setdefault(repr(key), []).append(row)
    return sorted(groups.values(), key=lambda group: (-len({row["run"] for row in group}), -images[group[0]["run"]]))


def group_name(group: Sequence[Row]) -> str:
    """What one of ``comparable_groups`` measured, in words."""
    its = group[0]["parameters"]
    which = its["image"] if its.get("image") is not None else None
    images = f"image {which}" if which is not None else f"{max(row['images'] for row in group)} images"
    attack = its.get("attack") if its.get("attack") not in (None, "none") else f"protocol {its.get('protocol')}"
    runs = ", ".join(dict.fromkeys(row["run"] for row in group))
    return f"{images} of {Path(str(its.get('dataset'))).name} by {attack}, {its.get('norm', 'all norms')} ({runs})"


def axes_of(rows: Sequence[Row]) -> list[str]:
    """The parameters over which the rows of one of ``comparable_groups`` are drawn: those in which they differ, but for
    technical ones and for how many images were loaded.
    """
    left_out = (*TECHNICAL, *COMPARABLE, "max_train", "experiment")
    return [name for name in varied([row["parameters"] for row in rows]) if name.rpartition(".")[2] not in left_out]


def training_rows(run_dirs: Iterable[Path]) -> list[Row]:
    """Trainings to print: a line a run, the parameters in which those of a notebook differ, its result."""
    rows = [row for row in map(run_row, run_dirs) if "metrics.test_accuracy" in row]
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        of_stage = [row for row in rows if row["stage"] == stage]
        axes = varied(of_stage)
        for row in of_stage:
            setting = ", ".join(f"{name} = {cell(row.get(name))}" for name in axes)
            accuracy, seconds = 100 * row["metrics.test_accuracy"], row.get("metrics.train_seconds")
            lines.append({"run": row["run"], "varied": setting, "clean %": round(accuracy, 1), "seconds": seconds})
    return lines


def crossed(rows: Iterable[Row], *, down: str, across: str) -> dict[str, "Surface"]:
    """Accuracy of trained purifiers by two parameters of their training, for each attack.

    A cell is the mean over the runs that share both values, with its 95 % interval over the images. AP is what was not
    fine-tuned: the first value of ``variant``, and absent where fine-tuning alone has a parameter. Purifiers that were
    measured behind another transform than their own are left out.

    Args:
        rows: of ``score_rows``.
        down, across: names of parameters of the trainings.
    """
    from atoplib.heatmaps import Surface  # here, because a recipe should start without a second of matplotlib's import

    found: dict[str, dict[tuple[Any, Any], list[Row]]] = {}
    for row in rows:
        key = trained_with(row, down), trained_with(row, across)
        as_trained = all(row["parameters"].get(name) in (None, trained_with(row, name)) for name in CHANGES)
        if None not in key and as_trained:
            found.setdefault(row["attack"], {}).setdefault(key, []).append(row)
    surfaces = {}
    for attack, groups in found.items():
        cells = {(cell(one), cell(other)): pooled(group) for (one, other), group in groups.items()}
        names = ([cell(value) for value in sorted({key[place] for key in groups}, key=rank)] for place in (0, 1))
        surfaces[attack] = Surface(*map(tuple, names), cells)
    return surfaces


def trained_with(row: Row, name: str) -> Any:
    """A parameter of the training of the purifier that a row of ``score_rows`` is about; None if there is none."""
    if row["defence"] == "AP":
        return NOT_TUNED if name == "variant" else row["parameters"].get(f"{PretrainPurifier.STAGE}.{name}")
    return row["parameters"].get(f"{FinetuneAtop.STAGE}.{name}") if row["defence"] == "AToP" else None


def pooled(rows: Sequence[Row]) -> Row:
    """The mean accuracy of some rows, with the interval of one of them over its images."""
    accuracy, images = sum(row["accuracy"] for row in rows) / len(rows), min(row["images"] for row in rows)
    low, high = wilson_interval(accuracy * images, images)
    return {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "images": images}


def rank(value: Any) -> tuple[int, Any]:
    """Sorts values of a parameter: numbers, then names in the order of their meaning, then others by name."""
    if isinstance(value, int | float):
        return (0, value)
    return (1, ORDER.index(value)) if value in ORDER else (2, str(value))
