"""The mkdocs hook: adds the generated pages, draws formulas, and fails the build where the site says too little.

Everything that can be tested without mkdocs is in :mod:`sitegen`, beside this file.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from sitegen import coverage, mathml, pages

ROOT = Path(__file__).resolve().parents[2]


class _Build:
    """What one build knows between its events."""

    folder: Path | None
    ids: set[str]


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show mkdocstrings the package alone: the root of the repository holds tests and environments as well."""
    if config.use_directory_urls:
        raise PluginError("the catalogue links to files: set use_directory_urls to false")
    _Build.folder, _Build.ids = Path(tempfile.mkdtemp(prefix="reweigh-docs-")), set()
    coverage.linked_tree(ROOT, _Build.folder)
    handlers: dict[str, Any] = config.plugins["mkdocstrings"].config["handlers"]
    handlers["python"]["paths"] = [str(_Build.folder)]
    config.nav = pages.navigation(config.nav or [])
    bare = coverage.undocumented(griffe.load("reweigh", search_paths=[_Build.folder]))
    if bare:
        raise PluginError(f"public names without a docstring: {', '.join(bare)}")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, text in pages.generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Formulas outside code become words that Markdown leaves alone; the API page lists what has no page.

    What a page's code has to have installed stands under its title.
    """
    if page.file.src_uri == "api.md":
        markdown = pages.with_members(markdown)
    markdown = pages.with_extras(markdown)
    return mathml.in_markdown(markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Those words become MathML, and no line ends before a percent sign."""
    try:
        return pages.unbroken(mathml.drawn(html))
    except mathml.FormulaError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Nothing of reST or LaTeX may be left over."""
    left = coverage.raw(output)
    if left:
        raise PluginError(f"{page.file.src_uri}: raw markup in the page: {', '.join(left)}")
    _Build.ids |= coverage.anchors(output)
    return output


@event_priority(-100)  # after the search plugin has written its index
def on_post_build(config: MkDocsConfig) -> None:
    """Every public name shows up; the search index is a script as well, which a page on disk may load."""
    _tidy()
    index = Path(config.site_dir) / "search" / "search_index.json"
    index.with_suffix(".js").write_text(f"var __index = {index.read_text(encoding='utf-8')}", encoding="utf-8")
    lost = coverage.missing(_Build.ids)
    if lost:
        raise PluginError(f"public names that no page shows: {', '.join(lost)}")


def on_build_error(**_: Any) -> None:
    """Leave nothing behind."""
    _tidy()


def _tidy() -> None:
    if _Build.folder is not None:
        shutil.rmtree(_Build.folder, ignore_errors=True)
        _Build.folder = None
