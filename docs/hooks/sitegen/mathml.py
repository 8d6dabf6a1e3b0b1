"""Formulas as MathML, which browsers draw without any script.

Markdown would touch what stands inside a formula, so a formula travels through it as one word of letters and digits
(:func:`word`) and is turned into MathML in the finished HTML (:func:`drawn`).
"""

from __future__ import annotations

import re
import warnings
from functools import cache
from itertools import accumulate
from xml.etree import ElementTree

from latex2mathml.converter import convert

_WORD = re.compile(r"texformula(inline|block)x([0-9a-f]+)x")
_ARG = re.compile(r"\\arg\s*\\(max|min)(?![a-zA-Z])")
_CODE = re.compile(
    r"^(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^(?P=fence)[ \t]*$|(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)", re.M | re.S
)
_MATH = re.compile(
    r"\$\$(?P<dollars>.+?)\$\$|\\\[(?P<brackets>.+?)\\\]|\\\((?P<inline>.+?)\\\)"
    r"|(?<![\\$\w])\$(?P<single>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?![\w$])",
    re.S,
)

_PARTS = {"mfrac": 2, "msub": 2, "msup": 2, "msubsup": 3, "munder": 2, "mover": 2, "munderover": 3}
"""How many children such an element has."""


class FormulaError(ValueError):
    """A formula that cannot be drawn."""


@cache
def mathml(latex: str, *, block: bool = False) -> str:
    """A ``<math>`` element; :class:`FormulaError` where the formula cannot be converted in full."""
    plain = _ARG.sub(r"\\operatorname*{arg\\,\1}", " ".join(latex.split()))
    plain = re.sub(r"(\\begin\{cases\}|\\\\)\s*\[", r"\1 {}[", plain)  # a bracket of the formula, not of the command
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = convert(plain, display="block" if block else "inline")
    except Exception as error:
        raise FormulaError(f"cannot convert {latex!r}: {type(error).__name__} {error}") from error
    left = re.search(r"\\[a-zA-Z]+|\\\W|merror", made)
    if left:
        raise FormulaError(f"cannot convert {latex!r}: {left.group()} is left over")
    depths = list(accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in re.sub(r"\\.", "", plain)))
    if depths and (min(depths) < 0 or depths[-1] != 0):
        raise FormulaError(f"cannot convert {latex!r}: its braces do not match")
    for element in ElementTree.fromstring(made).iter():
        wanted = _PARTS.get(element.tag.rpartition("}")[2])
        if wanted is not None and len(element) != wanted:
            raise FormulaError(f"cannot convert {latex!r}: a part of it is missing")
    return str(made)


def word(latex: str, *, block: bool = False) -> str:
    """The formula as one word that Markdown leaves alone."""
    return f"texformula{'block' if block else 'inline'}x{latex.encode().hex()}x"


def drawn(html: str) -> str:
    """HTML with every such word replaced by MathML; a wide formula scrolls in a frame of its own."""

    def one(found: re.Match[str]) -> str:
        latex = bytes.fromhex(found[2]).decode()
        return mathml(latex) if found[1] == "inline" else f'<span class="formula">{mathml(latex, block=True)}</span>'

    return _WORD.sub(one, html)


def in_markdown(text: str) -> str:
    r"""Markdown with ``$..$``, ``$$..$$``, ``\(..\)`` and ``\[..\]`` outside code as words of :func:`word`."""
    parts, last = [], 0
    for code in _CODE.finditer(text):
        parts += [_MATH.sub(_as_word, text[last : code.start()]), code.group()]
        last = code.end()
    return "".join([*parts, _MATH.sub(_as_word, text[last:])])


def _as_word(found: re.Match[str]) -> str:
    block = found["dollars"] or found["brackets"]
    return word(block or found["inline"] or found["single"], block=bool(block))
