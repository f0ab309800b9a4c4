"""What compute-sanitizer looks for on a GPU, looked for in Triton's interpreter: every load and store of a kernel."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

__all__ = ["Poison", "Sanitizer"]

_UNIT = 2  # bytes; no kernel has narrower values


class Sanitizer:
    """Makes a launch fail that does what no launch may do.

    A load or store outside every tensor, or across its alignment; an address that is no multiple of what the kernel
    tells the compiler that it is, since the wide instructions made of that would fault; and two programs of one launch
    that touch the same memory, if one of them writes it, since a GPU runs them in any order.

    Args:
        islands: Tensors that share memory with others; of that memory, kernels may touch these tensors only.

    Attributes:
        launches: Names of the kernels that ran.
        wide: How many addresses were promised to be multiples of something.
    """

    def __init__(self, *islands: Tensor) -> None:
        self.launches: list[str] = []
        self.wide = 0
        self._islands = islands
        self._patches = ExitStack()

    def __enter__(self):
        builder, executor, handle = interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter.TensorHandle
        load, store = builder.create_masked_load, builder.create_masked_store
        launch, set_attr = executor.__call__, handle.set_attr

        def watched_load(builder, pointers, mask, *rest):
            self._note(builder, pointers, mask, "loads")
            return load(builder, pointers, mask, *rest)

        def watched_store(builder, pointers, value, mask, *rest):
            self._note(builder, pointers, mask, "stores")
            return store(builder, pointers, value, mask, *rest)

        def watched_attr(handle, name, values):
            if name == "tt.divisibility":
                self.wide += 1
                if (handle.data % values[0]).any():
                    raise MemoryError(f"{handle.data} is said to be a multiple of {values[0]}")
            set_attr(handle, name, values)

        def watched_launch(executor, *arguments, **options):
            self._begin()
            launch(executor, *arguments, **options)
            self._end(executor.fn.__name__)

        for owner, name, watched in (
            (builder, "create_masked_load", watched_load),
            (builder, "create_masked_store", watched_store),
            (handle, "set_attr", watched_attr),
            (executor, "__call__", watched_launch),
        ):
            self._patches.enter_context(patch.object(owner, name, watched))
        return self

    def __exit__(self, *error):
        self._patches.close()

    def _begin(self) -> None:
        """Find the memory of every tensor that is alive."""
        shared = {island.untyped_storage().data_ptr() for island in self._islands}
        places = {island.data_ptr(): island.nbytes for island in self._islands}
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor) and thing.layout is torch.strided:
                storage = thing.untyped_storage()
                if storage.data_ptr() not in shared:
                    places[storage.data_ptr()] = storage.nbytes()
        self._starts = np.array(sorted(places), dtype=np.uint64)
        self._ends = self._starts + np.array([places[start] for start in sorted(places)], dtype=np.uint64)
        self._touched: list[np.ndarray] = []

    def _note(self, builder, pointers, mask, verb) -> None:
        inside = np.broadcast_to(mask.data, pointers.data.shape)
        addresses = pointers.data[inside].astype(np.uint64)
        width = pointers.get_element_ty().primitive_bitwidth // 8
        place = np.searchsorted(self._starts, addresses, side="right") - 1
        known = (place >= 0) & (addresses + np.uint64(width) <= self._ends[place])
        if not known.all():
            raise MemoryError(f"{verb} {width} bytes at {addresses[~known][0]:#x}, where no tensor is")
        if (addresses % width).any():
            raise MemoryError(f"{verb} {width} bytes at addresses that are no multiples of {width}")
        units = (addresses[:, None] + np.arange(0, width, _UNIT, dtype=np.uint64)).ravel()
        record = np.empty((len(units), 3), dtype=np.uint64)
        record[:, 0], record[:, 1], record[:, 2] = units, builder.grid_idx[0], verb == "stores"
        self._touched.append(record)

    def _end(self, name) -> None:
        """Look for memory that one program writes and another touches."""
        self.launches.append(name)
        if not self._touched:
            return
        units, programs, writes = np.concatenate(self._touched).T
        order = np.argsort(units, kind="stable")
        first = np.flatnonzero(np.diff(units[order], prepend=units.max() + np.uint64(1)))
        programs, writes = programs[order], writes[order]
        several = np.minimum.reduceat(programs, first) != np.maximum.reduceat(programs, first)
        if (several & (np.maximum.reduceat(writes, first) > 0)).any():
            raise MemoryError(f"programs of {name} race: one writes what another touches")


class Poison(TorchDispatchMode):
    """Fills what torch allocates without values, so that a result made of it shows.

    Args:
        byte: What to fill it with.
    """

    def __init__(self, byte: int) -> None:
        super().__init__()
        self._byte = byte
        self.filled = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if "empty" in func.__name__ and made.numel():
            self.filled += 1
            made.untyped_storage().fill_(self._byte)
        return made
