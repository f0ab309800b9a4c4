"""What a contributor and a release rely on agrees with the package: versions, pins, workflows."""

import re
import sys

import pytest
import yaml

import samopt
from tests.helpers.pages import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere():
    assert samopt.__version__ == PROJECT["version"] == str(load(REPOSITORY / "CITATION.cff")["version"])
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(PROJECT['version'])}\]", changelog, flags=re.MULTILINE)


def test_the_hooks_run_the_pinned_linter():
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    hooks = [hook for repo in load(REPOSITORY / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    pinned = [pin for hook in hooks for pin in hook.get("additional_dependencies", [])]
    assert pinned != []
    assert set(pinned) <= set(pins)


def test_the_tests_run_on_the_oldest_and_the_newest_python():
    versions = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    matrix = load(REPOSITORY / ".github" / "workflows" / "ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert [versions[0], versions[-1]] == matrix


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_targets_that_exist_with_no_more_rights_than_it_needs(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    used = {word for command in commands for word in re.findall(r"\bmake ([a-z]+)", command)}
    assert used
    assert used <= targets
