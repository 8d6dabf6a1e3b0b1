"""The generated pages, in Markdown: one per method, the catalogue, the citations."""

from __future__ import annotations

import doctest
import inspect
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from html import escape
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from . import curves, results
from .docstrings import full_name, sections, to_markdown
from .figure import svg
from .records import Entry, entries, logit_transforms, sources

DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
CATALOGUE, CITATION = "methods/index.md", "citation.md"
_WORDS = {
    "local": "its own term, constants and stored state",
    "scaled": "its own term, times one constant number of the batch",
    "global": "other terms of the batch as well",
}
_TERMS = {
    "any": "terms of any kind",
    "class": "terms with one label of several classes",
    "binary": "terms with a yes-or-no label",
    "token": "tokens",
    "transition": "terms whose labels may have been changed, in a known way",
    "region": "classes of an image, one term for each",
    "pair": "pairs of samples",
    "stacked": "two losses of each sample",
    "task": "the losses of several tasks",
}
_EVENTS = {
    "fit": "before training (`fit`)",
    "forward": "in each training forward",
    "step": "after each optimizer step",
    "epoch": "after each epoch",
    "validation": "after each validation",
}
_EXTRAS = {
    "lightning": {"pytorch_lightning", "lightning", "torchmetrics", "reweigh.lightning_callbacks"},
    "bench": {"sklearn", "scipy", "matplotlib", "reweigh.benchmarks"},
    "torchjd": {"torchjd"},
    "hf": {"transformers", "trl"},
}
"""What needs an extra, by the extra's name in pyproject.toml; "bench" brings "lightning" with it."""
_STATE = {"clock": "how often its events came (`clock`)"}
SHOWN_BY_MKDOCSTRINGS = ("Args", "Raises", "Returns")
"""Sections that stand under the signature; :func:`method_page` shows the others itself."""


def generated() -> dict[str, str]:
    """Every generated page: its path in the sources and its Markdown."""
    pages = {entry.path: method_page(entry) for entry in entries()}
    return {**pages, CATALOGUE: catalogue_page(), CITATION: citation_page()}


def navigation(nav: list[Any]) -> list[Any]:
    """The site's navigation with every method's page in the section that holds the catalogue."""

    def listed(kind: str) -> list[dict[str, str]]:
        found = {entry.cls.__name__: entry.path for entry in entries() if entry.kind == kind}
        return [{name: found[name]} for name in sorted(found, key=str.lower)]

    methods = [{"Weightings": listed("weighting")}, {"Objectives": listed("objective")}]
    return [
        {title: [*inside, *methods] if CATALOGUE in str(inside) else inside for title, inside in item.items()}
        for item in nav
    ]


def resolver(entry: Entry) -> Callable[[str], str | None]:
    """Where the roles of a method's docstring lead: full names, its own members, names of its module."""
    module = import_module(entry.cls.__module__)

    def resolve(target: str) -> str | None:
        first = target.partition(".")[0]
        if full_name(target) is not None:
            return target
        if hasattr(entry.cls, first):
            return f"{entry.public}.{target}"
        found = getattr(module, first, None)
        home = getattr(found, "__module__", "") or ""
        return f"{home}.{target}" if home.startswith("reweigh.") else None

    return resolve


def method_page(entry: Entry) -> str:
    """The page of one method."""
    return "\n\n".join(part.strip("\n") for part in _method_parts(entry) if part.strip()) + "\n"


def _method_parts(entry: Entry) -> Iterator[str]:
    resolve = resolver(entry)

    def said(text: str) -> str:
        return to_markdown(text, resolve)

    def section(title: str) -> str:
        text = entry.sections.get(title)
        return f"## {title}\n\n{said(text)}" if text else ""

    yield _front(entry)
    yield f"# {entry.cls.__name__}"
    yield said(entry.summary)
    yield f"`{entry.name}` among the {entry.kind}s of the [catalogue](../index.md) · {_source_line(entry)}"
    yield said(entry.body)
    yield _figure(entry)
    for title in ("Use when", "Avoid when"):
        yield section(title)
    yield _facts(entry)
    for title in ("Weights", "State and cadence", "Memory", "Memory and time", "Packed rows", "Several processes"):
        yield section(title)
    yield _defaults(entry)
    yield _deviations(entry, said)
    yield _results(entry)
    yield _cost(entry)
    if entry.sections.get("Example"):
        yield f"## Example\n\n{example(entry.sections['Example'])}"
    yield _signature(entry)
    yield section("Shapes")
    yield _reference(entry, said)


