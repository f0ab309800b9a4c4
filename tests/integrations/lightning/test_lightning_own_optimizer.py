"""Modules that make a samopt optimizer themselves: with the callback, with manual optimization, with Fabric."""

from __future__ import annotations

import functools

import pytest
import torch
from pytorch_lightning.callbacks import Callback, LearningRateFinder
from pytorch_lightning.plugins import MixedPrecision

import samopt
from samopt.integrations.lightning import SharpnessAwareTraining
from tests.helpers import lit

pytestmark = pytest.mark.lightning


class Returning(lit.Module):
    """Returns an ASAM optimizer, with a schedule on it."""

    options = {"rho": 0.3}

    def configure_optimizers(self):
        optimizer = samopt.ASAM(self.base(self.parameters()), model=self, **self.options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.filterwarnings("error:.*lr_scheduler.step")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_returned_optimizer_is_driven_by_the_callback(accumulate, tmp_path):
    module, expected = Returning(), lit.Module(scheduler="step")
    callback = SharpnessAwareTraining()
    lit.fit(tmp_path, module, callback, accumulate_grad_batches=accumulate, gradient_clip_val=0.3)
    sam = functools.partial(samopt.ASAM, rho=0.3)
    lit.train_by_hand(expected, list(lit.loader()), sam=sam, accumulate=accumulate, clip_norm=0.3)
    lit.assert_same_state(module.net, expected.net)
    assert isinstance(callback.optimizer, samopt.ASAM)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_a_returned_optimizer_in_mixed_precision(precision, tmp_path):
    module, expected = Returning(), lit.Module(scheduler="step")
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) if precision == "16-mixed" else None for _ in range(2)]
    lit.fit(tmp_path, module, plugins=[MixedPrecision(precision, "cpu", scalers[0])], accumulate_grad_batches=2)
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    sam = functools.partial(samopt.ASAM, rho=0.3)
    lit.train_by_hand(expected, list(lit.loader()), sam=sam, accumulate=2, autocast=dtype, scaler=scalers[1])
    lit.assert_same_state(module.net, expected.net)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_returned_optimizer_in_true_precision(precision, tmp_path):
    module, expected = Returning(), lit.Module(scheduler="step")
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float64
    lit.fit(tmp_path, module, data=lit.loader(dtype=dtype), precision=precision, accumulate_grad_batches=2)
    lit.compute_in(expected, dtype)
    sam = functools.partial(samopt.ASAM, rho=0.3)
    lit.train_by_hand(expected, list(lit.loader(dtype=dtype)), sam=sam, accumulate=2)
    lit.assert_same_state(module.net, expected.net)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_without_the_callback_it_is_refused_at_the_start(precision, tmp_path):
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if precision == "16-mixed" else None
    module = Returning()
    with pytest.raises(RuntimeError, match=r"ASAM, but automatic.*callbacks=\[samopt.integrations.lightning.Sharpness"):
        lit.fit(tmp_path, module, Callback(), plugins=plugins)
    assert module.calls == 0


def test_a_trainer_that_calls_the_closure_without_a_second_pass_is_refused_at_the_step(tmp_path):
    """Should Lightning start a fit in another way one day, the first step still refuses."""
    module = Returning()

    class Removing(Callback):
        runs_second_pass = True

    before = [p.detach().clone() for p in module.net.parameters()]
    with pytest.raises(RuntimeError, match="gradients but no perturbed pass since the last step"):
        lit.fit(tmp_path, module, Removing())
    assert all(torch.equal(p, b) for p, b in zip(module.net.parameters(), before, strict=True))


def test_options_for_two_optimizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"returned ASAM.*given options for one of its own: .*rho.*return SGD alone"):
        lit.fit(tmp_path, Returning(), SharpnessAwareTraining(rho=0.1))


def test_learning_rate_finder_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="LearningRateFinder takes all other callbacks away.*return the SGD alone"):
        lit.fit(tmp_path, Returning(), callbacks=[LearningRateFinder()])


