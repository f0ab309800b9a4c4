"""State that a model's forward keeps: in every framework the second pass leaves that of the first, in fp64 by hand."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

import samopt
from samopt.integrations.accelerate import SharpnessAwareBackward
from samopt.integrations.transformers import SAMTrainer, SAMTrainingArguments

pl = pytest.importorskip("pytorch_lightning")
pytestmark = [pytest.mark.hf, pytest.mark.lightning]

RHO, LR, BATCH = 0.3, 0.1, 4


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate shares its state between instances."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Keeping(nn.Module):
    """Two layers, between which a subclass keeps state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6, dtype=torch.float64)
        self.last = nn.Linear(6, 3, dtype=torch.float64)

    def keep(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.keep(torch.tanh(self.first(x))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Codebook(Keeping):
    """An EMA codebook that is written through ``.data``, which no version counter notices."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(7, 6, dtype=torch.float64), requires_grad=False)

    def keep(self, hidden):
        nearest = torch.cdist(hidden.detach(), self.codes).argmin(1)
        self.codes.data.mul_(0.9).index_add_(0, nearest, 0.1 * hidden.detach())
        return hidden + 0.5 * self.codes[nearest]


class LargeCodebook(Codebook):
    """Too large to be copied unless it has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(2000, 6, dtype=torch.float64), requires_grad=False)


class HiddenState(Keeping):
    """A recurrent state between batches."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(6, dtype=torch.float64)

    def keep(self, hidden):
        out = hidden + self.state
        self.state = 0.5 * out.detach().mean(0)
        return out


class Appending(Keeping):
    """A list in a dict, whose length and values matter."""

    def __init__(self) -> None:
        super().__init__()
        self.log = {"means": []}

    def keep(self, hidden):
        self.log["means"].append(float(hidden.detach().mean()))
        return hidden * (1 + 0.1 * len(self.log["means"])) + sum(self.log["means"])


class Counting(Keeping):
    """A warm-up that the forward counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def keep(self, hidden):
        self.calls += 1
        return hidden * min(1.0, 0.2 * self.calls)


class MomentumEncoder(Keeping):
    """A target network that follows in every training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.first).requires_grad_(False)

    def keep(self, hidden):
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.first.parameters(), strict=True):
                slow.lerp_(fast, 0.3)
        return hidden + self.target.weight.sum(1)


class StatisticsAsParameters(Keeping):
    """Running statistics in parameters without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(6, dtype=torch.float64), requires_grad=False)
        self.count = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def keep(self, hidden):
        self.count += 1
        self.mean += (hidden.detach().mean(0) - self.mean) / self.count
        return hidden - self.mean


class ReplacedBuffer(Keeping):
    """A buffer that every forward replaces, and whose size changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(0, 6, dtype=torch.float64))

    def keep(self, hidden):
        self.bank = torch.cat([self.bank, hidden.detach()])[-10:]
        return hidden - self.bank.mean(0)


class OwnGenerators(Keeping):
    """Noise from generators of its own, beside the global streams."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_generator = torch.Generator().manual_seed(1)
        self.python_generator = random.Random(2)
        self.numpy_generators = [np.random.default_rng(3)]

    def keep(self, hidden):
        noise = torch.randn(6, dtype=torch.float64, generator=self.torch_generator)
        return hidden * self.python_generator.random() + noise * self.numpy_generators[0].random()


class AnotherOwner(Keeping):
    """A parameter that another optimizer trains: its gradient is the first pass's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, dtype=torch.float64))
        self.found: list[Tensor] = []

    def keep(self, hidden):
        return hidden * self.scale


KINDS = [
    Codebook,
    LargeCodebook,
    HiddenState,
    Appending,
    Counting,
    MomentumEncoder,
    StatisticsAsParameters,
    ReplacedBuffer,
    OwnGenerators,
    AnotherOwner,
]


class NotingSGD(torch.optim.SGD):
    """Notes the gradient of the parameter that another optimizer would step with it."""

    def __init__(self, model: nn.Module, **options) -> None:
        trained = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith("scale")]
        super().__init__(trained, lr=LR)
        self.model = model

    def step(self, closure=None):
        with torch.enable_grad():
            result = None if closure is None else closure()
        if hasattr(self.model, "scale"):
            self.model.found.append(self.model.scale.grad.clone())
        super().step()
        return result


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(5, dtype=torch.float64, generator=generator),
            "labels": torch.randint(3, (), generator=generator),
        }
        for _ in range(6 * BATCH)
    ]


def batches() -> list[dict[str, Tensor]]:
    data = rows()
    return [
        {key: torch.stack([row[key] for row in data[start : start + BATCH]]) for key in data[0]}
        for start in range(0, len(data), BATCH)
    ]


def plain_attributes(model: nn.Module) -> dict[str, object]:
    """A copy of what ``vars`` holds besides torch's own."""
    copied = {}
    for name, value in vars(model).items():
        if not name.startswith("_") and name != "training":
            copied[name] = value.clone_state() if isinstance(value, torch.Generator) else copy.deepcopy(value)
    return copied


