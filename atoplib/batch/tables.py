"""Any set of runs as tables of pandas: for the notebooks 07 and 08, and for a question of your own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas

from atoplib.files import read_json
from atoplib.hashing import NO_IDENTITY

HEAD = ("stage", "status", "ended", "seconds", "hardware", "revision")
COMPARABLE = ("dataset", "image_size", "image", "max_test", "protocol", "attack", "norm", "smoke")
"""Parameters that say what was measured; accuracies are compared only where they agree, and the images do."""
TECHNICAL = ("attack_batch", "max_batch", "dtype", "keep_images", "masking_images", "max_train", "experiment")
"""Parameters that change how something is computed, or how much is loaded, not what a comparison is about."""
PRETRAINED, FINETUNED = "02_pretrain_purifier", "03_finetune_atop"
NOT_TUNED = "none (AP)"


def runs_frame(run_dirs: Iterable[Path]) -> pandas.DataFrame:
    """A row a run: ``run``, what its manifest says, its parameters as ``STAGE.name``, those of the runs that
    it was computed from likewise, and its numbers as ``metrics.name``, nested ones joined by dots.
    """
    rows = []
    for run_dir in run_dirs:
        manifest = read_json(run_dir / "manifest.json") or {}
        metrics = pandas.json_normalize(read_json(run_dir / "metrics.json") or {}).add_prefix("metrics.")
        numbers = (
            {name: value for name, value in metrics.iloc[0].items() if not isinstance(value, list)}
            if len(metrics)
            else {}
        )
        rows.append(
            {
                "run": run_dir.name,
                **{name: manifest.get(name) for name in HEAD},
                **_parameters(run_dir),
                **numbers,
            }
        )
    frame = pandas.DataFrame(rows)
    return frame[sorted(frame, key=lambda name: name.startswith("metrics."))]


def scores_frame(run_dirs: Iterable[Path]) -> pandas.DataFrame:
    """What attacks measured, one sample an image: the rows of ``Evaluation.frame`` for the rule ``single``,
    with the columns ``run``, ``measured`` (accuracies are comparable where it agrees), and all parameters as
    in ``runs_frame``.
    """
    frames = []
    for run_dir in run_dirs:
        if (run_dir / "frame.csv").is_file():
            parameters = _parameters(run_dir)
            frame = pandas.read_csv(run_dir / "frame.csv").query("rule == 'single'")
            constant = {"run": run_dir.name, "measured": _measured(run_dir, frame), **parameters}
            columns = {name: [value] * len(frame) for name, value in constant.items()}
            frames.append(pandas.concat([frame.reset_index(drop=True), pandas.DataFrame(columns)], axis=1))
    return (
        pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame(columns=["run", "measured"])
    )


def varied(frame: pandas.DataFrame) -> list[str]:
    """The parameters in which the rows differ: the axes of a comparison. Names of runs are none, nor is what
    only says how something is computed; one that always equals that of the same name in another notebook is
    listed once.
    """
    axes: dict[tuple[str, tuple[str, ...]], str] = {}
    for column in frame:
        stage, _, name = column.partition(".")
        values = tuple(frame[column].map(repr))
        own = stage[:2].isdigit() and not name.endswith("_run") and name not in (*TECHNICAL, *COMPARABLE)
        if own and len(set(values)) > 1:
            axes.setdefault((name, values), column)
    return list(axes.values())


def trained_with(scores: pandas.DataFrame, name: str) -> pandas.Series:
    """For each row of ``scores_frame`` a parameter of the training of its purifier; None where there is none,
    or where the purifier was attacked behind another transform than its own. AP is ``none (AP)`` for the
    parameter ``variant``.
    """

    def value(row: pandas.Series) -> Any:
        stage = {"AP": PRETRAINED, "AToP": FINETUNED}.get(row["defence"], "")
        for changed in ("transform", "missing_rate", "noise_std", "num_masks"):
            own, attacked = row.get(f"{stage}.{changed}"), row.get(f"04_attack.{changed}")
            if not pandas.isna(attacked) and attacked != own:
                return None
        return NOT_TUNED if (stage, name) == (PRETRAINED, "variant") else row.get(f"{stage}.{name}")

    return pandas.Series([value(row) for _, row in scores.iterrows()], index=scores.index, dtype=object)


def _parameters(run_dir: Path) -> dict[str, Any]:
    """Parameters of a run and of the runs beside it that it was computed from, each once, the nearest
    first.
    """
    found: dict[str, Any] = {}
    queue, seen = [run_dir], set()
    while queue:
        path = queue.pop(0)
        manifest = read_json(path / "manifest.json") or {}
        if path in seen or not manifest:
            continue
        seen.add(path)
        for name, value in (read_json(path / "parameters.json") or {}).items():
            if name not in NO_IDENTITY:
                found.setdefault(f"{manifest.get('stage')}.{name}", value)
        queue += [
            run_dir.parent / Path(str(noted.get("file"))).parent.name
            for noted in manifest.get("inputs", {}).values()
        ]
    return found


def _measured(run_dir: Path, frame: pandas.DataFrame) -> str:
    """What a run measured, in words."""
    values = read_json(run_dir / "parameters.json") or {}
    images = (
        f"{int(frame['images'].max())} images" if values.get("image") is None else f"image {values['image']}"
    )
    name, size = Path(str(values.get("dataset"))).name, values.get("image_size")
    attack = values.get("attack") or f"protocol {values.get('protocol')}"
    norm = f" ({values['norm']})" if values.get("norm") else ""
    return f"{images} of {name}{f' at {size} px' if size else ''} by {attack}{norm}"
