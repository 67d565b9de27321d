"""What a batch leaves to be looked at: a page of each notebook, one page that lists an experiment's runs, and
a small folder of results for a paper's repository or a colleague.
"""

import html
import json
import sys
from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from atoplib import files, progress, runs
from atoplib.batch.recipe import Job

IN_PLACE_OF_PICTURES = "(a picture of images of the data set was here)"
TABLES = ("*.csv", "*.md", "*.tex")
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{height:90px}"
    "th,td{padding:.4em .8em;text-align:left;vertical-align:top}tr{border-top:1px solid #ddd}"
    "small{color:#555}table{border-collapse:collapse}"
)


def write_page(executed: Path) -> None:
    """The executed notebook as a page beside it, unless there is one, with its first heading as the title and
    its formulas as pictures, for which nothing has to be loaded."""
    if (page := executed.with_suffix(".html")).exists():
        return
    # Here, so that a recipe that cannot be run says so at once; without the check of URIs, as papermill.
    sys.modules.setdefault("rfc3987_syntax", None)
    import nbconvert
    import nbformat
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    drawing = type("Drawing", (IPythonRenderer,), {"inline_math": _formula, "block_math": _formula})
    exporter = nbconvert.HTMLExporter(
        filters={"markdown2html": lambda text: MarkdownWithMath(renderer=drawing(escape=False)).render(text)}
    )
    notebook = nbformat.read(executed, as_version=4)
    about = {"metadata": {"name": notebook.cells[0].source.removeprefix("# ").partition("\n")[0]}}
    files.write_text(page, exporter.from_notebook_node(notebook, about)[0])


def _formula(_renderer: Any, text: str) -> str:
    """A formula as a picture on the line; as it is, for a reader with MathJax, where matplotlib cannot draw
    it."""
    from matplotlib.mathtext import math_to_image

    picture = BytesIO()
    try:
        depth = math_to_image(f"${text.strip()}$", picture, format="svg")
    except ValueError:
        return html.escape(f"${text}$")
    return (
        f'<img alt="{html.escape(text)}" style="vertical-align: {-depth}pt" '
        f'src="data:image/svg+xml;base64,{b64encode(picture.getvalue()).decode()}">'
    )


def write_index(experiment_dir: Path) -> Path:
    """``index.html`` in an experiment's folder: its complete runs by notebook, the newest first, with the
    parameters in which those of a notebook differ, a number, a picture, and links.
    """
    from atoplib.batch import tables  # here, as no run waits for pandas

    name, complete = html.escape(experiment_dir.name), runs.complete_runs(experiment_dir)
    parts = [f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style><h1>{name}</h1>"]
    for stage in sorted({files.read_json(path / "manifest.json")["stage"] for path in complete}):
        paths = runs.complete_runs(experiment_dir, stage)[::-1]
        frame = tables.runs_frame(paths)
        shown = (
            tables.pandas.DataFrame(
                {name: html.escape(str(value)) for name, value in tables.identity_parameters(path).items()}
                for path in paths
            )
            .loc[:, lambda every: every.nunique() > 1]
            .assign(
                result=[html.escape(tables.headline(path)) for path in paths],
                files=[_links(path, experiment_dir) for path in paths],
                ended=frame["ended"].str[:16].str.replace("T", " "),
                took=frame["seconds"].map(progress.format_seconds),
            )
        )
        with tables.pandas.option_context("display.max_colwidth", None):
            parts += [f"<h2>{stage}</h2>", shown.to_html(escape=False, index=False, border=0)]
    files.write_text(experiment_dir / "index.html", "\n".join(parts) + "\n")
    return experiment_dir / "index.html"


def _links(run_dir: Path, folder: Path) -> str:
    """Links to what a run leaves, and its first picture, as HTML."""
    hrefs = [
        html.escape(file.relative_to(folder).as_posix())
        for file in _files(run_dir, "notebook.html", "pictures/*.png", "figures/*.png", *TABLES)
    ]
    return "".join(
        [
            *[f"<img alt='' src='{href}'><br>" for href in hrefs if href.endswith(".png")][:1],
            " · ".join(f"<a href='{href}'>{href.rpartition('/')[2]}</a>" for href in hrefs),
            f"<br><small>{run_dir.name}</small>",
        ]
    )


def _files(folder: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


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
        target, manifest = folder / job.run_dir.name, files.read_json(job.run_dir / "manifest.json") or {}
        for path in job.run_dir.glob("figures/*.png"):
            files.write_atomically(
                target / path.name, lambda part, path=path: part.write_bytes(path.read_bytes())
            )
        texts = {
            path.name: path.read_text(encoding="utf-8") for path in _files(job.run_dir, *TABLES, "*.json")
        }
        for name, text in (texts | {"notebook.ipynb": without_pictures(job.executed)}).items():
            for private, public in _private_folders(job).items():
                text = text.replace(private, public).replace(json.dumps(private)[1:-1], public)
            files.write_text(target / name, text)
        lines.append(
            f"| [{job.label}]({job.run_dir.name}/notebook.ipynb) "
            f"| {manifest.get('seconds', 0):.0f} s on {manifest.get('hardware', '?')} |"
        )
    files.write_text(folder / "README.md", "\n".join(lines) + "\n")


def _private_folders(job: Job) -> dict[str, str]:
    """Folders of one's own that a run's records name, the longest first, and what replaces each."""
    folders = {job.parameters.get(name): name.upper() for name in ("workspace", "data_dir")}
    folders[str(Path(__file__).resolve().parents[2])] = "ATOPLIB"
    kind, _, images = job.parameters.get("dataset", "").partition(":")
    if kind == "folder":
        path = Path(images).expanduser()
        folders |= {f"folder:{images}": f"folder:{path.name}", str(path.resolve()): path.name}
    return {path: folders[path] for path in sorted(filter(None, folders), key=len, reverse=True)}


def without_pictures(executed: Path) -> str:
    """An executed notebook in which no output shows images: of cells with the tag ``pictures`` only printed
    text is kept.
    """
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    shown = [cell for cell in notebook.cells if "pictures" in cell.metadata.get("tags", ())]
    for output in (output for cell in shown for output in cell.get("outputs", ()) if "data" in output):
        output["data"] = {"text/plain": IN_PLACE_OF_PICTURES}
    notebook.metadata |= {"widgets": {}, "papermill": {}}  # which hold images and folders
    return nbformat.writes(notebook)
