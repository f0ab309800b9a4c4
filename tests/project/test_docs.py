"""Every example in the pages and in the docstrings runs, and every command and link they name exists."""

import contextlib
import doctest
import functools
import importlib
import io
import itertools
import random
import re
import shlex
import subprocess
import sys
import traceback
import types

import numpy
import pytest
import torch

from tests.helpers.pages import PAGES, REPOSITORY, read

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHELL = {"bash", "console"}
LANGUAGES = {"python", *SHELL, "diff", "text", "yaml", "json", "toml", "ini", "mermaid"}
BLOCKS = {page.relative_to(REPOSITORY).as_posix(): read(page) for page in PAGES}
WITH_DOCTESTS = [
    path for path in sorted(REPOSITORY.glob("samopt/**/*.py")) if ">>> " in path.read_text(encoding="utf-8")
]


def pages_with_python():
    """One case a page, and one more, marked slow, for a page that holds slow blocks."""
    for page, blocks in BLOCKS.items():
        python = [block for block in blocks if block.language == "python"]
        if any(block.note != "slow" for block in python):
            yield pytest.param(page, [block for block in python if block.note != "slow"], id=page)
        if any(block.note == "slow" for block in python):
            yield pytest.param(page, python, id=f"{page} in full", marks=pytest.mark.slow)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """What someone who pastes an example has: an empty folder and a fresh, here seeded, interpreter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        yield sys.modules["__main__"].__dict__
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("page", "blocks"), list(pages_with_python()))
def test_python_blocks_run(page, blocks, reader):
    for block in blocks:
        if block.note.startswith("skip"):
            continue
        try:
            # The padding makes the line numbers of a traceback those of the page.
            padded = "\n" * (block.line - 1) + block.source
            exec(compile(padded, str(REPOSITORY / page), "exec", dont_inherit=True), reader)
        except (Exception, SystemExit) as error:
            lines = [
                frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(page)
            ]
            line = lines[-1] if lines else getattr(error, "lineno", block.line)
            details = "".join(traceback.format_exception(error))
            pytest.fail(f"{page}:{line}: {type(error).__name__}: {error}\n\n{details}", pytrace=False)


@pytest.mark.parametrize("page", BLOCKS)
def test_blocks_are_labelled(page):
    for block in BLOCKS[page]:
        where = f"{page}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: language {block.language!r} is none of {sorted(LANGUAGES)}"
        assert re.fullmatch(r"|slow|skip because .+", block.note), f"{where}: {block.note!r} is no docs comment"
        if block.language == "python" and block.note.startswith("skip"):
            assert "GPU" in block.note, f"{where}: a python block may be skipped only because it needs a GPU"


def commands(block):
    """The commands of a shell block as lists of words, without comments, prompts and variable assignments."""
    joined = block.source.replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines()]
    if block.language == "console":
        lines = [line for line in lines if line.startswith("$ ")]
    for line in lines:
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if not set(word) <= set(lexer.punctuation_chars):
                words.append(word)
            elif words:
                yield list(itertools.dropwhile(re.compile(r"\w+=").match, words))
                words = []


@functools.cache
def output_of(*command):
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{shlex.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@functools.cache
def help_of(*subcommand):
    """What the benchmarks say to --help, in this process: a new one would import torch for each page."""
    from benchmarks.harness.cli import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            status = main([*subcommand, "--help"])
        except SystemExit as stop:
            status = stop.code
    assert status == 0, text.getvalue()
    return text.getvalue()


def check_benchmarks(arguments):
    """The subcommand explains itself, and its help knows every option used."""
    subcommand = [word for word in arguments[:1] if not word.startswith("-")]
    help_text = help_of(*subcommand)
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert options <= set(re.findall(r"--[\w-]+", help_text))


def check_pip(arguments):
    """Every extra asked for is one that the package has."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in arguments:
        if extras := re.fullmatch(r"(?:samopt|\.)\[(.+)\]", word):
            assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("page", BLOCKS)
def test_commands_exist(page):
    for block in BLOCKS[page]:
        for words in commands(block) if block.language in SHELL else []:
            match words:
                case [_, "-m", "benchmarks", *arguments]:
                    check_benchmarks(arguments)
                case ["make", *arguments]:
                    output_of("make", "-n", *arguments)
                case ["pip", "install", *arguments] | [_, "-m", "pip", "install", *arguments]:
                    check_pip(arguments)


@pytest.mark.parametrize("page", PAGES, ids=BLOCKS)
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *(`{3,}|~{3,}).*?^ *\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(<?([^)\s#>]+)", text)
    local = [target for target in targets if not re.match(r"\w+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("path", WITH_DOCTESTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_docstring_examples_run(path, reader):
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report = []
    for example in doctest.DocTestFinder().find(importlib.import_module(name)):
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
