"""The public names are the ones listed here, and each is documented where a user looks for it."""

import ast
import doctest
import inspect
import re
import sys
import types

import pytest
import torch

import samopt
from tests.helpers.pages import REPOSITORY

# The names users may rely on. Adding one is a decision: it also needs an entry in docs/api/ and in CHANGELOG.md.
PUBLIC = [
    "ASAM",
    "GSAM",
    "LESAM",
    "SAM",
    "TRAM",
    "WSAM",
    "FisherSAM",
    "FlatLoRA",
    "FriendlySAM",
    "FunctionalSAM",
    "LookSAM",
    "MomentumSAM",
    "PassHandle",
    "PreconditionedSAM",
    "RhoScheduler",
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


def test_every_public_name_is_on_one_page_of_the_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in REPOSITORY.glob("docs/api/*.md"))
    entries = re.findall(r"^::: samopt\.(\w+)$", pages, flags=re.MULTILINE)
    assert sorted(entries) == sorted(PUBLIC)


@pytest.mark.parametrize(
    "module",
    [
        "samopt.parts",
        "samopt.sharpness",
        "samopt.trust_region",
        "samopt.integrations.accelerate",
        "samopt.integrations.lightning",
        "samopt.integrations.transformers",
    ],
)
def test_every_name_of_a_public_module_is_in_the_reference(module):
    folder = module.replace("samopt.integrations", "integrations").replace(".", "/")
    pages = "".join(page.read_text(encoding="utf-8") for page in REPOSITORY.glob("docs/api/*.md"))
    entries = re.findall(rf"^::: {re.escape(module)}\.(\w+)$", pages, flags=re.MULTILINE)
    assert sorted(entries) == sorted(exported(REPOSITORY / folder / "__init__.py"))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_that_runs(name, monkeypatch):
    """A class may have its example in its own docstring or in that of a method."""
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    public = getattr(samopt, name)
    examples = [test for test in doctest.DocTestFinder().find(public, name) if test.examples]
    assert examples, f"samopt.{name}: its docstring has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report = []
    with torch.random.fork_rng(devices=[]):
        for example in examples:
            torch.manual_seed(0)
            runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_is_complete(name):
    """An argument has an entry of its own, or the entry of ``**options`` names it in double backticks."""
    public = getattr(samopt, name)
    docstring = inspect.getdoc(public) or ""
    assert re.match(r"\S.*\.$", docstring.partition("\n")[0]), f"{name}: the first line is no sentence"
    described = set(re.findall(r"^ {4}\*{0,2}(\w+)(?: \(.+\))?:", docstring, flags=re.MULTILINE))
    others = re.search(r"^ {4}\*\*\w+: ((?:.+\n?)(?: {8}.+\n?)*)", docstring, flags=re.MULTILINE)
    described |= set(re.findall(r"``(\w+)``", others[1])) if others else set()
    parameters = inspect.signature(public).parameters.values()
    missing = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD} - described
    assert missing == set(), f"{name}: not described"
