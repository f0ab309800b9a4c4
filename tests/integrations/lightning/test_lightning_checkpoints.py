"""A run that is saved and resumed is the uninterrupted one, and a checkpoint never holds perturbed weights."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.callbacks import Callback, LearningRateFinder, ModelCheckpoint

import samopt
from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import cases, lit

pytestmark = pytest.mark.lightning


class Resumable:
    """The batches in order; a resumed epoch goes on where the saved one was."""

    def __init__(self, precision=torch.float32):
        self.batches = [(x.to(precision), y) for x, y in lit.loader()]
        self.place = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def saving(folder, **options):
    return ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **options)


VARIANTS = {
    "asam": {},
    "tram": {"trust_region": "ema", "scale": 20.0},
    "sam": {},
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_at_the_end_of_an_epoch(variant, precision, tmp_path):
    """bf16 weights are rounded stochastically, and go on with the next random numbers."""

    def run(epochs, **more):
        module = lit.Module(lit.adamw, scheduler="step")
        callback = SharpnessAwareTraining(variant, **VARIANTS[variant])
        return lit.fit(
            tmp_path,
            module,
            callback,
            callbacks=[saving(tmp_path / str(epochs))],
            accumulate_grad_batches=2,
            max_epochs=epochs,
            enable_checkpointing=True,
            precision=precision,
            **more,
        )

    whole = run(3)
    run(2)
    resumed = run(3, ckpt_path=tmp_path / "2" / "epoch=1-step=8.ckpt")
    lit.assert_same_state(resumed.lightning_module, whole.lightning_module)
    cases.assert_same(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resume_inside_an_epoch(step, tmp_path):
    """Seven batches in windows of two: a checkpoint after a window, resumed, goes on with the next one."""

    def run(steps, **more):
        return lit.fit(
            tmp_path,
            lit.Module(),
            data=Resumable(),
            callbacks=[saving(tmp_path / str(steps), every_n_train_steps=step)],
            accumulate_grad_batches=2,
            max_steps=steps,
            max_epochs=-1,
            enable_checkpointing=True,
            **more,
        )

    whole = run(7)
    run(step)
    resumed = run(7, ckpt_path=tmp_path / str(step) / f"epoch=0-step={step}.ckpt")
    lit.assert_same_state(resumed.lightning_module.net, whole.lightning_module.net)


def test_a_checkpoint_holds_the_weights_and_the_bases_state(tmp_path):
    """It is the plain loop's, and a run without the callback goes on from it."""
    module, expected = lit.Module(lit.adamw), lit.Module(lit.adamw)
    lit.fit(
        tmp_path,
        module,
        callbacks=[saving(tmp_path, every_n_train_steps=5)],
        max_steps=7,
        max_epochs=-1,
        enable_checkpointing=True,
    )
    lit.train_by_hand(expected, list(lit.loader()), max_steps=5)
    saved = torch.load(tmp_path / "epoch=0-step=5.ckpt", weights_only=False)
    for name, value in expected.net.state_dict().items():
        assert torch.equal(saved["state_dict"][f"net.{name}"], value)
    stock = lit.adamw(expected.net.parameters())
    stock.load_state_dict(saved["optimizer_states"][0])
    assert stock.state_dict()["state"][0]["step"] == 5
    plain = lit.Module(lit.adamw)
    trainer = lit.fit(
        tmp_path, plain, Callback(), ckpt_path=tmp_path / "epoch=0-step=5.ckpt", max_steps=6, max_epochs=-1
    )
    assert trainer.global_step == 6


def test_a_plain_runs_checkpoint_goes_on_with_the_callback(tmp_path):
    """Options are the new run's, also where the saved groups have others."""
    for callback in (Callback(), SharpnessAwareTraining("sam", rho=0.3)):
        lit.fit(
            tmp_path,
            lit.Module(),
            callback,
            callbacks=[saving(tmp_path)],
            max_epochs=1,
            enable_checkpointing=True,
        )
        resumed = SharpnessAwareTraining("sam", rho=0.1)
        lit.fit(tmp_path, lit.Module(), resumed, ckpt_path=tmp_path / "epoch=0-step=7.ckpt")
        assert float(resumed.last_step.radius) == pytest.approx(0.1)
        (tmp_path / "epoch=0-step=7.ckpt").unlink()


def test_a_second_fit_starts_afresh(tmp_path):
    """The callback, the module and the optimizer may serve again, with another radius."""
    module, expected = lit.Module(), lit.Module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.base = lambda _: optimizer
    expected.base = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    for rho in (0.1, 0.4):
        lit.fit(tmp_path, module, SharpnessAwareTraining("sam", rho=rho), max_epochs=1)
        assert "rho" not in optimizer.param_groups[0]
        lit.train_by_hand(
            expected,
            list(lit.loader()),
            sam=lambda base, model, rho=rho: samopt.SAM(base, rho=rho, model=model),
            epochs=1,
        )
        lit.assert_same_state(module.net, expected.net)


def test_learning_rate_finder_searches_without_a_second_pass(tmp_path):
    """It takes all other callbacks away, and puts them back."""

    class Tunable(lit.Module):
        def __init__(self):
            super().__init__()
            self.lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    def finder():
        return LearningRateFinder(num_training_steps=30, early_stop_threshold=None, update_attr=True)

    module, plain, expected = Tunable(), Tunable(), lit.Module()
    data = lit.loader(120)
    lit.fit(tmp_path, plain, Callback(), data=data, callbacks=[finder()], max_epochs=1)
    lit.fit(tmp_path, module, data=data, callbacks=[finder()], max_epochs=1)
    assert module.lr == plain.lr != 0.1
    expected.base = lambda parameters: torch.optim.SGD(parameters, lr=plain.lr)
    lit.train_by_hand(expected, list(data), epochs=1)
    lit.assert_same_state(module.net, expected.net)
