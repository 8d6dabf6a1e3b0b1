"""Docstrings of the house (Google sections with reST roles) as Markdown, and cut into their sections."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from inspect import cleandoc

from .mathml import word

_BLOCK = re.compile(
    r"^(?P<indent> *)\.\. math::[ \t]*(?P<first>[^\n]*)\n?"
    r"(?P<more>(?:(?P=indent) +\S[^\n]*(?:\n|\Z)|[ \t]*\n(?=(?P=indent) +\S))*)",
    re.M,
)
_MATH_ROLE = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:py:)?(class|func|meth|mod|attr|data|exc|obj):`(~?)([^`<]+?)(?:\s*<([^`>]+)>)?`")
_TWO_TICKS = re.compile(r"``(.+?)``", re.S)
_QUOTE = re.compile(r"^( *)>(?!>>)", re.M)
_SECTION = re.compile(r"^([A-Z][A-Za-z ]+):[ \t]*$", re.M)

Resolver = Callable[[str], str | None]
"""From the target of a role to the full dotted name that it means, or ``None``."""


def full_name(target: str) -> str | None:
    """A target that says its full name itself."""
    return target if target.startswith("reweigh.") else None


def to_markdown(text: str, resolve: Resolver = full_name) -> str:
    """Formulas become words (see :mod:`.mathml`), roles become code that links where the target is known."""

    def block(found: re.Match[str]) -> str:
        latex = "\n".join([found["first"], *found["more"].splitlines()]).strip()
        return f"{found['indent']}{word(latex, block=True)}\n\n"

    def role(found: re.Match[str]) -> str:
        kind, short, target = found[1], found[2], (found[4] or found[3]).strip()
        shown = found[3].strip() if found[4] else target.rpartition(".")[2] if short else target
        shown += "()" if kind in ("func", "meth") else ""
        name = resolve(target)
        code = f"<code>{escape(shown)}</code>"
        return code if name is None else f'<autoref identifier="{escape(name)}" optional>{code}</autoref>'

    text = _BLOCK.sub(block, _QUOTE.sub(r"\1\\>", text))  # ">= 0" at the start of a line is no quotation
    text = _MATH_ROLE.sub(lambda found: word(" ".join(found[1].split())), text)
    return _TWO_TICKS.sub(lambda found: f"``{found[1]}``", _ROLE.sub(role, text))


def sections(doc: str | None) -> dict[str, str]:
    """The sections of a docstring by name, dedented; what stands before the first is under ``""``."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in cleandoc(doc or "").splitlines():
        head = _SECTION.match(line)
        if head:
            name = head[1]
            found.setdefault(name, [])
        else:
            found[name].append(line)
    return {name: cleandoc("\n" + "\n".join(lines)).strip() for name, lines in found.items()}
