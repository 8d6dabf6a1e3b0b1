"""The suites, by name."""

from __future__ import annotations

from .base import Gate, Method, Metric, Outcome, Published, Recorded, Suite, Trial
from .diabetes_skewed import DiabetesSkewed
from .digits_lt50 import DigitsLT50
from .digits_lt_noisy import DigitsLTNoisy
from .digits_nuisance import DigitsNuisance
from .digits_overlay_ml import DigitsOverlayML
from .digits_spurious import DigitsSpurious
from .digits_two_tasks import DigitsTwoTasks
from .pydoc_lm import PydocLM
from .pydoc_quotes import PydocQuotes
from .unicode_category import UnicodeCategory

SUITES: dict[str, type[Suite]] = {
    suite.name: suite
    for suite in (
        DigitsLT50,
        UnicodeCategory,
        DigitsOverlayML,
        PydocQuotes,
        PydocLM,
        DigitsSpurious,
        DigitsTwoTasks,
        DigitsNuisance,
        DigitsLTNoisy,
        DiabetesSkewed,
    )
}
"""Every suite the program knows."""

__all__ = [
    "SUITES",
    "DiabetesSkewed",
    "DigitsLT50",
    "DigitsLTNoisy",
    "DigitsNuisance",
    "DigitsOverlayML",
    "DigitsSpurious",
    "DigitsTwoTasks",
    "Gate",
    "Method",
    "Metric",
    "Outcome",
    "Published",
    "PydocLM",
    "PydocQuotes",
    "Recorded",
    "Suite",
    "Trial",
    "UnicodeCategory",
]
