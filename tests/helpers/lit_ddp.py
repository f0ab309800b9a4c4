"""A process of a Lightning run over two: started by torchrun, it fits every scenario and saves what it ends with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import samopt
from samopt.integrations.lightning import SharpnessAwareTraining, SharpnessCallback, is_second_pass
from tests.helpers import lit

RANKS = 2
Batch = Sequence[Tensor]
MEASURES: dict[str, dict[str, Any]] = {"worst_case": {"rho": 0.1, "steps": 2}, "per_layer": {"rho": 0.1, "steps": 1}}
EXAMPLES = 8

SCENARIOS: dict[str, dict[str, Any]] = {
    "per rank": {"options": {}},
    "synced": {"options": {"sync_perturbation": True}},
    "per rank, accumulating": {"options": {}, "accumulate": 3},
    "synced, accumulating": {"options": {"sync_perturbation": True}, "accumulate": 3},
    "asam, bucket views": {"variant": "asam", "options": {}, "strategy": {"gradient_as_bucket_view": True}},
    "static graph": {"options": {"sync_perturbation": True}, "strategy": {"static_graph": True}},
    "static graph, per rank": {"options": {}, "strategy": {"static_graph": True}},
    "unused parameters": {"options": {}, "strategy": {"find_unused_parameters": True}},
    "no radius": {"options": {"rho": 0.0}, "accumulate": 2},
    "infinite on one rank": {"options": {}, "trouble": "infinite"},
    "zero on one rank": {"options": {}, "trouble": "zero"},
    "sharded": {"options": {}, "sharded": True},
    "sharded, accumulating": {"variant": "asam", "options": {}, "sharded": True, "accumulate": 3},
    "monitored": {"options": {}, "monitored": True},
    "tram": {"variant": "tram", "options": {"scale": 20.0}},
    "manual": {"options": {"sync_perturbation": True}, "manual": "perturbed"},
    "manual, with a closure": {"options": {"sync_perturbation": True}, "manual": "closure"},
    "manual, unused parameters": {
        "options": {"sync_perturbation": True},
        "manual": "perturbed",
        "strategy": {"find_unused_parameters": True},
    },
}


class Module(pl.LightningModule):
    """Dropout, and trouble in the first pass of the second step on rank 1 for those who want it."""

    def __init__(self, trouble: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))
        self.trouble = trouble

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed(self.global_rank, batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = loss_of(self, batch)
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        if self.trouble and self.global_rank == 1 and self.global_step == 1 and not is_second_pass(self.trainer):
            return loss * (torch.inf if self.trouble == "infinite" else 0.0)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Manual(Module):
    """The same with manual optimization: DDP runs the training step, with both passes in it, as its forward."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.form = form

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if self.form == "perturbed":
            optimizer.zero_grad()
            self.backward_of(batch)
            with optimizer.perturbed():
                self.backward_of(batch)
            optimizer.step()
            return

        def closure() -> Tensor:
            optimizer.zero_grad()
            return self.backward_of(batch)

        optimizer.step(closure)

    def backward_of(self, batch: Batch) -> Tensor:
        loss = loss_of(self, batch)
        self.manual_backward(loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return samopt.SAM(super().configure_optimizers(), model=self)


class Sharded(Module):
    """The same, with its layers sharded over the processes by FSDP2."""

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[3], self.net):
            if not isinstance(layer, FSDPModule):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def seed(rank: int, batch_idx: int) -> None:
    """Give every batch of every rank a random stream of its own."""
    torch.manual_seed(100 * rank + batch_idx)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches_of(rank: int) -> list[Batch]:
    """Five batches of each rank; the last window of three is partial."""
    return list(lit.loader(40))[rank::RANKS]


class Exchanges(Callback):
    """Counts the exchanges of gradients in each optimizer step."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.now = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def average(state, bucket):  # torch wants these annotated with its own classes, or not at all
            self.now += 1
            exchanged = torch.distributed.all_reduce(bucket.buffer().div_(RANKS), async_op=True).get_future()
            return exchanged.then(lambda future: future.value()[0])

        trainer.strategy.model.register_comm_hook(None, average)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.counts) < trainer.global_step:
            self.counts.append(self.now)
            self.now = 0


def whole(value: Tensor) -> Tensor:
    """Return a tensor, gathered if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def main(folder: Path) -> None:
    """Fit every scenario."""
    for name, scenario in SCENARIOS.items():
        module, exchanges = Module(scenario.get("trouble", "")), Exchanges()
        callback = SharpnessAwareTraining(scenario.get("variant", "sam"), **scenario["options"])
        strategy: Any = DDPStrategy(process_group_backend="gloo", **scenario.get("strategy", {}))
        if scenario.get("sharded"):
            module = Sharded()
            exchanges = Callback()
            strategy = ModelParallelStrategy(RANKS, 1, process_group_backend="gloo")
        if scenario.get("manual"):
            module = Manual(scenario["manual"])
        monitor = SharpnessCallback(MEASURES, every=5, examples=EXAMPLES, max_fraction=None)
        trainer = lit.trainer(
            folder,
            [
                *([] if scenario.get("manual") else [callback]),
                exchanges,
                *([monitor] if scenario.get("monitored") else []),
            ],
            devices=RANKS,
            strategy=strategy,
            max_epochs=1,
            accumulate_grad_batches=scenario.get("accumulate", 1),
            use_distributed_sampler=False,
        )
        trainer.fit(module, DataLoader(batches_of(trainer.global_rank), batch_size=None))
        result = {
            "weights": {name: whole(value) for name, value in module.net.state_dict().items()},
            "exchanges": getattr(exchanges, "counts", []),
            "logged": {key: float(value) for key, value in trainer.callback_metrics.items()},
            "history": monitor.history,
        }
        torch.save(result, folder / f"{name}.{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
