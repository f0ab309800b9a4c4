"""Which weights count as whole: those under LoRA adapters, or the plain weights of a model without adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["AdapterLayer", "Factors", "find_layers"]

_PEFT_KINDS = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")
_BESIDE = ("trainable_tokens",)  # rows of an embedding: an option of peft's LoraConfig
_PLAIN_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_QUANTISED_BY = ("qweight", "quant_state", "W_q", "codebooks")  # attributes of GPTQ, AWQ, bitsandbytes, HQQ and AQLM
_WITHOUT = "or train the adapters with samopt.SAM, which perturbs the factors alone"


class Factors(NamedTuple):
    """One adapter of a layer: it adds ``scaling left right`` to the weight, of the weight's own shape.

    They are ``B`` and ``A``, or ``A^T`` and ``B^T`` where the weight has shape (inputs, outputs).
    """

    left: Tensor
    right: Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class AdapterLayer:
    """A weight that is perturbed as a whole, ``W + scaling B A``.

    Attributes:
        name: Its name in the model, for messages.
        owner: The module whose attribute ``weight`` is ``W``.
        weight: ``W`` when the layer was found.
        adapter: The module that has the factors, and whose call runs the layer; None where ``W`` itself is trained.
        inputs_first: Whether ``W`` has shape (inputs, outputs), so that a row of the layer is a column of ``W``.
    """

    name: str
    owner: nn.Module
    weight: nn.Parameter
    adapter: Any
    inputs_first: bool

    def factors(self) -> list[Factors]:
        """Return the factors that a forward adds now; none where the adapter is switched off."""
        if self.adapter is None or getattr(self.adapter, "disable_adapters", False):
            return []
        if not _is_peft(self.adapter):
            found = [_own_factors(self.adapter)]
        else:
            names = [name for name in self.adapter.active_adapters if _has(self.adapter, name)]
            found = [_peft_factors(self.adapter, name) for name in names]
        return [Factors(a.T, b.T, scaling) for b, a, scaling in found] if self.inputs_first else found

    def is_on(self) -> bool:
        """Return whether a forward runs at ``W + scaling B A``, and not at ``W`` because its adapters are off."""
        return self.adapter is None or bool(self.factors())

    def trained(self) -> list[Tensor]:
        """Return the tensors by which the base optimizer moves the whole weight."""
        return [self.weight] if self.adapter is None else _all_factors(self.adapter)

    def merged(self) -> Tensor:
        """Return ``W + scaling B A`` in at least fp32, in memory of its own; costs ``B A`` once for each adapter."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        whole = self.weight.detach().to(wide, copy=True)
        for left, right, scaling in self.factors():
            # B of a convolution has a kernel of one point.
            product = torch.einsum("or,r...->o...", left.detach().to(wide).flatten(1), right.detach().to(wide))
            whole.add_(product, alpha=scaling)
        return whole

    def row_norms(self) -> Tensor:
        """Return the norm of each row (filter) of ``W + scaling B A``, shaped to multiply ``W``."""
        whole = self.merged()
        dims = [0] if self.inputs_first else list(range(1, whole.dim()))
        norms: Tensor = torch.linalg.vector_norm(whole, dim=dims, keepdim=True)
        return norms

    def row_size(self) -> int:
        """Return how many entries a row (filter) has."""
        rows = self.weight.shape[1 if self.inputs_first else 0]
        return self.weight.numel() // max(rows, 1)

    def has_own_weight(self) -> bool:
        """Return whether ``W`` is in its place, and no tensor that ``torch.func.functional_call`` was given.

        Raises:
            RuntimeError: If the adapters were merged into ``W``, or another parameter is in its place.
        """
        present = self.owner._parameters.get("weight")
        if _is_merged(self.adapter):
            raise RuntimeError(_merged_text(self.name))
        if present is not self.weight and isinstance(present, nn.Parameter):
            raise RuntimeError(
                f"the weight of {self.name} was replaced by another tensor after the optimizer was made, so it would "
                "not be perturbed; make the optimizer after everything that replaces parameters, and put calls by "
                "torch.func.functional_call into 'with optimizer.exact():'"
            )
        return present is self.weight


