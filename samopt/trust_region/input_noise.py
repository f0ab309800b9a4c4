"""A trust region between the model on its inputs and the model on noisy inputs."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from samopt.trust_region.call import ForwardCall

__all__ = ["InputNoise"]

_KINDS = ("normal", "uniform")
_STRIDE = 0x9E3779B97F4A7C15  # odd, so that neighbouring seeds, steps and calls do not share streams


class InputNoise:
    """``d = E_x[D(p(.|x + z, theta), p(.|x, theta))]`` with noise ``z`` (Sherborne et al. 2024, equation 5, TRAM-x).

    The noise is added to the output of the model's input embeddings where it has any, else to its first floating-point
    argument that is no mask. It comes from its own random stream, apart from every global one.

    Memory: none between steps.

    Args:
        std: Standard deviation of the noise, > 0, in units of the embeddings (or inputs).
        kind: "normal"; or "uniform", in ``[-sqrt(3) std, sqrt(3) std]``.
        embedding: The module whose output gets the noise, or its name in the model; None asks the model's
            ``get_input_embeddings()``.
        seed: Which stream of noise.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, std: float = 0.1, kind: str = "normal", embedding: nn.Module | str | None = None, seed: int = 0
    ) -> None:
        if not (std > 0 and math.isfinite(std)):
            raise ValueError(f"std must be > 0 and finite, got {std}")
        if kind not in _KINDS:
            raise ValueError(f'kind must be "normal" or "uniform", got {kind!r}')
        self.std = std
        self.kind = kind
        self.embedding = embedding
        self.seed = seed
        self._step = 0
        self._found: list[nn.Module] = []

    def bind(self, model: nn.Module) -> None:
        """Meet the model, and find its input embeddings.

        Args:
            model: The module.

        Raises:
            ValueError: If ``embedding`` names no module of it.
        """
        if isinstance(self.embedding, str):
            names = dict(model.named_modules())
            if self.embedding not in names:
                raise ValueError(
                    f"InputNoise(embedding={self.embedding!r}) names no module of {type(model).__name__}; its modules "
                    f"are {sorted(filter(None, names))}"
                )
            self._found = [names[self.embedding]]
        elif self.embedding is not None:
            self._found = [self.embedding]
        else:
            self._found = _input_embeddings(model)

    def measure(self, call: ForwardCall) -> Tensor:
        """Return the divergence between the output on noisy inputs and the call's own.

        Args:
            call: A forward call of the first pass.

        Raises:
            RuntimeError: If there is nothing that noise can be added to.
        """
        noise = self._noise(call.index)
        if self._found and "inputs_embeds" not in call.kwargs:
            with _added_to_outputs(self._found, noise) as touched:
                output = call.rerun(eager=True)
            if not touched:
                raise RuntimeError(
                    f"InputNoise found the embeddings {[type(module).__name__ for module in self._found]}, but the "
                    "model's forward did not call them; name the module it calls, as in InputNoise(embedding="
                    '"encoder.embed")'
                )
            return call.distance_to(output)
        args, kwargs = _added_to_input(call, noise)
        return call.distance_to(call.rerun(args=args, kwargs=kwargs))

    def advance(self) -> None:
        """Draw other noise at the next step."""
        self._step += 1

    def reset(self) -> None:
        """Start the noise from its first step."""
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps taken."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the noise from a saved step.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        self._step = state_dict["step"]

    def _noise(self, index: int) -> Any:
        """Return a function from a tensor to noise of its shape, different at each step and call."""
        seed = ((self.seed * _STRIDE + self._step) * _STRIDE + index) % 2**63
        generators: dict[torch.device, torch.Generator] = {}

        def draw(like: Tensor) -> Tensor:
            generator = generators.setdefault(like.device, torch.Generator(like.device).manual_seed(seed))
            if self.kind == "normal":
                noise = torch.randn(like.shape, generator=generator, device=like.device) * self.std
            else:
                unit = torch.rand(like.shape, generator=generator, device=like.device)
                noise = (2 * unit - 1) * (math.sqrt(3) * self.std)
            return noise.to(like.dtype)

        return draw


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return what ``get_input_embeddings()`` names, with the embeddings that share its weights; [] without it."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]  # Hugging Face models have it
    except (AttributeError, NotImplementedError, TypeError):
        return []
    if not isinstance(found, nn.Module):
        return []
    weight = getattr(found, "weight", None)
    sharing = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not found and module.weight is weight
    ]
    return [found, *sharing]


@contextmanager
def _added_to_outputs(modules: list[nn.Module], noise: Any) -> Generator[list[nn.Module]]:
    """Add noise to what ``modules`` return inside the context; yields those that were called."""
    touched: list[nn.Module] = []

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        touched.append(module)
        return output + noise(output)

    handles = [module.register_forward_hook(add) for module in modules]
    try:
        yield touched
    finally:
        for handle in handles:
            handle.remove()


def _added_to_input(call: ForwardCall, noise: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the call's arguments with noise on the first floating-point input."""
    names = {id(value): name for name, value in call.arguments.items()}
    for position, value in enumerate(call.args):
        if _is_input(value, names.get(id(value), "")):
            return (*call.args[:position], value + noise(value), *call.args[position + 1 :]), call.kwargs
        if isinstance(value, dict) and (changed := _with_noise(value, noise)) is not None:
            return (*call.args[:position], changed, *call.args[position + 1 :]), call.kwargs
    if (changed := _with_noise(call.kwargs, noise)) is not None:
        return call.args, changed
    raise RuntimeError(
        f"InputNoise found no input embeddings in {type(call.module).__name__} and no floating-point argument among "
        f"{sorted(call.arguments)}; name the module whose output should get the noise, as in "
        'InputNoise(embedding="encoder.embed")'
    )


def _with_noise(arguments: dict[str, Any], noise: Any) -> dict[str, Any] | None:
    preferred = ["inputs_embeds", *arguments]
    for name in preferred:
        if _is_input(arguments.get(name), name):
            return {**arguments, name: arguments[name] + noise(arguments[name])}
    return None


def _is_input(value: Any, name: str) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name and name != "labels"
