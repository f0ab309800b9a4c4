"""A module and a trainer for the Lightning tests, and the loop written by hand that a run is compared with."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import samopt
from samopt._replay.forward_calls import RngState
from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import cases

Batch = Sequence[Tensor]
Base = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Momentum SGD."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(parameters, lr=1e-2)


def network() -> nn.Sequential:
    """``cases.norms``, seeded."""
    torch.manual_seed(0)
    return cases.norms()


def points(count: int = 26, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Vectors ``(6,)`` with a label each."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator).to(dtype)
    return TensorDataset(x, torch.randint(3, (count,), generator=generator))


def loader(count: int = 26, dtype: torch.dtype = torch.float32) -> DataLoader:
    """The points in order, four at a time; the last batch has two."""
    return DataLoader(points(count, dtype), batch_size=4)


def draw_noise(batch_idx: int, epoch: int) -> Tensor:
    """What the module's ``on_train_batch_start`` draws, at its own seed so that loops which load data differ little."""
    torch.manual_seed(1000 * epoch + batch_idx)
    return 0.1 * torch.randn(6)


class Shared:
    """The content of the test module, for the LightningModule of any package."""

    automatic = True

    def __init__(self, base: Base = sgd, scheduler: str | None = None) -> None:
        super().__init__()
        self.net = network()
        self.base = base
        self.scheduler = scheduler
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.losses: list[float] = []
        self.seen = torch.zeros(())
        self.steps_by_label: dict[str, list[int]] = {"any": []}
        self.calls = 0
        self.noise = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        noise = self.noise.to(x) + 0.1 * torch.rand(6).to(x)
        self.logits = self(x + noise)
        return nn.functional.cross_entropy(self.logits.float() if x.dtype != torch.float64 else self.logits, y)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.noise = draw_noise(batch_idx, self.current_epoch)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        loss = self.loss(batch)
        self.accuracy(self.logits, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("total", loss, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log_dict({"largest": loss}, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.losses.append(float(loss.detach()))
        self.seen += len(batch[1])
        self.steps_by_label["any"].append(batch_idx)
        self.calls += 1
        return {"loss": loss}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = self.base(self.parameters())
        if self.scheduler is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.scheduler}}


class Module(Shared, pl.LightningModule):
    """The test module for ``pytorch_lightning``."""


class ByHand(Module):
    """Both passes in ``backward``, without accumulation: what a run with the callback is to equal."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        self.batch, self.start = batch, RngState.capture()
        return super().training_step(batch, batch_idx)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        base = self.trainer.optimizers[0]
        present = [set(group) for group in base.param_groups]
        logits = self.logits
        with samopt.SAM(base, model=self, warn_on_stall=False).perturbed():
            self.start.restore()
            self.loss(self.batch).backward()
        self.logits = logits
        for group, keys in zip(base.param_groups, present, strict=True):
            for key in group.keys() - keys:
                del group[key]


class Manual:
    """Both passes in ``training_step``, as the documentation writes manual optimization; mixed into a test module."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return samopt.SAM(self.base(self.parameters()), rho=0.2, model=self)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        with optimizer.perturbed(loss) as second:
            second.loss = self.loss(batch)
            self.manual_backward(second.loss)
        optimizer.step()
        return loss


@dataclass
class History:
    """What the hand-written loop measured."""

    losses: list[float] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)


