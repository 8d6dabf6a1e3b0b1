"""Every registered method with all that its page says, read from the registries and the classes themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from reweigh import losses, weighting
from reweigh.losses import CausalLM, Objective
from reweigh.losses.criteria.joint import Joint
from reweigh.losses.logits import LogitTransform
from reweigh.weighting.base import Weighting
from reweigh.weighting.dynamics import dynamics
from reweigh.weighting.registry import Method

from . import bibtex, docstrings

REGISTRIES = (weighting.registry, losses.registry)


@dataclass(frozen=True)
class Entry:
    """One method of the catalogue."""

    kind: str
    """``"weighting"`` or ``"objective"``, as its registry says."""
    name: str
    cls: type[Any]
    record: Method

    @property
    def path(self) -> str:
        """Its page, from the root of the site's sources."""
        return f"methods/{self.kind}/{self.name}.md"

    @property
    def public(self) -> str:
        """The name that users import it by."""
        return f"reweigh.{'weighting' if self.kind == 'weighting' else 'losses'}.{self.cls.__name__}"

    @cached_property
    def sections(self) -> dict[str, str]:
        """The docstring by section."""
        return docstrings.sections(self.cls.__doc__)

    @cached_property
    def built(self) -> Any:
        """An instance, from the first of the record's examples."""
        return self.cls(**self.record.examples[0])

    @property
    def summary(self) -> str:
        """The docstring's first sentence."""
        return " ".join(self.sections[""].partition("\n\n")[0].split())

    @property
    def body(self) -> str:
        """What the docstring says between summary and sections: formula and symbols."""
        return self.sections[""].partition("\n\n")[2].strip()

    @property
    def weightings(self) -> list[Weighting]:
        """All weightings inside an instance, itself included."""
        return [part for part in self.built.modules() if isinstance(part, Weighting)]

    @property
    def needs(self) -> list[str]:
        """A weighting: statistics it reads. An objective: what a call may bring beside inputs and masks."""
        if isinstance(self.built, Weighting):
            return sorted(self.built.needs)
        asked: set[str] = set()
        for part in self.built.modules():
            if isinstance(part, Objective):
                asked |= set(part.criterion.accepts) - {"offered"}
                if part.weighting is not None:
                    asked |= set(part.weighting.needs) - set(part.criterion.provides) - set(part.criterion.offers)
        return sorted(asked)

    @property
    def events(self) -> list[str]:
        """Events at which something inside changes."""
        found = {part.update_on for part in dynamics(self.built)} - {"never"}
        return [event for event in ("fit", "forward", "step", "epoch", "validation") if event in found]

    @property
    def kinds(self) -> list[str]:
        """Kinds of terms it works on, by what it reads beside what a call brings.

        "any" where that is nothing; tokens as well where it is only a label and its probability.
        """
        acts_on = self.record.acts_on
        if not isinstance(self.built, Weighting) or acts_on != "class":
            return [acts_on]
        reads = self.built.needs - {"loss", "group"} - set(self.built.example_stats(1))
        if reads <= {"index"}:
            return ["any"]
        return ["class", "token"] if reads <= CausalLM().provides else ["class"]

    @property
    def state(self) -> list[str]:
        """What a checkpoint holds of it, a count of steps or epochs last."""
        names = {key.rpartition(".")[2] for key in self.built.state_dict()}
        return [*sorted(names - {"clock"}), *sorted(names & {"clock"})]

    @property
    def detached(self) -> str:
        """Whether gradient flows through the weights, in words; empty where there are no weights."""
        found = list(_weights(self.built))
        if not found:
            return ""
        if any(parameter.requires_grad for part in found for parameter in part.parameters()):
            return "learned: gradient flows into parameters of their own"
        if all(part.detached for part in found):
            return "constants to the gradient"
        return "differentiated: gradient flows through them"

    @property
    def scope(self) -> str:
        """What a weight depends on; empty where there are no weights, or one for each task."""
        own = next(_weights(self.built), None)
        return "" if own is None or self.record.acts_on == "task" else own.scope

    @property
    def year(self) -> int | None:
        """When it appeared; ``None`` for textbook methods."""
        years = re.findall(r"\b(?:19|20)\d\d\b(?!\.)", re.sub(r"\d{4}\.\d{4,5}", "", self.record.venue))
        cited = [one.year for one in bibtex.citations(self.sections.get("References", "")) if one.year]
        return int(years[0]) if years else cited[0] if cited else None

    @property
    def keys(self) -> list[str]:
        """Keys of its sources."""
        return [one.key for one in bibtex.citations(self.sections.get("References", ""))]


@cache
def entries() -> tuple[Entry, ...]:
    """All methods of this library, weightings first; those of installed plugins have sites of their own."""
    return tuple(_found())


def _weights(built: Any) -> Iterator[Weighting]:
    """The weighting itself, or those that an objective and objectives inside multiply losses with."""
    if isinstance(built, Weighting):
        yield built
    elif isinstance(built, Objective):
        if built.weighting is not None and not isinstance(built.criterion, Joint):
            yield built.weighting
        for part in built.criterion.modules():
            if isinstance(part, Objective):
                yield from _weights(part)


def _found() -> Iterator[Entry]:
    for registry in REGISTRIES:
        for name in registry.available():
            cls = registry.get(name)
            if cls.__module__.startswith("reweigh."):
                yield Entry(registry.kind, name, cls, registry.record(name))


def logit_transforms() -> list[type[LogitTransform]]:
    """Public changes of the logits. They have no registry, because a criterion takes them as objects."""
    public = (getattr(losses, name) for name in losses.__all__)
    found = [one for one in public if isinstance(one, type) and issubclass(one, LogitTransform)]
    return [cls for cls in found if not inspect.isabstract(cls)]


@cache
def sources() -> dict[str, bibtex.Citation]:
    """All sources of all methods by key."""
    return bibtex.library(entry.sections.get("References", "") for entry in entries())
