"""The gradient of functional SAM: the Jacobian at ``w + epsilon``, the loss's derivative at ``w``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from samopt._replay.output_gradients import OutputGradients, Outputs
from samopt.parts.combination import Combination

__all__ = ["FunctionalGradient"]


class FunctionalGradient(Combination):
    """``J(w + epsilon)^T v``, with ``J`` the Jacobian of the model's outputs and ``v = dL/df`` at the outputs ``f(w)``.

    SAM's gradient is the same with ``v`` at ``f(w + epsilon)``. Source: Singh et al. 2025, "Avoiding spurious sharpness
    minimization broadens applicability of SAM" (functional SAM); Baek et al. 2024, "Why is SAM Robust to Label Noise?"
    (the Jacobian term of SAM).

    The outputs of each call of ``model=`` are found as TRAM finds logits: the output itself, ``.logits`` or the entries
    named so; where no name tells, and no scalar beside them may be a loss, every floating-point tensor with a
    dimension. The loss may be computed outside the model or inside it. It must not be linear in the outputs, as the
    likelihood is in log-probabilities, or the step is SAM's; the first step warns of that. What the loss takes past the
    outputs (a regulariser of the weights, an auxiliary loss on hidden states) contributes its gradient at
    ``w + epsilon``, as in SAM.

    Both passes must run the same forward and backward passes: calls are matched by their input tensors where these are
    the same, else by their order. Evaluation between steps, and calls that are never differentiated, do not count.

    Cost: a copy of the gradient of the outputs, kept from the first pass to the second; of all micro-batches, where
    gradients are accumulated. With several outputs or calls also a walk over the graph, which looks for one that is
    computed from another.

    Args:
        outputs: Takes from what the model returns the tensors that the loss is computed from: a tensor, or a sequence
            of tensors none of which is computed from another. None finds them.

    Raises:
        TypeError: If ``outputs`` is not a callable.

    Example:
        >>> import torch, samopt
        >>> from samopt.parts import FunctionalGradient
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = samopt.ASAM(base, model=model, combination=FunctionalGradient())
    """

    uses_first_gradients = False

    def __init__(self, outputs: Outputs | None = None) -> None:
        if outputs is not None and not callable(outputs):
            raise TypeError(
                "outputs must be a callable that takes tensors from what the model returns, as in outputs=lambda "
                f"output: output.logits; got {outputs!r}"
            )
        self.outputs = outputs

    def check_models(self, models: Sequence[nn.Module], base: Optimizer) -> None:
        """Raise unless one model makes the outputs.

        Args:
            models: What was given as ``model``.
            base: The base optimizer.

        Raises:
            TypeError: If there is none.
            ValueError: If the base optimizer updates parameters of another one, too.
        """
        if not models:
            raise TypeError(
                "FunctionalGradient follows the model's forward calls, but model= is missing; pass the module that the "
                "training loop calls, as in samopt.FunctionalSAM(base_optimizer, model=model)"
            )
        own = set(map(id, models[0].parameters()))
        updated = {id(p) for group in base.param_groups for p in group["params"]} - own
        for other in models[1:]:
            if any(id(parameter) in updated for parameter in other.parameters()):
                raise ValueError(
                    f"FunctionalGradient takes the outputs of {type(models[0]).__name__}, the first of model=, but the "
                    f"base optimizer also updates parameters of {type(other).__name__}; put both into one module and "
                    "call that, or leave a loss with weights out of model="
                )

    def follow(
        self, models: Sequence[nn.Module], parameters: Callable[[], list[Tensor]], may_move: Callable[[], bool]
    ) -> OutputGradients:
        """Return what notes the derivative in the first pass and uses it in the second.

        Args:
            models: The module that the training loop calls comes first.
            parameters: Returns every parameter.
            may_move: Returns whether this step has a second pass.
        """
        return OutputGradients(may_move, self.outputs)
