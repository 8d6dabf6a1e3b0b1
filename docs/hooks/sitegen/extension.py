"""A griffe extension: the docstrings that mkdocstrings renders, in Markdown instead of reST."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import griffe

from .docstrings import Resolver, sections, to_markdown
from .pages import left_for_mkdocstrings
from .records import entries


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Called once, when all modules are there."""
        registered = {f"{entry.cls.__module__}.{entry.cls.__qualname__}" for entry in entries()}
        for found in walk(pkg):
            if found.docstring is None:
                continue
            text = found.docstring.value
            if found.path in registered:
                text = left_for_mkdocstrings(text)  # the rest stands on the method's page already
            found.docstring.value = to_markdown(_plural(text), resolver(found))


def walk(at: griffe.Object) -> Iterator[griffe.Object]:
    """An object and all that is defined inside."""
    yield at
    for member in list(at.members.values()):
        if isinstance(member, griffe.Object):
            yield from walk(member)


def resolver(at: griffe.Object) -> Resolver:
    """Where a role leads, by the scope it stands in."""

    def resolve(target: str) -> str | None:
        if target.startswith("reweigh."):
            return target
        first, dot, rest = target.partition(".")
        scope: griffe.Object | None = at
        while scope is not None:
            if first in scope.members:
                member = scope.members[first]
                return f"{member.target_path if isinstance(member, griffe.Alias) else member.path}{dot}{rest}"
            if scope.name == first:
                return f"{scope.path}{dot}{rest}"
            scope = scope.parent
        return None

    return resolve


def _plural(text: str) -> str:
    """The parser knows ``Examples:`` as doctests."""
    if "Example" not in sections(text):
        return text
    return "\n".join(
        line.replace("Example:", "Examples:") if line.strip() == "Example:" else line for line in text.split("\n")
    )
