"""Free parameters, and losses of them that are written out by hand."""

import torch
from torch import nn

__all__ = ["Weights", "linear", "normal", "quadratic", "symmetric"]


class Weights(nn.Module):
    """Free parameters in fp64."""

    def __init__(self, *values):
        super().__init__()
        for index, value in enumerate(values):
            self.register_parameter(f"w{index}", nn.Parameter(torch.as_tensor(value, dtype=torch.float64)))

    def vector(self):
        """Return all of them as one vector."""
        return torch.cat([parameter.flatten() for parameter in self.parameters()])


def normal(*shape, seed=0):
    """Return normal random numbers in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(size, seed=0):
    """Return a random symmetric matrix, with eigenvalues of both signs."""
    matrix = normal(size, size, seed=seed)
    return (matrix + matrix.T) / 2


def linear(slope):
    """Return the loss ``slope . w``."""
    return lambda model, batch: model.vector() @ slope


def quadratic(matrix, slope=None):
    """Return the loss ``w . matrix w / 2 + slope . w``."""
    slope = matrix.new_zeros(len(matrix)) if slope is None else slope
    return lambda model, batch: 0.5 * model.vector() @ matrix @ model.vector() + slope @ model.vector()
