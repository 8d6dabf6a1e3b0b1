"""What exists: the record of each method, and the registries that third-party packages extend by entry points."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """What the catalogue says of a method. The docs, the conformance suite and the benchmark read it."""

    name: str
    """Name in the registry, in snake case."""
    paper: str
    """Title of the source paper, or ``"none"``."""
    venue: str
    """Where it appeared, with the year."""
    acts_on: str = "class"
    """What its terms are: ``"class"`` (an index target), ``"binary"`` (targets in [0, 1]), or a plugin's own word."""
    official: str | None = None
    """The authors' code at a commit, where there is any."""
    defaults: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Hyper-parameter: (default, where it comes from)."""
    deviations: Sequence[str] = ()
    """Where this differs from the paper or the authors' code, and why."""
    neutral: Mapping[str, Any] | None = None
    """Constructor arguments, for four classes, that leave every loss as it is; ``None`` where there are none."""
    examples: Sequence[Mapping[str, Any]] = ({},)
    """Constructor arguments, for four classes, that the conformance suite builds the method with."""


class Registry(Generic[T]):
    """Named classes of one kind, those of installed plugins included.

    Args:
        kind: Word for error messages.
        group: Entry-point group that is loaded on first use. Each entry point names a class.
        base: What those classes derive from.
    """

    def __init__(self, kind: str, group: str, base: type[Any] = object) -> None:
        self.kind, self.group, self.base = kind, group, base
        self._classes: dict[str, type[T]] = {}
        self._methods: dict[str, Method] = {}
        self._loaded = False

    def add(self, cls: type[T], method: Method) -> None:
        """Enter a class; raises ``ValueError`` where the name is taken by another one."""
        known = self._classes.get(method.name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{self.kind} name {method.name!r} is taken by {known.__module__}.{known.__qualname__}, "
                f"so {cls.__module__}.{cls.__qualname__} cannot have it"
            )
        self._classes[method.name], self._methods[method.name] = cls, method

    def method(self, name: str, **record: Any) -> Callable[[type[T]], type[T]]:
        """Class decorator: enter the class with its :class:`Method` record."""

        def enter(cls: type[T]) -> type[T]:
            self.add(cls, Method(name=name, **record))
            return cls

        return enter

    def available(self) -> list[str]:
        """Names of everything that can be created, sorted."""
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class behind a name; ``ValueError`` with the nearest names where there is none."""
        self._load()
        if name not in self._classes:
            from difflib import get_close_matches

            near = get_close_matches(name, self._classes, n=3, cutoff=0.4) or self.available()
            raise ValueError(f"no {self.kind} is called {name!r}; did you mean {', '.join(map(repr, near))}?")
        return self._classes[name]

    def record(self, name: str) -> Method:
        """The catalogue record behind a name."""
        self.get(name)
        return self._methods[name]

    def create(self, name: str, *args: Any, **kwargs: Any) -> T:
        """Build the class behind a name."""
        return self.get(name)(*args, **kwargs)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for entry in entry_points(group=self.group):
            try:
                loaded: Any = entry.load()
                if not (isinstance(loaded, type) and issubclass(loaded, self.base)):
                    raise TypeError(f"it must name a class derived from {self.base.__name__}, got {loaded!r}")
            except Exception as error:
                warnings.warn(
                    f"{self.kind} plugin {entry.name!r} ({entry.value}) cannot be loaded: {error}", stacklevel=3
                )
                continue
            if not any(known is loaded for known in self._classes.values()):
                try:
                    self.add(loaded, Method(name=entry.name, paper="none", venue=f"plugin {entry.value}"))
                except ValueError:
                    self._loaded = False  # a clash is an error every time, not only for the first who asks
                    raise
