"""What the study ``vision`` measures of a trained classifier: curvature, attacks, corruptions, active units."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness.data import Split, stream
from benchmarks.harness.networks import Residual
from samopt import sharpness

CORRUPTIONS = ("noise", "blur", "shift", "contrast")
ATTACKS = (0.01, 0.03)
"""Sizes of the attack on each pixel, whose values lie in [0, 1]."""

_LOWEST_GELU = 0.17  # GELU's values lie above -0.17: a larger magnitude is a unit at work
_CURVATURE_IMAGES, _ROBUSTNESS_IMAGES, _BATCH = 512, 2000, 128


def measure(model: nn.Module, split: Split, seed: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return what is measured of a trained model; the model comes back bit for bit.

    Args:
        model: The model.
        split: Curvature is of 512 of its training images; the rest is of its first 2,000 test images.
        seed: Draws the training images and the noise.

    Returns:
        "lambda_max", the Hessian's largest eigenvalue; "fgsm 0.01" and so on and each of ``CORRUPTIONS``, accuracies;
        "active", the share of active units. The curve "active" has it layer by layer.
    """
    drawn = torch.randperm(len(split.labels), generator=stream(seed, "curvature"))[:_CURVATURE_IMAGES]
    curvature = sharpness.hessian_eigenvalues(
        model, sharpness.cross_entropy, _batches(split.inputs[drawn], split.labels[drawn]), tolerance=0.01,
        progress=False,
    )  # fmt: skip
    images, labels = split.test_inputs[:_ROBUSTNESS_IMAGES], split.test_labels[:_ROBUSTNESS_IMAGES]
    batches = _batches(images, labels)
    attacked = sharpness.fgsm(
        model, sharpness.cross_entropy, batches, sizes=ATTACKS, bounds=(0.0, 1.0), accuracy_fn=sharpness.accuracy,
        progress=False,
    )  # fmt: skip
    assert attacked.accuracies is not None
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU | nn.GELU | Residual)]
    gelu = any(isinstance(module, nn.GELU) for module in model.modules())
    active = sharpness.active_units(
        model, sharpness.cross_entropy, batches, layers=layers, threshold=_LOWEST_GELU if gelu else 0.0, progress=False
    )
    metrics = {"lambda_max": curvature.value, "active": active.value}
    metrics |= {f"fgsm {size:g}": found for size, found in zip(ATTACKS, attacked.accuracies[1:], strict=True)}
    model.eval()
    with torch.no_grad():
        for name in CORRUPTIONS:
            outputs = [model(part) for part in corrupt(images, name, seed).split(_BATCH)]
            metrics[name] = float((torch.cat(outputs).argmax(1) == labels).float().mean())
    metrics["corrupted"] = sum(metrics[name] for name in CORRUPTIONS) / len(CORRUPTIONS)
    return metrics, {"active": list(active.layers.values())}


def corrupt(images: Tensor, name: str, seed: int) -> Tensor:
    """Return images, pixels in [0, 1], shape ``(n, 1, height, width)``, after one of ``CORRUPTIONS``.

    "noise" adds normal noise of deviation 0.15; "blur" is a mean over 3 x 3 pixels; "shift" moves two pixels right and
    down and fills with black; "contrast" keeps 0.4 of each pixel's distance from the image's mean.
    """
    if name == "noise":
        return (images + 0.15 * torch.randn(images.shape, generator=stream(seed, "noise"))).clamp(0, 1)
    if name == "blur":
        return functional.avg_pool2d(images, 3, stride=1, padding=1)
    if name == "shift":
        return functional.pad(images, (2, -2, 2, -2))
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + 0.4 * (images - mean)


def _batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(_BATCH), labels.split(_BATCH), strict=True))
