"""What the documentation site is generated from: pages, curves, formulas, references and results (no mkdocs needed)."""

import ast
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from reweigh import losses, weighting
from reweigh.benchmarks.speed.methods import measure
from reweigh.weighting import Focal, Weighting
from reweigh.weighting.registry import Method

pytest.importorskip("latex2mathml")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs" / "hooks"))

from sitegen import bibtex, coverage, curves, docstrings, figure, mathml, pages, records, results  # noqa: E402

MINUS = "\N{MINUS SIGN}"
ENTRIES = records.entries()
NAMES = [f"{entry.kind}/{entry.name}" for entry in ENTRIES]
BY_NAME = dict(zip(NAMES, ENTRIES, strict=True))


@pytest.fixture(scope="module")
def generated():
    return pages.generated()


@pytest.fixture(scope="module")
def drawn():
    return {name: curves.curve(entry) for name, entry in BY_NAME.items() if name not in curves.REASONS}


# pages


def test_every_registered_method_has_a_page(generated):
    wanted = {
        f"methods/{registry.kind}/{name}.md"
        for registry in (weighting.registry, losses.registry)
        for name in registry.available()
        if registry.get(name).__module__.startswith("reweigh.")
    }
    assert len(wanted) > 100
    assert set(generated) == wanted | {"methods/index.md", "citation.md"}


def test_a_page_says_all_that_record_and_docstring_say(generated):
    for entry in ENTRIES:
        text = generated[entry.path]
        assert f"# {entry.cls.__name__}\n" in text
        assert f"::: {entry.public}\n" in text
        for name, (default, source) in entry.record.defaults.items():
            assert f"| `{name}` | `{default}` | {source.replace('|', chr(92) + '|')} |" in text, (entry.name, name)
        assert text.count("\n- ") >= len(entry.record.deviations)
        for title in ("Use when", "Avoid when", "At a glance", "What it costs", "Example", "Shapes", "Reference"):
            assert f"\n## {title}\n\n" in text, (entry.name, title)
        assert ">>> " in text
        assert ("<svg " in text) != (f"{entry.kind}/{entry.name}" in curves.REASONS)
        marked = re.findall(r"\.\. math::|:math:", entry.sections[""] + entry.sections.get("Weights", ""))
        assert text.count("texformula") >= len(marked), entry.name
        assert not re.search(r"[a-z]-\n *[a-z]", text), (entry.name, "a word broken at its hyphen gets a blank")
        for left in (":math:", ".. math::", ":class:", ":func:", ":meth:", ":mod:", ":attr:"):
            assert left not in text, (entry.name, left)


@pytest.mark.parametrize(
    ("name", "year"),
    [
        ("weighting/focal", 2017),
        ("weighting/softadapt", 2019),  # arXiv 1912.12355: not the year 1912
        ("weighting/chi_square_dro", 2017),
        ("weighting/inverse_document_frequency", 1972),
        ("weighting/class_weight", None),
    ],
)
def test_years(name, year):
    assert BY_NAME[name].year == year


def test_state_events_and_needs_are_those_of_the_class():
    coba = BY_NAME["weighting/coba"]
    assert coba.events == ["validation"]
    assert set(coba.state) >= {"ratios", "baseline"}
    assert BY_NAME["weighting/group_dro"].needs == ["group"]
    assert BY_NAME["objective/group_dro"].needs == ["group"]
    assert BY_NAME["objective/focal"].needs == []
    assert BY_NAME["weighting/focal"].detached.startswith("differentiated")


def test_the_api_page_names_what_has_no_page_of_its_own():
    text = pages.with_members("::: reweigh.losses\n\n## Next\n\n::: reweigh.weighting")
    assert "        - Objective\n" in text
    assert "- FocalLoss\n" not in text
    assert "- Focal\n" not in text
    assert "::: reweigh.losses.functional\n" in text
    assert "::: reweigh.weighting.dynamics.dynamics\n" in text  # a function that hides a module of the same name


# the catalogue