def _front(entry: Entry) -> str:
    summary = re.sub(r":\w+:`~?([^`]*)`|`", r"\1", entry.summary).replace('"', "'").replace("\\", "")
    return f'---\ntitle: {entry.cls.__name__}\ndescription: "{summary}"\n---'


def _source_line(entry: Entry) -> str:
    record = entry.record
    paper = "" if record.paper.startswith("none") else f"{record.paper}, "
    venue = "" if record.venue == "none" else record.venue
    return f"{paper}{venue}".strip(", ") or "no paper"


def _figure(entry: Entry) -> str:
    reason = curves.REASONS.get(f"{entry.kind}/{entry.name}")
    if reason is not None:
        return f"*No figure: {reason}*"
    made = curves.curve(entry)
    drawn = (svg(one, f"{entry.cls.__name__}: {one.ylabel}, by {one.xlabel}") for one in made.panels)
    flat = re.sub(r"\s*\n\s*", " ", "".join(drawn))
    caption = re.sub(r"`([^`]*)`", lambda code: f"<code>{escape(code[1])}</code>", escape(made.caption, quote=False))
    return f'<figure class="curve" data-search-exclude>{flat}<figcaption>{caption}</figcaption></figure>'


def _facts(entry: Entry) -> str:
    built = entry.built
    rows = [("Acts on", "; ".join(_TERMS[kind] for kind in entry.kinds))]
    if entry.detached:
        rows.append(("Weights are", entry.detached))
    if entry.scope:
        rows.append(("A weight depends on", _WORDS[entry.scope]))
    if entry.kind == "weighting":
        in_rows = sorted(getattr(built, "rows", ()))
        reads = ", ".join(f"`{name}`{' (a row per sample)' if name in in_rows else ''}" for name in entry.needs)
        rows.append(("Reads", reads or "`loss` only"))
    elif entry.needs:
        rows.append(("A call may bring", ", ".join(f"`{name}=`" for name in entry.needs)))
    feeds = sorted({feed for part in entry.weightings for feed in part.feeds})
    if feeds:
        words = {
            "validation": "losses on validation data",
            "after": "the step's losses after the optimizer has stepped",
        }
        rows.append(("Lives on", ", ".join(words[feed] for feed in feeds)))
    rows.append(("Changes", ", ".join(_EVENTS[event] for event in entry.events) or "never"))
    rows.append(("State", ", ".join(_STATE.get(name, f"`{name}`") for name in entry.state) or "none"))
    if entry.kind == "objective" and "reduction" in inspect.signature(entry.cls.__init__).parameters:
        rows.append(("Reduction by default", f"`{built.reduction.name}`"))
    return "## At a glance\n\n" + table(("", ""), rows)


def _defaults(entry: Entry) -> str:
    rows = [(f"`{name}`", f"`{value}`", source) for name, (value, source) in entry.record.defaults.items()]
    return "## Defaults and where they come from\n\n" + table(("argument", "default", "source"), rows) if rows else ""


def _deviations(entry: Entry, said: Callable[[str], str]) -> str:
    if not entry.record.deviations:
        return ""
    listed = "\n".join(f"- {said(text)}" for text in entry.record.deviations)
    return f"## Deviations from the paper and the authors' code\n\n{listed}"


def _results(entry: Entry) -> str:
    found = results.rows().get((entry.kind, entry.name), [])
    if not found:
        return ""
    return (
        f"## What came out\n\nThe rows of the committed [benchmarks]({_up(entry.path, 'benchmarks.md')}) in which it "
        "takes part, losers too: paired differences to the baseline, and the time of a training step as a multiple of "
        f"the baseline's.\n\n{_rows(found)}"
    )


def _rows(found: Iterable[results.Row]) -> str:
    found = list(found)
    rows = []
    for row in found:
        time = DASH if row.relative_time is None else f"{TIMES}{row.relative_time:.2f}"
        label = row.label + ("" if row.claim else " (no claim)")
        rows.append((row.title, label, row.metric, row.baseline, f"{row.difference} {row.wins}", time))
    heads = ("data set", "row", "what counts", "baseline", "difference, [95 % interval], better in", "time per step")
    words = "\n".join(dict.fromkeys(f"- {row.label}: {row.what}" for row in found))
    return f"{table(heads, rows)}\n\n{words}"


