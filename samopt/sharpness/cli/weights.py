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
        key: Where in the file the weights are, as in "state_dict", "model.ema" or, for a prefix of names in a state
            dict, "state_dict.teacher"; None to look for them.

    Raises:
        CommandError: If there are none that fit, or several.
    """
    content = read_file(path)
    if key is not None:
        content = _inside(content, key, path)
    candidates = {place: _clean(tensors) for place, tensors in _state_dicts(content)}
    if not candidates:
        raise CommandError(f"{quoted(path)} holds no state dict, but {_keys(content)}; say where with --key")
    wanted = _wanted(model)
    fitting = {
        ".".join(part for part in (place, prefix.removesuffix(".")) if part): fitted
        for place, found in candidates.items()
        for prefix, fitted in _fitted(found, wanted).items()
    }
    if len(fitting) > 1 and "" in fitting:
        fitting = {"": fitting[""]}
    if len(fitting) > 1:
        raise CommandError(
            f"{quoted(path)} holds {len(fitting)} sets of weights that fit, at {', '.join(fitting)}; choose with --key"
        )
    chosen = next(iter(fitting.values())) if fitting else max(candidates.values(), key=len)
    _load(model, chosen, wanted, path)


def _inside(content: Any, key: str, path: Path) -> Any:
    """Return what is at a key: of a mapping, of one in another, or the tensors behind a prefix of their names."""
    names = [key] if isinstance(content, Mapping) and key in content else key.split(".")
    for number, name in enumerate(names):
        if isinstance(content, Mapping) and name in content:
            content = content[name]
            continue
        prefix = ".".join(names[number:]) + "."
        tensors = content.items() if isinstance(content, Mapping) else ()
        behind = {each[len(prefix) :]: value for each, value in tensors if str(each).startswith(prefix)}
        if not behind:
            raise CommandError(f"{quoted(path)} has no {key!r}; it has {_keys(content)}")
        return behind
    return content


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
                content = read_file(file)
                twice = [name for name in merged if name in content and not _same(merged[name], content[name])]
                if twice:
                    raise CommandError(
                        f"the files of the folder {quoted(path)} hold different weights under {_some(twice)}; take the "
                        "older files away, or give one file"
                    )
                merged |= content
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
        if (module, name) in (("builtins", "set"), ("__builtin__", "set")):
            return set
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
    unsaved = content.get("_non_persistent_buffers_set", ())  # which no state dict has
    for kind in ("_parameters", "_buffers"):
        for name, tensor in content.get(kind, {}).items():
            if isinstance(tensor, Tensor) and name not in unsaved:
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


def _fitted(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors under the model's names, for each prefix behind which all of them are.

    Without a prefix they are the whole file. Of several prefixes those count whose shapes fit, and of equal weights
    under several names (a module that has two) one.
    """
    needed = _needed(wanted, found)
    first = next(iter(wanted), None)
    if first is None:
        return {}
    found_first = [name for name in found if name == first or name.endswith(f".{first}")]
    prefixes = sorted((name[: -len(first)] for name in found_first), key=len)  # of equal length: as in the file
    fitting: dict[str, dict[str, Tensor]] = {}
    for prefix in prefixes:
        inside = {name[len(prefix) :]: tensor for name, tensor in found.items() if name.startswith(prefix)}
        if not all(name in inside for name in _needed(wanted, inside)):
            continue
        if not prefix:
            return {"": inside}
        fitting[prefix] = {name: inside[name] for name in inside if name in wanted or name in needed}
    of_its_shape = {
        prefix: tensors
        for prefix, tensors in fitting.items()
        if all(tensor.shape == wanted[name].shape for name, tensor in tensors.items() if name in wanted)
    }
    kept: dict[str, dict[str, Tensor]] = {}
    for prefix, tensors in (of_its_shape or fitting).items():
        if not any(_all_same(tensors, other) for other in kept.values()):
            kept[prefix] = tensors
    return kept if of_its_shape else dict(list(kept.items())[:1])  # one whose shapes do not fit is named by the load


def _all_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(_same(tensor, other[name]) for name, tensor in one.items())


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


def _needed(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Return the names that must be there; of tied weights, one is enough."""
    stored = {tensor.data_ptr() for name, tensor in wanted.items() if name in found and tensor.numel()}
    return [name for name, tensor in wanted.items() if name in found or tensor.data_ptr() not in stored]


def _refuse_other_kinds(
    model: nn.Module, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path
) -> None:
    """Refuse numbers that a copy would turn into others: codes of quantised weights, complex numbers, fractions."""
    for name, own in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype is torch.bool:
            continue
        into_whole = not (own.is_floating_point() or own.is_complex())
        if into_whole:
            is_kept = not tensor.is_complex() and torch.equal(tensor, tensor.round())
        else:
            is_kept = tensor.is_floating_point() or (tensor.is_complex() and own.is_complex())
        if not is_kept:
            raise CommandError(
                f"{quoted(path)} does not fit {type(model).__name__}: {name!r} holds {tensor.dtype} numbers, and the "
                f"model's are {own.dtype}. Give dequantized weights, or the model that was saved"
            )


def _load(model: nn.Module, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    _refuse_other_kinds(model, tensors, wanted, path)
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
