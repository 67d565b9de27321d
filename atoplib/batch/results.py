"""A small folder of what a batch measured, for a paper's repository or a colleague: numbers, plots and executed notebooks,
without weights and without a picture of the data set.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoplib.batch.plan import Job
from atoplib.batch.table import write_table
from atoplib.checkpoints import write_json
from atoplib.runs import PLACES, read_json

PICTURES = "pictures"  # the tag of a notebook's cell whose output shows images of the data set
RECORDS = ("manifest.json", "metrics.json", "results.json")
TABLES = ("*.csv", "*.md", "*.tex", "figures/*.png")
IN_PLACE_OF_PICTURES = "(a picture of images of the data set stood here)"


def write_results(folder: Path, jobs: Sequence[Job], summary: str) -> Path:
    """Write the results of complete runs: a folder a run, ``table.csv`` and ``README.md``.

    What is there is replaced file by file; runs of earlier calls stay.

    Args:
        folder: made if it is not there.
        jobs: complete ones.
        summary: Markdown that ``README.md`` begins with, such as the table that a recipe ends with.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        write_run(folder / job.run_dir.name, job)
    table = folder / "table.csv"
    write_table(table, [job.run_dir for job in jobs])
    table.write_text(without_places(table.read_text(encoding="utf-8"), places_of(jobs[0])), encoding="utf-8")
    lines = [summary.strip(), "", "| run | |", "|---|---|"]
    lines += [f"| [{job.label}]({job.run_dir.name}/notebook.ipynb) | {how(job)} |" for job in jobs]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_run(folder: Path, job: Job) -> None:
    """One run: its records, tables and plots, and its notebook without pictures; nobody's folders in any of them."""
    folder.mkdir(exist_ok=True)
    parameters = read_json(job.run_dir / "parameters.json") or {}
    places = places_of(job)
    for name in RECORDS:
        if record := read_json(job.run_dir / name):
            write_json(folder / name, without_places(record, places))
    kept = {name: value for name, value in parameters.items() if name not in PLACES}
    write_json(folder / "parameters.json", without_places(kept, places))
    for path in (path for pattern in TABLES for path in sorted(job.run_dir.glob(pattern))):
        shutil.copyfile(path, folder / path.name)
    notebook = json.loads(job.executed.read_text(encoding="utf-8"))
    write_json(folder / "notebook.ipynb", without_places(without_pictures(notebook), places))


def places_of(job: Job) -> dict[str, str]:
    """Folders of one's own that a run's records name: the workspace, and that of its images; and what stands for each."""
    places = {str(job.run_dir.parents[2]): "WORKSPACE", str(Path(__file__).resolve().parents[2]): "ATOPLIB"}
    _, _, images = job.parameters.dataset.partition(":")
    if images:
        name = job.parameters.data_name
        places |= {f"folder:{images}": f"folder:{name}", str(Path(images).expanduser().resolve()): name}
        places |= {images: name} if Path(images).is_absolute() else {}
    return places


def without_pictures(notebook: dict[str, Any]) -> dict[str, Any]:
    """An executed notebook in which no output shows images: of cells with the tag ``pictures`` only the text is kept."""
    cells = [
        {**cell, "outputs": [text_of(output) for output in cell["outputs"]]} if is_of_pictures(cell) else cell
        for cell in notebook["cells"]
    ]
    metadata = {name: value for name, value in notebook.get("metadata", {}).items() if name != "widgets"}
    if isinstance(metadata.get("papermill"), dict):
        metadata["papermill"] = {name: v for name, v in metadata["papermill"].items() if not name.endswith("_path")}
    return {**notebook, "cells": cells, "metadata": metadata}


def is_of_pictures(cell: dict[str, Any]) -> bool:
    """Whether a cell's outputs show images of the data set."""
    return "outputs" in cell and PICTURES in cell.get("metadata", {}).get("tags", ())


def text_of(output: dict[str, Any]) -> dict[str, Any]:
    """An output without what it shows: printed text as it is, of anything that is displayed a line in its place."""
    return {**output, "data": {"text/plain": [IN_PLACE_OF_PICTURES]}} if "data" in output else output


def without_places(content: Any, places: Mapping[str, str]) -> Any:
    """JSON values in which folders of one's own read as the names that stand for them; longer paths are replaced first."""
    if isinstance(content, str):
        for path in sorted(places, key=len, reverse=True):
            content = content.replace(path, places[path])
        return content
    if isinstance(content, dict):
        return {name: without_places(value, places) for name, value in content.items()}
    if isinstance(content, list):
        return [without_places(value, places) for value in content]
    return content


def how(job: Job) -> str:
    """What computed a run, and how long."""
    manifest = read_json(job.run_dir / "manifest.json") or {}
    return f"{manifest.get('seconds', 0):.0f} s on {manifest.get('device', 'an unknown device')}"
