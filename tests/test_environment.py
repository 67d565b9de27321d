"""pyproject.toml, requirements.lock, environment.yml, the Makefile and the README say the same thing."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"] + PYPROJECT["build-system"]["requires"]]
OVERRIDES = {canonicalize_name(r.name): r for r in map(Requirement, PYPROJECT["tool"]["uv"]["override-dependencies"])}
LOCK_LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
MAKEFILE = (ROOT / "Makefile").read_text()
PYTHONS = ["3.11.0", "3.11.9", "3.12.4", "3.13.0"]
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]


def marker_environment(python: str, platform: str, machine: str) -> dict[str, str]:
    system = {"linux": "Linux", "darwin": "Darwin"}[platform]
    return {
        **default_environment(),
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "sys_platform": platform,
        "platform_system": system,
        "platform_machine": machine,
    }


def locked(environment: dict[str, str]) -> dict[str, Version]:
    """The versions that the lock installs there; a package that two lines would install is an error."""
    versions = {}
    for requirement in map(Requirement, LOCK_LINES):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in versions, f"two lines of the lock install {name}"
            (specifier,) = requirement.specifier
            versions[name] = Version(specifier.version)
    return versions


def installed_as_locked() -> bool:
    """False where somebody chose another torch than the lock's: then its companions differ as well."""
    return Version(Version(version("torch")).public) == locked(default_environment())["torch"]


def test_every_line_of_the_lock_pins_one_version_and_names_no_address():
    for line in LOCK_LINES:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [^:@/\\#]+)?", line), line


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform, machine", PLATFORMS)
def test_lock_holds_every_dependency_at_an_allowed_version(python, platform, machine):
    versions = locked(marker_environment(python, platform, machine))
    for requirement in DIRECT:
        chosen = versions.get(canonicalize_name(requirement.name))
        assert chosen is not None, f"{requirement.name} is missing in requirements.lock: run `make lock`"
        assert chosen in requirement.specifier, f"the lock has {requirement.name} {chosen}: run `make lock`"


def test_lock_follows_the_overrides_and_constraints():
    versions = locked(default_environment())
    for requirement in map(Requirement, PYPROJECT["tool"]["uv"]["constraint-dependencies"]):
        assert versions[requirement.name] in requirement.specifier
    for name, requirement in OVERRIDES.items():
        assert versions[name] in requirement.specifier


def test_this_python_is_supported():
    assert Version(".".join(map(str, sys.version_info[:3]))) in SpecifierSet(PROJECT["requires-python"])


def test_installed_versions_are_the_locked_ones_or_at_least_allowed():
    if installed_as_locked():
        for name, chosen in locked(default_environment()).items():
            assert Version(Version(version(name)).public) == chosen, name
    for requirement in DIRECT:
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement.name


def test_lock_leaves_out_nothing_that_a_locked_package_needs():
    if not installed_as_locked():
        return  # another torch brings other companions than the lock's
    versions = locked(default_environment())
    environment = {**default_environment(), "extra": ""}
    for name in versions:
        for requirement in map(Requirement, distribution(name).requires or []):
            if requirement.marker is not None and not requirement.marker.evaluate(environment):
                continue
            needed = canonicalize_name(requirement.name)
            assert needed in versions, f"{name} needs {needed}"
            specifier = OVERRIDES.get(needed, requirement).specifier
            assert specifier.contains(versions[needed], prereleases=True), f"{name} needs {requirement}"


def test_environment_yml_takes_the_same_pythons_and_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (python,) = [entry for entry in plain if entry.startswith("python")]
    allowed, required = SpecifierSet(python.removeprefix("python")), SpecifierSet(PROJECT["requires-python"])
    for minor in range(8, 20):
        assert (f"3.{minor}.0" in allowed) == (f"3.{minor}.0" in required), f"Python 3.{minor}"
    assert "pip" in environment["dependencies"]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock", "-e ."]
    # Anything more from conda would come without its dependencies' versions held together by the lock.
    assert len(environment["dependencies"]) == 3
    assert "PIP_NO_DEPS=1 conda env create -f environment.yml" in (ROOT / "environment.yml").read_text()


def test_citation_names_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_notebooks_find_the_kernel_of_this_environment():
    from jupyter_client.kernelspec import KernelSpecManager

    folder = KernelSpecManager().find_kernel_specs()["python3"]
    assert Path(folder).is_relative_to(sys.prefix), f"`-k python3` would start the kernel of {folder}"


def make_targets() -> set[str]:
    return set(re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)[1].split())


