"""Any set of runs as tables of pandas: for the notebooks 07 and 08, and for a question of your own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas

from atoplib import files, hashing

HEAD = ("stage", "status", "ended", "seconds", "hardware", "revision")
# Parameters that are no axes of a comparison.
NO_AXES = (
    # what was measured: accuracies are compared only where these agree, and the images do
    *("dataset", "image_size", "image", "max_test", "protocol", "attack", "norm", "smoke"),
    # how something is computed, or how much is loaded: not what a comparison is about
    *("attack_batch", "max_batch", "dtype", "keep_images", "masking_images", "max_train", "experiment"),
)
PRETRAINED, FINETUNED = "02_pretrain_purifier", "03_finetune_atop"


def runs_frame(run_dirs: Iterable[Path]) -> pandas.DataFrame:
    """A row a run: ``run``, what its manifest says, its parameters as ``STAGE.name``, those of the runs that
    it was computed from likewise, and its numbers as ``metrics.name``, nested ones joined by dots.
    """
    rows = []
    for run_dir in run_dirs:
        manifest = files.read_json(run_dir / "manifest.json") or {}
        (metrics,) = pandas.json_normalize(files.read_json(run_dir / "metrics.json") or {"": []}).to_dict(
            "records"
        )
        rows.append(
            {"run": run_dir.name}
            | {name: manifest.get(name) for name in HEAD}
            | parameters(run_dir)
            | {f"metrics.{name}": value for name, value in metrics.items() if not isinstance(value, list)}
        )
    frame = pandas.DataFrame(rows)
    return frame[sorted(frame, key=lambda name: name.startswith("metrics."))]


def scores_frame(run_dirs: Iterable[Path]) -> pandas.DataFrame:
    """What attacks measured, one sample an image: the rows of ``Evaluation.frame`` for the rule ``single``,
    with the columns ``run``, ``measured`` (accuracies are comparable where it agrees), and all parameters as
    in ``runs_frame``.
    """
    frames = [pandas.DataFrame(columns=["run", "measured"])]
    for run_dir in run_dirs:
        if (run_dir / "frame.csv").is_file():
            frame = pandas.read_csv(run_dir / "frame.csv").query("rule == 'single'").reset_index(drop=True)
            constant = {"run": run_dir.name, "measured": _measured(run_dir, frame)} | parameters(run_dir)
            frames.append(
                pandas.concat(
                    [frame, pandas.DataFrame([constant] * len(frame), columns=list(constant))], axis=1
                )
            )
    return pandas.concat(frames[1:] or frames, ignore_index=True).copy()  # of few blocks


def varied(frame: pandas.DataFrame) -> list[str]:
    """The parameters in which the rows differ: the axes of a comparison. Names of runs are none, nor is what
    only says how something is computed; one that always equals that of the same name in another notebook is
    listed once.
    """
    axes: dict[tuple[str, tuple[str, ...]], str] = {}
    for column in frame:
        stage, _, name = column.partition(".")
        values = tuple(frame[column].map(repr))
        if stage[:2].isdigit() and not name.endswith("_run") and name not in NO_AXES and len(set(values)) > 1:
            axes.setdefault((name, values), column)
    return list(axes.values())


def trained_with(scores: pandas.DataFrame, name: str) -> pandas.Series:
    """For each row of ``scores_frame`` a parameter of the training of its purifier; None where there is none,
    or where the purifier was attacked behind another transform than its own. AP is ``none (AP)`` for the
    parameter ``variant``.
    """

    def value(row: pandas.Series) -> Any:
        stage = {"AP": PRETRAINED, "AToP": FINETUNED}.get(row["defence"], "")
        pairs = [
            (row.get(f"{stage}.{changed}"), row.get(f"04_attack.{changed}"))
            for changed in ("transform", "missing_rate", "noise_std", "num_masks")
        ]
        if any(attacked != trained for trained, attacked in pairs if not pandas.isna(attacked)):
            return None
        return "none (AP)" if (stage, name) == (PRETRAINED, "variant") else row.get(f"{stage}.{name}")

    return pandas.Series([value(row) for _, row in scores.iterrows()], index=scores.index, dtype=object)


def identity_parameters(run_dir: Path) -> dict[str, Any]:
    """A run's parameters, but for those that say where it is made."""
    return {
        name: value
        for name, value in (files.read_json(run_dir / "parameters.json") or {}).items()
        if name not in hashing.NO_IDENTITY
    }


def parameters(run_dir: Path) -> dict[str, Any]:
    """Parameters of a run and of the runs beside it that it was computed from, as ``STAGE.name``, each once,
    the nearest first.
    """
    collected, queue = dict[str, Any](), [run_dir]
    for path in queue:  # which grows meanwhile
        manifest = files.read_json(path / "manifest.json") or {}
        named = {
            f"{manifest.get('stage')}.{name}": value for name, value in identity_parameters(path).items()
        }
        collected |= {name: value for name, value in named.items() if name not in collected}
        inputs = [Path(noted["file"]) for noted in manifest.get("inputs", {}).values()]
        queue += [near for file in inputs if (near := run_dir.parent / file.parent.name) not in queue]
    return collected


def _measured(run_dir: Path, frame: pandas.DataFrame) -> str:
    """What a run measured, in words."""
    values = files.read_json(run_dir / "parameters.json") or {}
    images = (
        f"{int(frame['images'].max())} images" if values.get("image") is None else f"image {values['image']}"
    )
    name, size = Path(str(values.get("dataset"))).name, values.get("image_size")
    attack = values.get("attack") or f"protocol {values.get('protocol')}"
    norm = f" ({values['norm']})" if values.get("norm") else ""
    return f"{images} of {name}{f' at {size} px' if size else ''} by {attack}{norm}"


def headline(run_dir: Path) -> str:
    """The number of a run: accuracy of what it trained, or what the strongest attack left of each defence; ""
    without one.
    """
    clean = (files.read_json(run_dir / "metrics.json") or {}).get("test_accuracy")
    if clean is not None:
        return f"clean accuracy {100 * clean:.1f} %"
    scores = scores_frame([run_dir])
    if scores.empty:
        return ""
    counting = scores[scores["threat_model"] != "known sample"]  # which tells what randomness hides
    return "under the strongest attack: " + ", ".join(
        f"{name} {value:.1f} %"
        for name, value in counting.groupby("defence", sort=False)["accuracy"].min().items()
    )