def _cost(entry: Entry) -> str:
    rows = []
    for row in results.costs(entry.kind, entry.name):
        plain = row.plain_microseconds
        beside = DASH if plain is None else f"{plain:.0f} (`{row.plain}`)"
        times = DASH if plain is None else f"{TIMES}{row.microseconds / plain:.2f}"
        rows.append((f"{row.samples:,}", f"{row.microseconds:.0f}", beside, times))
    heads = ("samples", "with it, µs", "the plain criterion, µs", "ratio")
    return (
        "## What it costs\n\nForward, backward and the step's event on the small inputs of the conformance suite, "
        f"least CPU time of one thread (`python -m reweigh.benchmarks.speed.methods`).\n\n{table(heads, rows)}"
    )


def _signature(entry: Entry) -> str:
    return f"## Signature\n\n::: {entry.public}\n    options:\n      heading_level: 3\n      show_root_toc_entry: false"


def _reference(entry: Entry, said: Callable[[str], str]) -> str:
    text = entry.sections.get("References", "")
    official = entry.record.official
    code = f"\n\nReference code: {official}" if official and not official.startswith("none") else ""
    if not entry.keys:
        return f"## Reference\n\n{said(text)}{code}"
    entries_ = "\n\n".join(sources()[key].bibtex() for key in dict.fromkeys(entry.keys))
    return f"## Reference\n\n{said(text)}{code}\n\n```bibtex\n{entries_}\n```"


def example(text: str) -> str:
    """A doctest as a code block, with what stands around it."""
    return f"```pycon\n{text}\n```" if doctest.DocTestParser().get_examples(text) else text


def catalogue_page() -> str:
    """All methods in one table, with filters that a script adds (without it, the table is whole)."""
    heads = ("method", "kind", "in one sentence", "acts on", "reads", "changes", "year")
    body = "\n".join(_catalogue_row(entry) for entry in entries())
    count = {kind: sum(entry.kind == kind for entry in entries()) for kind in ("weighting", "objective")}
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return f"""---
title: Catalogue
description: "Every weighting and objective of the library, with filters."
hide: [toc]
---

# Catalogue

{count["weighting"]} weightings and {count["objective"]} objectives. A weighting gives each loss term a number and
composes with any criterion; an objective is a loss that is ready to call. Balanced softmax and its relatives are
[changes of the logits](#changes-of-the-logits). For help with the choice see
[Choosing](../guides/choosing.md); to cite, see [Citation](../citation.md).

<div id="catalogue-filters" hidden></div>

<div class="catalogue-frame" markdown="0"><table id="catalogue-table"><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>

## Changes of the logits

Not weights, so not in the table above: they go into a criterion, `CrossEntropy(logits=BalancedSoftmax(counts))`, and
some correct for class sizes, where weights would as well. `posthoc_logit_adjustment` does the same to a model that was
trained without. When to use which: [Choosing](../guides/choosing.md#rare-classes).

{_logit_transforms()}
"""


def _logit_transforms() -> str:
    said = []
    came_out: dict[tuple[str, str], results.Row] = {}
    for cls in logit_transforms():
        summary = to_markdown(" ".join(sections(cls.__doc__)[""].partition("\n\n")[0].split()))
        said.append((f"[`{cls.__name__}`][reweigh.losses.{cls.__name__}]", summary))
        for row in results.rows().get(("logits", cls.__name__), []):
            came_out.setdefault((row.suite, row.label), row)
    return f"{table(('in a criterion', 'in one sentence'), said)}\n\n{_rows(came_out.values())}"


