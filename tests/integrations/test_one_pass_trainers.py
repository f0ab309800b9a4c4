"""One pass under Trainer, accelerate and Fabric, whose loops do not change, is the loop written by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

import samopt
from samopt.integrations.accelerate import SharpnessAwareBackward
from samopt.integrations.transformers import SAMTrainer
from tests.helpers import hf
from tests.helpers.cases import asam_epsilon, bits, sam_epsilon, same_bits
from tests.helpers.one_pass import CLIPPED_NORM, DIRECTIONS, FRAMEWORK_CASES, hand_step

pytestmark = pytest.mark.hf

VARIANTS = {
    "sam": (samopt.SAM, sam_epsilon, 0.05),
    "asam": (samopt.ASAM, asam_epsilon, 0.5),
    "momentum-sam": (samopt.MomentumSAM, sam_epsilon, 0.3),
    "base": (samopt.SAM, sam_epsilon, 0.0),
}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OVERFLOWS = {"fp16": {3}}
EPOCHS = 2


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate shares its state between instances."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def scale(accelerator: Accelerator) -> torch.amp.GradScaler:
    """Have an accelerator train in fp16; it has no scaler for the CPU of its own."""
    accelerator.scaler = make_scaler()
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return accelerator.scaler


def slow_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """So slow that the rounding of a perturbation, fp64 by hand and fp32 in the engine, stays rounding."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def wrapped(model: nn.Module, variant: str, direction: str) -> samopt.SharpnessAwareOptimizer:
    options = {} if variant == "momentum-sam" else {"direction": direction}
    return VARIANTS[variant][0](slow_sgd(model), model=model, **options)


def loss_of(model: nn.Module, batch: hf.Batch, step: int, precision: str) -> Tensor:
    loss = model(**batch)["loss"].float()
    return loss * float("inf") if step in OVERFLOWS.get(precision, ()) else loss


