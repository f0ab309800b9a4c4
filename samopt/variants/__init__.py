"""Which published optimizer? One file each; the registry below holds them by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from samopt.optimizer import SharpnessAwareOptimizer
from samopt.variants.asam import ASAM
from samopt.variants.fisher_sam import FisherSAM
from samopt.variants.flat_lora import FlatLoRA
from samopt.variants.friendly_sam import FriendlySAM
from samopt.variants.functional_sam import FunctionalSAM
from samopt.variants.gsam import GSAM
from samopt.variants.lesam import LESAM
from samopt.variants.looksam import LookSAM
from samopt.variants.momentum_sam import MomentumSAM
from samopt.variants.preconditioned_sam import PreconditionedSAM
from samopt.variants.sam import SAM
from samopt.variants.tram import TRAM
from samopt.variants.wsam import WSAM

__all__ = ["available", "create", "option_names"]

_REGISTRY: dict[str, Callable[..., SharpnessAwareOptimizer]] = {
    "sam": SAM,
    "asam": ASAM,
    "fisher-sam": FisherSAM,
    "preconditioned-sam": PreconditionedSAM,
    "momentum-sam": MomentumSAM,
    "friendly-sam": FriendlySAM,
    "looksam": LookSAM,
    "gsam": GSAM,
    "wsam": WSAM,
    "le-sam": LESAM,
    "functional-sam": FunctionalSAM,
    "tram": TRAM,
    "flat-lora": FlatLoRA,
}


def available() -> list[str]:
    """Return the names that ``create`` knows, in a fixed order.

    Example:
        >>> import samopt
        >>> samopt.available()[:2]
        ['sam', 'asam']
    """
    return list(_REGISTRY)


def create(
    name: str,
    params: ParamsT | Optimizer,
    base_optimizer: Callable[..., Optimizer] | None = None,
    **options: Any,
) -> SharpnessAwareOptimizer:
    """Make a sharpness-aware optimizer by name.

    Args:
        name: One of ``available()``, in any case; "_" counts as "-".
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class.
        **options: Options of the optimizer's class, such as ``rho`` and ``model``.

    Returns:
        The optimizer.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> import torch, samopt
        >>> model = torch.nn.Linear(4, 2)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> type(samopt.create("asam", base, model=model, rho=0.5)).__name__
        'ASAM'
    """
    return _named(name)(params, base_optimizer, **options)


def option_names(name: str) -> list[str]:
    """Return the options that ``create(name, base, ...)`` takes.

    Args:
        name: One of ``available()``.

    Raises:
        ValueError: If the name is unknown.
    """
    parameters = inspect.signature(_named(name)).parameters
    return [each for each in parameters if each not in ("params", "base_optimizer", "base_kwargs")]


def _named(name: str) -> Callable[..., SharpnessAwareOptimizer]:
    kind = _REGISTRY.get(str(name).lower().replace("_", "-"))
    if kind is None:
        raise ValueError(f"unknown optimizer {name!r}; samopt.available() lists {', '.join(_REGISTRY)}")
    return kind
