"""What a contributor and a release rely on agrees with the package: versions, pins, workflows."""

import ast
import importlib.metadata
import re
import sys

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import samopt
from tests.helpers.pages import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
PYTHONS = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere():
    assert samopt.__version__ == PROJECT["version"] == str(load(REPOSITORY / "CITATION.cff")["version"])
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(PROJECT['version'])}\]", changelog, flags=re.MULTILINE)


def test_the_hooks_run_the_pinned_linter():
    hooks = [hook for repo in load(REPOSITORY / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    pinned = [pin for hook in hooks for pin in hook.get("additional_dependencies", [])]
    assert pinned != []
    assert set(pinned) <= set(PINS)


def test_the_tests_run_on_the_oldest_and_the_newest_python():
    matrix = load(REPOSITORY / ".github" / "workflows" / "ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert [PYTHONS[0], PYTHONS[-1]] == matrix


def imports_of(path):
    """The names that a file imports when it is loaded, up to the line that skips it where a package is missing."""
    names = set()
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign | ast.Expr) and "pytest.importorskip" in ast.unparse(statement):
            break
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            names |= {f"{statement.module}.{alias.name}" for alias in statement.names}
    return names


def test_what_runs_on_the_oldest_torch_imports_no_other_package():
    """One file that does would end the whole run before its first test."""
    commands = [
        step.get("run", "") for step in load(REPOSITORY / ".github" / "workflows" / "ci.yml")["jobs"]["oldest"]["steps"]
    ]
    folders = re.findall(r"\btests/\w+", " ".join(commands))
    assert len(folders) == len(set(folders)) > 5
    pending = [file for folder in folders for file in sorted((REPOSITORY / folder).glob("test_*.py"))]
    assert len(pending) > 50
    allowed = {"numpy", "pytest", "samopt", "torch", *sys.stdlib_module_names}
    met, others = set(), {}
    while pending:
        path = pending.pop()
        met.add(path)
        for name in imports_of(path):
            if name.startswith("tests."):
                parts = name.split(".")
                files = [REPOSITORY.joinpath(*parts[:end]).with_suffix(".py") for end in (3, len(parts))]
                pending += [file for file in files if file.exists() and file not in met]
            elif name.split(".")[0] not in allowed or name.startswith("samopt.integrations"):
                others[name] = path.name
    assert others == {}


def requirements_of(package, extras):
    """The lines of a package's metadata, or of pyproject.toml; none where this Python has no such package."""
    if package == "samopt":
        return PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def needed_on(python):
    """The packages that an install of ``samopt[dev]`` brings on a version of Python, as far as this one has them."""
    there = {"python_version": python, "python_full_version": f"{python}.99"}
    waiting, met = [("samopt", ("dev",))], set()
    while waiting:
        package, extras = waiting.pop()
        if (package, extras) in met:
            continue
        met.add((package, extras))
        for line in requirements_of(package, extras):
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({**there, "extra": e}) for e in (*extras, "")):
                waiting.append((needed.name, tuple(sorted(needed.extras))))
    return {re.sub(r"[-_.]+", "-", package).lower() for package, _ in met}


@pytest.mark.parametrize("python", PYTHONS)
def test_no_pinned_version_refuses_a_python(python):
    packages = needed_on(python)
    assert len(packages) > 50
    pins = [Requirement(line) for line in PINS if line and not line.startswith("#")]
    looked_at, refused = 0, {}
    for pin in pins:
        applies = pin.marker is None or pin.marker.evaluate({"python_version": python})
        if not applies or re.sub(r"[-_.]+", "-", pin.name).lower() not in packages:
            continue
        try:
            package = importlib.metadata.distribution(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if package.version in pin.specifier:  # this Python has the version that the other one would get
            looked_at += 1
            accepted = package.metadata.get("Requires-Python") or ""
            if f"{python}.99" not in SpecifierSet(accepted):
                refused[str(pin)] = accepted
    assert looked_at > 30
    assert refused == {}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_targets_that_exist_with_no_more_rights_than_it_needs(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    used = {word for command in commands for word in re.findall(r"\bmake ([a-z]+)", command)}
    assert used
    assert used <= targets
