"""What a batch leaves to be looked at: a page of each notebook, one page that lists an experiment's runs, and
a small folder of results for a paper's repository or a colleague.
"""

import csv
import html
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoplib.batch.recipe import Job
from atoplib.files import read_json, write_atomically, write_text
from atoplib.hashing import NO_IDENTITY
from atoplib.progress import format_seconds

PICTURES = "pictures"  # the tag of a notebook's cell whose output shows images of the data set
IN_PLACE_OF_PICTURES = "(a picture of images of the data set was here)"
TABLES = ("*.csv", "*.md", "*.tex")
STYLE = "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{height:90px}"
STYLE += "td{padding:.4em .8em;vertical-align:top}tr{border-top:1px solid #ddd}small{color:#555}"
STYLE += "table{border-collapse:collapse}"


def write_page(executed: Path, page: Path) -> None:
    """The executed notebook as a page with its first heading as the title."""
    # Here, so that a recipe that cannot be run says so at once; without the check of URIs, as papermill.
    sys.modules.setdefault("rfc3987_syntax", None)
    import nbconvert
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    heading = next(
        (line for cell in notebook.cells for line in cell.source.splitlines() if line.startswith("# ")),
        executed.stem,
    )
    text, _ = nbconvert.HTMLExporter().from_notebook_node(
        notebook, {"metadata": {"name": heading.removeprefix("# ")}}
    )
    write_text(page, text)


def write_index(experiment_dir: Path) -> Path:
    """``index.html`` in an experiment's folder: its complete runs by notebook, the newest first, with the
    parameters in which those of a notebook differ, a number, a picture, and links.
    """
    runs = {path.parent: read_json(path) or {} for path in experiment_dir.glob("*-*/manifest.json")}
    runs = {path: manifest for path, manifest in runs.items() if manifest.get("status") == "complete"}
    parts = [
        "<!doctype html><meta charset=utf-8>",
        f"<title>{html.escape(experiment_dir.name)}</title><style>{STYLE}</style>",
    ]
    parts.append(f"<h1>{html.escape(experiment_dir.name)}</h1>")
    for stage in sorted({str(manifest.get("stage")) for manifest in runs.values()}):
        group = [path for path in runs if runs[path].get("stage") == stage]
        group.sort(key=lambda path: str(runs[path].get("ended")), reverse=True)
        values = {path: _parameters(path) for path in group}
        axes = [
            name for name in values[group[0]] if len({repr(own.get(name)) for own in values.values()}) > 1
        ]
        parts.append(f"<h2>{html.escape(stage)}</h2><table>")
        for path in group:
            name = ", ".join(f"{axis} = {values[path].get(axis)}" for axis in axes) or "as in the recipe"
            ended = str(runs[path].get("ended"))[:16].replace("T", " ")
            when = f"{ended}, {format_seconds(runs[path].get('seconds', 0))}"
            shown = [path / "notebook.html", *_files(path, "pictures/*.png", "figures/*.png", *TABLES)]
            links = [
                f"<a href='{_href(file, experiment_dir)}'>{html.escape(file.name)}</a>"
                for file in shown
                if file.is_file()
            ]
            picture = next((file for file in shown if file.suffix == ".png"), None)
            image = f"<img alt='' src='{_href(picture, experiment_dir)}'>" if picture else ""
            parts.append(
                f"<tr><td>{image}<td><b>{html.escape(name)}</b><br>{html.escape(headline(path))}<br>"
                f"{' · '.join(links)}"
                f"<br><small>{html.escape(when)} · {html.escape(path.name)}</small>"
            )
        parts.append("</table>")
    write_text(experiment_dir / "index.html", "\n".join(parts) + "\n")
    return experiment_dir / "index.html"


