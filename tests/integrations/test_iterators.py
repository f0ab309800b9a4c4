"""Iterators that a training step reads: the second pass cannot take a batch back, so a warning names them."""

from __future__ import annotations

import itertools
import tempfile
import types
import warnings

import pytest
import torch
from torch import nn

from samopt.integrations.transformers import SAMTrainer, SAMTrainingArguments
from tests.helpers import hf

pl = pytest.importorskip("pytorch_lightning")
pytestmark = [pytest.mark.hf, pytest.mark.lightning]


def batches(seed, count=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


class Module(pl.LightningModule):
    """A penalty on outputs for unlabelled data."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 1, dtype=torch.float64)

    def on_train_start(self):
        self.unlabelled = iter(batches(1))

    def on_train_batch_start(self, batch, batch_idx):
        self.more = next(self.unlabelled)

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - 1).square().mean() + self.net(self.more).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, **options):
    from samopt.integrations.lightning import SharpnessAwareTraining

    loader = torch.utils.data.DataLoader(batches(2), batch_size=None)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=3, callbacks=[SharpnessAwareTraining("sam", rho=0.3)], **quiet, **options
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(module, loader)
    return [str(each.message) for each in told if "iterator" in str(each.message)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_a_hook_takes_before_the_step_is_that_of_both_passes(accumulate):
    module, expected = Module(), Module().net
    (message,) = fit(module, accumulate_grad_batches=accumulate)
    assert "Module holds an iterator (list_iterator) in its attribute unlabelled" in message
    assert "on_train_batch_start" in message

    parameters = list(expected.parameters())
    pairs = list(zip(batches(2), batches(1), strict=True))

    def gradients(window):
        expected.zero_grad()
        for x, more in window:
            loss = (expected(x) - 1).square().mean() + expected(more).square().mean()
            (loss / accumulate).backward()
        return [p.grad.clone() for p in parameters]

    for step in range(3):
        window = pairs[step * accumulate : (step + 1) * accumulate]
        first = gradients(window)
        norm = torch.sqrt(sum((g**2).sum() for g in first))
        start = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p += 0.3 * g / norm
        second = gradients(window)
        with torch.no_grad():
            for p, w, g in zip(parameters, start, second, strict=True):
                p.copy_(w - 0.1 * g)
    for ours, theirs in zip(module.net.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


HOLDERS = {
    "a generator": (lambda: (x for x in batches(1)), "in its attribute held"),
    "a loader's iterator": (lambda: iter(torch.utils.data.DataLoader(batches(1))), "in its attribute held"),
    "in a dict": (lambda: {"more": itertools.cycle(batches(1))}, "in an object or a module"),
    "in an object": (lambda: types.SimpleNamespace(more=iter([])), "in an object or a module"),
    "in a method's closure": (lambda: (lambda source: lambda: next(source))(iter([])), "in an object or a module"),
    "a list": (lambda: [1, 2], None),
    "a range": (lambda: range(3), None),
    "a file": (lambda: tempfile.TemporaryFile("w+"), None),
}


@pytest.mark.parametrize(
    ("framework", "holder"),
    [
        *(("Lightning", holder) for holder in HOLDERS),
        ("Trainer", "in an object"),
        *(pytest.param("Trainer", holder, marks=pytest.mark.slow) for holder in HOLDERS if holder != "in an object"),
    ],
)
def test_an_iterator_is_named_once_wherever_it_is_held(framework, holder, tmp_path):
    make, place = HOLDERS[holder]
    if framework == "Lightning":
        module = Module()
        module.on_train_start = lambda: None
        module.on_train_batch_start = lambda batch, batch_idx: None
        module.more, module.held = batches(1)[0], make()
        told = fit(module)
    else:

        class Holding(SAMTrainer):
            held = None

        trainer = hf.make_trainer(tmp_path, hf.norms(), hf.points(), kind=Holding, arguments=SAMTrainingArguments)
        trainer.held = make()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer.train()
        told = [str(each.message) for each in found if "iterator" in str(each.message)]
    assert len(told) == (place is not None)
    assert place is None or place in told[0]
