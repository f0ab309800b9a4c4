"""With ``model=``, every buffer ends as a single pass leaves it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import samopt
from tests.helpers.cases import wrapped_step

forms = pytest.mark.parametrize("form", ["closure", "explicit"])


class Reassigning(nn.Module):
    """Replaces its buffers in forward instead of writing into them, and has buffers of awkward kinds."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("made_later", None)
        self.register_buffer("overlapping", torch.ones(1).expand(6))
        self.register_buffer("hidden", torch.zeros(6), persistent=False)

    def forward(self, x):
        out = self.inner(x) + self.overlapping
        self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
        self.calls = self.calls + 1
        self.hidden.lerp_(out.detach().amax(0), 0.5)
        if self.made_later is not None:
            self.made_later += 1
        elif self.calls >= 2:  # the second pass of the first step, or the first of the second
            self.made_later = out.detach().mean(0)
        return out


def normalised(norm, width=6):
    return lambda: nn.Sequential(nn.Linear(6, width), norm(), nn.Tanh(), nn.Linear(width, 3))


def images(norm):
    return lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 1), norm(4), nn.Flatten(), nn.Linear(24, 3)
    )


BUFFERED = {
    "batch norm": normalised(lambda: nn.BatchNorm1d(6)),
    "batch norm, cumulative": normalised(lambda: nn.BatchNorm1d(6, momentum=None)),
    "batch norm, 2d": images(nn.BatchNorm2d),
    "batch norm, 2d, cumulative": images(lambda c: nn.BatchNorm2d(c, momentum=None)),
    "synchronised batch norm": normalised(lambda: nn.SyncBatchNorm(6)),  # outside a process group: its local form
    "instance norm": images(lambda c: nn.InstanceNorm2d(c, track_running_stats=True, affine=True)),
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 3)),
    "spectral norm, old": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 3)),
    "reassigned": lambda: nn.Sequential(Reassigning(), nn.Linear(6, 3)),
}


def loss_of(model, x):
    return nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3)


def data(seed, size=10):
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))


def single_pass(twin, model, x, calls=1):
    """Give the twin the model's weights and one stock pass."""
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    sum(loss_of(twin, x + i) for i in range(calls)).backward()


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def model_and_twin(kind):
    torch.manual_seed(0)
    model = BUFFERED[kind]()
    torch.manual_seed(0)
    return model, BUFFERED[kind]()


@forms
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("kind", BUFFERED)
def test_buffers_are_those_of_single_passes(kind, calls, form):
    model, twin = model_and_twin(kind)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    seen = []

    def one_pass(x):
        loss = sum(loss_of(model, x + i) for i in range(calls))
        seen.append(buffers(model))
        return loss

    for seed in range(3):
        x = data(seed)
        single_pass(twin, model, x, calls)
        wrapped_step(optimizer, [lambda x=x: one_pass(x)] * 2, form)
        assert same(buffers(model), buffers(twin))
        assert not same(buffers(model), seen[-1])  # the second pass really wrote to them
    assert len(seen) == 6


@forms
@pytest.mark.parametrize("kind", BUFFERED)
def test_buffers_are_those_of_single_passes_after_an_exception(kind, form):
    model, twin = model_and_twin(kind)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    x = data(0)

    def broken():
        loss_of(model, x).backward()
        raise RuntimeError("out of memory")

    single_pass(twin, model, x)
    with pytest.raises(RuntimeError, match="out of memory"):
        wrapped_step(optimizer, [lambda: loss_of(model, x), broken], form)
    assert same(buffers(model), buffers(twin))
    single_pass(twin, model, x)
    wrapped_step(optimizer, [lambda: loss_of(model, x)] * 2, form)
    assert same(buffers(model), buffers(twin))
