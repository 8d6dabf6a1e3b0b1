"""``report.html``: one file that needs nothing else, for a reader who knows none of the words yet."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from .figures import figures
from .summary import GateResult, Row, Summary, interval, probability, signed, value

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1b1f24; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 1.2rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .6rem 0; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; }
section + section { border-top: 3px solid #dde2e7; margin-top: 3.5rem; padding-top: .6rem; }
.matrix th, .matrix td { font-size: .82rem; } .matrix th { min-width: 6.2rem; } a { color: #00568a; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
.card { border: 1px solid #dde2e7; border-radius: .4rem; padding: .2rem .8rem .6rem; min-width: 0; }
.card h3 { margin: .5rem 0 .1rem; } .card p { margin: .2rem 0; font-size: .88rem; }
.card td { padding: .25rem .2rem; white-space: normal; } .card tr:last-child td { border-bottom: 0; }
.card td:first-child { position: static; } .card small { display: inline; margin-left: .3rem; white-space: nowrap; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
.lead { font-size: 1.06rem; }
.answer { background: #eef5fb; border-left: 4px solid #0072b2; padding: .7rem 1rem; margin: 1rem 0; }
.answer ul { margin: .4rem 0; padding-left: 1.2rem; } .answer p { margin: .3rem 0; }
.limits { background: #fdf4e3; border-left: 4px solid #e69f00; padding: .5rem 1rem; margin: 1rem 0; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem; min-width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .6rem; border-bottom: 1px solid #dde2e7; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; background: #f5f7f9; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; max-width: 11rem;
  white-space: normal; }
thead th:first-child { background: #f5f7f9; }
small { display: block; color: #545b63; } .up { color: #00568a; } .down { color: #a84300; }
figure { margin: 1rem 0 2rem; } figure img { width: 100%; max-width: 40rem; height: auto; display: block; }
figcaption { font-size: .9rem; color: #3d444c; max-width: 40rem; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; } code, pre { font: .85rem/1.4 ui-monospace, monospace; }
pre { background: #f5f7f9; padding: .6rem .8rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.pass { color: #00568a; } .fail { color: #a84300; font-weight: 700; } .open { color: #545b63; }
"""


def page(summaries: Sequence[Summary], sessions: Sequence[dict[str, Any]]) -> str:
    """The whole document."""
    from .report import remarks  # both halves describe the same limits

    suites = "".join(
        f'<section id="{summary.suite.name}">{_suite(summary, remarks(summary))}</section>' for summary in summaries
    )
    if len(summaries) > 1:
        suites = _overview(summaries) + suites
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>reweigh: benchmark report</title><style>{STYLE}</style></head><body><main>"
        f"{suites}{_origin(sessions)}</main></body></html>\n"
    )


UP, DOWN = "\N{BLACK UP-POINTING TRIANGLE}", "\N{BLACK DOWN-POINTING TRIANGLE}"


def _overview(summaries: Sequence[Summary]) -> str:
    """A card per suite with what its methods do to its first column, and the methods that several suites have."""
    cards = "".join(_card(summary) for summary in summaries)
    return (
        '<section id="overview"><h1>What re-weighting does, and what it does not</h1><p class="lead">Each card is a '
        "data set with a model of its own. A number is a method's difference to plain training in what that data set "
        f"is about, with its 95 % interval: {UP} better, {DOWN} worse, neither: no clear difference. What a method "
        "costs elsewhere stands in the section of its data set.</p>"
        f'<div class="cards">{cards}</div>{_matrix(summaries)}</section>'
    )


def _card(summary: Summary) -> str:
    suite, metric = summary.suite, summary.suite.primary
    rows = "".join(f"<tr><td>{escape(row.method.label)}</td>{_verdict(summary, row)}</tr>" for row in summary.others)
    return (
        f'<div class="card"><h3><a href="#{suite.name}">{escape(suite.title)}</a></h3><p>{escape(metric.label)} with '
        f"{escape(suite.baseline.label)}: <b>{value(metric, summary.baseline.means[metric.name])}</b>"
        f"{'' if metric.higher_is_better else ' (lower is better)'}</p><table>{rows}</table></div>"
    )


def _verdict(summary: Summary, row: Row) -> str:
    metric = summary.suite.primary
    found, tone, sign = row.versus[metric.name], "", ""
    if found.clear:
        better = _improves(row, metric.name, higher=metric.higher_is_better)
        tone, sign = ("up", f"{UP} ") if better else ("down", f"{DOWN} ")
    return f'<td class="{tone}">{sign}{signed(metric, found.mean)}<small>{interval(metric, found)}</small></td>'


