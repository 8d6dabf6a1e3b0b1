"""What the imbalance of a data set is, and which objectives are worth trying, from the suites' committed results."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .readers import DataError, read_documents
from .suites import SUITES
from .summary import signed

if TYPE_CHECKING:
    from rich.console import Console

RESULTS = Path(__file__).resolve().parent / "results"
BETA = 0.999
"""Of the effective numbers."""
MANY, FEW = 100, 20
"""Classes with more samples than the first are many-shot, with fewer than the second few-shot."""
MILD = 3.0
"""Below this imbalance factor nothing is advised."""
RARE = 20
"""Tokens that occur at most so often are rare."""


@dataclass(frozen=True)
class Suggestion:
    """An objective worth trying."""

    objective: str
    """As one would type it."""
    why: str
    evidence: tuple[str, ...] = ()
    """What the suites measured, with the price, one line each."""


@dataclass(frozen=True)
class Advice:
    """What was found, in words, and what to try, the cheapest first."""

    kind: str
    profile: Mapping[str, Any]
    """Numbers by name."""
    words: tuple[str, ...]
    suggestions: tuple[Suggestion, ...] = field(default=())


def advise(
    labels: Sequence[Any] | np.ndarray[Any, Any] | None = None,
    *,
    groups: Sequence[Any] | np.ndarray[Any, Any] | None = None,
    token_counts: Sequence[float] | np.ndarray[Any, Any] | None = None,
    numbers: Sequence[float] | np.ndarray[Any, Any] | None = None,
) -> Advice:
    """Look at labels, groups, token counts or numeric targets.

    Args:
        labels: One class per sample; with ``groups``, subgroups are pairs of both.
        groups: One group per sample.
        token_counts: How often each token occurs in the training text.
        numbers: One number per sample (regression).

    Raises:
        ValueError: If nothing is given, too much, or something empty or of another length.

    Example:
        >>> found = advise(["cat"] * 900 + ["dog"] * 30)
        >>> found.profile["imbalance_factor"]
        30.0
        >>> found.suggestions[0].objective
        'posthoc_logit_adjustment(logits, counts)'
    """
    given = [name for name, value in (("token_counts", token_counts), ("numbers", numbers)) if value is not None]
    if labels is not None or groups is not None:
        given.append("labels or groups")
    if len(given) != 1:
        raise ValueError(f"advise: give one of labels (with or without groups), token_counts, numbers; got {given}")
    if token_counts is not None:
        return _tokens(np.asarray(token_counts, dtype=float))
    if numbers is not None:
        return _numbers(np.asarray(numbers, dtype=float))
    if labels is not None and groups is not None and len(labels) != len(groups):
        raise ValueError(f"advise: labels and groups must have one length, got {len(labels)} and {len(groups)}")
    if groups is not None:
        pairs = list(zip(labels, groups, strict=True)) if labels is not None else list(groups)
        return _groups(Counter(pairs))
    return classes(Counter(list(labels or ()) if not isinstance(labels, np.ndarray) else labels.tolist()))


def classes(counts: Mapping[Any, float]) -> Advice:
    """Advice for class sizes."""
    sizes = _sizes("labels", counts)
    factor = sizes[0][1] / sizes[-1][1]
    numbers = np.array([size for _, size in sizes], dtype=float)
    effective = (1.0 - BETA**numbers) / (1.0 - BETA)
    many, few = int((numbers > MANY).sum()), int((numbers < FEW).sum())
    profile = {
        "samples": int(numbers.sum()),
        "classes": len(sizes),
        "counts": {str(name): int(size) for name, size in sizes},
        "imbalance_factor": factor,
        "effective_numbers": {str(name): float(value) for (name, _), value in zip(sizes, effective, strict=True)},
        "many": many,
        "medium": len(sizes) - many - few,
        "few": few,
    }
    words = [
        f"{profile['samples']} samples, {len(sizes)} classes, from {sizes[0][1]:g} ({sizes[0][0]}) down to "
        f"{sizes[-1][1]:g} ({sizes[-1][0]}): imbalance factor {factor:.3g}.",
        f"{many} classes have more than {MANY} samples, {few} fewer than {FEW}, {len(sizes) - many - few} are between.",
        f"Effective numbers (beta {BETA}) run from {effective[0]:.0f} to {effective[-1]:.0f}.",
    ]
    if factor < MILD:
        words.append(f"Below a factor of {MILD:g} plain cross-entropy is as good as anything; nothing is advised.")
        return Advice("classes", profile, tuple(words))
    if numbers[-1] < 5:
        words.append(
            "The rarest class has fewer than 5 samples: no weighting makes up for what the data do not show; look at "
            "its recall over several seeds."
        )
    words.append("Judge by balanced accuracy and the recall of each class; plain accuracy hides what this is about.")
    return Advice(
        "classes",
        profile,
        tuple(words),
        (
            Suggestion(
                "posthoc_logit_adjustment(logits, counts)",
                "Costs no training: correct the logits of the model that you have, and see what is left to gain.",
                evidence(("digits_lt50", "posthoc_la"), ("unicode_category", "posthoc_la")),
            ),
            Suggestion(
                "Objective(CrossEntropy(logits=BalancedSoftmax(counts)))",
                "The same correction in training, so that the model need not learn the class sizes.",
                evidence(("digits_lt50", "balanced_softmax"), ("unicode_category", "balanced_softmax")),
            ),
            Suggestion(
                'Objective(CrossEntropy(), InverseFrequency(counts, power=0.5), "weighted_mean")',
                "The mild weighting: most of the gain for rare classes at hardly a price for the common ones.",
                evidence(("unicode_category", "sqrt_inverse")),
            ),
            Suggestion(
                'Objective(CrossEntropy(), InverseFrequency(counts), "weighted_mean")',
                "The full weighting, where rare classes must count as much as common ones.",
                evidence(("digits_lt50", "inverse"), ("unicode_category", "inverse")),
            ),
            Suggestion(
                "FocalLoss(2.0)",
                "Often tried; knows no class sizes. The numbers say what to expect.",
                evidence(("digits_lt50", "focal"), ("unicode_category", "focal")),
            ),
        ),
    )


def _groups(counts: Mapping[Any, float]) -> Advice:
    sizes = _sizes("groups", counts)
    factor = sizes[0][1] / sizes[-1][1]
    profile = {
        "samples": int(sum(size for _, size in sizes)),
        "groups": len(sizes),
        "counts": {_name(name): int(size) for name, size in sizes},
        "imbalance_factor": factor,
    }
    words = [
        f"{profile['samples']} samples in {len(sizes)} groups, from {sizes[0][1]:g} ({_name(sizes[0][0])}) down to "
        f"{sizes[-1][1]:g} ({_name(sizes[-1][0])}): imbalance factor {factor:.3g}.",
        "Judge by the accuracy of the worst group, and choose the model by it on validation data, under every loss.",
    ]
    if factor < MILD:
        words.append(
            f"Below a factor of {MILD:g} groups are even enough; look at the worst group before anything else."
        )
    return Advice(
        "groups",
        profile,
        tuple(words),
        (
            Suggestion(
                "WeightedRandomSampler(group_sampling_weights(group), ...)",
                "The baseline that group DRO has to beat: batches with equal shares of groups.",
                evidence(("digits_spurious", "resampling")),
            ),
            Suggestion(
                f"GroupDROLoss({len(sizes)}, adjustment=1.0, group_counts=counts)",
                "Follows which group does worst, and allows for what small groups lose from training to test.",
                evidence(("digits_spurious", "group_dro_adjusted"), ("digits_spurious", "group_dro")),
            ),
            Suggestion(
                "CVaRLoss(0.2)",
                "Needs no groups. What is hard is not what is rare, so the numbers are what they are.",
                evidence(("digits_spurious", "cvar")),
            ),
        ),
    )


def _tokens(counts: np.ndarray[Any, Any]) -> Advice:
    if counts.ndim != 1 or not len(counts) or not np.isfinite(counts).all() or (counts < 0).any() or not counts.any():
        raise ValueError("advise: token_counts must be a row of counts >= 0, not all 0")
    seen = np.sort(counts[counts > 0])[::-1]
    rare = seen <= RARE
    profile = {
        "tokens": float(counts.sum()),
        "vocabulary": len(counts),
        "seen": len(seen),
        "rare_types": int(rare.sum()),
        "rare_share": float(seen[rare].sum() / seen.sum()),
        "top10_share": float(seen[:10].sum() / seen.sum()),
    }
    words = (
        f"{counts.sum():.0f} tokens of {len(seen)} kinds (vocabulary {len(counts)}); the 10 most common ones are "
        f"{100 * profile['top10_share']:.0f} % of the text.",
        f"{int(rare.sum())} kinds occur at most {RARE} times; together they are {100 * profile['rare_share']:.1f} % of "
        "the text.",
        "Judge by the accuracy on rare tokens and by perplexity together: each is easily bought with the other.",
    )
    return Advice(
        "tokens",
        profile,
        words,
        (
            Suggestion(
                "posthoc_logit_adjustment(logits, counts, tau=0.5)",
                "Costs no training; what a weighting has to be compared with.",
                evidence(("pydoc_lm", "posthoc_la")),
            ),
            Suggestion(
                "PowerLawDecayLoss(counts, alpha=0.25)",
                "Rare tokens count more; alpha says how much is paid for it.",
                evidence(("pydoc_lm", "pdl"), ("pydoc_lm", "pdl_half")),
            ),
            Suggestion(
                "TLDRLoss()",
                "For models that answer everything alike; elsewhere it does little harm and no good.",
                evidence(("pydoc_lm", "tldr")),
            ),
        ),
    )


def _numbers(values: np.ndarray[Any, Any]) -> Advice:
    if values.ndim != 1 or len(values) < 4 or not np.isfinite(values).all():
        raise ValueError("advise: numbers must be a row of at least 4 finite values")
    edges = np.linspace(values.min(), values.max(), 5)
    counts = np.histogram(values, edges)[0]
    factor = counts.max() / max(1, counts.min())
    profile = {
        "samples": len(values),
        "range": [float(values.min()), float(values.max())],
        "counts": {f"{low:.3g} to {high:.3g}": int(n) for low, high, n in zip(edges, edges[1:], counts, strict=False)},
        "imbalance_factor": float(factor),
    }
    words = [
        f"{len(values)} targets from {values.min():.3g} to {values.max():.3g}; quarters of that range hold "
        f"{', '.join(map(str, counts))} of them.",
        "Judge by the error in each quarter, not by the mean error alone.",
    ]
    if factor < MILD:
        words.append(f"Below a factor of {MILD:g} between quarters a weighting has little to do.")
    return Advice(
        "numbers",
        profile,
        tuple(words),
        (
            Suggestion(
                "a straight line behind the model, fitted with density weights",
                "Costs no training; what weights have to be compared with.",
                evidence(("diabetes_skewed", "posthoc")),
            ),
            Suggestion(
                'Objective(FromLoss(squared_error), GroupFrequency(density, power=0.5), "weighted_mean")',
                "The mild weighting by how common a target is.",
                evidence(("diabetes_skewed", "density_sqrt")),
            ),
            Suggestion(
                'Objective(FromLoss(squared_error), GroupFrequency(density), "weighted_mean")',
                "The full one.",
                evidence(("diabetes_skewed", "density")),
            ),
        ),
    )


def evidence(*pairs: tuple[str, str]) -> tuple[str, ...]:
    """What the committed results say of methods, as one line each: the first column, and what got clearly worse."""
    lines = []
    for suite_name, method in pairs:
        found = _result(suite_name)
        row = next((row for row in found.get("summary", ()) if row["method"] == method), None)
        if row is None:
            continue
        suite = SUITES[suite_name]()
        primary = suite.primary
        versus = row["versus_baseline"]
        main = versus[primary.name]
        worse = [
            f"{metric.label} {signed(metric, versus[metric.name]['mean'])}"
            for metric in suite.metrics
            if metric.shown and metric.name in versus and _clearly_worse(versus[metric.name], metric.higher_is_better)
        ]
        interval = f"[{signed(primary, main['t_low'])}, {signed(primary, main['t_high'])}]"
        price = f"; the price: {', '.join(worse)}" if worse else "; no other column clearly worse"
        lines.append(f"{suite_name}: {primary.label} {signed(primary, main['mean'])} {interval}{price}")
    return tuple(lines)


def _clearly_worse(versus: Mapping[str, Any], higher: bool) -> bool:
    low, high = versus["t_low"], versus["t_high"]
    return low is not None and (high < 0 if higher else low > 0)


@cache
def _result(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _sizes(what: str, counts: Mapping[Any, float]) -> list[tuple[Any, float]]:
    if not counts:
        raise ValueError(f"advise: {what} must not be empty")
    if any(size <= 0 for size in counts.values()):
        raise ValueError(f"advise: {what} must have counts > 0, got {min(counts.values()):g}")
    return sorted(counts.items(), key=lambda pair: (-pair[1], str(pair[0])))


def _name(group: Any) -> str:
    return " / ".join(map(str, group)) if isinstance(group, tuple) else str(group)


# the command line


def advice_from(options: Any) -> Advice:
    """Advice for the command line's arguments: ``counts``, or a ``file`` with ``target`` and ``group``."""
    if options.counts is not None:
        try:
            sizes = [float(text) for text in options.counts.split(",")]
        except ValueError:
            raise ValueError(f"--counts must be numbers with commas between them, got {options.counts!r}") from None
        return classes({f"class {place}": size for place, size in enumerate(sizes)})
    path = Path(options.file)
    if path.suffix.lower() != ".csv":
        if options.target or options.group:
            raise ValueError(f"--target and --group name columns of a .csv file, got {path.name}")
        words = Counter(word for text in read_documents(path) for word in text.split())
        return advise(token_counts=list(words.values()))
    columns = _columns(path)
    for name, given in (("--target", options.target), ("--group", options.group)):
        if given is not None and given not in columns:
            raise ValueError(f"{name}: {path.name} has no column {given!r}; it has {', '.join(columns)}")
    if options.group is not None:
        labels = columns[options.target] if options.target else None
        return advise(labels, groups=columns[options.group])
    if options.target is None:
        raise ValueError(f"--target must name one of the columns: {', '.join(columns)}")
    values = columns[options.target]
    numbers = _floats(values)
    if numbers is not None and (any(not value.is_integer() for value in numbers) or len(set(numbers)) > 50):
        return advise(numbers=numbers)
    return advise(values)


def _columns(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    if len(rows) < 2:
        raise DataError(f"{path}: must have a header and at least one row, got {len(rows)} lines")
    header, *body = rows
    for number, row in enumerate(body, 2):
        if len(row) != len(header):
            raise DataError(f"{path}, line {number}: must have {len(header)} columns, got {len(row)}")
    return {name: [row[place] for row in body] for place, name in enumerate(header)}


def _floats(values: Sequence[str]) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def show_advice(advice: Advice, console: Console) -> None:
    """Print it."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for text in advice.words:
        say(text)
    if advice.suggestions:
        say("\nWorth trying, in this order (measured on the suites, not on your data):")
    for place, suggestion in enumerate(advice.suggestions, 1):
        say(f"\n{place}. {suggestion.objective}\n   {suggestion.why}")
        for text in suggestion.evidence:
            say(f"   {text}")