class Rows(HTMLParser):
    """Attributes and links of the table's rows."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.cells = [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr" and attributes:
            self.rows.append({"cells": 0, **dict(attributes)})
        elif tag == "td":
            self.rows[-1]["cells"] += 1
        elif tag == "a" and self.rows:
            self.rows[-1].setdefault("link", dict(attributes)["href"])


def test_catalogue_rows_are_complete(generated):
    rows = Rows(generated["methods/index.md"]).rows
    assert [row["link"] for row in rows] == [f"{entry.kind}/{entry.name}.html" for entry in ENTRIES]
    script = (ROOT / "docs" / "assets" / "catalogue.js").read_text(encoding="utf-8")
    filters = re.findall(r'^    \["(\w+)", "', script, re.M)
    assert filters == ["kind", "acts", "needs", "update", "year"]
    for row, entry in zip(rows, ENTRIES, strict=True):
        assert row["cells"] == 7
        assert all(row[f"data-{name}"] for name in filters if name != "year")
        assert row["data-year"] == str(entry.year or "")
    acts = {row["data-acts"] for row in rows}
    assert acts >= {"class", "binary", "token", "task", "pair", "region"}


# curves


def test_every_method_has_a_curve_or_a_reason(drawn):
    assert set(drawn) | set(curves.REASONS) == set(NAMES)
    assert not set(drawn) & set(curves.REASONS)
    for name, curve in drawn.items():
        assert 1 <= len(curve.panels) <= 2, name
        for panel in curve.panels:
            labels = [line.label for line in panel.lines]
            assert 1 <= len(labels) == len(set(labels)) <= 4, name
            for line in panel.lines:
                assert len(line.y) == len(panel.x)
                assert any(math.isfinite(y) for y in line.y), name


def test_curves_show_something(drawn):
    """What a method is about moves: only constants stand still."""
    still = set()
    for name, curve in drawn.items():
        values = [y for panel in curve.panels[-1:] for line in panel.lines for y in line.y if math.isfinite(y)]
        spread = max(values) - min(values)
        if spread <= 1e-6 * max(map(abs, values)):
            still.add(name)
    assert still == set()
    flat = {name for name, curve in drawn.items() if all(len(set(line.y)) == 1 for line in curve.panels[-1].lines)}
    assert flat == {"weighting/fixed", "weighting/temperature_mixing"}


def panel_of(curve, label):
    return next(panel for panel in curve.panels if panel.ylabel == label)


def test_curves_are_the_methods_own(drawn):
    focal = panel_of(drawn["weighting/focal"], "weight")
    assert focal.lines[0].y == pytest.approx([(1 - p) ** 2 for p in focal.x])
    dft = panel_of(drawn["weighting/dft"], "gradient on the logit")
    assert dft.lines[0].y == pytest.approx([p * (1 - p) for p in dft.x])
    cross_entropy = drawn["objective/focal"].panels[0]
    assert cross_entropy.lines[1].y == pytest.approx([-math.log(p) for p in cross_entropy.x])
    inverse = drawn["weighting/inverse_frequency"].panels[0]
    assert [a * b for a, b in zip(inverse.x, inverse.lines[0].y, strict=True)] == pytest.approx(
        [inverse.x[0] * inverse.lines[0].y[0]] * len(inverse.x)
    )
    dro = panel_of(drawn["weighting/group_dro"], "weight")
    assert dro.lines[2].y[-1] > dro.lines[0].y[-1]  # the group with the largest loss
    mae = drawn["objective/mae"].panels[0]
    assert mae.lines[0].y == pytest.approx([1 - p for p in mae.x])


class Coloured(Weighting):
    """Reads what nobody knows how to draw."""

    needs = frozenset({"colour"})

    def weigh(self, terms):
        return terms.need("colour")


def test_a_method_that_cannot_be_drawn_stops_the_build():
    entry = records.Entry("weighting", "coloured", Coloured, Method(name="coloured", paper="p", venue="v"))
    with pytest.raises(curves.NoCurve, match=r"coloured.*colour"):
        curves.curve(entry)


def test_an_empty_curve_stops_the_build():
    class Hole(Weighting):
        def weigh(self, terms):
            return torch.full_like(terms.loss, torch.nan)

    entry = records.Entry("weighting", "hole", Hole, Method(name="hole", paper="p", venue="v"))
    with pytest.raises(curves.NoCurve, match="empty"):
        curves.curve(entry)


def test_drawings_are_small_text_and_the_same_each_time(drawn):
    for name in ("weighting/focal", "weighting/coba", "objective/dice"):
        for panel in drawn[name].panels:
            made = figure.svg(panel, name)
            assert made == figure.svg(panel, name)
            assert len(made) < 40_000
            tree = ElementTree.fromstring(made)
            assert tree.find("{http://www.w3.org/2000/svg}title").text == name
            words = " ".join(element.text or "" for element in tree.iter("{http://www.w3.org/2000/svg}text"))
            assert panel.xlabel in words
            assert "currentColor" in made
            assert not re.search(r'#010203|(?:href|src)="http|font: [^"]*DejaVu', made)


# formulas


def all_docstrings():
    for room in coverage.ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
                    yield path, node.value


def formulas(markdown):
    return [
        (bytes.fromhex(found[2]).decode(), found[1] == "block")
        for found in re.finditer(r"texformula(inline|block)x([0-9a-f]+)x", markdown)
    ]


def test_every_formula_of_every_docstring_becomes_mathml():
    number = 0
    for path, text in all_docstrings():
        found = formulas(docstrings.to_markdown(text))
        if path.name not in ("hook.py",):
            assert len(found) == text.count(":math:") + text.count(".. math::"), path.name
        for latex, block in found:
            made = ElementTree.fromstring(mathml.mathml(latex, block=block))
            assert made.tag == "{http://www.w3.org/1998/Math/MathML}math"
            assert made.get("display") == ("block" if block else "inline")
            number += 1
    assert number > 800


def test_every_formula_of_every_page_becomes_mathml():
    number = 0
    for path in sorted((ROOT / "docs").rglob("*.md")):
        for latex, block in formulas(mathml.in_markdown(path.read_text(encoding="utf-8"))):
            assert mathml.mathml(latex, block=block).startswith("<math")
            number += 1
    assert number > 0


def text_of(latex):
    return "".join(ElementTree.fromstring(mathml.mathml(latex)).itertext())


def test_formulas_that_need_care():
    assert "arg" in text_of(r"\arg\min_\theta f")
    assert text_of(r"a = \begin{cases} [s + m]_+ & x \\ [t]_- & y \end{cases}").count("[") == 2
    assert "<msup>" in mathml.mathml("p^q")
    assert "<mfrac>" in mathml.mathml(r"\tfrac12")


@pytest.mark.parametrize("latex", [r"\nosuchcommand x", r"\frac{1}", r"a_{b", r"\begin{cases} x"])
def test_what_cannot_be_converted_is_an_error(latex):
    with pytest.raises(mathml.FormulaError, match="cannot convert"):
        mathml.mathml(latex)


def test_formulas_in_pages():
    text = "It costs $5 and $6.\n\n$$w = p$$ and $x_i$ and \\(y\\) `$no$` \n\n```python\na = '$x$'\n```\n"
    made = mathml.in_markdown(text)
    assert formulas(made) == [("w = p", True), ("x_i", False), ("y", False)]
    assert "It costs $5 and $6." in made
    assert "`$no$`" in made
    assert "a = '$x$'" in made
    html = mathml.drawn(f"<p>{mathml.word('p_t')}</p>")
    assert html.startswith("<p><math ")
    assert "texformula" not in html


def test_pages_say_which_extras_their_code_needs():
    page = "# Title\n\nText.\n\n```python\nimport torch\nfrom sklearn.datasets import load_digits\n```\n"
    assert pages.extras(page) == ["bench"]
    assert "# Title\n\n*The code of this page needs `pip install '.[bench]'`.*\n\nText." in pages.with_extras(page)
    both = page.replace("import torch\n", "import torchjd\nimport pytorch_lightning as pl\n")
    assert pages.extras(both) == ["bench", "torchjd"]  # bench brings Lightning
    said = page.replace("Text.", "It needs `pip install '.[bench]'`.")
    assert pages.with_extras(said) == said
    assert pages.extras("```text\nimport sklearn\n```\n") == []


def test_every_method_has_a_measured_cost_and_nothing_else_has():
    rows = json.loads(results.METHODS.read_text(encoding="utf-8"))["rows"]
    assert {f"{row['kind']}/{row['method']}" for row in rows} == set(NAMES)
    for kind, name in (("weighting", "coba"), ("objective", "circle_classification")):
        fresh = measure(kind, name, rounds=1)  # one that has no second size, and one that has no plain criterion
        recorded = results.costs(kind, name)
        assert [row["samples"] for row in fresh] == [row.samples for row in recorded]
        assert [row["plain"] for row in fresh] == [row.plain for row in recorded]
        assert all(0 < row["microseconds"] < 1e6 for row in fresh)


def test_changes_of_the_logits_are_in_the_catalogue(generated):
    catalogue = generated[pages.CATALOGUE]
    for name in ("LogitAdjustment", "BalancedSoftmax", "CircleLogits"):
        assert f"[`{name}`][reweigh.losses.{name}]" in catalogue
    assert "| Long-tailed digits | balanced softmax |" in catalogue


# docstrings


def test_roles_and_blocks():
    text = (
        "See :class:`~reweigh.losses.ClosedForm`, :meth:`slope` and :func:`look <reweigh.look>`.\n\n"
        ".. math:: a = b,\n   c\n\nEnd :math:`x`."
    )
    made = docstrings.to_markdown(text)
    assert '<autoref identifier="reweigh.losses.ClosedForm" optional><code>ClosedForm</code></autoref>' in made
    assert "<code>slope()</code> and" in made
    assert '<autoref identifier="reweigh.look" optional><code>look()</code></autoref>' in made
    assert [" ".join(latex.split()) for latex, _ in formulas(made)] == ["a = b, c", "x"]
    assert "End " in made


def test_sections():
    doc = '"""One line.\n\n    More.\n\n    Args:\n        a: One.\n\n    Use when:\n        Always.\n    """'
    found = docstrings.sections(ast.literal_eval(doc))
    assert found == {"": "One line.\n\nMore.", "Args": "a: One.", "Use when": "Always."}


# references


def parsed(entry):
    """Kind, key and fields of one BibTeX entry; raises where braces do not fit."""
    head = re.match(r"@(\w+)\{([^,\s]+),\n", entry)
    fields, at = {}, head.end()
    while entry[at] != "}":
        name = re.match(r"\s*(\w+) = \{", entry[at:])
        start = at = at + name.end()
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(entry[at], 0)
            at += 1
        fields[name[1]] = entry[start : at - 1]
        at += 2  # comma and line end
    assert entry[at:] == "}"
    return head[1], head[2], fields


def test_every_reference_parses():
    assert len(records.sources()) > 75
    for key, source in records.sources().items():
        kind, found, fields = parsed(source.bibtex())
        assert found == key
        assert re.fullmatch(r"[a-z][a-z0-9]*", key), key
        assert kind in ("article", "inproceedings", "misc")
        assert fields["title"].startswith("{")
        assert 1950 <= int(fields["year"]) <= 2100, key
        assert fields.get("booktitle") or fields.get("journal") or fields.get("eprint"), key
        assert all(", " in name for name in fields["author"].split(" and ") if name != "others"), key
        assert "et al" not in source.bibtex()


def test_every_method_can_be_cited_or_says_why_not(generated):
    for entry in ENTRIES:
        text = generated[entry.path]
        if entry.keys:
            for key in entry.keys:
                assert f"{{{key},\n" in text
                assert f"{{{key},\n" in generated["citation.md"]
        else:
            assert entry.sections["References"].startswith(("None", "scikit-learn")), entry.name
    assert len(re.findall(r"^```bibtex$", generated["citation.md"], re.M)) == len(records.sources())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            'J. Pérez de Frutos, T. Langø, "A Title & More", PLOS ONE 2023.',
            [("article", "perezdefrutos2023title", "P{\\'e}rez de Frutos, J. and Lang{\\o}, T.")],
        ),
        (
            'T. Liu, D. Tao, "Noisy Labels", IEEE TPAMI 38(3), 2016. H. Bae, "Weighting", ICLR 2024.',
            [("article", "liu2016noisy", "Liu, T. and Tao, D."), ("inproceedings", "bae2024weighting", "Bae, H.")],
        ),
        (
            'Y. Wu et al., "On SFT", arXiv 2508.05629, 2025; scikit-learn, ``f``; R. Li, "B", ICML 2022 (samples).',
            [("misc", "wu2025sft", "Wu, Y. and others"), ("inproceedings", "li2022b", "Li, R.")],
        ),
        ("None (textbook).", []),
    ],
)
def test_references(text, wanted):
    made = [parsed(one.bibtex()) for one in bibtex.citations(text)]
    assert [(kind, key, fields["author"]) for kind, key, fields in made] == wanted


def test_a_volume_is_one():
    (one,) = bibtex.citations('T. Liu, "Noisy Labels", IEEE TPAMI 38(3), 2016.')
    fields = parsed(one.bibtex())[2]
    assert (fields["journal"], fields["volume"], fields["number"]) == ("IEEE TPAMI", "38", "3")


def test_a_reference_that_is_none_is_an_error():
    with pytest.raises(bibtex.CitationError, match="not a reference"):
        bibtex.citations("Some words without a source")


# results


def test_rows_lead_to_the_methods_that_take_part():
    found = results.rows()
    labels = {key: {(row.suite, row.label) for row in rows} for key, rows in found.items()}
    assert ("digits_lt50", "class-balanced focal") in labels["weighting", "effective_number"]
    assert ("digits_lt50", "class-balanced focal") in labels["objective", "focal"]
    assert ("digits_two_tasks", "CoBa (first losses)") in labels["weighting", "coba"]
    assert ("pydoc_lm", "TLDR") in labels["weighting", "tldr"]
    assert all("post-hoc" not in label for rows in labels.values() for _, label in rows)
    assert ("weighting", "class_weight") not in labels  # the coefficients of a sum are no method


def test_rows_show_the_committed_numbers():
    table = json.loads((results.RESULTS / "digits_lt_noisy.json").read_text(encoding="utf-8"))
    committed = next(row for row in table["summary"] if row["method"] == "mae")
    versus = committed["versus_baseline"]["accuracy"]
    (row,) = [row for row in results.rows()["objective", "mae"] if row.suite == "digits_lt_noisy"]
    shown = re.findall(rf"[+{MINUS}]?\d+\.\d", row.difference)
    wanted = [100 * versus[name] for name in ("mean", "t_low", "t_high")]
    assert [float(number.replace(MINUS, "-")) for number in shown] == pytest.approx(wanted, abs=0.051)
    assert row.wins == f"{versus['wins']}/{versus['n']}"
    assert row.relative_time == committed["relative_step_time"]


def test_a_row_whose_objective_cannot_be_built_is_an_error():
    class Suite:
        name = "new"

        def method(self, name):
            return type("M", (), {"trained": True})

        def objective(self, method, weather):
            return Focal()

    with pytest.raises(LookupError, match="new: say in STAND_INS what stands for weather"):
        results.objective_of(Suite(), "any")


def test_losers_are_shown(generated):
    text = generated["methods/objective/mae.md"]
    assert re.search(rf"\| \*\*{MINUS}\d", text)
    assert "## What came out" not in generated["methods/weighting/lrat.md"]


# what the build checks


def test_missing_names_are_found():
    names = dict(coverage.public_names())
    assert len(names) > 200
    assert coverage.missing(set(names)) == []
    assert coverage.missing(set(names) - {"reweigh.losses.Objective"}) == ["reweigh.losses.Objective"]
    assert coverage.missing(set(names) - {"reweigh.losses.Objective"} | {"reweigh.losses.objective.Objective"}) == []


def test_names_without_a_docstring_are_found():
    griffe = pytest.importorskip("griffe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            coverage, "public_names", lambda: iter([("reweigh.losses.Bare", None), ("reweigh.losses.Told", None)])
        )
        package = griffe.Module("reweigh")
        package["losses"] = griffe.Module("losses")
        package["losses"]["Bare"] = griffe.Class("Bare")
        package["losses"]["Told"] = griffe.Class("Told", docstring=griffe.Docstring("Words."))
        assert coverage.undocumented(package) == ["reweigh.losses.Bare"]


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ("<p>:math:<code>x</code></p>", [":math:"]),
        ("<p>.. math:: x</p>", [".. math::"]),
        ("<p>See :class:<code>X</code></p>", [":class:"]),
        (r"<p>$$x$$ \frac{1}{2}</p>", ["$$", r"\frac"]),
        ("<p>texformulainlinex70x</p>", ["texformulainlinex"]),
        ("<pre><code>.. math:: x :class:`X` $$</code></pre><p>fine: 5 $</p>", []),
    ],
)
def test_raw_markup_is_found(html, found):
    assert coverage.raw(html) == found
