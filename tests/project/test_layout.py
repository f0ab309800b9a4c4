"""Where things are: imports go down only, nothing hides a circle, and the public modules are the ones listed here."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

from tests.helpers.pages import REPOSITORY

# From the bottom up. A folder or module of samopt/ may import what stands above it in this list, and nothing below.
LAYERS = [
    "_numerics",
    "step_metrics",
    "distributed",
    "_callers",
    "_replay",
    "parts",
    "kernels",
    "_perturb",
    "stall_warning",
    "_step",
    "optimizer",
    "rho_scheduler",
    "trust_region",
    "variants",
    "reference",
    "sharpness",
    "__init__",
    "integrations",
]
# What users import by its path. Everything else is private, and its path begins with an underscore or is in a folder
# that only its own __init__ stands for.
PUBLIC = {
    "samopt",
    "samopt.distributed",
    "samopt.kernels",
    "samopt.parts",
    "samopt.reference",
    "samopt.sharpness",
    "samopt.trust_region",
    "samopt.variants",
    "samopt.integrations.accelerate",
    "samopt.integrations.lightning",
    "samopt.integrations.transformers",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((REPOSITORY / "samopt").rglob("*.py"))}
# rglob does not follow the link to integrations/ on every version of Python.
MODULES |= {
    "samopt." + name_of(path): path for path in sorted((REPOSITORY / "integrations").rglob("*.py")) if path.is_file()
}


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(module: str) -> set[str]:
    """The modules of samopt that a module imports, wherever the import statement stands: under TYPE_CHECKING too."""
    found = set()
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return {name for name in found if name in MODULES and name != module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    own = LAYERS.index(layer_of(module))
    above = sorted(name for name in imported(module) if LAYERS.index(layer_of(name)) > own)
    assert above == [], f"{module} is below what it imports"


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: imported(module) for module in MODULES}
    # A folder's __init__ gathers what is in it, so "from samopt.parts import X" is an import of the module that has X.
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


@pytest.mark.parametrize("module", MODULES)
def test_nothing_of_ours_is_imported_for_types_alone(module: str) -> None:
    """An import under TYPE_CHECKING would hide a circle; other packages may be optional, so they may stand there."""
    if module == "samopt":
        pytest.skip("names sharpness and find_rho, which it imports at their first use, for type checkers")
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom):
                    assert inner.level == 0 and not (inner.module or "").startswith("samopt"), ast.unparse(inner)


def test_the_optimizer_is_not_reached_from_below() -> None:
    """No weak proxy of the optimizer: the steps are given what they need."""
    below = [path for name, path in MODULES.items() if LAYERS.index(layer_of(name)) < LAYERS.index("optimizer")]
    assert [path for path in below if "weakref.proxy" in path.read_text(encoding="utf-8")] == []


def test_every_folder_says_which_question_it_answers() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
            assert first, f"{name} has no docstring"


def test_public_modules_are_the_listed_ones() -> None:
    for name in PUBLIC:
        assert name in MODULES, name
        assert not any(part.startswith("_") for part in name.split("."))
    top = {name.split(".")[1] for name in MODULES if name.count(".") == 1} - {"integrations"}
    assert {name for name in top if not name.startswith("_")} == {
        "distributed",
        "kernels",
        "optimizer",
        "parts",
        "reference",
        "rho_scheduler",
        "sharpness",
        "stall_warning",
        "step_metrics",
        "trust_region",
        "variants",
    }
