"""Weights out of files, without running anything that the files may hold."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from samopt.sharpness._measuring.optional_packages import require
from samopt.sharpness.cli.errors import CommandError, first_line, one_line, quoted

__all__ = ["load_weights", "read_file"]

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")
_DEPTH = 4
_SHOWN = 8
_REBUILDERS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state"}


def load_weights(model: nn.Module, path: Path, key: str | None) -> None:
    """Load a file's weights into a model, all of them.

    A state dict is looked for in the file, under any key, and under any prefix of its names: plain state dicts,
    training checkpoints that hold one, Lightning's checkpoints and whole pickled models load alike.

    Args:
        model: The model.
        path: A file, or a folder of safetensors or .bin files.
        key: Where in the file the state dict is, as in "state_dict" or "model.ema"; None to look for it.

    Raises:
        CommandError: If there is none that fits.
    """
    content = read_file(path)
    if key is not None:
        for name in [key] if isinstance(content, Mapping) and key in content else key.split("."):
            if not isinstance(content, Mapping) or name not in content:
                raise CommandError(f"{quoted(path)} has no {key!r}; it has {_keys(content)}")
            content = content[name]
    candidates = {place: _clean(tensors) for place, tensors in _state_dicts(content)}
    if not candidates:
        raise CommandError(f"{quoted(path)} holds no state dict, but {_keys(content)}; say where with --key")
    wanted = _wanted(model)
    fitting = {place: fitted for place, found in candidates.items() if (fitted := _fitted(found, wanted)) is not None}
    if len(fitting) > 1 and "" in fitting:
        fitting = {"": fitting[""]}
    if len(fitting) > 1:
        raise CommandError(
            f"{quoted(path)} holds {len(fitting)} sets of weights that fit, at {', '.join(fitting)}; choose with --key"
        )
    chosen = next(iter(fitting.values())) if fitting else max(candidates.values(), key=len)
    _load(model, chosen, wanted, path)


def read_file(path: Path) -> Any:
    """Return the content of a file of weights.

    Args:
        path: A safetensors file, one that ``torch.save`` wrote, or a folder of such files.

    Raises:
        CommandError: If it cannot be read.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.is_file():
            raise CommandError(f"there is no file {quoted(path)} to load weights from")
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _read_torch(path)
    except OSError as error:
        raise CommandError(f"{quoted(path)} cannot be read: {error.strerror or first_line(error)}") from error


def _read_folder(path: Path) -> dict[str, Tensor]:
    for pattern in ("*.safetensors", "*.bin"):
        if files := sorted(path.glob(pattern)):
            merged: dict[str, Tensor] = {}
            for file in files:
                merged |= read_file(file)
            return merged
    raise CommandError(f"the folder {quoted(path)} holds neither safetensors nor .bin files")


def _read_safetensors(path: Path) -> Any:
    try:
        return require("safetensors.torch", f"loading {path.name}").load_file(path)
    except ModuleNotFoundError as error:
        raise CommandError(f"{path.name} needs safetensors: python -m pip install safetensors") from error
    except Exception as error:  # its own error class is not exported
        raise CommandError(f"{quoted(path)} is no valid safetensors file: {first_line(error)}") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass  # it holds other classes, or is no such file
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CommandError(
            f"{quoted(path)} is no file of weights that torch.save wrote: {first_line(error)}"
        ) from error
    try:
        # Lightning's checkpoints, pickled models and others: tensors are read, and everything else is left inert.
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_inert_pickle())
    except Exception as error:  # a file of any kind may break an unpickler anywhere
        raise CommandError(
            f"{quoted(path)} is no file of weights that torch.save wrote: {first_line(error)}"
        ) from error


class _Inert(dict[Any, Any]):
    """Stands for an object of any class that a file names: keeps its state as entries, and runs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(part)

    def __hash__(self) -> int:  # type: ignore[override]  # it may be a key in a file
        return id(self)

    def append(self, entry: Any) -> None:
        """Take what a list would."""

    def extend(self, entries: Any) -> None:
        """Take what a list would."""

    def add(self, entry: Any) -> None:
        """Take what a set would."""


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in _REBUILDERS:
            return getattr(torch._utils, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        return _Inert


def _inert_pickle() -> Any:
    module: Any = ModuleType("inert_pickle")
    module.Unpickler = _InertUnpickler
    module.load = lambda file, **options: _InertUnpickler(file, **options).load()
    return module


def _state_dicts(content: Any, place: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every mapping from names to tensors, and where it is."""
    if not isinstance(content, Mapping) or depth == 0:
        return
    if "_parameters" in content and "_modules" in content:  # a pickled module
        yield place, dict(_pickled_module(content))
        return
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)}
    if tensors:
        yield place, tensors
    for name, value in content.items():
        yield from _state_dicts(value, f"{place}.{name}" if place else str(name), depth - 1)


def _pickled_module(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for kind in ("_parameters", "_buffers"):
        for name, tensor in content.get(kind, {}).items():
            if isinstance(tensor, Tensor):
                yield prefix + name, tensor
    for name, module in content.get("_modules", {}).items():
        if isinstance(module, Mapping):
            yield from _pickled_module(module, f"{prefix}{name}.")


def _clean(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that they have without wrappers."""
    cleaned = {}
    for name, tensor in tensors.items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        cleaned[name] = tensor
    return cleaned


def _wanted(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def _fitted(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors under the model's names, if all are there behind one prefix; None otherwise."""
    needed = _needed(wanted, found)
    first = next(iter(wanted), None)
    if first is None:
        return None
    prefixes = sorted({name[: -len(first)] for name in found if name == first or name.endswith(f".{first}")}, key=len)
    for prefix in prefixes:
        inside = {name[len(prefix) :]: tensor for name, tensor in found.items() if name.startswith(prefix)}
        if all(name in inside for name in _needed(wanted, inside)):
            return inside if not prefix else {name: inside[name] for name in inside if name in wanted or name in needed}
    return None


def _needed(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Return the names that must be there; of tied weights, one is enough."""
    stored = {tensor.data_ptr() for name, tensor in wanted.items() if name in found and tensor.numel()}
    return [name for name, tensor in wanted.items() if name in found or tensor.data_ptr() not in stored]


def _load(model: nn.Module, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CommandError(
            f"{quoted(path)} does not fit {type(model).__name__}: {one_line(str(error))} Check that --model builds the "
            "model that was saved"
        ) from error
    needed = set(_needed(wanted, tensors))
    lacking = [name for name in missing if name in needed]
    if lacking or unexpected:
        parts = [f"{kind} {_some(names)}" for kind, names in (("lacks", lacking), ("also has", unexpected)) if names]
        raise CommandError(
            f"{quoted(path)} does not fit {type(model).__name__}: it {' and '.join(parts)}. Check that --model builds "
            "the model that was saved"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _keys(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"an object of type {type(content).__name__}"
    return f"the keys {_some([str(name) for name in content])}" if content else "nothing"
