"""Beside Lightning's own callbacks and Trainer options, a run is the one whose module runs both passes by hand."""

from __future__ import annotations

import pytest
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)

from samopt.integrations.lightning import SharpnessAwareTraining
from tests import lit

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
