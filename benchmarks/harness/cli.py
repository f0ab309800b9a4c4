"""The command line: a study's options are the parameters of its ``study`` function."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import restricted_number_type

from benchmarks.harness.errors import BenchmarkError, choose, suggestion

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

Fraction = restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)])


_USAGE_ERROR = 2
_FOLDER = Path(__file__).parents[1] / "studies"
_HELP = """\
usage: python -m benchmarks STUDY [OPTIONS]

Train real models with and without sharpness-aware optimizers, and compare.
python -m benchmarks STUDY --help lists a study's options. Every study also takes
--config FILE (options in YAML) and --print_config.

studies:
{studies}

Every run becomes one line of runs.jsonl in the output folder as soon as it ends:
settings, seed, metrics, curves, commit, versions, machine, time. The same command
continues after the last finished run; with --quick it starts again and takes
seconds. table.md and the figures are made from the rows.
Runs with the same seed start from the same weights and see the same examples,
labels and batches, with every optimizer.
"""


def studies() -> dict[str, str]:
    """Return the studies' names with the first line of each docstring; nothing is imported for it."""
    found = {}
    for path in sorted(_FOLDER.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem.replace("_", "-")] = text.partition("\n")[0].rstrip(".")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study and return the exit code: 0, 2 after a mistake that is explained, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    known = studies()
    if not words or words[0] in ("-h", "--help"):
        print(_HELP.format(studies="\n".join(f"  {name:<14} {text}" for name, text in known.items())))
        return 0
    try:
        name = words[0].replace("_", "-")
        choose("study", name, known)
        module = importlib.import_module(f"benchmarks.studies.{name.replace('-', '_')}")
        if hasattr(module, "command"):  # a study that reads its words itself
            return int(module.command(words[1:]))
        module.study(**parse(name, known[name], module.study, words[1:]))
    except (BenchmarkError, ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command continues after the last finished run", file=sys.stderr)
        return INTERRUPTED
    return 0


def parse(name: str, summary: str, study: Callable[..., None], words: Sequence[str]) -> dict[str, Any]:
    """Return a study's arguments.

    Args:
        name: The study's name.
        summary: One line about it.
        study: Its function: parameters become options (without a default: arguments), the docstring's Args section
            their help.
        words: The command line.

    Raises:
        BenchmarkError: If an option is unknown or its value is not of the parameter's type.
    """
    hints = get_type_hints(study)
    texts = {p.arg_name: p.description for p in docstring_parser.parse(study.__doc__ or "").params}
    parser = ArgumentParser(prog=f"python -m benchmarks {name}", description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="File of options in YAML.")
    options: dict[str, Any] = {}
    for parameter in inspect.signature(study).parameters.values():
        option, text = f"--{parameter.name.replace('_', '-')}", texts.get(parameter.name)
        options[option] = hints[parameter.name]
        if parameter.default is parameter.empty:
            parser.add_argument(parameter.name, type=hints[parameter.name], help=text)
        elif hints[parameter.name] is bool:
            parser.add_argument(option, action="store_true", help=text)
        else:
            parser.add_argument(option, type=hints[parameter.name], default=parameter.default, help=text)
    try:
        parsed = parser.parse_args(list(_with_lists(words, options))).as_dict()
    except ArgumentError as error:
        raise BenchmarkError(_one_line(str(error), list(options))) from error
    values = {key: value for key, value in parsed.items() if key != "config"}
    for key, value in values.items():
        if isinstance(value, list) and (not value or len(set(map(str, value))) < len(value)):
            raise BenchmarkError(
                f"--{key.replace('_', '-')} takes a comma-separated list that names each item once, got "
                f"{','.join(map(str, value)) or 'nothing'}"
            )
    return values


def _with_lists(words: Sequence[str], options: dict[str, Any]) -> Sequence[str]:
    """Return the words with "0,1,2" written as a JSON list where the option takes a list."""
    result: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if result and _items(options.get(result[-1])):
            result[-1] += "=" + _as_list(word, _items(options[result[-1]]))
        elif equals and _items(options.get(option)):
            result.append(f"{option}={_as_list(value, _items(options[option]))}")
        else:
            result.append(word)
    return result


def _items(hint: Any) -> Any:
    """Return the type of a list's items, also of ``list[T] | None``; None for another type."""
    found = [each for each in (hint, *get_args(hint)) if get_origin(each) is list]
    return get_args(found[0])[0] if found else None


def _as_list(text: str, item: Any) -> str:
    if text.startswith("["):
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return json.dumps(parts) if item is str else f"[{','.join(parts)}]"


def _one_line(message: str, options: list[str]) -> str:
    message = re.sub(r'Parser key "(\w+)":?', lambda match: f"--{match[1].replace('_', '-')}:", message)
    message = re.sub(r"(?s)Does not validate against.*?Errors:\s*- (.*?)\n\s*- .*", r"\1", message)
    unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
    hint = suggestion(unknown[1], options) if unknown else ""
    return " ".join((message + (f"; {hint}" if hint else "")).split())
