"""What the page on migrating says of other implementations is true of their code."""

import torch

import samopt
from tests.helpers.pages import REPOSITORY, read


class DavdaSAM:
    """The arithmetic of davda54/sam at commit cdcbdc1 with ``adaptive=True``, but for the 1e-12 in its norm."""

    def __init__(self, parameters, base, rho):
        self.parameters, self.base, self.rho = list(parameters), base, rho

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([(p.abs() * p.grad).norm() for p in self.parameters]).norm()
        self.saved = [p.clone() for p in self.parameters]
        for p in self.parameters:
            p.add_(p.pow(2) * p.grad * self.rho / norm)

    @torch.no_grad()
    def second_step(self):
        for p, saved in zip(self.parameters, self.saved, strict=True):
            p.copy_(saved)
        self.base.step()


def network():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    return layers.double()


def test_the_geometry_of_the_page_is_that_of_davda54():
    page = read(REPOSITORY / "docs" / "migrating.md")
    (source,) = [block.source for block in page if block.language == "python" and "AbsoluteValue" in block.source]
    names = {"torch": torch, "nn": torch.nn}
    exec(source, names)
    batches = [torch.randn(5, 6, dtype=torch.float64) for _ in range(4)]

    expected = network()
    theirs = DavdaSAM(expected.parameters(), torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9), rho=2.0)
    for x in batches:
        expected.zero_grad()
        expected(x).square().mean().backward()
        theirs.first_step()
        expected.zero_grad()
        expected(x).square().mean().backward()
        theirs.second_step()

    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    geometry = names["AbsoluteValue"]()
    ours = samopt.SharpnessAwareOptimizer(base, geometry=geometry, rho=2.0, eta=0.0, model=model)
    for x in batches:
        ours.zero_grad()
        ours.backward(lambda x=x: model(x).square().mean())
        ours.step()

    for weight, reference in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, reference, rtol=1e-12, atol=1e-14)