def find_layers(models: Sequence[nn.Module], groups: Iterable[dict[str, Any]], name: str) -> list[AdapterLayer]:
    """Return the layers whose whole weight an optimizer trains: those with adapters, or the plain ones without any.

    peft's LoRA layers (Linear, Embedding, Conv) are known by their class. Any other module is an adapter layer if it
    has ``lora_A`` and ``lora_B``, each a parameter or a module with a weight, a number ``scaling``, and a frozen
    ``weight``: its own, or that of its child ``base_layer`` or ``linear``. In a model without adapters, the layers are
    the trained weights of ``nn.Linear``, of convolutions, and of transformers' ``Conv1D``.

    Args:
        models: The modules that the passes run.
        groups: The base optimizer's parameter groups.
        name: The wrapper's name, for messages.

    Raises:
        ValueError: If there is no such layer, or one of them cannot be perturbed as a whole.
    """
    owned = {id(parameter) for group in groups for parameter in group["params"]}
    modules = [(path or type(module).__name__, module) for model in models for path, module in model.named_modules()]
    modules = list({id(module): (path, module) for path, module in reversed(modules)}.values())[::-1]
    adapters = [(path, module) for path, module in modules if _is_adapter(module)]
    _refuse_other_kinds(modules, owned, _BESIDE if adapters else ())
    if not adapters:
        plain = [found for path, module in modules if (found := _plain_layer(path, module, owned)) is not None]
        if not plain:
            raise ValueError(
                f"{name} found neither an adapter layer nor a trained weight of a linear layer in "
                f"model={', '.join(type(model).__name__ for model in models)}; it knows peft's LoRA layers, modules "
                "with lora_A, lora_B, scaling and a frozen weight, nn.Linear and convolutions. Make the optimizer "
                f"after the adapters, {_WITHOUT}"
            )
        return list({layer.weight: layer for layer in reversed(plain)}.values())[::-1]  # a tied weight once
    trained = [(path, module) for path, module in adapters if _any_owned(_all_factors(module), owned)]
    if not trained:
        raise ValueError(
            f"{name} found {len(adapters)} adapter layers ({adapters[0][0]} for one), but the base optimizer has no "
            "factor of theirs; build it from the model's trainable parameters, after the adapters were added"
        )
    layers = [_adapter_layer(path, module) for path, module in trained]
    owners: dict[nn.Module, str] = {}
    for layer in layers:
        first = owners.setdefault(layer.owner, layer.name)
        if first != layer.name:
            raise ValueError(
                f"{first} and {layer.name} adapt one and the same base layer, so that its weight would have two values "
                f"at once; give each a layer of its own (which may share the parameter), {_WITHOUT}"
            )
    return layers


def _refuse_other_kinds(modules: Iterable[tuple[str, Any]], owned: set[int], beside: Sequence[str]) -> None:
    """Raise if peft trains something by another method than LoRA, or by both at once.

    Args:
        modules: The modules, with their names.
        owned: The ids of the base optimizer's parameters.
        beside: Methods that may be trained beside LoRA.

    Raises:
        ValueError: If it does.
    """
    for path, module in modules:
        kinds = {
            each.__name__: each.__module__.split(".") for each in type(module).__mro__ if _is_defined_in_peft(each)
        }
        method = next((names[2] for names in kinds.values() if names[1] == "tuners" and len(names) > 3), None)
        if method in (None, "lora", *beside) or not kinds.keys().isdisjoint(("BaseTuner", "LoraLayer")):
            continue
        own = [tensor for name, tensor in module.named_parameters() if not name.startswith("base_layer.")]
        if _any_owned(own, owned):
            raise ValueError(
                f"{path} is a {type(module).__module__}.{type(module).__name__}, which changes the model in another "
                "way than by adding scaling B A to a weight; use LoRA alone, or train with samopt.SAM, which perturbs "
                "the trained parameters"
            )


