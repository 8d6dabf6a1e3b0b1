"""The "Coming from" pages: a peer's call and ours give the same numbers and gradients, where the peer is installed.

A page names in its front matter what it needs (``peer:``), and holds the peer's calls in blocks that have a title, ours
in plain ones. All blocks run in order. As soon as ``theirs`` and ``ours`` are both there, they are compared and taken
away.
"""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from peers import importable

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "coming-from"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.name != "index.md")
BLOCK = re.compile(r'^```(?:python|py title="(?P<title>[^"\n]+)")\n(?P<code>.*?)^```$', re.M | re.S)


def front_matter(page):
    match = re.match(r"---\n(.*?)\n---\n", page.read_text(encoding="utf-8"), re.S)
    assert match, f"{page.name} has no front matter that names its peer"
    return dict(re.findall(r"^(\w+): *(.*)$", match[1], re.M))


def slopes(value, leaves):
    if not (isinstance(value, torch.Tensor) and value.requires_grad):
        return None
    found = torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if slope is None else slope for slope, leaf in zip(found, leaves, strict=True)]


def agree(theirs, ours, leaves):
    """To the rounding of float32, which several peers compute in whatever they are given."""
    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(ours, theirs, **close)
    found, wanted = slopes(ours, leaves), slopes(theirs, leaves)
    assert (found is None) == (wanted is None), "only one of the two has a gradient"
    if found is not None:
        torch.testing.assert_close(found, wanted, **close)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_both_calls_agree(page, monkeypatch):
    matter, text = front_matter(page), page.read_text(encoding="utf-8")
    for name, value in re.findall(r"(\w+)=(\S+)", matter.get("environment", "")):
        monkeypatch.setenv(name, value)
    for module in matter["peer"].split():
        importable(module, monkeypatch)
    module = types.ModuleType(f"coming_from_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names, compared = module.__dict__, 0
    for block in BLOCK.finditer(text):
        line = text[: block.start("code")].count("\n")
        exec(compile("\n" * line + block["code"], str(page), "exec"), names)
        if {"theirs", "ours"} <= names.keys():
            leaves = [v for v in names.values() if isinstance(v, torch.Tensor) and v.requires_grad and v.is_leaf]
            try:
                agree(names.pop("theirs"), names.pop("ours"), leaves)
            except AssertionError as error:
                raise AssertionError(f"{page.name}, the block from line {line}: {error}") from error
            compared += 1
    assert not {"theirs", "ours"} & names.keys(), f"{page.name}: the last call has no counterpart"
    titled = sum(block["title"] is not None for block in BLOCK.finditer(text))
    assert compared >= max(titled, 1), f"{page.name}: {titled} blocks of the peer, {compared} comparisons"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_is_listed_and_every_block_runs(page):
    assert front_matter(page)["peer"]
    assert f"({page.name})" in (FOLDER / "index.md").read_text(encoding="utf-8")
    assert f"coming-from/{page.name}" in (FOLDER.parents[1] / "mkdocs.yml").read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == len(re.findall(r"^```py", text, re.M)), "a block that no test runs"