def by_hand(model: nn.Module, accumulate: int) -> None:
    """SAM in plain torch: both passes begin with the same state."""
    trained = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith("scale")]
    data = batches()
    model.train()

    def one_pass(window):
        for batch in window:
            (model(**batch)["loss"] / accumulate).backward()

    for first in range(0, len(data), accumulate):
        window = data[first : first + accumulate]
        model.zero_grad()
        before = plain_attributes(model)
        buffers = [(module._buffers, module._buffers.copy()) for module in model.modules()]
        kept = [t for t in (*model.parameters(), *model.buffers()) if not any(t is p for p in trained)]
        values = [t.detach().clone() for t in kept]
        one_pass(window)
        after = plain_attributes(model)
        tensors = {key: value.clone() for key, value in model.state_dict().items()}
        others = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        norm = torch.sqrt(sum((p.grad**2).sum() for p in trained))
        with torch.no_grad():
            for p in trained:
                p += RHO * p.grad / norm
        model.zero_grad()
        vars(model).update(before)
        for registry, content in buffers:
            registry.update(content)
        for tensor, value in zip(kept, values, strict=True):
            tensor.data.copy_(value)
        one_pass(window)
        vars(model).update(after)
        for key, value in tensors.items():
            owner = model.get_submodule(key.rpartition(".")[0])
            name = key.rpartition(".")[2]
            if name in owner._buffers:
                owner._buffers[name] = value
            else:
                owner._parameters[name].data.copy_(value)
        if hasattr(model, "scale"):
            model.scale.grad = others[model.scale]
            model.found.append(model.scale.grad.clone())
        with torch.no_grad():
            for p in trained:
                p -= LR * p.grad


def with_trainer(model, accumulate, folder) -> None:
    arguments = SAMTrainingArguments(
        str(folder),
        sam="sam",
        sam_rho=RHO,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    SAMTrainer(
        model,
        args=arguments,
        train_dataset=rows(),
        data_collator=lambda chunk: {key: torch.stack([row[key] for row in chunk]) for key in chunk[0]},
        optimizers=(NotingSGD(model), None),
    ).train()


def with_accelerate(model, accumulate, folder) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    optimizer = samopt.SAM(NotingSGD(model), rho=RHO, model=model)
    model, optimizer = accelerator.prepare(model, optimizer)
    backward = SharpnessAwareBackward(accelerator, model, optimizer)
    model.train()
    for batch in batches():
        with accelerator.accumulate(model):
            backward(lambda batch: model(**batch)["loss"], batch)
            optimizer.step()
            if accelerator.sync_gradients:
                model.zero_grad()
            optimizer.zero_grad()


def with_lightning(model, accumulate, folder) -> None:
    from samopt.integrations.lightning import SharpnessAwareTraining

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model

        def training_step(self, batch, batch_idx):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return NotingSGD(model)

        def on_before_zero_grad(self, optimizer):
            model.zero_grad()

    pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        accumulate_grad_batches=accumulate,
        callbacks=[SharpnessAwareTraining("sam", rho=RHO)],
    ).fit(Module(), torch.utils.data.DataLoader(rows(), batch_size=BATCH))


def with_the_engine(model, accumulate, folder) -> None:
    optimizer = samopt.SAM(NotingSGD(model), rho=RHO, model=model)
    model.train()
    for index, batch in enumerate(batches()):
        if index % accumulate == 0:
            optimizer.zero_grad()
            model.zero_grad()
        last = (index + 1) % accumulate == 0
        optimizer.backward(lambda batch=batch: model(**batch)["loss"] / accumulate, last=last)
        if last:
            optimizer.step()


FRAMEWORKS = {
    "Trainer": with_trainer,
    "accelerate": with_accelerate,
    "Lightning": with_lightning,
    "backward()": with_the_engine,
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_second_pass_leaves_what_the_first_left(kind, framework, accumulate, tmp_path) -> None:
    model, expected = kind(), kind()
    FRAMEWORKS[framework](model, accumulate, tmp_path)
    by_hand(expected, accumulate)
    for (name, ours), theirs in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert_same_attributes(plain_attributes(model), plain_attributes(expected))


def assert_same_attributes(ours: object, theirs: object) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same_attributes(value, theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_attributes(mine, other)
    elif isinstance(ours, torch.Generator):
        assert torch.equal(ours.get_state(), theirs.get_state())
    elif isinstance(ours, random.Random):
        assert ours.getstate() == theirs.getstate()
    elif isinstance(ours, np.random.Generator):
        assert ours.bit_generator.state == theirs.bit_generator.state
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_comparison_tells_sam_from_the_base() -> None:
    models = [Counting(), Counting()]
    by_hand(models[0], 1)
    for batch in batches():
        models[1].zero_grad()
        models[1](**batch)["loss"].backward()
        NotingSGD(models[1]).step()
    assert float((models[0].first.weight - models[1].first.weight).detach().abs().max()) > 1e-3