class OnePass(lit.Module):
    """Needs no callback."""

    def configure_optimizers(self):
        return samopt.SAM(self.base(self.parameters()), model=self.net, direction="momentum", rho=0.2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_pass_needs_no_callback(accumulate, tmp_path):
    module, expected = OnePass(), lit.Module()
    lit.fit(tmp_path, module, Callback(), accumulate_grad_batches=accumulate)
    optimizer = samopt.SAM(lit.sgd(expected.net.parameters()), model=expected.net, direction="momentum", rho=0.2)
    batches = list(lit.loader())
    for epoch in range(2):
        for first in range(0, len(batches), accumulate):
            for index in range(first, min(first + accumulate, len(batches))):
                expected.noise = lit.draw_noise(index, epoch)
                loss = expected.loss(batches[index]) / accumulate
                if index == first:
                    optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    lit.assert_same_state(module.net, expected.net)
    driven = OnePass()
    lit.fit(tmp_path, driven, SharpnessAwareTraining(), accumulate_grad_batches=accumulate)
    lit.assert_same_state(driven.net, expected.net)


class Manual(lit.Manual, lit.Module):
    """Manual optimization that logs what its step measured."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("sharpness", self.optimizers().last_step.sharpness)
        return loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_manual_optimization(precision, tmp_path):
    module, expected = Manual(), lit.Module()
    module.loss = functools.partial(noiseless, module)
    expected.loss = functools.partial(noiseless, expected)
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) if precision == "16-mixed" else None for _ in range(2)]
    how = {"plugins": [MixedPrecision(precision, "cpu", scalers[0])]} if mixed else {"precision": precision}
    trainer = lit.fit(tmp_path, module, Callback(), **how)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    expected.net.to(dtype)
    batches = [(x.to(dtype), y) for x, y in lit.loader()]
    sam = functools.partial(samopt.SAM, rho=0.2)
    history = lit.train_by_hand(expected, batches, sam=sam, autocast=mixed, scaler=scalers[1])
    lit.assert_same_state(module.net, expected.net)
    assert trainer.global_step == 14
    assert float(trainer.callback_metrics["sharpness"]) == pytest.approx(history.sharpness[-1], abs=1e-6)


class WithClosure(Manual):
    """torch's closure contract instead of ``perturbed()``."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        self.log("sharpness", optimizer.last_step.sharpness)


def test_manual_optimization_with_a_closure(tmp_path):
    module, expected = WithClosure(), lit.Module()
    module.loss = functools.partial(noiseless, module)
    expected.loss = functools.partial(noiseless, expected)
    trainer = lit.fit(tmp_path, module, Callback())
    history = lit.train_by_hand(expected, list(lit.loader()), sam=functools.partial(samopt.SAM, rho=0.2))
    lit.assert_same_state(module.net, expected.net)
    assert trainer.global_step == 14
    assert float(trainer.callback_metrics["sharpness"]) == pytest.approx(history.sharpness[-1], abs=1e-6)


class TwoOptimizers(lit.Module):
    """Two networks, each with an optimizer of its own, as in a GAN."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = lit.network()

    def configure_optimizers(self):
        return [samopt.SAM(self.base(net.parameters()), rho=0.2, model=net) for net in (self.net, self.other)]

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(noiseless(net, batch))
            with optimizer.perturbed():
                self.manual_backward(noiseless(net, batch))
            optimizer.step()


def test_several_optimizers_take_manual_optimization(tmp_path):
    """Each pair of passes is its own optimizer's; Lightning itself refuses several in automatic optimization."""
    module, nets = TwoOptimizers(), (lit.network(), lit.network())
    trainer = lit.fit(tmp_path, module, Callback(), max_epochs=1)
    optimizers = [samopt.SAM(lit.sgd(net.parameters()), rho=0.2, model=net) for net in nets]
    for index, batch in enumerate(lit.loader()):
        lit.draw_noise(index, 0)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            noiseless(net, batch).backward()
            with optimizer.perturbed():
                noiseless(net, batch).backward()
            optimizer.step()
    assert trainer.global_step == 14
    lit.assert_same_state(module.net, nets[0])
    lit.assert_same_state(module.other, nets[1])

    class Automatic(lit.Module):
        def configure_optimizers(self):
            return [self.base([parameter]) for parameter in self.parameters()]

    refused = Automatic()
    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        lit.fit(tmp_path, refused)
    assert refused.calls == 0


def noiseless(module, batch):
    """Only dropout is random: the replay of a model's calls is all that manual optimization has."""
    return torch.nn.functional.cross_entropy(module(batch[0]).float(), batch[1])


def test_manual_optimization_without_a_second_pass_is_refused(tmp_path):
    class Forgetful(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    with pytest.raises(RuntimeError, match="gradients but no perturbed pass"):
        lit.fit(tmp_path, Forgetful(), Callback())


def test_the_callback_refuses_manual_optimization(tmp_path):
    with pytest.raises(TypeError, match=r"Manual has automatic_optimization=False(.|\n)*with optimizer.perturbed\(\):"):
        lit.fit(tmp_path, Manual(), SharpnessAwareTraining())


@pytest.mark.parametrize("package", ["lightning_fabric", "lightning.fabric"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_fabric(precision, package):
    fabric_package = pytest.importorskip(package)
    module, expected = lit.Module(), lit.Module()
    for made in (module, expected):
        made.loss = functools.partial(noiseless, made)
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) if precision == "16-mixed" else None for _ in range(2)]
    if mixed:
        plugins = fabric_package.plugins.MixedPrecision(precision, "cpu", scalers[0])
        fabric = fabric_package.Fabric(accelerator="cpu", devices=1, plugins=[plugins])
    else:
        fabric = fabric_package.Fabric(accelerator="cpu", devices=1, precision=precision)
    net = module.net
    model, optimizer = fabric.setup(net, samopt.SAM(module.base(net.parameters()), rho=0.2, model=net))
    batches = list(lit.loader())
    net.train()
    for epoch in range(2):
        for index, (x, y) in enumerate(batches):
            lit.draw_noise(index, epoch)
            optimizer.zero_grad()
            fabric.backward(torch.nn.functional.cross_entropy(model(x).float(), y))
            with optimizer.perturbed():
                fabric.backward(torch.nn.functional.cross_entropy(model(x).float(), y))
            fabric.clip_gradients(model, optimizer, max_norm=0.3)
            optimizer.step()
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    expected.net.to(dtype)
    by_hand = [(x.to(mixed or dtype), y) for x, y in batches]
    sam = functools.partial(samopt.SAM, rho=0.2)
    lit.train_by_hand(expected, by_hand, sam=sam, autocast=mixed, scaler=scalers[1], clip_norm=0.3)
    lit.assert_same_state(net, expected.net)
