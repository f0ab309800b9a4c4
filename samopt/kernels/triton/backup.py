"""Old weights that a kernel saves in the launch that moves them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from samopt.kernels.triton.tables import PointerTable

__all__ = ["TritonBackup"]


@dataclass(frozen=True)
class TritonBackup:
    """Where the old weights are, once the device has written them there.

    Attributes:
        weights: The weights.
        values: Memory for the old value of each.
        table: Addresses of the weights, of their directions and of ``values``.
        written: int64 on the device, one number for each chunk: ``stamp`` once its old weights are in ``values``.
        stamp: A number that no other ascent has.
    """

    weights: list[Tensor]
    values: list[Tensor]
    table: PointerTable
    written: Tensor
    stamp: int
