"""Recipes: the notebooks one after the other through papermill, each in a process of its own.

    python -m atoplib.batch RECIPE [--workspace DIR] [--smoke] [-p NAME VALUE ...]

A recipe (``notebooks/recipes/NAME.yaml``, or a path) names the notebooks and their parameters. A notebook whose run is
complete is skipped, so that a second call goes on where the first one stopped; every run's directory keeps the executed
notebook as ``notebook.ipynb`` and ``notebook.html``.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from atoplib.checkpoints import write_atomically
from atoplib.evaluation import Score
from atoplib.parameters import NOTEBOOKS, ParameterError, Parameters
from atoplib.progress import format_seconds
from atoplib.runs import read_json, run_name, workspace_dir

# papermill, but for its signals. A Ctrl-C in a terminal reaches it along with us, another one (`kill`, an editor's stop)
# does not: so it ignores that one and heeds ours, once, as if it were a Ctrl-C. It then interrupts the cell that is
# running, which saves what it has, and ends its kernel; a kernel without its papermill may run on for ever.
# Two savings of a few seconds a notebook: no import of a check of URIs, which notebooks have none of, and no wait for the
# kernel's own farewell, which takes seconds once it has imported torch.
PAPERMILL = """
import signal
import sys

sys.modules["rfc3987_syntax"] = None

def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, stop)

import papermill
import yaml

notebook, output, parameters = sys.argv[1:]
with open(parameters) as file:
    values = yaml.safe_load(file)
papermill.execute_notebook(
    notebook, output, values, kernel_name="python3", progress_bar=False, shutdown_kernel="immediate"
)
"""
STOP_SECONDS = 60  # for a notebook to end after a Ctrl-C


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says where it is wrong and what is allowed."""


class NotebookFailed(RuntimeError):
    """A notebook that stopped with an error; the message holds the error and where to look."""


@dataclass(frozen=True)
class Stage:
    """One notebook of a recipe, with its checked parameters and the directory of its run."""

    notebook: Path
    parameters: Parameters
    values: dict[str, Any]
    run_dir: Path

    @property
    def name(self) -> str:
        """The notebook's name without its ending."""
        return self.notebook.stem

    @property
    def page(self) -> Path:
        """The executed notebook as HTML."""
        return self.run_dir / "notebook.html"

    @property
    def complete(self) -> bool:
        """Whether an earlier call finished it."""
        manifest = read_json(self.run_dir / "manifest.json") or {}
        return manifest.get("status") == "complete" and (self.run_dir / "notebook.ipynb").is_file()


