"""Which parts of two outputs are compared, and how the comparison is averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samopt._numerics.low_precision import full_precision
from samopt._replay.outputs import describe, named_logits
from samopt.trust_region.arguments import is_encoder_decoder, predicts_next_token
from samopt.trust_region.divergence import Divergence, between

__all__ = ["Comparison"]

_IGNORED_LABEL = -100  # torch's cross_entropy and every Hugging Face model leave this label out


@dataclass(frozen=True)
class Comparison:
    """How the output of a reference is compared with the output of a forward call.

    Attributes:
        divergence: Name of a divergence, or a callable ``(reference, current) -> Tensor`` on logits.
        class_dim: Dimension of the logits that holds the classes.
        logits: Takes the logits from what the model returns; None looks for them.
        mask: Returns which positions of a call count, as a boolean tensor without the class dimension; None asks
            labels and attention masks.
    """

    divergence: str | Divergence
    class_dim: int = -1
    logits: Callable[[Any], Tensor] | None = None
    mask: Callable[[Any], Tensor] | None = None

    def logits_of(self, output: Any) -> list[Tensor]:
        """Return the tensors of an output that are compared, detached, with the classes in the last dimension.

        Args:
            output: What a model returned.

        Raises:
            TypeError: If it holds no floating-point tensor.
        """
        found = [self.logits(output)] if self.logits is not None else _find_logits(output)
        if not found:
            raise TypeError(
                f"TRAM compares logits, but the model returned {describe(output)}, which holds no floating-point "
                "tensor with a dimension; pass logits=, a callable that takes them from what the model returns"
            )
        return [self._classes_last(tensor.detach()) for tensor in found]

    def masks_of(self, call: Any) -> list[Tensor | None]:
        """Return which positions count, for each of the call's logits.

        Args:
            call: A ``ForwardCall``.

        Raises:
            ValueError: If the mask that the user's callable returned has another shape than the positions.
        """
        if self.mask is None:
            return [_valid_positions(call, tensor.shape[:-1]) for tensor in call.logits]
        mask = self.mask(call)
        for tensor in call.logits:
            if mask.shape != tensor.shape[:-1]:
                raise ValueError(
                    f"mask= must return a boolean tensor of shape {tuple(tensor.shape[:-1])}, the logits' without the "
                    f"class dimension; got {tuple(mask.shape)}"
                )
        return [mask != 0] * len(call.logits)

    def examples(self, logits: Tensor, mask: Tensor | None) -> int | Tensor:
        """Return how many examples have a position that counts.

        Args:
            logits: ``(examples, ..., classes)``.
            mask: ``(examples, ...)`` or None.
        """
        return logits.shape[0] if mask is None else _rows(mask).any(1).sum()

    def distance(self, call: Any, output: Any) -> Tensor:
        """Return the mean divergence over the examples of a call; heads of one model add up.

        Args:
            call: The call, whose own output is the second argument of the divergence.
            output: The reference's output.

        Raises:
            ValueError: If the reference's logits have other shapes than the call's.
        """
        references = self.logits_of(output)
        if [tensor.shape for tensor in references] != [tensor.shape for tensor in call.logits]:
            raise ValueError(
                "the reference forward returned logits of shapes "
                f"{[tuple(tensor.shape) for tensor in references]}, the training forward "
                f"{[tuple(tensor.shape) for tensor in call.logits]}; pass logits=, a callable that takes the same "
                "tensor from both"
            )
        with torch.no_grad(), full_precision(references[0].device.type):
            distances = [
                _mean(between(self.divergence, reference, current, mask), mask)
                for reference, current, mask in zip(references, call.logits, call.masks, strict=True)
            ]
        return torch.stack(distances).sum()

    def _classes_last(self, logits: Tensor) -> Tensor:
        return logits.unsqueeze(-1) if logits.dim() == 1 else logits.movedim(self.class_dim, -1)


def _find_logits(output: Any) -> list[Tensor]:
    """Return ``output.logits``, or every tensor named so, or the first floating-point tensor with a dimension."""
    if named := [value for value in named_logits(output).values() if _is_logits(value)]:
        return named
    if isinstance(output, Mapping):
        return [value for value in output.values() if _is_logits(value)][:1]
    if isinstance(output, tuple | list):
        return [value for value in output if _is_logits(value)][:1]
    return []


def _is_logits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _valid_positions(call: Any, shape: torch.Size) -> Tensor | None:
    """Return which positions are neither padding nor labelled -100, as far as the call's arguments tell."""
    attention = call.arguments.get("decoder_attention_mask" if is_encoder_decoder(call.module) else "attention_mask")
    labels = call.arguments.get("labels")
    valid: list[Tensor] = []
    if isinstance(attention, Tensor) and attention.shape == shape:
        valid.append(attention != 0)
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        labelled = labels != _IGNORED_LABEL
        if len(shape) > 1 and predicts_next_token(call.module):
            labelled = torch.nn.functional.pad(labelled[:, 1:], (0, 1), value=False)
        valid.append(labelled)
    if not valid:
        return None
    return valid[0] if len(valid) == 1 else valid[0] & valid[1]


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over examples of each one's mean over the positions that count; a 0-dim value is a mean."""
    if values.dim() == 0 or mask is None:
        return values.mean()
    counted = _rows(mask).to(values.device)
    number = counted.sum(1)
    means = torch.where(counted, _rows(values), 0.0).sum(1) / number.clamp(min=1)
    return means.sum() / (number > 0).sum().clamp(min=1)


def _rows(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], -1)
