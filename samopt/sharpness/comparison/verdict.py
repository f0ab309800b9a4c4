"""A table of measures in words: what agrees, what does not, and which measure to believe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from samopt.sharpness._measuring.results import Result
from samopt.sharpness.comparison.differences import Difference

__all__ = ["verdict"]

_CURVATURE = {"hessian_eigenvalues", "gauss_newton_eigenvalues", "hessian_trace", "spectral_density", "landscape"}
_RELATIVE = {"weight_noise"}
_SURVIVAL = {
    "quantization": "rounding of its weights",
    "fgsm": "the attack on its inputs",
    "forgetting": "training on other data",
}
_NOT_SHARPNESS = {"mean_loss", "mean_accuracy", "active_units", *_SURVIVAL}
_OTHER_NORM = 1.15  # from this ratio of norms on, two models' weights differ in scale
_OTHER_LOSS = 3.0


def verdict(
    names: Sequence[str],
    rows: Mapping[str, tuple[Result, Result, Difference]],
    norms: Sequence[float],
    losses: Sequence[float],
    counts: Sequence[int],
) -> str:
    """Return what the measures say about two models.

    Args:
        names: Of both models.
        rows: For each measure both results, and the second less the first.
        norms: The l2 norm of the weights of both.
        losses: The mean loss of both.
        counts: How many trainable weights both have.
    """
    first, second = names
    sharpness = {label: row for label, row in rows.items() if _is_sharpness(row[0])}
    flatter: dict[str, list[str]] = {first: [], second: []}
    unclear = []
    for label, (_, _, apart) in sharpness.items():
        if apart.is_clear:
            flatter[second if apart.value < 0 else first].append(label)
        else:
            unclear.append(label)
    if not any(flatter.values()):
        said = [
            f"No measure tells {first} and {second} apart: every difference is within its error. Use more batches to "
            "see smaller differences."
        ]
    elif not (flatter[first] and flatter[second]):
        winner = first if flatter[first] else second
        said = [f"{winner} is flatter by every measure that tells the two apart ({_listed(flatter[winner])})."]
    else:
        said = [
            f"The measures disagree: {first} is flatter by {_listed(flatter[first])}, {second} by "
            f"{_listed(flatter[second])}.",
            *_reasons(names, flatter, sharpness, norms),
        ]
    if unclear and any(flatter.values()):
        said.append(f"Within the error: {_listed(unclear)}.")
    if counts[0] != counts[1]:
        said.append(
            f"Careful: {counts[0]:,} weights move in {first} and {counts[1]:,} in {second}, those that are trainable. "
            "Fewer weights that move look flatter: give both models the same requires_grad before you compare them."
        )
    said += _caution_about_the_loss(names, flatter, sharpness, losses)
    said += _survival(names, rows)
    said.append("Flatter is not yet better: which model is better on new data, only held-out examples tell.")
    return " ".join(said)


def _is_sharpness(result: Result) -> bool:
    """Return whether a smaller value means flatter: not so for the most negative eigenvalue, or one of either sign."""
    return result.measure not in _NOT_SHARPNESS and result.settings.get("which", "largest") == "largest"


def _survival(names: Sequence[str], rows: Mapping[str, tuple[Result, Result, Difference]]) -> list[str]:
    """Say which model stands what better."""
    better: dict[str, list[str]] = {name: [] for name in names}
    for first, _, apart in rows.values():
        if first.measure in _SURVIVAL and apart.is_clear:
            better[names[1] if apart.value < 0 else names[0]].append(_SURVIVAL[first.measure])
    return [f"{name} stands {_listed(changes)} better." for name, changes in better.items() if changes]


def _reasons(
    names: Sequence[str],
    flatter: Mapping[str, list[str]],
    rows: Mapping[str, tuple[Result, Result, Difference]],
    norms: Sequence[float],
) -> list[str]:
    """Say why measures may disagree."""
    kinds = {name: {is_relative(rows[label][0]) for label in labels} for name, labels in flatter.items()}
    relative = [name for name in names if kinds[name] == {True}]
    plain = [name for name in names if kinds[name] == {False}]
    if relative and plain:
        measures = _listed(flatter[plain[0]])
        if max(norms) > _OTHER_NORM * min(norms):
            return [
                f"The reason is scale: the weights of {names[0]} and {names[1]} have norm {norms[0]:.3g} and "
                f"{norms[1]:.3g}. {measures} move weights by fixed amounts, which mean less to larger weights. Believe "
                f"{_listed(flatter[relative[0]])}, which move each weight in proportion to its size: {relative[0]} is "
                "flatter."
            ]
        return [
            f"Scale does not explain it: the weights have about the same norm ({norms[0]:.3g} and {norms[1]:.3g}). "
            f"{measures} treat all weights alike, the other measures follow the size of each weight; rescaling two "
            f"layers against each other changes the former alone, so believe {_listed(flatter[relative[0]])}."
        ]
    return [
        "Measures of one kind disagree as well: an eigenvalue looks at one direction, a trace and noise at all of "
        "them, a worst case at a finite distance. Look at the plot, and do not call either model flatter."
    ]


def _caution_about_the_loss(
    names: Sequence[str],
    flatter: Mapping[str, list[str]],
    rows: Mapping[str, tuple[Result, Result, Difference]],
    losses: Sequence[float],
) -> list[str]:
    low, high = sorted((0, 1), key=lambda index: losses[index])
    curved = [label for label in flatter[names[low]] if rows[label][0].measure in _CURVATURE]
    if not curved or losses[high] < _OTHER_LOSS * losses[low]:
        return []
    return [
        f"Careful with {_listed(curved)}: the loss of {names[low]} is much lower ({losses[low]:.2g} against "
        f"{losses[high]:.2g}), and the curvature of cross-entropy shrinks with the loss."
    ]


def is_relative(result: Result) -> bool:
    """Return whether a measure moves each weight in proportion to its size.

    Args:
        result: What the measure returned.
    """
    return result.measure in _RELATIVE or bool(result.settings.get("adaptive"))


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
