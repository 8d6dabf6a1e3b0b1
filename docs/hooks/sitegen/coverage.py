"""What has to be true of the built site."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .pages import ROOMS

if TYPE_CHECKING:
    import griffe

_RAW = re.compile(
    r":(?:math|class|func|meth|mod|attr|data|exc|obj):(?=<code|`|<a)|\.\. math::|texformula(?:inline|block)x"
    r"|```|\$\$|\\[(\[]|\\(?:frac|sum|log|mathrm|text|begin|ell)\b"
)
_VERBATIM = re.compile(r"<(pre|code|script|style|textarea)\b[^>]*>.*?</\1>", re.S)
_ID = re.compile(r'\bid="([^"]+)"')


def anchors(html: str) -> set[str]:
    """All ids of a page."""
    return set(_ID.findall(html))


def raw(html: str) -> list[str]:
    """What is left of reST or LaTeX markup in a page, code aside."""
    return sorted(set(_RAW.findall(_VERBATIM.sub("<code>", html))))


def public_names() -> Iterator[tuple[str, Any]]:
    """Every public name and what it means."""
    for room in ROOMS:
        module = import_module(f"reweigh.{room}")
        for name in module.__all__:
            yield f"reweigh.{room}.{name}", getattr(module, name)


def spellings(name: str, value: Any) -> set[str]:
    """The ids under which a public name may stand on the site."""
    found = {name}
    home, qualified = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(value, ModuleType):
        found.add(value.__name__)
    elif isinstance(home, str) and isinstance(qualified, str):
        found.add(f"{home}.{qualified}")
    return found


def missing(ids: Collection[str]) -> list[str]:
    """Public names that no page shows."""
    return [name for name, value in public_names() if not any(one in ids for one in spellings(name, value))]


def undocumented(package: griffe.Object) -> list[str]:
    """Public names without a docstring in the source."""
    found = []
    for name, _ in public_names():
        member = package[name.removeprefix("reweigh.")]
        if member.docstring is None or not member.docstring.value.strip():
            found.append(name)
    return found


def linked_tree(root: Path, into: Path) -> Path:
    """A folder in which the repository's root is the package ``reweigh``, without its tests and environments."""
    package = into / "reweigh"
    package.mkdir(parents=True)
    for part in ("__init__.py", "py.typed", *ROOMS):
        (package / part).symlink_to(root / part)
    return into
