"""Small line drawings as SVG that takes the page's own text colour, so that it reads on light and on dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import Tensor

COLOURS = ("#3d85c6", "#e08a1e", "#3fa35b", "#b05fc4")
"""Of middling lightness; lines differ in their dashes as well."""
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (8, 2, 2, 2)))
MARKS = ("o", "s", "^", "D")
WIDTH, HEIGHT = 3.6, 2.5
_TEXT = "#010203"


@dataclass(frozen=True)
class Line:
    """One line of a panel."""

    label: str
    y: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    xlabel: str
    ylabel: str
    x: Sequence[float]
    lines: Sequence[Line]
    log_x: bool = False
    points: bool = False
    """Whether x are separate things (classes, samples) rather than a line."""


@dataclass(frozen=True)
class Curve:
    """A figure."""

    panels: Sequence[Panel]
    caption: str


def numbers(value: Tensor) -> list[float]:
    """Plain floats, not finite ones as NaN (a gap in the line)."""
    return [number if math.isfinite(number) else math.nan for number in value.detach().double().flatten().tolist()]


def svg(panel: Panel, title: str) -> str:
    """The panel as an ``<svg>`` element: no script, no font, nothing from elsewhere; the same at every call."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        **{"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "font.family": ["sans-serif"]},
        **{"text.color": _TEXT, "axes.labelcolor": _TEXT, "xtick.color": _TEXT, "ytick.color": _TEXT},
        **{"axes.edgecolor": _TEXT, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8},
        **{"mathtext.default": "regular", "axes.formatter.useoffset": False, "legend.frameon": False},
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.patch.set_alpha(0.0)
        for at, line in enumerate(panel.lines):
            look: dict[str, Any] = {"color": COLOURS[at % len(COLOURS)], "label": line.label}
            if panel.points:
                axes.plot(panel.x, line.y, MARKS[at % 4], markersize=4, **look)
            else:
                dashes = DASHES[max(1, at % 4)] if line.dashed else DASHES[at % 4]
                axes.plot(panel.x, line.y, linestyle=dashes, linewidth=1.6, **look)
        if panel.log_x:
            axes.set_xscale("log")
        highest = max((y for line in panel.lines for y in line.y if math.isfinite(y)), default=1.0)
        if all(y >= 0 for line in panel.lines for y in line.y if math.isfinite(y)):
            axes.set_ylim(bottom=-0.03 * highest if highest > 0 else -0.03, top=1.08 * highest or 1.0)
        axes.set_xlabel(panel.xlabel)
        axes.set_ylabel(panel.ylabel)
        if len(panel.lines) > 1:
            axes.legend(fontsize=8)
        figure.subplots_adjust(left=0.6 / WIDTH, right=1 - 0.1 / WIDTH, bottom=0.18, top=0.96)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    made = re.search(r"<svg.*</svg>", out.getvalue(), re.S)
    if made is None:  # pragma: no cover
        raise ValueError(f"{title}: no drawing came out")
    text = re.sub(r"<metadata>.*?</metadata>", "", made.group(), flags=re.S).replace(_TEXT, "currentColor")
    text = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number.group()):.2f}".rstrip("0").rstrip("."), text)
    box = re.search(r'viewBox="[^"]*"', text)
    head = (
        f'<svg {box.group() if box else ""} role="img" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
    )
    return re.sub(r"\n\s*", "\n", re.sub(r"^<svg [^>]*>", head, text))
