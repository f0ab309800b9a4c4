"""Models by name, by file and by folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samopt.sharpness._measuring.optional_packages import require
from samopt.sharpness.cli.errors import CommandError, first_line, quoted
from samopt.sharpness.cli.names import called, named_object
from samopt.sharpness.cli.weights import load_weights

__all__ = ["load_models"]


def load_models(
    model: str | None,
    arguments: Mapping[str, Any],
    weights: Sequence[str],
    *,
    names: Sequence[str] | None,
    key: str | None,
    as_built: bool,
    device: str,
) -> dict[str, nn.Module]:
    """Return the models to measure, by name: one for each file of weights.

    Args:
        model: ``module:name`` of a class or function, or a folder that transformers wrote; None where the weights are
            such folders.
        arguments: For the class or function, or for ``from_pretrained``.
        weights: Files, or folders that transformers wrote.
        names: Of the models; None for the names of the files.
        key: Where in the files the state dicts are.
        as_built: Measure the model as it is built.
        device: Where to.

    Raises:
        CommandError: If there is no such model, or the weights do not fit.
    """
    if not weights and not as_built and not (model and _is_folder(Path(model))):
        raise CommandError(
            "there are no weights to measure; give --weights FILE, or --as_built true to measure the model as --model "
            "builds it, with random weights if it has no others"
        )
    if weights and as_built:
        raise CommandError("--as_built true measures the model without --weights; give one of the two")
    sources = [Path(text) for text in weights]
    chosen = _checked_names(names, sources or [Path(model or "model")], len(sources) or 1)
    models = {}
    places: list[Path | None] = [*sources] or [None]
    for name, source in zip(chosen, places, strict=True):
        built = _one(model, arguments, source, key)
        if not isinstance(built, nn.Module):
            raise CommandError(f"--model {model} must return a torch.nn.Module, got {type(built).__name__}")
        models[name] = _on(device, built)
    return models


def _one(model: str | None, arguments: Mapping[str, Any], source: Path | None, key: str | None) -> Any:
    folder = next((path for path in (Path(model) if model else None, source) if path and _is_saved_model(path)), None)
    if folder is not None and (model is None or Path(model) == folder):
        built = _from_transformers(folder, arguments)
        if source is not None and source != folder:
            load_weights(built, source, key)
        return built
    if model is None:
        raise CommandError(
            f"{quoted(source)} is no folder with a config.json, so --model must say which class or function builds the "
            "model, as in --model my_project:build_model"
        )
    found = named_object("--model", model)
    if arguments and isinstance(found, nn.Module):
        raise CommandError(
            f"--model {model} is a {type(found).__name__} that is built already, so --model_args would do nothing; "
            "name its class or a function, or leave them out"
        )
    built = copy.deepcopy(found) if isinstance(found, nn.Module) else called("--model", model, found, arguments)
    if source is not None and isinstance(built, nn.Module):
        load_weights(built, source, key)
    return built


def _is_saved_model(path: Path) -> bool:
    return _is_folder(path) and (path / "config.json").is_file()


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long a name, for example
        return False


def _from_transformers(folder: Path, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the model of a folder, from safetensors or weights alone; code in the folder is not run."""
    try:
        transformers = require("transformers", f"loading the folder {folder}")
    except ModuleNotFoundError as error:
        raise CommandError(
            f"the folder {quoted(folder)} needs transformers: python -m pip install transformers"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        names = config.architectures or []
        kind = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        if kind is None:
            raise CommandError(
                f"the config.json of {quoted(folder)} names {names or 'no architecture'}, which transformers does not "
                "have; give the class with --model module:Class"
            )
        model, report = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **arguments)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise CommandError(f"{quoted(folder)} cannot be loaded by transformers: {first_line(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CommandError(
            f"{quoted(folder)} lacks {len(missing)} weights of {type(model).__name__}, which would be random: "
            f"{', '.join(missing[:4])}"
        )
    loaded: nn.Module = model
    return loaded


def _on(device: str, model: nn.Module) -> nn.Module:
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise CommandError("--device meta holds no numbers, so nothing can be measured there; use cpu or cuda")
        return model.to(place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch asserts that it was compiled with CUDA
        raise CommandError(f"--device {device!r} cannot be used: {first_line(error)}") from error


def _checked_names(names: Sequence[str] | None, sources: Sequence[Path], count: int) -> list[str]:
    if names is not None:
        if len(names) != count or len(set(names)) != count:
            raise CommandError(f"--names must be {count} different names, one for each model, got {list(names)}")
        return list(names)
    short = [path.stem or path.name for path in sources]
    found = short if len(set(short)) == count else [str(path) for path in sources]
    if len(set(found)) != count:
        raise CommandError(f"the same weights are given twice: {', '.join(map(str, sources))}; or give --names")
    return found
