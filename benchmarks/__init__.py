"""The comparison suite: ``python -m reweigh.benchmarks run digits_lt50``.

``suites`` says what is compared, ``runner`` trains it on all cores and can be stopped and continued, ``statistics``
holds the paired tests, ``report`` turns the runs of a folder into a table, ``results.json`` and ``report.html``.
:func:`compare` does the same for a model of your own, :func:`advise` looks at the imbalance of your data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .advice import advise as advise
    from .own import compare as compare

__all__ = ["advise", "compare"]


def __getattr__(name: str) -> Any:
    # not at import: workers and the speed scripts need neither
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .advice import advise
        from .own import compare
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reweigh.benchmarks.{name} needs {error.name}, which is not installed; the extra 'bench' has all that it "
            "needs: pip install 'reweigh[bench]', or '.[bench]' in a clone",
            name=error.name,
        ) from error

    return {"advise": advise, "compare": compare}[name]