def _adapter_layer(path: str, module: Any) -> AdapterLayer:
    """Return the layer of an adapter.

    Raises:
        ValueError: If its whole weight cannot be perturbed.
    """
    owner = module.get_base_layer() if _is_peft(module) else _own_base(path, module)
    _refuse_quantised(path, owner)
    inputs_first = bool(getattr(module, "fan_in_fan_out", False))
    if _is_peft(module):
        kind = next(each for each in type(module).__mro__ if _is_defined_in_peft(each))
        if kind.__module__ != "peft.tuners.lora.layer" or kind.__name__ not in _PEFT_KINDS:
            raise ValueError(
                f"{path} is a {kind.__module__}.{kind.__name__}, whose weight is not W + scaling B A of one frozen W; "
                f"adapt only {', '.join(_PEFT_KINDS)} layers, {_WITHOUT}"
            )
        if variants := getattr(module, "lora_variant", None):
            found = ", ".join(sorted({type(each).__name__ for each in variants.values()}))
            raise ValueError(
                f"{path} uses {found}, whose weight is not W + scaling B A; use plain LoRA (use_dora=False), {_WITHOUT}"
            )
        if getattr(owner, "groups", 1) > 1:
            raise ValueError(
                f"{path} is a convolution with groups={owner.groups}, whose weight peft cannot merge with B A either; "
                f"leave it out of target_modules, {_WITHOUT}"
            )
        inputs_first = inputs_first and kind.__name__ == "Linear"  # an embedding of peft has the flag without a meaning
        weight = _checked_weight(path, owner)
    else:
        weight = _checked_weight(path, owner)
        b, a, _ = _own_factors(module, path)
        product = (b.shape[0], a.shape[1]) if b.dim() == a.dim() == 2 and b.shape[1] == a.shape[0] else None
        if product not in (tuple(weight.shape), tuple(weight.shape[::-1])):
            raise ValueError(
                f"{path} has lora_B of shape {tuple(b.shape)} and lora_A of shape {tuple(a.shape)}, whose product is "
                f"not of the weight's shape {tuple(weight.shape)}; B is (outputs, rank) and A is (rank, inputs)"
            )
        inputs_first = inputs_first or product != tuple(weight.shape)
    if weight.requires_grad:
        raise ValueError(
            f"{path} has adapters on a weight that is trained itself; freeze it (weight.requires_grad_(False)), so "
            "that the factors alone move the whole weight"
        )
    if _is_merged(module):
        raise ValueError(_merged_text(path))
    return AdapterLayer(path, owner, weight, module, inputs_first)


def _plain_layer(path: str, module: nn.Module, owned: set[int]) -> AdapterLayer | None:
    """Return the layer of a plain module; None where its weight is not the base's.

    Raises:
        ValueError: If its weight is trained, and cannot be perturbed.
    """
    kinds = {(each.__module__.partition(".")[0], each.__name__) for each in type(module).__mro__}
    is_transposed = ("transformers", "Conv1D") in kinds
    if not (isinstance(module, _PLAIN_KINDS) or is_transposed):
        return None
    weight = module._parameters.get("weight")
    # Without one, trained matrices in the layer are what its weight is made of in the forward.
    if not any(id(p) in owned for p in ([weight] if weight is not None else _matrices_in(module))):
        return None
    if weight is None:
        raise ValueError(
            f"the weight of {path}, a {type(module).__name__}, is made in the forward, by a parametrization or pruning "
            "say, so it cannot be replaced by a perturbed one; remove that, or use samopt.SAM, which perturbs what the "
            "weight is made of"
        )
    _refuse_quantised(path, module)
    return AdapterLayer(path, module, _checked_weight(path, module), None, is_transposed)


def _matrices_in(module: nn.Module) -> list[Tensor]:
    """Return the parameters in a module that are no vectors."""
    return [parameter for parameter in module.parameters() if not is_lazy(parameter) and parameter.dim() > 1]


def _refuse_quantised(path: str, owner: nn.Module) -> None:
    """Raise if the weight of a layer is not kept as numbers that can be moved.

    Raises:
        ValueError: If it is quantised, or sharded.
    """
    weight: Any = owner._parameters.get("weight")
    marks = [mark for mark in _QUANTISED_BY if getattr(owner, mark, None) is not None or hasattr(weight, mark)]
    kind = type(weight).__name__ if weight is not None else type(owner).__name__
    if getattr(weight, "device_mesh", None) is not None:
        raise ValueError(
            f"the weight of {path} is a {kind}, a part of which is on each rank; whole weights are perturbed layer by "
            f"layer, on one device: use DistributedDataParallel, {_WITHOUT}"
        )
    is_packed = weight is not None and not (weight.is_floating_point() or weight.is_complex())
    is_other_kind = weight is not None and type(weight) is not nn.Parameter and not is_lazy(weight)
    if marks or is_packed or is_other_kind:
        dtype = "" if weight is None else f" of dtype {weight.dtype}"
        raise ValueError(
            f"the base weight of {path} is quantised ({type(owner).__name__} with {kind}{dtype}), and w + epsilon does "
            f"not lie on its grid; load the base in bf16, fp16 or fp32, {_WITHOUT}"
        )


