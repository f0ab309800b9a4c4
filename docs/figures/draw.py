"""Draw the figures of the pages: ``python docs/figures/draw.py`` writes the PNG files beside this script.

``step.png`` shows one step of SAM on a real function: every arrow is computed. ``cost.png`` shows figures from
``docs/results/frontier/table.md``.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
TABLE = HERE.parent / "results" / "frontier" / "table.md"
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito's colours
STYLE = HERE.parents[1] / "benchmarks" / "harness" / "style.mplstyle"
CURVATURE = np.array([[1.6, 1.1], [1.1, 1.3]])
METHODS = {
    "base": ("sgd", "#000000", (-8, 10), "left"),
    "Momentum-\nSAM": ("momentum-ahead", BLUE, (6, 10), "left"),
    "SAM, every\n2nd step": ("sam-every-2", GREEN, (-5, -24), "right"),
    "SAM": ("sam", ORANGE, (-6, 8), "right"),
    "ASAM": ("asam", PINK, (6, -14), "left"),
}
"""Label in the figure: method in the table, colour, and where the label stands, in points from its dot."""


def loss(w: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the loss of points ``w``, whose last axis has length 2."""
    return np.asarray(0.5 * np.einsum("...i,ij,...j", w, CURVATURE, w))


def gradient(w: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the gradient of ``loss`` at one point."""
    return np.asarray(CURVATURE @ w)


def arrow(axes: Axes, start: NDArray[np.float64], move: NDArray[np.float64], colour: str) -> None:
    """Draw an arrow from ``start`` to ``start + move``."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
    axes.annotate("", xy=tuple(start + move), xytext=tuple(start), arrowprops=style)


def draw_step() -> None:
    """Draw the three stages of a step: ascent to ``w + epsilon``, gradient there, base step at ``w``."""
    w, rho, lr = np.array([-1.55, 0.45]), 0.6, 0.3
    epsilon = rho * gradient(w) / np.linalg.norm(gradient(w))
    there = w + epsilon
    step = -lr * gradient(there)
    grid = np.linspace(-2.9, 1.5, 160)
    points = np.stack(np.meshgrid(grid, grid), axis=-1)
    figure, panels = plt.subplots(1, 3, figsize=(9.2, 3.1), layout="constrained")
    titles = ("1  Go to the worst\nnearby point", "2  Take the\ngradient there", "3  Go back to w, and\nstep with it")
    for axes, title in zip(panels, titles, strict=True):
        axes.contour(grid, grid, loss(points), levels=np.geomspace(0.02, 6, 12), colors="#b9bfc7", linewidths=0.8)
        axes.set(title=title, aspect="equal", xticks=[], yticks=[], xlim=(-2.9, 1.0), ylim=(-1.2, 1.4))
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.plot(0, 0, marker="+", color="#6b7280", ms=9)
        axes.annotate("minimum", (0, 0), (4, -13), textcoords="offset points", color="#6b7280", fontsize=8.5)
        axes.plot(*w, "o", color="black", ms=6, zorder=4)
        axes.annotate("w", w, (6, -12), textcoords="offset points", weight="bold")
        axes.add_patch(plt.Circle(tuple(w), rho, fill=False, ls=":", color=ORANGE))
    arrow(panels[0], w, epsilon, ORANGE)
    panels[0].annotate("radius rho", w + [0.05, -rho], (4, -9), textcoords="offset points", color=ORANGE, fontsize=9)
    for axes in panels[:2]:
        axes.plot(*there, "o", color=ORANGE, ms=6, zorder=4)
        axes.annotate("w + epsilon", there, (-30, -15), textcoords="offset points", color=ORANGE, weight="bold")
    arrow(panels[1], there, step, BLUE)
    arrow(panels[2], w, step, BLUE)
    panels[2].annotate("base step", w + step, (4, 4), textcoords="offset points", color=BLUE, weight="bold")
    figure.supxlabel("grey lines: points of equal loss", fontsize=9, color="#6b7280")
    save(figure, "step.png")


def rows(labels: str) -> dict[str, tuple[float, float, float, float]]:
    """Return cost, gain and the gain's 95 % interval of each row of a section of the table; the base's gain is 0."""
    section = TABLE.read_text(encoding="utf-8").split(f"**digits, {labels}**")[1].split("\n**")[0]
    number = r"([+-]?[\d.]+)"
    gain = rf"(?:{number} \[{number}, {number}\])?"
    pattern = rf"^\| ([\w-]+):\S+ \|[^|]*\|[^|]*\| {number} \([^|]*\|[^|]*\| {gain} \|"
    found = re.findall(pattern, section, flags=re.MULTILINE)
    return {name: (float(cost), *(float(value or 0) for value in values)) for name, cost, *values in found}


def draw_cost() -> None:
    """Draw gain against cost for five methods on digits, where labels are random and where they are clean."""
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.5), sharey=True, layout="constrained")
    sections = {"40% random labels": "40 % of the training labels random", "clean labels": "clean labels"}
    for axes, (labels, title) in zip(panels, sections.items(), strict=True):
        table = rows(labels)
        for label, (name, colour, offset, side) in METHODS.items():
            cost, mean, low, high = table[name]
            axes.errorbar(cost, mean, [[mean - low], [high - mean]], fmt="o", color=colour, capsize=3, ms=7, lw=1.2)
            place = {"textcoords": "offset points", "ha": side, "color": colour, "weight": "bold", "fontsize": 9}
            axes.annotate(label, (cost, mean), offset, **place)
        axes.axhline(0, color="black", lw=0.8, ls=":")
        axes.set(xlabel="time of a step, as a multiple of the base's", xlim=(0.9, 2.75), ylim=(-2.5, 9.5))
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("gain in test accuracy, points\n(5 seeds, bar: 95 % interval)")
    save(figure, "cost.png")


def save(figure: plt.Figure, name: str) -> None:
    """Write a small PNG: 48 colours are enough for flat drawings."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(48).save(HERE / name, optimize=True)
    plt.close(figure)


def main() -> None:
    """Draw every figure."""
    with plt.style.context(STYLE):
        draw_step()
        draw_cost()


if __name__ == "__main__":
    main()
