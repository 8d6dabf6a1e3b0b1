"""From runs to numbers: means, paired differences to the baseline, corrected tests, gates, costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from .statistics import Paired, holm, paired
from .store import Run, StoreError
from .suites import Gate, Method, Metric, Suite

FEWEST_FOR_TEST = 6
"""With fewer pairs the Wilcoxon test cannot reach p = .05, whatever the data."""


@dataclass(frozen=True)
class Row:
    """A method."""

    method: Method
    runs: list[Run]
    means: dict[str, float]
    versus: dict[str, Paired]
    """Differences to the baseline by metric, over the seeds that both have; empty for the baseline itself."""
    p_holm: float | None
    """For the primary metric, corrected over all methods."""
    cost: float | None
    """Time of a training step relative to the baseline (median over seeds); ``None`` where it was not measured."""


@dataclass(frozen=True)
class GateResult:
    """A gate and what became of it."""

    gate: Gate
    passed: bool | None
    """``None``: not evaluated, for want of seeds."""
    text: str


@dataclass(frozen=True)
class Summary:
    """A suite's results."""

    suite: Suite
    rows: list[Row]
    seeds: list[int]
    gates: list[GateResult]
    missing: int
    """Runs that were never finished: methods present, on seeds present."""
    current: bool
    """Whether the runs were made with the settings this program would use."""

    @property
    def full(self) -> bool:
        """Whether there are as many seeds as the suite asks for."""
        return len(self.seeds) >= self.suite.seeds

    @property
    def baseline(self) -> Row:
        """The row that the others are compared with."""
        return self.rows[0]

    @property
    def others(self) -> list[Row]:
        """All rows but the baseline, best mean difference of the primary metric first."""
        primary = self.suite.primary
        sign = -1.0 if primary.higher_is_better else 1.0
        return sorted(self.rows[1:], key=lambda row: sign * row.versus[primary.name].mean)


