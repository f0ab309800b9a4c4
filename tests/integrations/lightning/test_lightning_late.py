"""A fit that perturbs in its last share only: which steps, at which cost, and after a resume."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint, Timer

import samopt
from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import cases, lit

pytestmark = pytest.mark.lightning


class Radii(Callback):
    """Notes what each optimizer step was perturbed by, and how many forwards it took; of no module, so kept."""

    def __init__(self, callback):
        self.callback, self.radii, self.forwards, self.steps = callback, [], [], 0

    def on_fit_start(self, trainer, pl_module):
        self.handle = pl_module.net.register_forward_hook(self.count)

    def count(self, *_):
        self.steps += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.radii):
            self.radii.append(float(self.callback.last_step.radius))
            self.forwards.append(self.steps)
            self.steps = 0

    def on_train_end(self, trainer, pl_module):
        self.handle.remove()


def fit(folder, late, *, callbacks=(), data=None, ckpt_path=None, variant="sam", **options):
    """Seven batches an epoch; returns the trainer, and each step's radius and forwards."""
    callback = SharpnessAwareTraining(variant, late=late)
    noted = Radii(callback)
    trainer = lit.fit(
        folder,
        lit.Module(lit.adamw),
        callback,
        data=data,
        callbacks=[noted, *callbacks],
        ckpt_path=ckpt_path,
        **options,
    )
    return trainer, noted, callback


@pytest.mark.parametrize("late", ["last 25 %", 0.25])
def test_the_last_steps_alone_are_perturbed_and_the_others_cost_one_pass(late, tmp_path):
    _, noted, callback = fit(tmp_path, late)
    assert noted.radii == pytest.approx([0.0] * 10 + [0.05] * 4)  # 14 steps; 3.5 are rounded up
    assert noted.forwards == [1] * 10 + [2] * 4
    assert callback.optimizer.param_groups == callback.optimizer.base_optimizer.param_groups
    assert not callback.optimizer.is_paused


def test_it_trains_as_a_run_whose_radius_is_set_by_hand(tmp_path):
    class ByHand(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            callback.optimizer.rho = 0.05 if trainer.global_step >= 4 else 0.0

    late, _, _ = fit(tmp_path, "last 50 %", accumulate_grad_batches=2)  # 8 steps
    callback = SharpnessAwareTraining("sam", rho=0.0)
    module = lit.Module(lit.adamw)
    expected = lit.fit(tmp_path, module, callback, callbacks=[ByHand()], accumulate_grad_batches=2)
    lit.assert_same_run(late, expected)


@pytest.mark.parametrize(
    ("options", "radii"),
    [
        ({"max_epochs": -1, "max_steps": 8}, [0] * 6 + [0.05] * 2),
        ({"max_epochs": 3, "max_steps": 10}, [0] * 7 + [0.05] * 3),
        ({"max_epochs": 3, "limit_train_batches": 4}, [0] * 9 + [0.05] * 3),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, [0] * 4 + [0.05] * 2),
        # four steps, then seven and seven
        ({"max_epochs": 3, "callbacks": [GradientAccumulationScheduler({0: 2, 1: 1})]}, [0] * 13 + [0.05] * 5),
    ],
)
def test_the_length_is_that_of_the_trainer(options, radii, tmp_path):
    _, noted, _ = fit(tmp_path, "last 25 %", **options)
    assert noted.radii == pytest.approx(radii)


@pytest.mark.parametrize("variant", ["momentum-sam", "tram", "gsam"])
def test_every_kind_of_step_is_the_bases_before(variant, tmp_path):
    options = {"max_epochs": 1, "data": lit.loader(), "callbacks": []}
    trainer, noted, _ = fit(tmp_path, "last 1 %", variant=variant, **options)
    plain = lit.Module(lit.adamw)
    lit.fit_by_hand(tmp_path, plain, max_epochs=1)
    assert noted.radii[:-1] == [0.0] * 6
    # All but the last step: their losses are those of the plain run.
    assert trainer.lightning_module.losses[:6] == plain.losses[:6]


