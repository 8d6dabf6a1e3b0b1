"""Every Python block of the README and the docs runs, in order, page by page."""

import re
import sys
import types
import warnings
from pathlib import Path

import pytest

from reweigh import losses, weighting

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {  # see docs/hooks
    *(ROOT / "docs" / page for page in ("citation.md", "methods/index.md")),
    *(ROOT / "docs" / f"methods/weighting/{name}.md" for name in weighting.available()),
    *(ROOT / "docs" / f"methods/objective/{name}.md" for name in losses.available()),
}
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S) for page in PAGES}


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCKS[p]], ids=lambda p: p.name)
def test_blocks_run(page, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = types.ModuleType(f"page_{page.stem}")  # a real module, so that what it defines can be pickled
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for block in BLOCKS[page]:
            exec(compile(block, str(page), "exec"), module.__dict__)


def test_links_between_files_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            assert target.exists() or target in GENERATED, f"{page.name} links to {link}"


def test_pages_that_show_a_file_of_the_root_can_do_so():
    shown = {name for page in PAGES for name in re.findall(r'^--8<-- "(.+)"$', page.read_text(encoding="utf-8"), re.M)}
    assert {"CHANGELOG.md", "CONTRIBUTING.md"} <= shown
    assert all((ROOT / name).is_file() for name in shown)
    assert "- pymdownx.snippets:" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_the_pages_show_the_committed_results():
    from reweigh.benchmarks.publish import MARK, RESULTS, filled, pages

    shown = set()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        shown |= {match[3] for match in MARK.finditer(text)}
        assert filled(text) == text, "run: python -m reweigh.benchmarks.publish"
    assert {path.stem for path in RESULTS.glob("*.json")} == shown - {None}