def summarize(suite: Suite, runs: Sequence[Run]) -> Summary:
    """Summarize the runs of one suite.

    Raises:
        StoreError: If the baseline is missing, or runs are not comparable with each other.
    """
    by_method: dict[str, dict[int, Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, {})[run.seed] = run
    _check_comparable(suite, runs, by_method)
    base = by_method[suite.baseline.name]
    rows = []
    for method in suite.methods:
        mine = by_method.get(method.name, {})
        common = sorted(set(mine) & set(base))
        if not common:
            continue
        means = {metric.name: fmean(run.metrics[metric.name] for run in mine.values()) for metric in suite.metrics}
        versus = {}
        if method is not suite.baseline:
            versus = {metric.name: _versus(metric, mine, base, common) for metric in suite.metrics}
        rows.append(Row(method, [mine[seed] for seed in sorted(mine)], means, versus, None, _cost(mine, base, common)))
    rows = _corrected(rows, suite.primary.name)
    seeds = sorted(set().union(*by_method.values()))
    current = all(run.fingerprint == suite.fingerprint(run.method) for run in runs)
    return Summary(
        suite=suite,
        rows=rows,
        seeds=seeds,
        gates=[_judge(suite, gate, rows, current) for gate in suite.gates],
        missing=len(by_method) * len(seeds) - len(runs),
        current=current,
    )


def _check_comparable(suite: Suite, runs: Sequence[Run], by_method: dict[str, dict[int, Run]]) -> None:
    known = [method.name for method in suite.methods]
    strange = sorted(set(by_method) - set(known))
    if strange:
        raise StoreError(f"runs of {suite.name} name methods that this version does not know: {', '.join(strange)}")
    if suite.baseline.name not in by_method:
        raise StoreError(f"no run of the baseline {suite.baseline.name!r}, so there is nothing to compare with")
    lacking = next((run for run in runs if any(metric.name not in run.metrics for metric in suite.metrics)), None)
    if lacking is not None:
        raise StoreError(
            f"the run of {lacking.method}, seed {lacking.seed}, lacks metrics of this version of {suite.name}"
        )
    for name, mine in by_method.items():
        if len({run.fingerprint for run in mine.values()}) > 1:
            raise StoreError(f"runs of {name} were made with different settings and cannot be averaged")
    for seed in {run.seed for run in runs}:
        if len({run.data_hash for run in runs if run.seed == seed}) > 1:
            raise StoreError(f"runs of seed {seed} were made on different data and cannot be paired")


def _versus(metric: Metric, mine: dict[int, Run], base: dict[int, Run], seeds: list[int]) -> Paired:
    return paired(
        [mine[seed].metrics[metric.name] for seed in seeds],
        [base[seed].metrics[metric.name] for seed in seeds],
        higher_is_better=metric.higher_is_better,
    )


def _cost(mine: dict[int, Run], base: dict[int, Run], seeds: list[int]) -> float | None:
    ratios = []
    for seed in seeds:
        own, theirs = mine[seed].step_ms, base[seed].step_ms
        if own and theirs:
            ratios.append(own / theirs)
    return median(ratios) if ratios else None


def _corrected(rows: list[Row], primary: str) -> list[Row]:
    tested = [row for row in rows if row.versus and row.versus[primary].n >= FEWEST_FOR_TEST]
    p_values = [p for row in tested if (p := row.versus[primary].p) is not None]
    corrected = dict(zip([row.method.name for row in tested], holm(p_values), strict=True))
    return [Row(row.method, row.runs, row.means, row.versus, corrected.get(row.method.name), row.cost) for row in rows]


def _judge(suite: Suite, gate: Gate, rows: Sequence[Row], current: bool) -> GateResult:
    metric = suite.metric(gate.metric)
    if gate.at_least is not None:
        least = gate.at_least if metric.higher_is_better else -gate.at_least
        promise = f"{signed(metric, least)} or {'more' if metric.higher_is_better else 'less'}, interval without 0"
    else:
        promise = f"within {100 * (gate.within or 0.0):g} % of the baseline's"
    name = f"{suite.method(gate.method).label}: {metric.label} {promise}"
    if gate.versus is not None:
        name += f", compared with {suite.method(gate.versus).label}"
    found = _compared(gate, metric, rows)
    if found is None or found.n < suite.seeds or not current:
        n = 0 if found is None else found.n
        why = f"{n} of {suite.seeds} seeds" if current else "made with other settings than this version's"
        return GateResult(gate, None, f"{name}: not evaluated ({why})")
    if gate.at_least is not None:
        sign = 1.0 if metric.higher_is_better else -1.0
        passed = sign * found.mean >= gate.at_least and found.clear
    else:
        edge = (gate.within or 0.0) * abs(rows[0].means[gate.metric])
        passed = abs(found.mean) <= edge
    text = f"{name}: {'pass' if passed else 'FAIL'}, measured {signed(metric, found.mean)} {interval(metric, found)}"
    return GateResult(gate, passed, text)


def _compared(gate: Gate, metric: Metric, rows: Sequence[Row]) -> Paired | None:
    by_name = {row.method.name: row for row in rows}
    if gate.method not in by_name:
        return None
    row = by_name[gate.method]
    if gate.versus is None:
        return row.versus[metric.name]
    if gate.versus not in by_name:
        return None
    mine, other = ({run.seed: run for run in by_name[name].runs} for name in (gate.method, gate.versus))
    common = sorted(set(mine) & set(other))
    return _versus(metric, mine, other, common) if common else None


# numbers in words; shares are shown in percent and points


def value(metric: Metric, number: float) -> str:
    """A measured value."""
    text = f"{100 * number:.1f} %" if metric.share else f"{number:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(metric: Metric, number: float) -> str:
    """A difference."""
    text = f"{100 * number:+.1f}" if metric.share else f"{number:+.3g}"
    if float(text) == 0:
        text = "0.0"  # no sign where none shows
    return text.replace("-", "\N{MINUS SIGN}")


def interval(metric: Metric, found: Paired, *, boot: bool = False) -> str:
    """An interval of a difference; a dash where there is none."""
    low, high = (found.boot_low, found.boot_high) if boot else (found.t_low, found.t_high)
    if low is None or high is None:
        return "\N{EN DASH}"
    return f"[{signed(metric, low)}, {signed(metric, high)}]"


def probability(p: float | None) -> str:
    """A p-value."""
    if p is None:
        return "\N{EN DASH}"
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0")