def _matrix(summaries: Sequence[Summary]) -> str:
    """Methods that at least two suites have, against those suites."""
    labels: dict[str, str] = {}
    cells: dict[str, dict[str, str]] = {}
    for summary in summaries:
        for row in summary.others:
            labels.setdefault(row.method.name, row.method.label)
            cells.setdefault(row.method.name, {})[summary.suite.name] = _verdict(summary, row)
    shared = sorted((name for name in labels if len(cells[name]) > 1), key=lambda name: -len(cells[name]))
    columns = [s for s in summaries if any(s.suite.name in cells[name] for name in shared)]
    if not shared:
        return ""
    head = "".join(f"<th>{escape(s.suite.title)}<small>{escape(s.suite.primary.label)}</small></th>" for s in columns)
    body = "".join(
        f"<tr><td>{escape(labels[name])}</td>"
        + "".join(cells[name].get(s.suite.name, "<td></td>") for s in columns)
        + "</tr>"
        for name in shared
    )
    return (
        "<h2>The same method on several data sets</h2>"
        f'<div class="scroll"><table class="matrix"><thead><tr><th>method</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _suite(summary: Summary, limits: list[str]) -> str:
    suite = summary.suite
    shown = [metric for metric in suite.metrics if metric.shown]
    parts = [
        f'<h1>{escape(suite.title)}</h1><p class="lead">{escape(suite.story)}</p>',
        f'<div class="answer">{_answer(summary)}</div>',
    ]
    if limits:
        parts.append('<div class="limits">' + "<br>".join(map(escape, limits)) + "</div>")
    parts.append(f"<h2>Results</h2><p>Mean over {len(summary.seeds)} repetitions; below it, the mean difference to ")
    parts.append(f"{escape(suite.baseline.label)} in points, coloured where its 95 % interval excludes 0.</p>")
    parts.append(_means(summary))
    parts.append("<h3>How sure is it?</h3>" + _tests(summary))
    if suite.gates and summary.full:
        parts.append("<h3>Promises</h3><p>Set before the run, at about half the effect first measured.</p><ul>")
        parts += [f'<li class="{_colour(gate)}">{escape(gate.text)}</li>' for gate in summary.gates]
        parts.append("</ul>")
    if suite.published:
        parts.append(
            "<h3>The papers' own figures</h3><p>Theirs, not ours: other code, other hardware, often other settings."
            '</p><div class="scroll"><table><thead><tr><th>method</th><th>what</th><th>figure</th><th>source</th></tr>'
            "</thead><tbody>"
        )
        parts += [
            f"<tr><td>{escape(found.method)}</td><td>{escape(found.metric)}</td><td>{escape(found.figure)}</td>"
            f"<td>{escape(found.source)}</td></tr>"
            for found in suite.published
        ]
        parts.append("</tbody></table></div>")
    for figure in figures(summary):
        image = base64.b64encode(figure.svg.encode()).decode()
        parts.append(
            f'<figure id="{suite.name}-{figure.name}"><h3>{escape(figure.title)}</h3>'
            f'<img src="data:image/svg+xml;base64,{image}" alt="{escape(figure.title)}. {escape(figure.caption)}">'
            f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        )
    parts.append("<h2>What the words mean</h2><h3>Methods</h3><dl>")
    parts += [f"<dt>{escape(row.method.label)}</dt><dd>{escape(row.method.what)}</dd>" for row in summary.rows]
    parts.append("</dl><h3>Columns</h3><dl>")
    parts += [f"<dt>{escape(metric.label)}</dt><dd>{escape(metric.meaning)}</dd>" for metric in shown]
    parts.append(_statistics_words(suite.baseline.label))
    parts.append("</dl><h3>To bear in mind</h3><ul>")
    parts += [f"<li>{escape(note)}</li>" for note in suite.notes]
    parts.append("</ul>")
    return "".join(parts)


def _answer(summary: Summary) -> str:
    suite, primary = summary.suite, summary.suite.primary
    base = escape(suite.baseline.label)
    level = value(primary, summary.baseline.means[primary.name])
    lines = [f"<p><b>{escape(primary.label.capitalize())} with {base}: {level}.</b> {escape(primary.meaning)}</p>"]
    clear = [row for row in summary.others if row.method.claim and row.versus[primary.name].clear]
    good = [row for row in clear if _improves(row, primary.name, higher=primary.higher_is_better)]
    bad = [row for row in clear if row not in good]
    quiet = [row for row in summary.others if row.method.claim and row not in clear]
    silent = [row for row in summary.others if not row.method.claim]
    unit = " in points" if primary.share else ""
    for rows, words in ((good, "Clearly better"), (bad, "Clearly worse")):
        if rows:
            items = "".join(f"<li>{_one(summary, row)}</li>" for row in rows)
            lines.append(f"<p>{words}, with the mean difference{unit} and its 95 % interval:</p><ul>{items}</ul>")
    if quiet:
        lines.append(f"<p>No clear difference: {'; '.join(_one(summary, row) for row in quiet)}.</p>")
    if silent:
        lines.append(f"<p>Shown without a claim: {'; '.join(_one(summary, row) for row in silent)}.</p>")
    lines.append(f"<p>{_price(summary, good)}</p>")
    return "".join(lines)


def _one(summary: Summary, row: Row) -> str:
    metric = summary.suite.primary
    found = row.versus[metric.name]
    return (
        f"{escape(row.method.label)}: {value(metric, row.means[metric.name])}, <b>{signed(metric, found.mean)}</b> "
        f"{interval(metric, found)}, better in {found.wins} of {found.n} repetitions"
    )


def _price(summary: Summary, good: list[Row]) -> str:
    if not good:
        return "No method is clearly better, so there is no price to name."
    losses = []
    for metric in summary.suite.metrics:
        worse = [
            f"{escape(row.method.label)} {signed(metric, row.versus[metric.name].mean)}"
            for row in good
            if row.versus[metric.name].clear and not _improves(row, metric.name, higher=metric.higher_is_better)
        ]
        if worse and metric.shown:
            losses.append(f"{escape(metric.label)} gets clearly worse ({', '.join(worse)})")
    return "The price: " + ("; ".join(losses) + "." if losses else "no other column gets clearly worse.")


def _improves(row: Row, metric: str, *, higher: bool) -> bool:
    return (row.versus[metric].mean > 0) == higher


def _means(summary: Summary) -> str:
    from .report import cost

    shown = [metric for metric in summary.suite.metrics if metric.shown]
    head = "".join(
        f"<th>{_heading(m.label)}{'' if m.higher_is_better else '<small>lower is better</small>'}</th>" for m in shown
    )
    body = []
    for row in [summary.baseline, *summary.others]:
        cells = []
        for metric in shown:
            below = ""
            if row.versus:
                found = row.versus[metric.name]
                tone = (
                    ("up" if _improves(row, metric.name, higher=metric.higher_is_better) else "down")
                    if found.clear
                    else ""
                )
                below = f'<small class="{tone}">{signed(metric, found.mean)}</small>'
            cells.append(f"<td>{value(metric, row.means[metric.name])}{below}</td>")
        body.append(f"<tr><td>{escape(row.method.label)}</td>{''.join(cells)}<td>{cost(row)}</td></tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>method</th>{head}<th>time per training step</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _heading(label: str) -> str:
    return escape(label).replace("-", "\N{NON-BREAKING HYPHEN}")


def _tests(summary: Summary) -> str:
    from .report import effect

    metric = summary.suite.primary
    body = []
    for row in summary.others:
        found = row.versus[metric.name]
        cells = (
            signed(metric, found.mean),
            interval(metric, found),
            interval(metric, found, boot=True),
            effect(found.d_z),
            f"{found.wins} of {found.n}" + (f" ({found.ties} equal)" if found.ties else ""),
            probability(row.p_holm),
        )
        label = escape(row.method.label) + ("" if row.method.claim else "<small>no claim</small>")
        body.append(f"<tr><td>{label}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(
        f"<th>{escape(text)}</th>"
        for text in (f"{metric.label}, difference", "95 % t interval", "95 % bootstrap", "d_z", "better in", "p (Holm)")
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>method</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _statistics_words(baseline: str) -> str:
    words = {
        "difference, points": f"The method minus {baseline} in the same repetition, averaged. 1 point is 1 %.",
        "95 % interval": "Where the true mean difference plausibly lies, computed in two ways (Student's t, bootstrap)."
        " If it excludes 0, chance alone is an unlikely explanation.",
        "d_z": "The mean difference measured in standard deviations of the difference: how steady the effect is.",
        "p (Holm)": "Wilcoxon signed-rank test, corrected for testing several methods at once. Small: unlikely to be "
        "chance.",
        "time per training step": f"Relative to {baseline}, median; none: no training of its own. On a "
        "model this small most of it is Lightning's and Python's own time.",
    }
    return "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in words.items())


def _colour(gate: GateResult) -> str:
    return "open" if gate.passed is None else "pass" if gate.passed else "fail"


def _origin(sessions: Sequence[dict[str, Any]]) -> str:
    parts = ["<h2>How this was made</h2>"]
    for session in sessions:
        about = session.get("environment", {})
        versions = ", ".join(f"{name} {number}" for name, number in about.get("versions", {}).items())
        lines = [
            f"{session['command']}",
            f"workers {session.get('workers')}; Python {about.get('python')}; {about.get('platform')}; "
            f"{about.get('cores')} cores",
            f"commit {about.get('commit') or 'unknown'}",
            versions,
        ]
        parts.append(f"<pre>{escape(chr(10).join(lines))}</pre>")
    parts.append("<p>The same command gives the same numbers on the same platform, except for times.</p>")
    return "".join(parts)