def with_trainer(model, variant, direction, accumulate, clip, precision, folder, *, by_argument: bool) -> None:
    class Trained(SAMTrainer if by_argument else transformers.Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if precision == "fp16":
                scale(self.accelerator)

        def compute_loss(self, model, inputs, **options):
            loss = loss_of(model, inputs, self.state.global_step, precision)
            return (loss, None) if options.get("return_outputs") else loss

    options = {
        "gradient_accumulation_steps": accumulate,
        "max_grad_norm": CLIPPED_NORM if clip else 0.0,
        "bf16": precision == "bf16",
        "num_train_epochs": EPOCHS,
        "lr_scheduler_type": "constant",
        "logging_nan_inf_filter": False,
    }
    if by_argument:
        options |= {"sam": variant, "base": slow_sgd}
        if variant != "momentum-sam":
            options["sam_direction"] = direction
    else:
        options |= {
            "arguments": transformers.TrainingArguments,
            "base": lambda model: wrapped(model, variant, direction),
        }
    hf.make_trainer(folder, model, hf.points(), kind=Trained, **options).train()


def with_accelerate(model, variant, direction, accumulate, clip, precision, folder, *, with_helper: bool) -> None:
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        mixed_precision="bf16" if precision == "bf16" else "no",
    )
    if precision == "fp16":
        scale(accelerator)
    loader = torch.utils.data.DataLoader(hf.points(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, wrapped(model, variant, direction), loader)
    backward = SharpnessAwareBackward(accelerator, model, optimizer) if with_helper else None
    model.train()
    step = 0
    for _ in range(EPOCHS):
        for batch in loader:
            if accelerator.step % accumulate == 0:
                torch.manual_seed(1000 + step)
            with accelerator.accumulate(model):
                if backward is None:
                    accelerator.backward(loss_of(model, batch, step, precision))
                else:
                    backward(lambda batch, step=step: loss_of(model, batch, step, precision), batch)
                if accelerator.sync_gradients:
                    step += 1
                    if clip:
                        accelerator.clip_grad_norm_(model.parameters(), CLIPPED_NORM)
                optimizer.step()
                optimizer.zero_grad()


def with_fabric(model, variant, direction, accumulate, clip, precision, folder) -> None:
    fabric_package = pytest.importorskip("lightning_fabric")
    if precision == "fp16":
        mixed = fabric_package.plugins.MixedPrecision("16-mixed", "cpu", make_scaler())
        fabric = fabric_package.Fabric(accelerator="cpu", devices=1, plugins=mixed)
    else:
        fabric = fabric_package.Fabric(
            accelerator="cpu", devices=1, precision="bf16-mixed" if precision == "bf16" else "32-true"
        )
    optimizer = wrapped(model, variant, direction)
    model, optimizer = fabric.setup(model, optimizer)
    batches = hf.batches_of(hf.points())
    windows = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    model.train()
    for step, window in enumerate(windows * EPOCHS):
        torch.manual_seed(1000 + step)
        optimizer.zero_grad()
        for batch in window:
            fabric.backward(loss_of(model, batch, step, precision) / len(window))
        if clip:
            fabric.clip_gradients(model, optimizer, max_norm=CLIPPED_NORM, error_if_nonfinite=False)
        optimizer.step()


def by_hand(model, variant, direction, accumulate, clip, precision, parts_of: Callable[[int], int]) -> list[bool]:
    """Plain torch: move along the momentum, one backward a batch, move back, unscale, clip, step."""
    base = slow_sgd(model)
    _, epsilon, rho = VARIANTS[variant]
    autocast = PRECISIONS[precision]
    scaler = make_scaler() if precision == "fp16" else None
    batches = hf.batches_of(hf.points())
    windows = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    skipped = []
    model.train()
    for step, window in enumerate(windows * EPOCHS):
        torch.manual_seed(1000 + step)

        def backward(step: int = step, window: list[hf.Batch] = window) -> None:
            for batch in window:
                with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                    loss = loss_of(model, batch, step, precision) / parts_of(len(window))
                (loss if scaler is None else scaler.scale(loss)).backward()

        start = bits(model)
        options = {"epsilon": epsilon, "sign": DIRECTIONS[direction], "rho": rho, "scaler": scaler}
        hand_step(base, backward, clip_norm=CLIPPED_NORM if clip else None, **options)
        skipped.append(same_bits(model, start))
    return skipped


LOOPS: dict[str, tuple[Callable[..., None], dict[str, bool]]] = {
    "Trainer, by argument": (with_trainer, {"by_argument": True}),
    "Trainer, given the optimizer": (with_trainer, {"by_argument": False}),
    "accelerate": (with_accelerate, {"with_helper": False}),
    "accelerate, with the helper for two passes": (with_accelerate, {"with_helper": True}),
    "Fabric": (with_fabric, {}),
}
COMPARED = [
    *((precision, case) for precision in PRECISIONS for case in ("sam", "asam, clipped")),
    *(("fp32", case) for case in ("sam, uphill", "momentum-sam")),
]


@pytest.mark.parametrize(("precision", "case"), COMPARED)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("loop", LOOPS)
def test_one_pass_is_the_hand_written_loop(loop, precision, accumulate, case, tmp_path) -> None:
    train, options = LOOPS[loop]
    variant, direction, clip = FRAMEWORK_CASES[case]
    model, plain = hf.norms(), hf.norms()
    train(model, variant, direction, accumulate, clip, precision, tmp_path, **options)
    # An epoch's last window holds one batch of three: Trainer divides by the one, accelerate by three.
    parts_of = (lambda found: accumulate) if train is with_accelerate else int
    skipped = by_hand(plain, variant, direction, accumulate, clip, precision, parts_of)
    assert [step for step, was in enumerate(skipped) if was] == sorted(OVERFLOWS.get(precision, ()))
    for (name, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", ["sam", "asam"])
def test_the_comparison_tells_one_pass_from_the_base(variant, direction) -> None:
    model, plain = hf.norms(), hf.norms()
    by_hand(model, variant, direction, 1, False, "fp32", int)
    by_hand(plain, "base", direction, 1, False, "fp32", int)
    gaps = [float((ours - theirs).abs().max()) for ours, theirs in zip(bits(model), bits(plain), strict=True)]
    assert max(gaps) > 1e-3
