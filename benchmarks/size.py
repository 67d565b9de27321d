"""How large the library and its tests are: `python benchmarks/size.py`. Statements are ast.stmt nodes without
docstrings.
"""

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def statements(path: Path) -> int:
    """Statements in a file, docstrings and other lone strings aside."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.stmt))
    return sum(
        not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str))
        for n in nodes
    )


def main(folders: list[str]) -> None:
    """Print statements, files and the longest file of each folder, and of each package within it."""
    for folder in folders:
        files = sorted((ROOT / folder).rglob("*.py"))
        count, lines = Counter(), {path: len(path.read_text().splitlines()) for path in files}
        for path in files:
            parts = path.relative_to(ROOT / folder).parts
            count[parts[0]] += statements(path)
        longest = max(files, key=lines.get)
        print(
            f"{folder}: {sum(count.values())} statements in {len(files)} files; "
            f"longest {longest.name}, {lines[longest]} lines"
        )
        for name, number in sorted(count.items(), key=lambda item: -item[1]):
            print(f"    {number:5d}  {name}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["atoplib", "tests"])
