"""A GAN whose critic trains in one pass along its momentum: the generator's loss still sees the exact critic.

python docs/examples/gan.py --steps 1500

It learns a ring of eight Gaussians in the plane and prints how many of them the samples reach.
"""

import argparse
import math

import torch
from torch import nn

import samopt

CENTRES = torch.tensor([[math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)] for i in range(8)]) * 2


def network(*sizes):
    """Return a perceptron with these layer widths."""
    layers = [layer for pair in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(*pair), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers[:-1])


def real(n):
    """Return ``n`` points of the ring."""
    return CENTRES[torch.randint(8, (n,))] + 0.05 * torch.randn(n, 2)


def main():
    """Train both networks, and print which share of the samples is near the ring and how many modes they reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rho", type=float, default=0.05)
    options = parser.parse_args()

    torch.manual_seed(0)
    generator, critic = network(8, 128, 128, 2), network(2, 128, 128, 1)
    for_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    base = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.99))
    for_critic = samopt.MomentumSAM(base, rho=options.rho, model=critic)

    for _ in range(options.steps):
        x = real(256)
        fake = generator(torch.randn(256, 8))
        for_critic.zero_grad()
        (nn.functional.softplus(-critic(x)) + nn.functional.softplus(critic(fake.detach()))).mean().backward()
        for_critic.step()

        for_generator.zero_grad()
        with for_critic.exact():
            nn.functional.softplus(-critic(fake)).mean().backward()
        for_generator.step()

    with torch.no_grad():
        distances = torch.cdist(generator(torch.randn(2000, 8)), CENTRES)
    near = distances.min(1).values < 0.3
    modes = distances.argmin(1)[near].unique().numel()
    print(f"near the ring {near.double().mean():.2f}, modes {modes} of 8")


if __name__ == "__main__":
    main()
