"""What torch has made of weights and keeps for their next use, which is stale once the weights have changed."""

from __future__ import annotations

import sys

import torch

__all__ = ["clear_cached_parametrizations", "clear_cached_weights"]


def clear_cached_weights() -> None:
    """Drop autocast's low-precision copies of weights, and what ``clear_cached_parametrizations`` does."""
    torch.clear_autocast_cache()
    clear_cached_parametrizations()


def clear_cached_parametrizations() -> None:
    """Drop the weights that ``torch.nn.utils.parametrize.cached()`` keeps, also of modules that it was not asked for.

    torch has no function for it. A cache that is not there any more, or has another name, is one without entries.
    """
    cache = getattr(sys.modules.get("torch.nn.utils.parametrize"), "_cache", None)
    if cache:
        cache.clear()