def _catalogue_row(entry: Entry) -> str:
    summary = re.sub(r"``([^`]*)``", r"<code>\1</code>", escape(entry.summary, quote=False))
    summary = to_markdown(summary.replace("&lt;", "<").replace("&gt;", ">")) if ":`" in summary else summary
    link = f"{entry.kind}/{entry.name}.html"
    needs, events = entry.needs or ["nothing more"], entry.events or ["never"]
    data = {
        "kind": entry.kind,
        "acts": " ".join(entry.kinds),
        "needs": " ".join(name.replace(" ", "_") for name in needs),
        "update": " ".join(events),
        "year": str(entry.year or ""),
    }
    attributes = " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())
    reads = ", ".join(f"<code>{name}</code>" for name in entry.needs) or DASH
    cells = (
        f'<a href="{link}">{entry.cls.__name__}</a>',
        entry.kind,
        summary,
        ", ".join(entry.kinds),
        reads,
        ", ".join(events),
        str(entry.year or DASH),
    )
    return f"<tr {attributes}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def citation_page() -> str:
    """BibTeX of every source, with the methods that come from it, and how to cite the library itself."""
    users: dict[str, list[Entry]] = {}
    for entry in entries():
        for key in dict.fromkeys(entry.keys):
            users.setdefault(key, []).append(entry)
    listed = "\n\n".join(
        f"### {source.title}\n\n{', '.join(f'[{one.cls.__name__}]({one.path})' for one in users[key])}\n\n"
        f"```bibtex\n{source.bibtex()}\n```"
        for key, source in sorted(sources().items(), key=lambda item: item[1].title.lower())
        if key in users
    )
    return f"""---
title: Citation
description: "BibTeX of every method's source."
hide: [toc]
---

# Citation

Please cite the source of the method you use. `CITATION.cff` of the repository says how to cite the library.
The entries are made from the references in the docstrings: {len(users)} sources of {len(entries())} methods.

{listed}
"""


def extras(markdown: str) -> list[str]:
    """Extras of the package that the Python blocks of a page need."""
    blocks = "\n".join(re.findall(r"^```py(?:thon)?\n(.*?)^```", markdown, re.M | re.S))
    named = {name for line in re.findall(r"^\s*(?:from|import) ([\w.]+)", blocks, re.M) for name in _parents(line)}
    found = [extra for extra, modules in _EXTRAS.items() if named & modules]
    return [extra for extra in found if not (extra == "lightning" and "bench" in found)]


def _parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[: at + 1]) for at in range(len(parts)))


def with_extras(markdown: str) -> str:
    """A page with a line under its title that says what to install, unless the page says so itself."""
    wanted = extras(markdown)
    if all(f"[{extra}]" in markdown for extra in wanted):
        return markdown
    line = f"The code of this page needs `pip install '.[{','.join(wanted)}]'`."
    return re.sub(r"^(# .+)$", rf"\1\n\n*{line}*", markdown, count=1, flags=re.M)


def unbroken(html: str) -> str:
    """HTML in which a number stays on a line with its percent sign."""
    return re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", html)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    heads = list(heads)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _up(page: str, target: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page))


def api_members() -> Mapping[str, list[str]]:
    """Public names of each room that have no page of their own, in the order of ``__all__``."""
    own = {entry.public for entry in entries()}
    found = {}
    for room in ROOMS:
        module = import_module(f"reweigh.{room}")
        found[f"reweigh.{room}"] = [name for name in module.__all__ if f"reweigh.{room}.{name}" not in own]
    return found


ROOMS = ("losses", "weighting", "lightning_callbacks", "benchmarks")


def left_for_mkdocstrings(doc: str) -> str:
    """What of a registered class's docstring stands under its signature: arguments and errors."""
    kept = sections(doc)
    parts = [f"{name}:\n" + _indented(kept[name]) for name in SHOWN_BY_MKDOCSTRINGS if kept.get(name)]
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line.strip() else "" for line in text.splitlines())


def with_members(markdown: str) -> str:
    """The API page with what each room shows there: all public names that have no page of their own.

    A name that is a module as well (or hides one) gets a block of its own: as a member, it would not be rendered.
    """
    for room, names in api_members().items():
        apart = [name for name in names if find_spec(f"{room}.{name}") is not None]
        listed = "".join(f"\n        - {name}" for name in names if name not in apart)
        block = f"::: {room}\n    options:\n      members:{listed}"
        for name in apart:
            value = getattr(import_module(room), name)
            inner = f"{room}.{name}" if isinstance(value, ModuleType) else f"{value.__module__}.{value.__qualname__}"
            block += f"\n\n::: {inner}\n    options:\n      heading_level: 3"
        markdown = f"{markdown}\n".replace(f"::: {room}\n", f"{block}\n")
    return markdown
