"""The report's figures, as self-contained SVG. Colours are Okabe and Ito's, told apart by colour-blind readers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

from .summary import Row, Summary, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#767676",
)
LOOKS = [(BLUE, "-"), (RED, "--"), (GREEN, "-"), (PURPLE, "-."), (ORANGE, "-"), (SKY, ":")]
MARKS = ("o", "s", "^", "D", "v", "P")
WIDTH = 4.8
"""Inches. Narrow, so that text stays readable when the page is shrunk to a phone."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.grid": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "reweigh",
}


@dataclass(frozen=True)
class Figure:
    """A drawing and its words."""

    name: str
    title: str
    caption: str
    svg: str


def figures(summary: Summary) -> list[Figure]:
    """All figures that the runs have data for."""
    draws = (
        differences,
        by_class,
        by_group,
        by_frequency,
        reliability,
        weights_over_training,
        tasks_over_training,
    )
    made = [draw(summary) for draw in draws]
    return [figure for figure in made if figure is not None]


@contextmanager
def _canvas(height: float) -> Iterator[tuple[Canvas, Callable[[], str]]]:
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")

        def render() -> str:
            FigureCanvasSVG(canvas)
            buffer = io.StringIO()
            canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            text = buffer.getvalue()
            text = text[text.index("<svg") :]
            return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)

        yield canvas, render


