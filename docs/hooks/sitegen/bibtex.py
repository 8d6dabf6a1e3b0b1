"""BibTeX from the ``References:`` section of a docstring: authors, "Title", Venue year; the next one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

_SPLIT = re.compile(r";\s+|(?<=\d{4})\.\s+|(?<=\d{4}\s\([a-z])\.\s+|(?<=\))\.\s+")
_QUOTED = re.compile(r'^(?:(?P<authors>[^"]+?),\s+)?"(?P<title>[^"]+)",\s+(?P<where>.+)$', re.S)
_PLAIN = re.compile(r"^(?P<title>[^,]+),\s+(?P<where>.+)$", re.S)
_ARXIV = re.compile(r"arXiv[: ]+(\d{4}\.\d{4,5})")
_JOURNAL = re.compile(r"Journal|JMLR|TMLR|TPAMI|TNNLS|PLOS|Graphics|Trans")
_INITIAL = re.compile(r"^(?:[^\W\d_]\.-?)+$")
_MARKS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0308": '"',
    "\u030a": "r ",
    "\u030c": "v ",
    "\u0327": "c ",
}
_PLAIN_LETTERS = {"ø": "o", "Ø": "O", "ß": "ss", "ł": "l", "Ł": "L", "æ": "ae"}
_LETTERS = {letter: f"{{\\{name}}}" for letter, name in _PLAIN_LETTERS.items()}
_SMALL = {"a", "an", "the", "on", "of", "in", "for", "to", "and", "can", "is"}


class CitationError(ValueError):
    """A reference that cannot be read."""


@dataclass(frozen=True)
class Citation:
    """One source."""

    authors: tuple[str, ...]
    """As they stand: initials before the name; "et al." as the last where there are more."""
    title: str
    venue: str
    """Where it appeared, without the year."""
    year: int | None
    arxiv: str | None = None

    @property
    def key(self) -> str:
        """Name of the first author, year and first word of the title that says something."""
        words = [w for w in re.findall(r"[A-Za-z][A-Za-z0-9]*", _ascii(self.title)) if w.lower() not in _SMALL]
        if not self.authors:
            return f"{words[0].lower()}{self.year or ''}"
        who = re.sub(r"[^a-z]", "", _ascii(_names(self.authors[0])[0]).lower())
        return f"{who}{self.year or ''}{words[0].lower()}"

    def bibtex(self) -> str:
        """The entry."""
        fields = {"title": f"{{{_tex(self.title)}}}"}
        if self.authors:
            fields["author"] = " and ".join(_author(name) for name in self.authors)
        if self.arxiv is not None:
            kind = "misc"
            fields |= {"eprint": self.arxiv, "archiveprefix": "arXiv"}
        elif _JOURNAL.search(self.venue):
            kind = "article"
            fields |= self._volume()
        elif self.authors:
            kind, fields["booktitle"] = "inproceedings", _tex(self.venue)
        else:
            kind, fields["howpublished"] = "misc", _tex(self.venue)
        if self.year is not None:
            fields["year"] = str(self.year)
        body = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
        return f"@{kind}{{{self.key},\n{body}}}"

    def _volume(self) -> dict[str, str]:
        found = re.match(r"^(.*\D)\s+(\d+)(?:\((\d+)\))?$", self.venue)
        if found is None:
            return {"journal": _tex(self.venue)}
        number = {} if found[3] is None else {"number": found[3]}
        return {"journal": _tex(found[1]), "volume": found[2], **number}


def citations(references: str) -> list[Citation]:
    """All sources that a section names, without functions of libraries; none where it starts with "None".

    Raises:
        CitationError: Where one cannot be read.
    """
    text = " ".join(references.split())
    if not text or re.match(r"None\b", text):
        return []
    return [_citation(part.strip().rstrip(".")) for part in _SPLIT.split(text) if part.strip(" .") and "``" not in part]


def library(sections: Iterable[str]) -> dict[str, Citation]:
    """All sources of many sections by key; where two name the same one, what says more of it."""
    found: dict[str, Citation] = {}
    for citation in (one for section in sections for one in citations(section)):
        known = found.setdefault(citation.key, citation)
        found[citation.key] = max(known, citation, key=lambda one: (len(one.authors), len(one.title)))
    return dict(sorted(found.items()))


def _citation(text: str) -> Citation:
    found = _QUOTED.match(text) or _PLAIN.match(text)
    if found is None:
        raise CitationError(f'not a reference (authors, "title", venue year): {text!r}')
    where = found["where"]
    arxiv = _ARXIV.search(where)
    rest = where.replace(arxiv.group(), "") if arxiv else where
    years = [int(number) for number in re.findall(r"\b(1[89]\d\d|20\d\d)\b", rest)]
    year = years[0] if years else 2000 + int(arxiv[1][:2]) if arxiv else None
    venue = rest.partition(str(year))[0] if years else rest  # what follows the year says what we took from it
    authors = found.groupdict().get("authors") or ""
    return Citation(
        authors=tuple(_people(authors)),
        title=found["title"].strip(),
        venue="arXiv" if arxiv else venue.strip(" ,"),
        year=year,
        arxiv=arxiv[1] if arxiv else None,
    )


def _people(text: str) -> list[str]:
    text, more = re.subn(r"\s+et al\.?$", "", text.strip())
    people = [name.strip() for name in text.split(",") if name.strip()]
    return [*people, "et al."] if more else people


def _names(author: str) -> tuple[str, str]:
    words = author.split()
    start = next((at for at, one in enumerate(words) if not _INITIAL.match(one)), 0)
    return " ".join(words[start:]), " ".join(words[:start])


def _author(author: str) -> str:
    if author == "et al.":
        return "others"
    last, first = _names(author)
    return _tex(f"{last}, {first}" if first else last)


def _ascii(text: str) -> str:
    text = "".join(_PLAIN_LETTERS.get(letter, letter) for letter in text)
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _tex(text: str) -> str:
    made = []
    for letter in text:
        base, *marks = list(unicodedata.normalize("NFD", letter))
        if letter in _LETTERS:
            made.append(_LETTERS[letter])
        elif marks and marks[0] in _MARKS:
            made.append(f"{{\\{_MARKS[marks[0]]}{base}}}")
        else:
            made.append(f"\\{letter}" if letter in "&%#_" else letter)
    return "".join(made)
