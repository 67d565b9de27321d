"""pyproject.toml, requirements.lock, the Makefile, the README and the code say the same thing."""

import ast
import json
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from benchmarks import attack_speed, leaderboard, picture, size, training_speed  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()
}
LOCKED_EXTRAS = [
    each
    for name, listed in EXTRAS.items()
    if name != "diffusion"
    for each in listed
    if each.name != "atoplib"
]
LOCK_LINES = [
    line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")
]
MAKEFILE = (ROOT / "Makefile").read_text()
IMPORTED_AS = {
    "ruamel.yaml": "ruamel",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "ipython": "IPython",
    "adversarial-robustness-toolbox": "art",
    "pytest-xdist": "xdist",
}
COMMANDS = {"jupyterlab", "ipykernel", "pytest-xdist", "nbval"}  # used by what is run, not by an import
COMMANDS |= {"typeguard", "ipywidgets", "playwright"}  # of pytest's options, of anywidget, of importorskip


def locked(python: str) -> dict[str, Version]:
    """The versions that the lock installs there; a package that two lines would install is an error."""
    environment = {
        **default_environment(),
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
    }
    versions: dict[str, Version] = {}
    for requirement in map(Requirement, LOCK_LINES):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in versions, f"two lines of the lock install {name}"
            (specifier,) = requirement.specifier
            versions[name] = Version(specifier.version)
    return versions


def test_every_line_of_the_lock_pins_one_version_and_names_no_address():
    for line in LOCK_LINES:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [^:@/\\#]+)?", line), line


@pytest.mark.parametrize("python", ["3.11.0", "3.12.4", "3.13.0"])
def test_the_lock_holds_every_dependency_at_an_allowed_version(python):
    versions = locked(python)
    for requirement in [*CORE, *LOCKED_EXTRAS]:
        chosen = versions.get(canonicalize_name(requirement.name))
        assert chosen is not None and chosen in requirement.specifier, (
            f"{requirement}: the lock has {chosen}; run `make lock`"
        )
    assert python in SpecifierSet(PROJECT["requires-python"])


def test_what_is_installed_is_what_the_lock_names():
    versions = locked(".".join(map(str, sys.version_info[:3])))
    if Version(Version(version("torch")).public) != versions["torch"]:
        pytest.skip("another torch than the lock's was chosen")
    for requirement in [*CORE, *LOCKED_EXTRAS]:
        name = canonicalize_name(requirement.name)
        assert Version(Version(version(name)).public) == versions[name], name


def imports(folder: str) -> set[str]:
    """Top-level names of what the files below a folder import."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / folder).rglob("*.py")]
    cells = [
        cell for path in (ROOT / folder).glob("*.ipynb") for cell in json.loads(path.read_text())["cells"]
    ]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = [line for source in sources for line in source.splitlines() if not line.startswith("%")]
    trees.append(ast.parse("\n".join(lines)))
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return (
        {name.split(".")[0] for name in names}
        - set(sys.stdlib_module_names)
        - {"atoplib", "tests", "benchmarks", ""}
    )


def module(requirement: Requirement) -> str:
    """What a package is imported as."""
    return IMPORTED_AS.get(requirement.name, requirement.name.replace("-", "_"))


def test_all_that_is_imported_is_declared_and_all_that_is_declared_is_imported():
    of_users = [
        *CORE,
        *(each for name in ("notebooks", "slurm", "attacks", "diffusion") for each in EXTRAS[name]),
    ]
    assert imports("atoplib") - set(map(module, of_users)) == set()
    declared = set(map(module, [*of_users, *EXTRAS["test"]]))
    own = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert (imports("tests") | imports("benchmarks")) - own <= declared
    used = imports("atoplib") | imports("tests") | imports("benchmarks") | imports("notebooks")
    for requirement in [*of_users, *EXTRAS["test"]]:
        assert module(requirement) in used or requirement.name in COMMANDS | {"atoplib"}, requirement.name


def test_environment_yml_installs_the_lock_with_the_same_pythons():
    python, *_, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    minors = [f"3.{minor}.0" for minor in range(8, 20)]
    allowed, stated = SpecifierSet(PROJECT["requires-python"]), SpecifierSet(python.removeprefix("python"))
    assert [each in stated for each in minors] == [each in allowed for each in minors]
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}


def test_the_version_is_stated_alike():
    import atoplib

    assert (
        str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"])
        == PROJECT["version"]
        == atoplib.__version__
    )


def test_make_help_lists_every_target_and_the_docs_mention_no_other():
    targets = set(re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)[1].split())
    assert set(re.findall(r'@echo "make ([a-z-]+)', MAKEFILE)) == targets - {"help"}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL) + re.findall(
            r"`([^`\n]+)`", text
        )
        for line in (line for block in blocks for line in block.splitlines()):
            match = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*make((?: +[a-z][a-z-]*)+)", line)
            assert set(match[1].split() if match else ()) <= targets, f"{page.name}: {line}"


def test_notebooks_find_the_kernel_of_this_environment():
    kernel = Path(sys.prefix, "share/jupyter/kernels/python3/kernel.json")
    assert kernel.is_file(), f"`-k python3` would start another kernel: {kernel} is not there"


def test_a_step_of_the_notebook_can_be_timed():
    for parameters in (training_speed.STEP, training_speed.TRANSFER | {"gan_weight": 1.0}):
        call = training_speed.fine_tuning(parameters, 32, 4, "float32", torch.device("cpu"))
        assert training_speed.seconds_of(call, torch.device("cpu"), least=0) > 0