def _checked_weight(path: str, owner: nn.Module) -> nn.Parameter:
    """Return the weight of a layer.

    Raises:
        ValueError: If it is not of real numbers, or made in the forward.
    """
    weight: Any = owner._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"the base layer of {path}, a {type(owner).__name__}, has no parameter called weight (a parametrization "
            f"makes it in the forward, say); remove the parametrization, {_WITHOUT}"
        )
    if is_lazy(weight) or weight.is_complex() or weight.dim() < 2:
        found = "not initialised" if is_lazy(weight) else f"of dtype {weight.dtype} and shape {tuple(weight.shape)}"
        raise ValueError(f"the weight of {path} is {found}; whole weights are real matrices or kernels with values")
    return weight  # type: ignore[no-any-return]  # it was read from a registry of parameters


def _is_adapter(module: Any) -> bool:
    """Return whether a module has low-rank factors."""
    kinds = {(each.__module__, each.__name__) for each in type(module).__mro__}
    if ("peft.tuners.lora.layer", "LoraLayer") in kinds:
        return True
    own = module._parameters.keys() | module._modules.keys()  # hasattr would find those inside a compiled module
    return not _is_peft(module) and {"lora_A", "lora_B"} <= own


def _is_peft(module: Any) -> bool:
    """Return whether a class of peft is among a module's classes."""
    return any(map(_is_defined_in_peft, type(module).__mro__))


def _is_defined_in_peft(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "peft"


def _is_merged(adapter: Any) -> bool:
    """Return whether the factors were added to the weight already."""
    return bool(getattr(adapter, "merged", False))


def _merged_text(path: str) -> str:
    return (
        f"the adapters of {path} are merged into its weight, so their factors play no part in a forward and get no "
        "gradient; call unmerge_adapter() (peft), or train() before training"
    )


def _has(adapter: Any, name: str) -> bool:
    """Return whether a layer of peft has an adapter."""
    return name in adapter.lora_A or name in getattr(adapter, "lora_embedding_A", ())


def _peft_factors(adapter: Any, name: str) -> Factors:
    """Return the factors ``B``, ``A`` of one adapter of a layer of peft; for an embedding ``A^T``, ``B^T``."""
    scaling = float(adapter.scaling[name])
    if name in adapter.lora_A:
        return Factors(adapter.lora_B[name].weight, adapter.lora_A[name].weight, scaling)
    return Factors(adapter.lora_embedding_A[name].T, adapter.lora_embedding_B[name].T, scaling)


def _own_factors(adapter: Any, path: str = "") -> Factors:
    """Return the factors ``B``, ``A`` of a module that is not peft's.

    Raises:
        ValueError: If they, or their scaling, are not where they are looked for.
    """
    b, a = (getattr(factor, "weight", factor) for factor in (adapter.lora_B, adapter.lora_A))
    scaling = getattr(adapter, "scaling", None)
    if not (isinstance(b, Tensor) and isinstance(a, Tensor) and isinstance(scaling, Real)):
        raise ValueError(
            f"{path}, a {type(adapter).__name__}, has lora_A ({type(adapter.lora_A).__name__}), lora_B "
            f"({type(adapter.lora_B).__name__}) and scaling {scaling!r}; the factors must be parameters or modules "
            "with a weight, and scaling the number that B A is multiplied by"
        )
    return Factors(b, a, float(scaling))


def _own_base(path: str, module: nn.Module) -> nn.Module:
    """Return the module that has the frozen weight of an adapter that is not peft's.

    Raises:
        ValueError: If there is none.
    """
    for owner in (module, getattr(module, "base_layer", None), getattr(module, "linear", None)):
        if isinstance(owner, nn.Module) and (owner._parameters.get("weight") is not None or hasattr(owner, "qweight")):
            return owner
    raise ValueError(
        f"{path}, a {type(module).__name__}, has lora_A and lora_B, but neither it nor a child called base_layer or "
        "linear has a weight that they adapt; give the frozen layer one of these names"
    )


def _all_factors(adapter: Any) -> list[Tensor]:
    """Return every factor of an adapter layer, of adapters that are not active, too."""
    found: list[Any] = []
    for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        some = getattr(adapter, name, None)
        if isinstance(some, nn.Module):
            found.extend(some.parameters())
        elif isinstance(some, nn.Parameter):
            found.append(some)
    return found


def _any_owned(tensors: Iterable[Tensor], owned: set[int]) -> bool:
    return any(id(tensor) in owned for tensor in tensors)
