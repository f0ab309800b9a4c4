"""The sdist, the wheel built from it, and an editable install each give a working samopt, without a network."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".*cache", "*.egg-info", "build", "dist", "site", "results", "lightning_logs"
)
IMPORT_BOTH = "import samopt, samopt.integrations; print(samopt.__file__); print(samopt.integrations.__file__)"


def run(*command, cwd):
    """Return what a command printed; fail with all of it when it does not exit with 0."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the source, so that no earlier build's file list can hide what MANIFEST.in forgets."""
    return shutil.copytree(REPOSITORY, tmp_path_factory.mktemp("source") / "samopt", ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def sources(checkout):
    return files_below(checkout)


@pytest.fixture(scope="module")
def built(checkout, sources, tmp_path_factory):
    """The folder holding the sdist and the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    return folder


def test_the_sdist_holds_every_source_file(built, sources):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert sources - held == {".gitignore"}


def test_the_wheel_holds_the_packages_and_nothing_else(built, sources):
    (archive,) = built.glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    packaged = {name for name in sources if name.startswith("samopt/")}
    packaged |= {f"samopt/{name}" for name in sources if name.startswith("integrations/")}
    assert held == packaged


@pytest.mark.parametrize("form", ["wheel", "sdist", "editable"])
def test_an_install_imports_from_outside_the_repository(form, built, checkout, tmp_path):
    target = {"wheel": [*built.glob("*.whl")], "sdist": [*built.glob("*.tar.gz")], "editable": ["-e", checkout]}[form]
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # torch and setuptools come from the environment that runs the tests; its own samopt comes last, or not at all.
    (site_packages / "tests_environment.pth").write_text(sysconfig.get_path("purelib"))

    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-index", "--no-deps", "--no-build-isolation", *target, cwd=tmp_path)
    engine, adapters = map(Path, run(python, "-c", IMPORT_BOTH, cwd=tmp_path).split())

    root = checkout if form == "editable" else site_packages
    assert engine == root / "samopt" / "__init__.py"
    assert adapters == root / "samopt" / "integrations" / "__init__.py"
