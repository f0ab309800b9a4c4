"""R3F by hand: a fine-tune whose loss has the divergence between outputs on clean and on noisy inputs added.

Equation 4 of Aghajanyan et al. 2021, "Better Fine-Tuning by Reducing Representational Collapse".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer


class R3F(Optimizer):
    """The base optimizer, and the penalty that the training loop adds to its loss.

    Args:
        base: The optimizer that steps.
        model: Called with noisy inputs.
        weight: The paper's lambda.
        std: Standard deviation of the normal noise on the input vectors.
    """

    def __init__(self, base: Optimizer, model: nn.Module, weight: float = 1.0, std: float = 0.1) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.param_groups, self._base = base.param_groups, base
        self._model, self._weight, self._std = model, weight, std

    def penalty(self, hidden: Tensor, attention_mask: Tensor, logits: Tensor) -> Tensor:
        """Return the weighted symmetric KL divergence between ``logits`` and those of noisy inputs.

        Args:
            hidden: The inputs that gave ``logits``; the noise comes from torch's global generator.
            attention_mask: The attention mask of these inputs.
            logits: ``(n, classes)``, with a graph.
        """
        return self._divergence(logits, self._model(self._with_noise(hidden), attention_mask))

    def token_penalty(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Return what ``penalty`` does for a language model, with the noise on its token embeddings.

        Args:
            tokens: ``(n, length)``.
            logits: ``(n, length, tokens)`` of these, with a graph.
        """
        model: Any = self._model
        hidden = model.get_input_embeddings()(tokens)
        return self._divergence(logits, model(inputs_embeds=self._with_noise(hidden)).logits.float())

    def _with_noise(self, hidden: Tensor) -> Tensor:
        return hidden + self._std * torch.randn_like(hidden)

    def _divergence(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the weighted symmetric KL divergence between logits, mean over all but the last dimension."""
        p, q = functional.log_softmax(first, -1), functional.log_softmax(second, -1)
        return self._weight * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()

    def step(self, closure: Callable[[], Tensor]) -> Any:
        """Take a step and return the loss before it."""
        loss = closure()
        self._base.step()
        return loss
