"""SAM in a Lightning run on two processes: one callback, and the module as it was.

python benchmarks/distributed/with_lightning.py --devices 2
"""

from __future__ import annotations

import argparse
import time

import pytorch_lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from samopt.integrations.lightning import SharpnessAwareTraining


class Classifier(pytorch_lightning.LightningModule):
    """A small network for the digits that ship with scikit-learn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Log the accuracy, averaged over processes."""
        accuracy = (self.network(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("test accuracy", accuracy, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the base optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main() -> None:
    """Train, and print the accuracy once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--synced", action="store_true", help="perturb along the averaged gradient")
    options = parser.parse_args()

    data = load_digits()
    pixels, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    trainer = pytorch_lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=options.devices,
        strategy="ddp",
        callbacks=[SharpnessAwareTraining("sam", rho=0.05, sync_perturbation=options.synced)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Classifier(),
        DataLoader(TensorDataset(pixels[:1280], labels[:1280]), batch_size=32, shuffle=True),
        DataLoader(TensorDataset(pixels[1280:], labels[1280:]), batch_size=517),
    )
    if trainer.is_global_zero:
        print(f"test accuracy {trainer.callback_metrics['test accuracy']:.3f}", flush=True)
    time.sleep(0.2)  # gloo's threads need Python to let go of what was sent last, and abort where it is gone


if __name__ == "__main__":
    main()
