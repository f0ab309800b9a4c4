"""An accelerator without one: tensors of another device that lie on the CPU, and a list of what would wait for it.

A copy to the CPU that does not wait holds nan: on a real device, the host may read it before the values arrive.

It takes torch's place for other devices and cannot be taken back, so it is for processes of its own.
"""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["DEVICE", "Accelerator", "on_device"]

_READS = ("_local_scalar_dense.", "nonzero.", "is_nonzero.", "equal.")
_MIXES = ("index.Tensor", "index_put_.default")  # which take indices of the CPU
_STRICT = ("cat.", "stack.", "mm.", "addmm.", "dot.", "_foreach_")  # which take no numbers of the CPU either
_OURS = Path(__file__).parents[2] / "samopt"


class _Module:
    """What ``torch.cuda`` is to CUDA; while a graph is captured, random states can be neither read nor set there."""

    capturing = False

    @classmethod
    def is_current_stream_capturing(cls):
        return cls.capturing

    @classmethod
    def get_rng_state(cls, device=None):
        if cls.capturing:
            raise RuntimeError("the random state was read during the capture of a graph")
        return torch.zeros(16, dtype=torch.uint8)

    @classmethod
    def set_rng_state(cls, state, device=None):
        if cls.capturing:
            raise RuntimeError("the random state was set during the capture of a graph")

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def is_initialized():
        return True

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16]

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def device_count():
        return 1


_setup_privateuseone_for_python_backend("imagined", backend_module=_Module)
DEVICE = torch.device("imagined", 0)


class _Away(Tensor):
    """A tensor of the device; its values are ``near``."""

    @staticmethod
    def __new__(cls, near):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        away = Tensor._make_wrapper_subclass(cls, near.shape, dtype=near.dtype, device=DEVICE, **layout)
        away.near = near
        return away

    def untyped_storage(self):
        return self.near.untyped_storage()

    def data_ptr(self):
        return self.near.data_ptr()

    def __repr__(self):
        return f"away: {self.near!r}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, [])


class Accelerator(TorchDispatchMode):
    """Runs what is asked of the device on the CPU, and notes what makes the host wait for it.

    Attributes:
        waits: The operation and the line of samopt that asked for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []

    @contextmanager
    def capture(self):
        """Have a graph captured in this context."""
        _Module.capturing = True
        try:
            yield
        finally:
            _Module.capturing = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.waits)


def _run(func, args, kwargs, waits):
    """Run an operation on the CPU; its results are on the device where they would be there."""
    name, target = func.__name__, None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_away = any(isinstance(tensor, _Away) for tensor in given)
    lands_away = is_away if target is None else target == DEVICE.type
    crosses = bool(given) and is_away is not lands_away
    if name.startswith("copy_."):
        lands_away = isinstance(args[0], _Away)
        crosses = lands_away is not isinstance(args[1], _Away)
    elif not crosses and name not in _MIXES and not name.startswith("_foreach_copy_"):
        _refuse_mixtures(name, given, args)
    may_go_on = lands_away and (kwargs.get("non_blocking") or (name.startswith("copy_.") and args[2:] == (True,)))
    if (is_away and name.startswith(_READS)) or (crosses and not may_go_on):
        waits.append((name, _asked_by()))
    near_args, near_kwargs = tree_map_only(_Away, lambda away: away.near, (args, kwargs))
    if target == DEVICE.type:
        near_kwargs["device"] = "cpu"
    made = func(*near_args, **near_kwargs)
    if crosses and not lands_away and kwargs.get("non_blocking"):  # the host may read it before the values arrive
        made = made.fill_(float("nan")) if made.is_floating_point() else made
    given_near = [leaf for leaf in tree_leaves((near_args, near_kwargs)) if isinstance(leaf, Tensor)]
    written = {id(near): whole for near, whole in zip(given_near, given, strict=True)}

    def named(out):
        """Return what was written into under its own name."""
        return written[id(out)] if id(out) in written else _Away(out) if lands_away else out

    return tree_map_only(Tensor, named, made)


def _refuse_mixtures(name, given, args):
    """Raise as torch does where tensors of two devices meet, but for single numbers of the CPU in pointwise ones."""
    near = [tensor for tensor in given if not isinstance(tensor, _Away)]
    if not near or len(near) == len(given):
        return
    into_near = name.split(".")[0].endswith("_") and not isinstance(tree_leaves(args)[0], _Away)
    if into_near or any(tensor.dim() for tensor in near) or name.startswith(_STRICT):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")


def _asked_by() -> str:
    lines = [frame for frame in traceback.extract_stack() if _OURS in Path(frame.filename).parents]
    return f"{Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else "outside samopt"


def on_device(thing: nn.Module | Tensor) -> nn.Module | Tensor:
    """A tensor's values on the device; or a module, whose parameters and buffers are replaced by ones there."""
    if isinstance(thing, Tensor):
        return _Away(thing.detach().clone())
    for module in thing.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_Away(parameter.detach().clone()))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _Away(buffer.detach().clone())
    return thing
