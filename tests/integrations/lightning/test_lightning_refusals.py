"""What the callback cannot do, it refuses before training, and says what to write instead."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy

import samopt
from samopt.integrations.lightning import SharpnessAwareTraining, is_second_pass
from tests.helpers import lit

pytestmark = pytest.mark.lightning


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("sharp",), {}, ValueError, f"variant must be one of {', '.join(samopt.available())}, got 'sharp'"),
        (("sam",), {"rho": -0.1}, ValueError, "rho must be >= 0"),
        (("asam",), {"eta": float("nan")}, ValueError, "eta must be"),
        (("sam",), {"norm": "l1"}, ValueError, 'norm must be "l2" or "linf"'),
        (("tram",), {"rho": 0.1}, TypeError, "takes no rho.*use scale="),
        (("tram",), {"trust_region": "nearest"}, ValueError, "nearest"),
        (("sam",), {"radius": 0.1}, TypeError, "radius"),
        (("sam",), {"only": "head", "reuse_trunk": True}, ValueError, "a trainer runs the two passes itself"),
        (("gsam",), {"sigma": 0.1}, TypeError, 'variant "gsam" takes no sigma.*alpha.*friendly-sam would'),
        (("fisher-sam",), {"adaptive": True}, TypeError, 'variant "fisher-sam" takes no adaptive'),
        (("momentum-sam",), {"direction": "momentum"}, TypeError, 'variant "momentum-sam" takes no direction'),
        (("wsam",), {"direction": "momentum"}, ValueError, "combines the gradients of two passes"),
    ],
)
def test_options_are_checked_where_they_are_given(arguments, options, error, message):
    with pytest.raises(error, match=message):
        SharpnessAwareTraining(*arguments, **options)


def refused(folder, module, message, error=(TypeError, ValueError), callback=None, **options):
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(error, match=message):
        lit.fit(folder, module, callback, **options)
    assert module.calls == 0
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_dataloader_iter(tmp_path):
    class Iterating(lit.Module):
        def training_step(self, dataloader_iter):
            raise AssertionError

    refused(tmp_path, Iterating(), r"training_step\(dataloader_iter\) takes batches from the iterator itself; write")


def test_no_optimizer(tmp_path):
    class Without(lit.Module):
        def configure_optimizers(self):
            return None

    refused(tmp_path, Without(), r"Without.configure_optimizers returned None; return one, such as")


def test_options_draw_no_random_numbers():
    before = torch.get_rng_state()
    SharpnessAwareTraining("asam", rho=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_lbfgs(tmp_path):
    refused(tmp_path, lit.Module(torch.optim.LBFGS), "cannot drive LBFGS.*choose another optimizer")


def test_a_submodule_that_is_not_there(tmp_path):
    callback = SharpnessAwareTraining("tram", watch="head")
    refused(tmp_path, lit.Module(), "head", AttributeError, callback)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(DeepSpeedStrategy, "its engine owns the gradients"), (FSDPStrategy, "its flat parameters hide each weight")],
)
def test_strategies(kind, reason, tmp_path):
    trainer = lit.trainer(tmp_path, [SharpnessAwareTraining()])
    trainer.strategy.__class__ = type(kind.__name__, (type(trainer.strategy), kind), {"__init__": None})
    assert isinstance(trainer.strategy, kind)
    module = lit.Module()
    with pytest.raises(ValueError, match=f'under {kind.__name__}: {reason}.*use Trainer\\(strategy="ddp"\\)'):
        SharpnessAwareTraining().setup(trainer, module, "fit")


def test_nothing_is_refused_outside_a_fit(tmp_path):
    """Validation, testing and prediction never see the callback."""

    class Manual(lit.Module):
        automatic_optimization = False

    callback = SharpnessAwareTraining()
    trainer = lit.trainer(tmp_path, [callback])
    trainer.validate(Manual(), lit.loader(), verbose=False)
    assert not is_second_pass(trainer)
    assert callback.optimizer is None
    assert callback.state_dict() == {}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_past_lightning_is_an_error_and_no_step_without_the_second_pass(accumulate, tmp_path):
    """Lightning runs the hooks of a step where its own wrapper of the optimizer is stepped."""

    class Past(lit.Module):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure=None):
            optimizer.optimizer.step(closure)

    with pytest.raises(RuntimeError, match=r"Past stepped its optimizer.*second pass was left out.*optimizer\.step\(c"):
        lit.fit(tmp_path, Past(), accumulate_grad_batches=accumulate)
    lit.fit(tmp_path, Past(), SharpnessAwareTraining("momentum-sam"))  # nothing is left out there