def differences(summary: Summary) -> Figure | None:
    """The primary metric's paired differences: a dot per seed, mean and interval."""
    rows, metric = summary.others, summary.suite.primary
    if not rows:
        return None
    scale = 100.0 if metric.share else 1.0
    base = {run.seed: run.metrics[metric.name] for run in summary.baseline.runs}
    sign = 1.0 if metric.higher_is_better else -1.0
    gates = {g.method: sign * g.at_least for g in summary.suite.gates if g.metric == metric.name and g.at_least}
    with _canvas(0.9 + 0.46 * len(rows)) as (canvas, render):
        axes = canvas.add_subplot()
        axes.axvline(0, color="black", linewidth=0.8)
        for place, row in enumerate(rows):
            found = row.versus[metric.name]
            y = -float(place)
            dots = [scale * (run.metrics[metric.name] - base[run.seed]) for run in row.runs if run.seed in base]
            spread = np.linspace(0.04, 0.3, len(dots)) if len(dots) > 1 else np.full(1, 0.15)
            axes.scatter(dots, y + spread, s=15, color=SKY, edgecolor="white", linewidth=0.4, zorder=2)
            y -= 0.14
            if found.t_low is not None and found.t_high is not None:
                axes.plot([scale * found.t_low, scale * found.t_high], [y, y], color=BLUE, linewidth=2.4, zorder=3)
            axes.plot(scale * found.mean, y, "o", color=BLUE, markersize=6.5, zorder=4)
            if row.method.name in gates:
                axes.plot(scale * gates[row.method.name], y, marker="|", color=RED, markersize=12, markeredgewidth=2)
            note = signed(metric, found.mean)
            axes.annotate(note, (1.01, y), xycoords=("axes fraction", "data"), va="center", ha="left", weight="bold")
        axes.set_yticks([-float(place) for place in range(len(rows))], [_wrapped(row) for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-len(rows) + 0.45, 0.55)
        unit = "points" if metric.share else "difference"
        axes.set_xlabel(f"{metric.label} minus that of {summary.suite.baseline.label}, {unit}")
        svg = render()
    promise = " A red bar marks the least that the suite promises for a method." if gates else ""
    better = "right" if metric.higher_is_better else "left"
    return Figure(
        "differences",
        f"{metric.label.capitalize()}: difference to {summary.suite.baseline.label}",
        f"Each small dot is one repetition, the large dot the mean, the line its 95 % t interval; further {better} is "
        f"better.{promise}",
        svg,
    )


def by_class(summary: Summary) -> Figure | None:
    """Recall (or precision) of each class, by its number of training samples: a panel per method, with the baseline."""
    for name, word in (("class_recall", "recall"), ("class_precision", "average precision")):
        rows = [row for row in summary.others if _each(row, name) is not None]
        base = _each(summary.baseline, name)
        if base is None or not rows:
            continue
        counts = summary.baseline.runs[0].details["class_counts"]
        places = np.arange(len(counts))
        every = max(1, round(len(counts) / 4))
        with _panels(rows) as (canvas, panels, render):
            for axes, row in panels:
                mine = np.asarray(_each(row, name))
                gain, loss = mine >= base, mine < base
                axes.fill_between(places, 100 * base, 100 * mine, where=gain, color=SKY, alpha=0.35, linewidth=0)
                axes.fill_between(places, 100 * base, 100 * mine, where=loss, color=ORANGE, alpha=0.5, linewidth=0)
                axes.plot(places, 100 * base, color=GREY, linewidth=1.4, linestyle="--")
                axes.plot(places, 100 * mine, color=BLUE, linewidth=1.8, marker="o", markersize=3.2)
                axes.set_ylim(0, 103)
                axes.set_yticks([0, 50, 100])
                axes.set_xticks(places, [str(count) if i % every == 0 else "" for i, count in enumerate(counts)])
            canvas.supxlabel("training samples of the class", fontsize=9)
            canvas.supylabel(f"{word}, %", fontsize=9)
            svg = render()
        return Figure(
            "by_class",
            f"Who gains: {word} by class size",
            f"Solid: the method. Dashed grey: {summary.suite.baseline.label}. Blue area: gain, orange area: loss. "
            "Classes run from the most common (left) to the rarest (right); means over repetitions.",
            svg,
        )
    return None


def by_group(summary: Summary) -> Figure | None:
    """Accuracy of each group: a dot per method and group."""
    rows = [row for row in summary.rows if _each(row, "group_accuracy") is not None]
    if not rows:
        return None
    names = rows[0].runs[0].details.get("group_names") or []
    counts = rows[0].runs[0].details["group_counts"]
    with _canvas(1.2 + 0.34 * len(rows)) as (canvas, render):
        axes = canvas.add_subplot()
        for place in range(len(counts)):
            found = [100 * float(_each(row, "group_accuracy")[place]) for row in rows]  # type: ignore[index]
            label = f"{names[place] if names else f'group {place}'} ({counts[place]} in training)"
            axes.plot(
                found, [-i for i in range(len(rows))], MARKS[place % len(MARKS)], color=LOOKS[place % 6][0], label=label
            )
        axes.set_yticks([-i for i in range(len(rows))], [row.method.label for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_xlabel("accuracy, %")
        canvas.legend(loc="outside lower center", ncols=2 if len(counts) > 2 else 1, frameon=False)
        svg = render()
    return Figure(
        "by_group",
        "Who gains: accuracy of each group",
        "A mark per group; the leftmost one of a line is the group that the method serves worst. Means over "
        "repetitions.",
        svg,
    )


def by_frequency(summary: Summary) -> Figure | None:
    """Unweighted loss of a token against how often training has it."""
    rows = [row for row in summary.rows if all("by_frequency" in run.details for run in row.runs)]
    if not rows:
        return None
    with _canvas(3.1) as (canvas, render):
        axes = canvas.add_subplot()
        for place, row in enumerate(rows):
            bins: dict[int, list[tuple[float, float, int]]] = {}
            for run in row.runs:
                for count, loss, number in run.details["by_frequency"]:
                    bins.setdefault(round(np.log2(count + 1)), []).append((count, loss, number))
            points = []
            for _, found in sorted(bins.items()):
                counts, losses, numbers = (np.array(column, dtype=float) for column in zip(*found, strict=True))
                points.append((np.average(counts, weights=numbers), np.average(losses, weights=numbers)))
            colour, dash = LOOKS[place % len(LOOKS)]
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=1.8, label=row.method.label)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlabel("occurrences in training")
        axes.set_ylabel("loss of a word, nats")
        canvas.legend(loc="outside lower center", ncols=2, frameon=False)
        svg = render()
    return Figure(
        "by_frequency",
        "Who gains: loss against word frequency",
        "Unweighted loss on held-out text, for words that training has seen as often as the axis below says. Lower is "
        "better; a line that is lower on the left and higher on the right takes from common words for rare ones.",
        svg,
    )


def reliability(summary: Summary) -> Figure | None:
    """Share of right answers against confidence: a panel per method."""
    rows = [row for row in summary.rows if all("reliability" in run.details for run in row.runs)]
    if not rows:
        return None
    with _panels(rows) as (canvas, panels, render):
        for axes, row in panels:
            bins: dict[int, list[tuple[int, float, float]]] = {}
            for run in row.runs:
                for number, confidence, right in run.details["reliability"]:
                    bins.setdefault(min(int(confidence * 15), 14), []).append((number, confidence, right))
            points = []
            for _, found in sorted(bins.items()):
                numbers, confidences, rights = (np.array(column, dtype=float) for column in zip(*found, strict=True))
                points.append(
                    (np.average(confidences, weights=numbers), np.average(rights, weights=numbers), numbers.sum())
                )
            x, y, sizes = (np.array(column) for column in zip(*points, strict=True))
            axes.plot([0, 100], [0, 100], color=GREY, linewidth=1.2, linestyle="--")
            axes.scatter(100 * x, 100 * y, s=14 + 50 * sizes / sizes.max(), color=BLUE, alpha=0.8, linewidth=0)
            axes.set_xlim(0, 103)
            axes.set_ylim(0, 103)
            axes.set_xticks([0, 50, 100])
            axes.set_yticks([0, 50, 100])
        canvas.supxlabel("confidence, %", fontsize=9)
        canvas.supylabel("right, %", fontsize=9)
        svg = render()
    return Figure(
        "reliability",
        "Can its confidence be believed?",
        "Share of right answers among those given with some confidence; larger dots: more answers. On the dashed line "
        "confidence is what it says; below it the method is too sure of itself.",
        svg,
    )


def weights_over_training(summary: Summary) -> Figure | None:
    """How many times more a sample of a rare class counts than one of a common class, step by step."""
    curves = [(row, curve) for row in summary.rows if (curve := _weight_ratio(row)) is not None]
    if not curves:
        return None
    with _canvas(3.1) as (canvas, render):
        axes = canvas.add_subplot()
        axes.axhline(1.0, color=GREY, linewidth=1.2)
        for place, (row, (steps, ratio)) in enumerate(curves):
            colour, dash = LOOKS[place % len(LOOKS)]
            axes.plot(steps, ratio, color=colour, linestyle=dash, linewidth=1.9, label=row.method.label)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low / 1.5 <= tick <= high * 1.5]
        axes.set_yticks(ticks, [f"{tick:g}\N{MULTIPLICATION SIGN}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_xlabel("training step")
        axes.set_ylabel("weight, rare over common")
        axes.margins(x=0.01)
        canvas.legend(loc="outside lower center", ncols=2, frameon=False)
        svg = render()
    return Figure(
        "weights",
        "Weights over training",
        "How many times more a training sample of the three rarest classes counts than one of the three most common "
        f"(logarithmic; the grey line, 1\N{MULTIPLICATION SIGN}, is {summary.suite.baseline.label}). Medians over the "
        "repetitions in which weights were recorded.",
        svg,
    )


def tasks_over_training(summary: Summary) -> Figure | None:
    """Weight of each task, as a share of all, step by step: a panel per method that changes it."""
    rows = [row for row in summary.rows if any("tasks" in run.details for run in row.runs)]
    if not rows:
        return None
    with _panels(rows) as (canvas, panels, render):
        handles: dict[str, Any] = {}
        for axes, row in panels:
            recorded = [run.details["tasks"] for run in row.runs if "tasks" in run.details]
            names = list(recorded[0]["weight"])
            weights = np.array([[found["weight"][name] for name in names] for found in recorded], dtype=np.float64)
            shares = np.median(weights / weights.sum(axis=1, keepdims=True), axis=0)
            for place, (name, share) in enumerate(zip(names, shares, strict=True)):
                colour, dash = LOOKS[place]
                (handles[name],) = axes.plot(
                    recorded[0]["step"], 100 * share, color=colour, linestyle=dash, linewidth=1.8
                )
            axes.set_yscale("symlog", linthresh=1)
            axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
            axes.set_ylim(0, 130)
        canvas.supxlabel("training step", fontsize=9)
        canvas.supylabel("share of all weights, %", fontsize=9)
        canvas.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=3, frameon=False)
        svg = render()
    return Figure(
        "tasks",
        "Task weights over training",
        "How much of the sum of all weights each task has, step by step (logarithmic above 1 %). Where losses are in "
        "different units, equal weights are not equal shares of the gradient. Medians over recorded repetitions.",
        svg,
    )


@contextmanager
def _panels(rows: Sequence[Row]) -> Iterator[tuple[Canvas, list[tuple[Axes, Row]], Callable[[], str]]]:
    """Two panels to a line, one per row, with the method's name above it."""
    lines = -(-len(rows) // 2)
    with _canvas(0.75 + 1.42 * lines) as (canvas, render):
        grid = canvas.subplots(lines, 2, sharex=True, sharey=True, squeeze=False)
        panels = list(zip(grid.flat, rows, strict=False))
        for axes, row in panels:
            axes.set_title(row.method.label, loc="left")
        for axes in list(grid.flat)[len(rows) :]:
            axes.axis("off")
        for axes in list(grid.flat)[max(0, len(rows) - 2) : len(rows)]:
            axes.tick_params(labelbottom=True)
        yield canvas, panels, render


def _each(row: Row, name: str) -> np.ndarray[Any, Any] | None:
    """Mean over a row's runs of a list in their details; ``None`` where one has none."""
    found = [run.details[name] for run in row.runs if name in run.details]
    return np.mean(found, axis=0) if found and len(found) == len(row.runs) else None


def _weight_ratio(row: Row) -> tuple[list[int], np.ndarray[Any, Any]] | None:
    recorded = [run.details["weights"] for run in row.runs if "weights" in run.details]
    if not recorded:
        return None
    tail = np.array([found["tail"] for found in recorded], dtype=np.float64)
    head = np.array([found["head"] for found in recorded], dtype=np.float64)
    usable = np.where(head > 0, head, np.nan)
    return recorded[0]["step"], np.array([_median(column) for column in (tail / usable).T])


def _median(values: np.ndarray[Any, Any]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _wrapped(row: Row) -> str:
    words, lines = row.method.label.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 15 and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
