"""What code a notebook's numbers depend on, as a hash: its own cells, and every definition that they reach in atoplib.

Definitions are followed one by one, so that a new attack, or a new parameter of another notebook, repeats no training.
Comments, docstrings and layout do not count, nor do the modules that only show or keep results, or use another run's.
"""

import ast
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent
ONLY_SHOWN = ("batch", "drawing", "figures", "heatmaps", "progress", "runs")
ANOTHER_RUNS = ("front",)  # uses what another run has trained, in whose name its code counts already
BLOCKS = ("body", "orelse", "finalbody")
PARSING = Lock()  # runs are noted by threads, and early releases of Python 3.11 cannot parse in two at once


class Target(NamedTuple):
    """What code refers to: a definition of a module, or the whole module where there is no name."""

    module: str
    name: str | None


@dataclass(frozen=True)
class Module:
    """A module's top level: statements by the names they define, imports from atoplib, and statements without a name."""

    name: str
    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, Target]
    nameless: list[ast.stmt]


@cache
def code_hash(notebook: Path) -> str:
    """The hash of all code that a notebook's numbers depend on; its parameters are no part of it. Taken once a process, of
    the code that was there at its start.
    """
    with PARSING:
        cells = notebook_code(notebook)
        top = top_level("", cells)
        waiting = references(cells, top)
        reached: dict[Target, str] = {}
        while waiting:
            target = waiting.pop()
            if target not in reached:
                reached[target], further = definition(target)
                waiting |= further
        parts = [plain(cells), *(f"{target.module} {target.name}\n{reached[target]}" for target in sorted(reached, key=str))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def notebook_code(notebook: Path) -> ast.Module:
    """A notebook's code without its parameters cell and without magics."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    chosen = [cell for cell in cells if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])]
    lines = "\n".join("".join(cell["source"]) for cell in chosen).splitlines()
    return ast.parse("\n".join(line for line in lines if not line.startswith(("%", "!"))))


@cache
def definition(target: Target) -> tuple[str, frozenset[Target]]:
    """A target's own code, and what that refers to."""
    module, name = target
    passed_over = module.split(".")[1:2] and module.split(".")[1] in ONLY_SHOWN + ANOTHER_RUNS
    top = None if passed_over else read_module(module)
    if top is None:
        return "", frozenset()
    if name is None:
        return "", frozenset(Target(module, each) for each in ("", *top.definitions, *top.imports))
    if name in top.imports:
        return "", frozenset({top.imports[name]})
    if name not in top.definitions and name != "":
        return "", frozenset({Target(f"{module}.{name}", None)})  # a module of the package, or a name made elsewhere
    statements = top.definitions[name] if name else top.nameless
    further = {target for statement in statements for target in references(statement, top)}
    return "\n".join(map(plain, statements)), frozenset(further | ({Target(module, "")} if name else set()))


def references(node: ast.AST, top: Module) -> set[Target]:
    """Every definition of atoplib that a piece of code of a module refers to."""
    imports = {**top.imports, **imports_in(node)}
    found, owners = set(), set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            target = imports.get(part.value.id)
            if target is not None and target.name is None:
                owners.add(part.value)
                found.add(Target(target.module, part.attr))
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part not in owners:
            if part.id in imports:
                found.add(imports[part.id])
            elif part.id in top.definitions:
                found.add(Target(top.name, part.id))
    return found


@cache
def module_file(module: str) -> Path | None:
    """The source of a module of atoplib, None if there is none of that name."""
    stem = PACKAGE.joinpath(*module.split(".")[1:])
    return next((path for path in (stem / "__init__.py", stem.with_suffix(".py")) if path.is_file()), None)


@cache
def read_module(module: str) -> Module | None:
    """A module's top level, None if there is none of that name."""
    path = module_file(module)
    return None if path is None else top_level(module, ast.parse(path.read_text(encoding="utf-8")))


def top_level(module: str, tree: ast.Module) -> Module:
    """What the statements of a module bind."""
    content = Module(module, {}, {}, [])
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            content.imports.update(imports_in(statement))
            continue
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [statement.name]
        else:
            bound = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", statement)]
            parts = (part for each in bound for part in ast.walk(each))
            names = [part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
        for name in names:
            content.definitions.setdefault(name, []).append(statement)
        if not names and not is_text(statement):
            content.nameless.append(statement)
    return content


def imports_in(tree: ast.AST) -> dict[str, Target]:
    """What every import from atoplib in a piece of code binds, by local name."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "atoplib":
                    found[alias.asname or "atoplib"] = Target(alias.name if alias.asname else "atoplib", None)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "atoplib":
            for alias in node.names:
                whole = module_file(f"{node.module}.{alias.name}") is not None
                target = Target(f"{node.module}.{alias.name}", None) if whole else Target(node.module, alias.name)
                found[alias.asname or alias.name] = target
    return found


def plain(tree: ast.AST) -> str:
    """Code as text without comments, docstrings and layout."""
    for node in ast.walk(tree):
        for name in BLOCKS:
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, [statement for statement in block if not is_text(statement)])
    return ast.dump(tree)


def is_text(node: ast.AST) -> bool:
    """Whether a statement is only a string: a docstring, or what the type checker reads."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
