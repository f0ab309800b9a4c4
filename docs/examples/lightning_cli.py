"""LightningCLI with SAM: the model's file does not mention samopt, the configuration does.

python docs/examples/lightning_cli.py fit --config docs/examples/lightning_cli.yaml
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(pl.LightningDataModule):
    """Scikit-learn's digits."""

    def setup(self, stage):
        """Load and split them."""
        digits = load_digits()
        images = torch.tensor(digits.data / 16, dtype=torch.float32)
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.parts = [TensorDataset(images[part], labels[part]) for part in (order[:1400], order[1400:])]

    def train_dataloader(self):
        """Return shuffled batches of 64."""
        return DataLoader(self.parts[0], batch_size=64, shuffle=True)

    def val_dataloader(self):
        """Return the rest."""
        return DataLoader(self.parts[1], batch_size=397)


class Classifier(pl.LightningModule):
    """A perceptron."""

    def __init__(self, width: int = 128, lr: float = 3e-3):
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        """Return the loss."""
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        """Log the accuracy."""
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).double().mean(), prog_bar=True)

    def configure_optimizers(self):
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main():
    """Run the command line, and print what the run ended with."""
    cli = LightningCLI(Classifier, Digits, seed_everything_default=0)
    metrics = cli.trainer.callback_metrics
    print(f"test accuracy {metrics['accuracy']:.3f}, sharpness {metrics['sharpness/sam']:.4f}")


if __name__ == "__main__":
    main()