def test_readme_mentions_only_make_targets_that_exist():
    pages = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
    for page in pages:
        text = page.read_text()
        fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        indented = re.findall(r"^(?: {4}|\t).*$", text, re.MULTILINE)
        spans = re.findall(r"`([^`\n]+)`", text)
        commands = [line for block in (*fenced, *indented, *spans) for line in block.splitlines()]
        for command in commands:
            match = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*make((?: +[a-z][a-z-]*)+)", command)
            for target in match[1].split() if match else ():
                assert target in make_targets(), f"{page.name}: make {target}"


def test_make_help_lists_every_target():
    listed = set(re.findall(r'@echo "make ([a-z-]+)', MAKEFILE))
    assert listed == make_targets() - {"help"}


# The installation itself, with stand-ins for Python and pip: what is done, what is done again, and what is said.

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that `make setup` reads, beside a stand-in for Python that makes a small environment."""
    root = tmp_path / "check out"
    root.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    fake = tmp_path / "python-fake"
    fake.write_text(
        "#!/bin/sh\n"
        'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/fresh"; exit; fi\n'
        'case "$2" in *torch*) exit 0;; esac\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    fake.chmod(0o755)
    return root


def make(root: Path, *arguments: str, python: str | None = None) -> subprocess.CompletedProcess:
    # A make that runs these tests hands its own variables down by MAKEFLAGS.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    python = python or str(root.parent / "python-fake")
    command = ["make", "setup", f"PYTHON={python}", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)


@needs_make
def test_setup_installs_once_and_again_after_the_lock_has_changed(checkout):
    first = make(checkout, "PIP=echo pip")
    assert first.returncode == 0, first.stderr
    assert "pip install --quiet --no-deps -r requirements.lock" in first.stdout
    assert "pip install" not in make(checkout, "PIP=echo pip").stdout
    later = (checkout / ".venv/.complete").stat().st_mtime + 10
    os.utime(checkout / "requirements.lock", (later, later))
    changed = make(checkout, "PIP=echo pip")
    assert "have changed" in changed.stdout and "pip install" in changed.stdout


@needs_make
def test_setup_that_did_not_finish_starts_over(checkout):
    failed = make(checkout, "PIP=false")
    assert failed.returncode != 0
    assert "Run make again" in failed.stderr
    (checkout / ".venv/fresh").unlink()
    again = make(checkout, "PIP=true")
    assert again.returncode == 0, again.stderr
    assert (checkout / ".venv/fresh").exists(), "the half-finished folder was kept"


@needs_make
def test_setup_starts_over_in_a_copied_repository(checkout):
    assert make(checkout, "PIP=true").returncode == 0
    copy = checkout.with_name("copy")
    shutil.copytree(checkout, copy)
    (copy / ".venv/fresh").unlink()
    assert make(copy, "PIP=true").returncode == 0
    assert (copy / ".venv/fresh").exists(), "the copy still uses the first one's paths"


@needs_make
def test_setup_removes_no_folder_that_it_did_not_make(checkout):
    (checkout / "mine").mkdir()
    (checkout / "mine/thesis.tex").touch()
    refused = make(checkout, "VENV=mine", "PIP=true")
    assert refused.returncode != 0
    assert "was not made by this Makefile" in refused.stderr
    assert (checkout / "mine/thesis.tex").exists()


@needs_make
@pytest.mark.parametrize(
    "script, sentence",
    [
        ("exit 1", "No suitable Python: 3.11, 3.12 or 3.13 is needed"),
        ('case "$2" in *ensurepip*) exit 1;; *print*) echo python3.12;; esac', "sudo apt install python3.12-venv"),
    ],
    ids=["a shim that fails", "Python without venv"],
)
def test_setup_says_what_is_missing(checkout, script, sentence):
    python = checkout.parent / "python-bad"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    result = make(checkout, "PIP=true", python=str(python))
    assert result.returncode != 0
    assert sentence in result.stderr
    assert not (checkout / ".venv").exists()


@needs_make
def test_setup_passes_over_a_python_that_does_not_fit(checkout):
    result = make(checkout, "PIP=true", python=f"no-such-python false {checkout.parent / 'python-fake'}")
    assert result.returncode == 0, result.stderr