def headline(run_dir: Path) -> str:
    """The number of a run: accuracy of what it trained, or what the strongest attack left of each defence; ""
    without one.
    """
    clean = (read_json(run_dir / "metrics.json") or {}).get("test_accuracy")
    if isinstance(clean, int | float):
        return f"clean accuracy {100 * clean:.1f} %"
    try:
        with (run_dir / "frame.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["rule"] == "single"]
        worst = {
            row["defence"]: min(float(r["accuracy"]) for r in rows if r["defence"] == row["defence"])
            for row in rows
        }
    except (OSError, KeyError, ValueError):
        return ""
    return (
        "under the strongest attack: " + ", ".join(f"{name} {value:.1f} %" for name, value in worst.items())
        if worst
        else ""
    )


def _parameters(run_dir: Path) -> dict[str, Any]:
    values = read_json(run_dir / "parameters.json") or {}
    return {name: value for name, value in values.items() if name not in NO_IDENTITY}


def _files(folder: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _href(path: Path, folder: Path) -> str:
    return html.escape(path.relative_to(folder).as_posix(), quote=True)


# ------------------------------------------------------------------------------------ --results: to hand on


def write_results(folder: Path, jobs: Sequence[Job], summary: str) -> None:
    """Write numbers, plots and executed notebooks of complete runs, without weights, pictures of the data
    set, or names of folders of one's own. What is there is replaced file by file; runs of earlier calls stay.

    Args:
        summary: Markdown that ``README.md`` begins with, such as the table that a recipe ends with.

    Raises:
        OSError: if the folder cannot be written.
    """
    lines = [summary.strip(), "", "| run | |", "|---|---|"]
    for job in jobs:
        target, own = folder / job.run_dir.name, _own_folders(job)
        for path in _files(job.run_dir, *TABLES, "figures/*.png"):
            write_atomically(target / path.name, lambda part, path=path: shutil.copyfile(path, part))
        manifest = read_json(job.run_dir / "manifest.json") or {}
        records = {"manifest.json": manifest, "parameters.json": _parameters(job.run_dir)}
        records |= {name: read_json(job.run_dir / name) for name in ("metrics.json", "results.json")}
        records["notebook.ipynb"] = without_pictures(json.loads(job.executed.read_text(encoding="utf-8")))
        for name, content in records.items():
            text = json.dumps(content, indent=1, ensure_ascii=False)
            for path in sorted(own, key=len, reverse=True):
                text = text.replace(path, own[path])
            if content:
                write_text(target / name, text + "\n")
        made = f"{manifest.get('seconds', 0):.0f} s on {manifest.get('hardware', 'an unknown device')}"
        lines.append(f"| [{job.label}]({job.run_dir.name}/notebook.ipynb) | {made} |")
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def _own_folders(job: Job) -> dict[str, str]:
    """Folders of one's own that a run's records name, and what replaces each."""
    folders = {str(job.run_dir.parents[2]): "WORKSPACE", str(Path(__file__).resolve().parents[2]): "ATOPLIB"}
    _, _, images = str(job.parameters.get("dataset", "")).partition(":")
    if images:
        name = Path(images).expanduser().resolve().name
        folders |= {f"folder:{images}": f"folder:{name}", str(Path(images).expanduser().resolve()): name}
        folders |= {images: name} if Path(images).is_absolute() else {}
    return folders


def without_pictures(notebook: dict[str, Any]) -> dict[str, Any]:
    """An executed notebook in which no output shows images: of cells with the tag ``pictures`` only printed
    text is kept.
    """
    cells = []
    for cell in notebook["cells"]:
        if "outputs" in cell and PICTURES in cell.get("metadata", {}).get("tags", ()):
            replaced = {"data": {"text/plain": [IN_PLACE_OF_PICTURES]}}
            cell = cell | {
                "outputs": [output | (replaced if "data" in output else {}) for output in cell["outputs"]]
            }
        cells.append(cell)
    metadata = {
        name: value
        for name, value in notebook.get("metadata", {}).items()
        if name not in ("widgets", "papermill")
    }
    return notebook | {"cells": cells, "metadata": metadata}