def test_a_resumed_run_goes_on_in_its_phase(tmp_path):
    def saving(name):
        return ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)

    options = {"max_epochs": 4, "enable_checkpointing": True}
    whole, noted, _ = fit(tmp_path, "last 40 %", callbacks=[saving("whole")], **options)  # 12 of 28 steps
    assert noted.radii == pytest.approx([0.0] * 16 + [0.05] * 12)
    for epoch in (0, 2):
        resumed, _, _ = fit(
            tmp_path,
            "last 40 %",
            callbacks=[saving(f"resumed{epoch}")],
            ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt",
            **options,
        )
        lit.assert_same_state(resumed.lightning_module, whole.lightning_module)
        cases.assert_same(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


class Clock:
    """Time that passes one second a batch."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("pytorch_lightning.callbacks.timer.time.monotonic", lambda: self.now)

    def ticking(self):
        clock = self

        class Tick(Callback):
            def on_train_batch_end(self, *_):
                clock.now += 1.0

        return Tick()


def test_a_share_of_the_time_where_time_ends_the_run(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    _, noted, _ = fit(tmp_path, "last 25 %", callbacks=[clock.ticking()], max_epochs=-1, max_time={"seconds": 12})
    assert noted.radii[:12] == pytest.approx([0.0] * 9 + [0.05] * 3)


def test_the_end_that_comes_first_counts(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    _, noted, _ = fit(tmp_path, "last 50 %", callbacks=[clock.ticking()], max_epochs=2, max_time={"seconds": 8})
    assert noted.radii[:8] == pytest.approx([0.0] * 4 + [0.05] * 4)
    _, noted, _ = fit(tmp_path, "last 50 %", callbacks=[clock.ticking()], max_epochs=2, max_time={"seconds": 100})
    assert noted.radii == pytest.approx([0.0] * 7 + [0.05] * 7)


def test_a_share_of_the_time_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)

    def run(*callbacks, **options):
        timer = Timer(duration={"seconds": 20})
        callbacks = [clock.ticking(), timer, *callbacks]
        return fit(tmp_path, "last 50 %", callbacks=callbacks, enable_checkpointing=True, **options)[1]

    first = run(ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1), max_epochs=1)
    assert first.radii == pytest.approx([0.0] * 3 + [0.05] * 4)  # here the steps are over first
    clock.now = 3.0  # the machine was started again, seven seconds into the run
    second = run(max_epochs=-1, ckpt_path=tmp_path / "saved" / "epoch=0.ckpt")
    assert second.radii == pytest.approx([0.0] * 3 + [0.05] * 10)


def test_an_unknown_length_is_refused_at_the_start(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(lit.loader())

    module = lit.Module(lit.adamw)
    before = cases.bits(module)
    with pytest.raises(ValueError, match=r"late= is a share .* max_epochs=-1, max_steps=-1 and no max_time, for 7 bat"):
        lit.fit(tmp_path, module, SharpnessAwareTraining("sam", late=0.25), max_epochs=-1)
    data = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(ValueError, match=r"max_epochs=2, max_steps=-1 .* for inf batches in an epoch; set max_steps="):
        lit.fit(tmp_path, module, SharpnessAwareTraining("sam", late=0.25), data=data)
    assert cases.same_bits(module, before)
    _, noted, _ = fit(tmp_path, 0.25, data=data, max_steps=8)
    assert noted.radii == pytest.approx([0.0] * 6 + [0.05] * 2)


@pytest.mark.parametrize("late", ["first 10 %", "last 25", 25, 0, -0.5, float("nan"), True])
def test_a_share_in_other_words_is_refused_where_it_is_written(late):
    with pytest.raises(ValueError, match='late must be a share of the run.*written as "last 25 %" or 0.25; got'):
        SharpnessAwareTraining("sam", late=late)


def test_an_optimizer_of_the_modules_own_has_a_phase_too(tmp_path):
    callback = SharpnessAwareTraining(late="last 50 %")
    noted = Radii(callback)
    module = lit.Module(lambda parameters: samopt.ASAM(lit.adamw(parameters), rho=0.2))
    lit.fit(tmp_path, module, callback, callbacks=[noted], max_epochs=1)
    assert noted.radii == pytest.approx([0.0] * 3 + [0.2] * 4)
