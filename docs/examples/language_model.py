"""A small GPT on characters, in the manner of nanoGPT, with ASAM around AdamW.

python docs/examples/language_model.py --steps 300 --text my_book.txt

Without ``--text`` it learns the reference of the Python language, which every interpreter carries.
"""

import argparse
import math
import pathlib
from pydoc_data.topics import topics

import torch
from torch import nn

import samopt

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 48, 64, 4, 2, 16


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and beside a skip connection."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x):
        """Return the block's output, of the shape of ``x``: (batch, time, width)."""
        batch, time, _ = x.shape
        heads = self.qkv(self.norms[0](x)).view(batch, time, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """Characters in, logits of the next character out."""

    def __init__(self, characters):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.tokens.weight  # tied: it is perturbed once

    def forward(self, x):
        """Return logits (batch, time, characters) for indices (batch, time)."""
        x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def main():
    """Train, and print the validation loss in nats a character."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--variant", default="asam", choices=samopt.available())
    parser.add_argument("--rho", type=float, default=0.1)
    options = parser.parse_args()

    torch.manual_seed(0)
    text = options.text.read_text(encoding="utf-8") if options.text else "\n".join(topics.values())
    alphabet = sorted(set(text))
    data = torch.tensor([alphabet.index(character) for character in text])
    split = int(0.9 * len(data))

    model = GPT(len(alphabet))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    base = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99))
    optimizer = samopt.create(options.variant, base, model=model, rho=options.rho)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps, cycle_momentum=False)

    def loss_of(starts):
        windows = data[starts[:, None] + torch.arange(CONTEXT + 1)]
        return nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    for step in range(options.steps):
        starts = torch.randint(split - CONTEXT - 1, (BATCH,))
        optimizer.zero_grad()
        loss = optimizer.backward(lambda starts=starts: loss_of(starts))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    model.eval()
    with torch.no_grad():
        validation = loss_of(torch.arange(split, len(data) - CONTEXT - 1, 10 * CONTEXT)).item()
    print(f"validation loss {validation:.3f} nats a character; uniform {math.log(len(alphabet)):.3f}")


if __name__ == "__main__":
    main()