def train_by_hand(
    module: Any,
    batches: Sequence[Batch],
    *,
    sam: Callable[..., samopt.SharpnessAwareOptimizer] = samopt.SAM,
    accumulate: int | dict[int, int] = 1,
    epochs: int = 2,
    clip_norm: float = 0.0,
    clip_value: float = 0.0,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    max_steps: int = -1,
) -> History:
    """Both passes over each window, clipping, step and schedule, in plain torch around ``samopt``'s engine."""
    history = History()
    net: nn.Sequential = module.net
    base = module.base(net.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(base, 1, gamma=0.9 if module.scheduler else 1.0)
    optimizer = sam(base, model=net)
    steps = 0
    net.train()
    parts = 1
    for epoch in range(epochs):
        parts = accumulate.get(epoch, parts) if isinstance(accumulate, dict) else accumulate
        for first in range(0, len(batches), parts):
            window = range(first, min(first + parts, len(batches)))
            starts: list[RngState] = []
            noises: list[Tensor] = []
            optimizer.zero_grad()

            def one_pass(second: bool) -> Tensor:
                total: Any = 0
                for place, index in enumerate(window):  # noqa: B023  # called in this iteration only
                    if second:
                        starts[place].restore()  # noqa: B023
                    else:
                        noises.append(draw_noise(index, epoch))  # noqa: B023
                        starts.append(RngState.capture())  # noqa: B023
                    module.noise = noises[place]  # noqa: B023
                    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                        loss = module.loss(batches[index])
                    if not second:
                        history.losses.append(float(loss.detach()))
                    loss = loss / parts  # noqa: B023
                    (loss if scaler is None else scaler.scale(loss)).backward()
                    total = total + loss.detach()
                return total

            with optimizer.perturbed(one_pass(False)) as again:
                again.loss = one_pass(True)
            history.sharpness.append(float(optimizer.last_step.sharpness))
            if scaler is not None:
                scaler.unscale_(optimizer)
            if clip_norm:
                nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
            if clip_value:
                nn.utils.clip_grad_value_(net.parameters(), clip_value)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            steps += 1
            if module.scheduler == "step":
                schedule.step()
            if steps == max_steps:
                return history
        if module.scheduler == "epoch":
            schedule.step()
    return history


def compute_in(module: Shared, dtype: torch.dtype) -> None:
    """Let a module trained by hand do as one under Lightning's true precision: its losses have this default dtype."""
    default = torch.get_default_dtype()

    class Typed(type(module)):
        def loss(self, batch: Batch) -> Tensor:
            torch.set_default_dtype(dtype)
            try:
                return super().loss(batch)
            finally:
                torch.set_default_dtype(default)

    module.net.to(dtype)
    module.__class__ = Typed


def run_cli(folder: Path, package: str, callbacks: str) -> Any:
    """Fit the test module for an epoch by the package's LightningCLI, and return the CLI.

    Args:
        folder: For the configuration.
        package: "pytorch_lightning" or "lightning.pytorch".
        callbacks: The trainer's, in YAML, indented by two.
    """
    cli = importlib.import_module(f"{package}.cli")

    class WithData(Shared, importlib.import_module(package).LightningModule):
        def __init__(self) -> None:  # the CLI makes options of the arguments
            super().__init__()

        def train_dataloader(self) -> DataLoader:
            return loader()

    path = folder / "run.yaml"
    path.write_text(_CLI_TRAINER + callbacks, encoding="utf-8")
    return cli.LightningCLI(
        WithData, args=["fit", "--config", str(path)], save_config_callback=None, seed_everything_default=None
    )


_CLI_TRAINER = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""


def trainer(folder: Path, callbacks: Sequence[Any] = (), *, package: Any = pl, **options: Any) -> Any:
    """A quiet trainer on the CPU, for two epochs unless told otherwise."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
        "callbacks": list(callbacks),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return package.Trainer(**(settings | options))


def fit(
    folder: Path,
    module: Any,
    callback: Any = None,
    *,
    data: Any = None,
    validation: Any = None,
    callbacks: Sequence[Any] = (),
    ckpt_path: Any = None,
    **options: Any,
) -> Any:
    """Train a module with the callback, SAM's unless told otherwise; returns the trainer."""
    callback = SharpnessAwareTraining() if callback is None else callback
    made = trainer(folder, [callback, *callbacks], **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|No `test_step|validation_step).*")
        made.fit(module, loader() if data is None else data, validation, ckpt_path=ckpt_path, weights_only=False)
    return made


def fit_by_hand(folder: Path, module: Any, **options: Any) -> Any:
    """Train a module without the callback; returns the trainer."""
    return fit(folder, module, pl.Callback(), **options)


def assert_same_run(trainer: Any, expected: Any) -> None:
    """Two trainers that have fitted their modules agree in all that they know."""
    assert_same_state(trainer.lightning_module, expected.lightning_module)
    assert trainer.global_step == expected.global_step
    assert trainer.current_epoch == expected.current_epoch
    for logged in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        ours, theirs = getattr(trainer, logged), getattr(expected, logged)
        assert {name: float(value) for name, value in ours.items()} == {n: float(v) for n, v in theirs.items()}
    for name in ("losses", "seen", "steps_by_label", "calls"):
        assert getattr(trainer.lightning_module, name) == getattr(expected.lightning_module, name), name
    for ours, theirs in zip(trainer.optimizers, expected.optimizers, strict=True):
        cases.assert_same(ours.state_dict(), theirs.state_dict())


def assert_same_state(module: nn.Module, expected: nn.Module) -> None:
    """Weights and buffers are the same bits."""
    for (name, ours), theirs in zip(module.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
