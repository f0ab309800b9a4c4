"""The public names are the ones listed here, and each is documented where a user looks for it."""

import ast
import inspect
import re

import pytest

import samopt
from tests.helpers.pages import REPOSITORY, Block, Heading, read

# The names users may rely on. Adding one is a decision: it also needs an entry in docs/api.md and in CHANGELOG.md.
PUBLIC = [
    "ASAM",
    "GSAM",
    "LESAM",
    "SAM",
    "TRAM",
    "WSAM",
    "FisherSAM",
    "FriendlySAM",
    "LookSAM",
    "MomentumSAM",
    "RhoScheduler",
    "SecondPass",
    "SharpnessAwareOptimizer",
    "StepMetrics",
    "available",
    "create",
    "find_rho",
]
MODULES = sorted([*REPOSITORY.glob("samopt/**/*.py"), *REPOSITORY.glob("integrations/**/*.py")])


def exported(path):
    """The literal list a module assigns to ``__all__``, or None; read from the source, so nothing is imported."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return ast.literal_eval(node.value)
    return None


def test_the_public_names_are_the_listed_ones():
    assert sorted(samopt.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_a_module_says_what_it_exports(path):
    names = exported(path)
    assert names is not None, f"{path} sets no __all__"
    assert [name for name in names if name.startswith("_")] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_entry_with_an_example(name):
    parts = read(REPOSITORY / "docs" / "api.md")
    headings = [part for part in parts if isinstance(part, Heading) and re.search(rf"\b{name}\b", part.title)]
    assert headings, f"docs/api.md has no heading that names {name}"
    following = parts[parts.index(headings[0]) + 1 :]
    is_next_entry = [isinstance(part, Heading) and part.level <= headings[0].level for part in following]
    entry = following[: is_next_entry.index(True)] if True in is_next_entry else following
    assert any(isinstance(part, Block) and part.language == "python" for part in entry), f"{name} has no example"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_is_complete(name):
    public = getattr(samopt, name)
    docstring = inspect.getdoc(public) or ""
    assert re.match(r"\S.*\.$", docstring.partition("\n")[0]), f"{name}: the first line is no sentence"
    described = set(re.findall(r"^ {4}\*{0,2}(\w+)(?: \(.+\))?:", docstring, flags=re.MULTILINE))
    assert set(inspect.signature(public).parameters) <= described, f"{name}: an argument is not described"
