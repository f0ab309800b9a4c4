"""Memory that is kept from step to step, a buffer for each parameter."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from samopt._perturb.scratch_pool import ScratchPool


@pytest.mark.parametrize(
    "parameter",
    [
        nn.Parameter(torch.randn(3, 4)),
        nn.Parameter(torch.randn(4, 3).t()),
        nn.Parameter(torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(3).bfloat16()),
        nn.Parameter(torch.randn(2, dtype=torch.complex64)),
        nn.Parameter(torch.zeros(0, 3)),
        nn.Parameter(torch.zeros(2, device="meta")),
    ],
    ids=["rows", "columns", "channels last", "bf16", "complex", "empty", "meta"],
)
def test_a_buffer_is_like_its_parameter_and_handed_out_again(parameter):
    pool = ScratchPool()
    first = pool.like(parameter)
    assert (first.shape, first.stride(), first.dtype, first.device) == (
        parameter.shape, parameter.stride(), parameter.dtype, parameter.device,
    )  # fmt: skip
    assert not first.requires_grad and pool.like(parameter) is first
    assert first.untyped_storage()._cdata != parameter.untyped_storage()._cdata


def test_a_buffer_is_made_again_when_its_parameter_has_changed():
    parameter, pool = nn.Parameter(torch.randn(3, 4)), ScratchPool()
    buffers = [pool.like(parameter)]
    for data in (torch.randn(4, 4), torch.randn(4, 4).t(), torch.randn(4, 4).double().t()):
        parameter.data = data
        buffers.append(pool.like(parameter))
        assert (buffers[-1].shape, buffers[-1].stride(), buffers[-1].dtype) == (data.shape, data.stride(), data.dtype)
    assert len({id(buffer) for buffer in buffers}) == 4


def test_parameters_that_share_memory_have_a_buffer_each():
    memory, pool = torch.randn(12), ScratchPool()
    first, second = nn.Parameter(memory.view(3, 4)), nn.Parameter(memory.view(3, 4))
    assert pool.like(first).data_ptr() != pool.like(second).data_ptr()


def test_memory_goes_with_its_parameter():
    pool, kept = ScratchPool(), nn.Parameter(torch.randn(3))
    pool.like(kept)
    for size in range(20):
        pool.like(nn.Parameter(torch.randn(size)))
    gc.collect()
    assert list(pool._buffers) == [id(kept)]


def test_a_parameter_of_the_same_id_does_not_get_the_old_buffer():
    pool, parameter, other = ScratchPool(), nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    old = pool.like(other)
    pool._buffers[id(parameter)] = pool._buffers[id(other)]  # as if the other one had been there before
    assert pool.like(parameter) is not old and pool.like(parameter).shape == (3,)


def test_copies_and_pickles_are_empty():
    pool, parameter = ScratchPool(), nn.Parameter(torch.randn(3))
    buffer = pool.like(parameter)
    for other in (copy.deepcopy(pool), copy.copy(pool), pickle.loads(pickle.dumps(pool))):
        assert type(other) is ScratchPool and not other._buffers
        assert other.like(parameter) is not buffer
