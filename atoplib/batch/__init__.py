"""Many runs: a recipe's notebooks through papermill, each in a process of its own, what they share only once.

    python -m atoplib.batch RECIPE [--dry-run] [--only PATTERN] [--jobs N] [--retry N] [--timeout SECONDS] [-p NAME VALUE]

``recipe`` reads the YAML, ``plan`` makes jobs of it, ``ledger`` knows which are done (``sources``: from which code). The
``runner`` gives those that are not to an engine (``engines``), which has a ``worker`` execute each; ``overview`` shows it.
``table`` and the notebook ``08_report`` compare what came out. A second call goes on where the first one stopped.
"""

from atoplib.batch.cli import main
from atoplib.batch.engines import ENGINES, Settings
from atoplib.batch.plan import Job, make_plan
from atoplib.batch.recipe import Recipe, RecipeError, find_recipe, read_recipe
from atoplib.batch.runner import Outcome, run_jobs
from atoplib.batch.table import (
    axes_of,
    comparable_groups,
    comparison,
    complete_runs,
    crossed,
    group_name,
    markdown_table,
    run_row,
    score_rows,
    training_rows,
    varied,
    write_table,
)
from atoplib.batch.worker import NotebookFailed, execute

__all__ = [
    "ENGINES",
    "Job",
    "NotebookFailed",
    "Outcome",
    "Recipe",
    "RecipeError",
    "Settings",
    "axes_of",
    "comparable_groups",
    "comparison",
    "complete_runs",
    "crossed",
    "execute",
    "find_recipe",
    "group_name",
    "main",
    "make_plan",
    "markdown_table",
    "read_recipe",
    "run_jobs",
    "run_row",
    "score_rows",
    "training_rows",
    "varied",
    "write_table",
]