def find_recipe(name: str, notebooks_dir: Path) -> Path:
    """The file of a recipe: a path, or a name in ``notebooks/recipes``.

    Raises RecipeError, naming the recipes that are there.
    """
    for path in (notebooks_dir / "recipes" / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    there = sorted(path.stem for path in (notebooks_dir / "recipes").glob("*.yaml"))
    raise RecipeError(f"there is no recipe {name!r}; allowed: {', '.join(there)}, or the path of a YAML file")


def plan(recipe: Path, notebooks_dir: Path, overrides: Mapping[str, Any]) -> list[Stage]:
    """The stages of a recipe in order, every parameter checked before anything runs.

    Args:
        recipe: YAML with ``shared`` (parameters for every notebook that has them) and ``notebooks`` (name: parameters).
        overrides: parameters that win over the recipe's, for every notebook that has them.

    Raises:
        RecipeError: for a file that is no recipe, an unknown notebook, a parameter that no notebook has, or a wrong value.
    """
    try:
        content = yaml.safe_load(recipe.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{recipe} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict) or set(content) - {"shared", "notebooks"} or not content.get("notebooks"):
        raise RecipeError(f"{recipe} must hold 'notebooks' (name: parameters) and may hold 'shared', nothing else")
    shared, notebooks = content.get("shared") or {}, content["notebooks"]
    if not isinstance(shared, dict) or not isinstance(notebooks, dict):
        raise RecipeError(f"{recipe}: 'shared' and 'notebooks' must be mappings")
    used: set[str] = set()
    stages: list[Stage] = []
    names_of_runs: dict[str, str] = {}
    for name, own in notebooks.items():
        if name not in NOTEBOOKS:
            raise RecipeError(f"{recipe}: unknown notebook {name!r}; allowed: {', '.join(NOTEBOOKS)}")
        if not isinstance(own or {}, dict):
            raise RecipeError(f"{recipe}: the parameters of {name} must be a mapping, got {own!r}")
        kind = NOTEBOOKS[name]
        known = {item.name for item in fields(kind)}
        general = {key: value for key, value in {**shared, **overrides}.items() if key in known}
        used |= set(general)
        inputs = {
            item.name: names_of_runs[item.metadata["stage"]]
            for item in fields(kind)
            if item.metadata.get("stage") in names_of_runs
        }
        values = {**inputs, **shared, **(own or {}), **overrides}
        values = {key: value for key, value in values.items() if key in known or key in (own or {})}
        try:
            parameters = kind.from_mapping(values)
        except ParameterError as error:
            raise RecipeError(f"{recipe}: {error}") from error
        names_of_runs[name] = run_name(name, parameters.as_dict())
        run_dir = parameters.experiment_dir / names_of_runs[name]
        stages.append(Stage(notebooks_dir / f"{name}.ipynb", parameters, values, run_dir))
    unused = sorted({*shared, *overrides} - used, key=str)
    if unused:
        raise RecipeError(f"{recipe}: no notebook has the parameter {', '.join(map(repr, unused))}")
    return stages


def papermill_command(stage: Stage, parameters_file: Path, output: Path) -> list[str]:
    """The command that executes a stage; by hand it is ``papermill NOTEBOOK OUTPUT -k python3 -f PARAMETERS``."""
    return [sys.executable, "-c", PAPERMILL, str(stage.notebook), str(output), str(parameters_file)]


def execute(stage: Stage, watch: Callable[[str], None]) -> None:
    """Execute a stage's notebook in a process of its own, which ends with this one's interruption.

    Args:
        watch: called about twice a second with the run's latest line of progress.

    Raises:
        NotebookFailed: if it stopped with an error; what it computed stays.
    """
    stage.run_dir.mkdir(parents=True, exist_ok=True)
    part = stage.run_dir / "notebook.part.ipynb"
    for left_over in (part, stage.run_dir / "progress.txt"):
        left_over.unlink(missing_ok=True)
    parameters_file = stage.run_dir / "papermill.yaml"
    write_atomically(parameters_file, lambda part: part.write_text(yaml.safe_dump(stage.values, sort_keys=False)))
    log_path = stage.run_dir / "papermill.log"
    command = papermill_command(stage, parameters_file, part)
    with tempfile.TemporaryDirectory(prefix="atop-ipython-") as ipython_dir, log_path.open("w") as log:
        # Notebooks that run side by side would otherwise share one history database.
        environment = {**os.environ, "IPYTHONDIR": ipython_dir, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                watch(latest_line(stage.run_dir))
                time.sleep(0.5)
        except BaseException:
            process.terminate()
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    manifest = read_json(stage.run_dir / "manifest.json") or {}
    if process.returncode or manifest.get("status") != "complete":
        reason = failing_cell(part) or manifest.get("error") or last_lines(log_path)
        raise NotebookFailed(f"{stage.name} failed: {reason}\nnotebook so far: {part}\nlog: {log_path}")
    os.replace(part, stage.run_dir / "notebook.ipynb")


def latest_line(run_dir: Path) -> str:
    """The run's line of progress, empty before there is one."""
    try:
        return (run_dir / "progress.txt").read_text().strip()
    except OSError:
        return ""


def last_lines(path: Path, count: int = 5) -> str:
    """The end of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])


def failing_cell(notebook: Path) -> str | None:
    """The error of the first cell that failed: its number as Jupyter shows it, type and message; None if none did."""
    try:
        cells = json.loads(notebook.read_text())["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for cell in cells:
        for output in cell.get("outputs", []):
            if output.get("output_type") == "error":
                return f"In [{cell.get('execution_count')}]: {output.get('ename')}: {output.get('evalue')}"
    return None


def write_html(notebook: Path, page: Path) -> None:
    """The executed notebook as a page."""
    # Here, because a recipe that cannot be run should say so at once; and without the check of URIs, as in PAPERMILL.
    sys.modules.setdefault("rfc3987_syntax", None)
    import nbconvert
    import nbformat

    html, _ = nbconvert.HTMLExporter().from_notebook_node(nbformat.read(notebook, as_version=4))
    write_atomically(page, lambda part: part.write_text(html))


class Console:
    """What a person sees: one line a notebook, renewed while it runs; in a log, one line when it ends."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.width = max(len(stage.name) for stage in stages)
        self.count = len(stages)
        self.live = sys.stdout.isatty()

    def line(self, number: int, stage: Stage, text: str, *, final: bool) -> None:
        """Show a stage's state."""
        line = f"[{number}/{self.count}] {stage.name:<{self.width}}  {text}"
        if self.live:
            columns = os.get_terminal_size().columns
            sys.stdout.write(f"\r\x1b[2K{line if final else line[: columns - 1]}" + ("\n" if final else ""))
        elif final:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()


def scores_of(stages: Sequence[Stage]) -> list[Score]:
    """The scores that the recipe's attack notebook measured."""
    for stage in stages:
        metrics = read_json(stage.run_dir / "metrics.json") or {}
        if "scores" in metrics:
            return [Score(**entry) for entry in metrics["scores"]]
    return []


def summary(stages: Sequence[Stage]) -> Iterator[str]:
    """What a recipe ends with: the table, and where everything is."""
    from atoplib.figures import format_table  # here, because a recipe should start without a second of matplotlib's import

    scores = scores_of(stages)
    if scores:
        attack = next(stage.parameters for stage in stages if stage.name == "04_attack")
        yield ""
        yield (
            f"Accuracy in % with its 95 % interval, one draw an image, {scores[0].images} test images of {attack.dataset}; "
            f"protocol {attack.plan.name}, eps {attack.eps:.4g} (l_inf)."
        )
        yield "transfer: the attack sees the classifier alone; white-box: it sees the whole pipeline."
        yield ""
        yield format_table(scores)
    yield ""
    yield "Executed notebooks, each as .ipynb and .html:"
    for stage in stages:
        yield f"  {stage.page}"
    pictures = [path for stage in stages for path in sorted((stage.run_dir / "figures").glob("*.png"))]
    if pictures:
        yield "Pictures:"
        yield from (f"  {path}" for path in pictures)


def run_recipe(stages: Sequence[Stage]) -> None:
    """Execute the stages that are not complete, in order, and print the summary.

    Each notebook's page is made while the next one starts.
    """
    console = Console(stages)
    with ThreadPoolExecutor(max_workers=1) as background:
        pages = []
        for number, stage in enumerate(stages, start=1):
            started = time.monotonic()

            def watch(line: str, number: int = number, stage: Stage = stage, started: float = started) -> None:
                console.line(number, stage, f"{format_seconds(time.monotonic() - started)}  {line}", final=False)

            if stage.complete:
                console.line(number, stage, "done before", final=True)
            else:
                execute(stage, watch)
                stage.page.unlink(missing_ok=True)
                console.line(number, stage, f"{format_seconds(time.monotonic() - started)}", final=True)
            if not stage.page.exists():
                pages.append(background.submit(write_html, stage.run_dir / "notebook.ipynb", stage.page))
        for page in pages:
            page.result()
    print("\n".join(summary(stages)))


def parse_overrides(pairs: Sequence[Sequence[str]] | None) -> dict[str, Any]:
    """``-p NAME VALUE`` pairs; values as YAML reads them (true, 1, 0.5, null, text)."""
    try:
        return {name: yaml.safe_load(value) for name, value in pairs or ()}
    except yaml.YAMLError as error:
        raise RecipeError(f"a value given by -p cannot be read as YAML: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m atoplib.batch", description="Run a recipe's notebooks by papermill.")
    parser.add_argument("recipe", help="a name in notebooks/recipes, such as mnist, or the path of a YAML file")
    parser.add_argument("--workspace", default="", help="folder for runs/ and data/ (default: the project's own)")
    parser.add_argument("--smoke", action="store_true", help="a few images and steps, to see that everything runs")
    parser.add_argument(
        "-p", action="append", nargs=2, metavar=("NAME", "VALUE"), help="a parameter that wins over the recipe's"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's SIGTERM ends a recipe as Ctrl-C does
    notebooks_dir = Path(__file__).resolve().parent.parent / "notebooks"
    try:
        overrides = parse_overrides(options.p) | ({"smoke": True} if options.smoke else {})
        overrides["workspace"] = str(workspace_dir(options.workspace))
        run_recipe(plan(find_recipe(options.recipe, notebooks_dir), notebooks_dir, overrides))
    except (RecipeError, NotebookFailed) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
