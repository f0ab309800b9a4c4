"""Batches of every kind, changed in place by the training step: the second pass sees what the first one saw."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

import samopt
from samopt.integrations.accelerate import SharpnessAwareBackward
from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import lit

pytestmark = [pytest.mark.hf, pytest.mark.lightning]


class Graph:
    """Of a user's own class, without a ``clone``."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y
        self.itself = self


class Slotted:
    """Without a ``__dict__``."""

    __slots__ = ("__hidden", "x", "y")

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y
        self.__hidden = x

    @property
    def shares(self) -> bool:
        return self.__hidden is self.x


@dataclasses.dataclass
class Fields:
    x: Any
    y: Any


class Pair(NamedTuple):
    x: Any
    y: Any


class Read(collections.UserDict):
    """As ``BatchEncoding``, with an attribute beside its data."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.source = "test"


KINDS = {
    "dict": lambda x, y: {"x": x, "y": y},
    "ordered dict": lambda x, y: collections.OrderedDict(x=x, y=y),
    "defaultdict": lambda x, y: collections.defaultdict(list, x=x, y=y),
    "UserDict": lambda x, y: Read(x=x, y=y),
    "read-only mapping": lambda x, y: types.MappingProxyType({"x": x, "y": y}),
    "object": Graph,
    "object with slots": Slotted,
    "namespace": lambda x, y: types.SimpleNamespace(x=x, y=y),
    "dataclass": Fields,
    "named tuple": Pair,
    "object inside a list": lambda x, y: [Graph(x, y)],
    "NumPy": lambda x, y: {"x": x.numpy(), "y": y.numpy()},
    "deque": lambda x, y: {"x": collections.deque([x]), "y": y},
    "leaf with a gradient": lambda x, y: {"x": x.requires_grad_(), "y": y},
}


def value(batch: Any, name: str) -> Any:
    if isinstance(batch, list):
        (batch,) = batch
    found = batch[name] if isinstance(batch, collections.abc.Mapping) else getattr(batch, name)
    return found[0] if isinstance(found, collections.deque) else found


def step(net: nn.Module, seen: list[Tensor], batch: Any) -> Tensor:
    """Note the inputs, compute the loss, and change everything in place."""
    x = value(batch, "x")
    inputs = torch.as_tensor(x)
    seen.append(inputs.detach().clone())
    if isinstance(x, Tensor) and x.requires_grad:  # an adversarial example
        (gradient,) = torch.autograd.grad(net(x).square().sum(), x)
        x.sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))
        inputs = x.detach() + 0.1 * gradient.sign()
        x.grad = None
    loss = nn.functional.cross_entropy(net(inputs.clone()), torch.as_tensor(value(batch, "y")))
    with torch.no_grad():
        x += 1.0
    return loss


def with_lightning(net: nn.Module, seen: list[Tensor], data: Any, folder: Any) -> None:
    class Module(lit.pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return step(net, seen, batch)

        def transfer_batch_to_device(self, batch: Any, *_: Any) -> Any:
            return batch

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(net.parameters(), lr=0.1)

    loader = torch.utils.data.DataLoader(data, batch_size=None, collate_fn=lambda batch: batch)
    lit.fit(folder, Module(), SharpnessAwareTraining(rho=0.5), data=loader, max_epochs=1)


def with_accelerate(net: nn.Module, seen: list[Tensor], data: Any, folder: Any) -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    optimizer = samopt.SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.5, model=net)
    model, optimizer = accelerator.prepare(net, optimizer)
    backward = SharpnessAwareBackward(accelerator, model, optimizer)
    for batch in data:
        backward(functools.partial(step, model, seen), batch)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("train", [with_lightning, with_accelerate])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_changed_in_place_is_seen_unchanged_by_the_second_pass(kind, train, tmp_path):
    data = list(lit.loader(8))
    expected = [x.clone() for x, _ in data]
    seen: list[Tensor] = []
    train(lit.network(), seen, [KINDS[kind](x, y) for x, y in data], tmp_path)
    assert len(seen) == 4
    for index, inputs in enumerate(seen):
        assert torch.equal(inputs, expected[index // 2])


def test_what_a_batch_holds_twice_its_copy_holds_twice():
    """Masking the inputs of a language model changes its labels where both are one tensor."""
    from samopt.integrations._second_pass.batch_copies import independent_copy

    ids = torch.arange(4)
    copied = independent_copy({"input_ids": ids, "labels": ids, "again": Slotted(ids, ids), "graph": Graph(ids, ids)})
    assert copied["input_ids"] is not ids
    assert copied["labels"] is copied["input_ids"] is copied["again"].x is copied["graph"].y
    assert copied["again"].shares
    assert copied["graph"].itself is copied["graph"]


def test_what_is_no_batch_is_shared():
    from samopt.integrations._second_pass.batch_copies import independent_copy

    module, generator, rows = nn.Linear(1, 1), torch.Generator(), torch.utils.data.TensorDataset(torch.zeros(3))
    given = (module, nn.Linear, generator, len, rows)
    assert all(ours is theirs for ours, theirs in zip(independent_copy(given), given, strict=True))
