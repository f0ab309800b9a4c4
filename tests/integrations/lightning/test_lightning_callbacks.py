"""Beside Lightning's own callbacks and Trainer options, a run is the one whose module runs both passes by hand."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.tuner import Tuner

from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import lit

pytestmark = pytest.mark.lightning


OPTIONS = {
    "plain": {},
    "schedule": {"scheduler": "step"},
    "early stopping": {
        "callbacks": lambda: [EarlyStopping("loss_epoch", mode="max", patience=1)],
        "max_epochs": 5,
    },
    "stochastic weight averaging": {
        "callbacks": lambda: [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)],
        "max_epochs": 3,
    },
    "weight averaging": {"callbacks": lambda: [WeightAveraging()], "validate": True},
    "overfit_batches": {"overfit_batches": 3},
    "max_steps": {"max_steps": 5, "max_epochs": -1},
    "limit_train_batches": {"limit_train_batches": 0.5},
    "validation inside an epoch": {"val_check_interval": 2, "validate": True},
    "validation by time and steps": {"check_val_every_n_epoch": None, "val_check_interval": 5, "validate": True},
    "fast_dev_run": {"fast_dev_run": 2},
    "anomaly detection": {"detect_anomaly": True},
    "no gradient norms": {"num_sanity_val_steps": 2, "validate": True},
    "barebones": {"barebones": True},
}


def run(folder, module, callback, callbacks=list, validate=False, **options):
    if options.get("barebones"):
        for name in ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"):
            options[name] = False
        options["log_every_n_steps"] = 0
    validation = lit.loader(8) if validate else None
    return lit.fit(folder, module, callback, validation=validation, callbacks=callbacks(), **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_equals_the_one_by_hand(name, tmp_path):
    options = dict(OPTIONS[name])
    scheduler = options.pop("scheduler", None)
    ours = run(tmp_path, lit.Module(scheduler=scheduler), SharpnessAwareTraining(), **options)
    theirs = run(tmp_path, lit.ByHand(scheduler=scheduler), Callback(), **options)
    lit.assert_same_run(ours, theirs)


def test_gradient_accumulation_scheduler(tmp_path):
    module, expected = lit.Module(), lit.Module()
    lit.fit(tmp_path, module, callbacks=[GradientAccumulationScheduler({0: 1, 1: 3, 2: 2})], max_epochs=3)
    lit.train_by_hand(expected, list(lit.loader()), accumulate={0: 1, 1: 3, 2: 2}, epochs=3)
    lit.assert_same_state(module.net, expected.net)


@pytest.mark.parametrize("every", [1, 2])
def test_validation_inside_an_accumulation_window(every, tmp_path):
    """It finds the weights exact, and leaves the window's gradients and micro-batches as they are."""

    class Seen(Callback):
        def __init__(self):
            self.gradients = []

        def on_validation_start(self, trainer, pl_module):
            self.gradients.append(pl_module.net[0].weight.grad is not None)
            self.before = [p.detach().clone() for p in pl_module.parameters()]

        def on_validation_end(self, trainer, pl_module):
            assert all(torch.equal(p, b) for p, b in zip(pl_module.parameters(), self.before, strict=True))

    module, expected, seen = lit.Module(), lit.Module(), Seen()
    lit.fit(
        tmp_path,
        module,
        validation=lit.loader(8),
        callbacks=[seen],
        accumulate_grad_batches=3,
        val_check_interval=every,
        num_sanity_val_steps=0,
    )
    assert True in seen.gradients
    lit.train_by_hand(expected, list(lit.loader()), accumulate=3)
    lit.assert_same_state(module.net, expected.net)


def test_a_tuner_searches_without_a_second_pass(tmp_path):
    """As ``LearningRateFinder`` does: it takes the callbacks away for the search."""

    class Tunable(lit.Module):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    found = []
    for callback in (SharpnessAwareTraining(), Callback()):
        trainer = lit.trainer(tmp_path, [callback], max_epochs=1)
        finder = Tuner(trainer).lr_find(Tunable(), lit.loader(120), num_training=25, early_stop_threshold=None)
        assert trainer.callbacks == [callback]
        found.append(finder.results)
    assert found[0] == found[1]
