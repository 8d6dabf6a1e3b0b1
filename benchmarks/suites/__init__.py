"""The suites, by name."""

from __future__ import annotations

from .base import Gate, Method, Metric, Outcome, Suite, Trial
from .digits_lt50 import DigitsLT50
from .digits_lt_noisy import DigitsLTNoisy
from .digits_spurious import DigitsSpurious
from .digits_two_tasks import DigitsTwoTasks

SUITES: dict[str, type[Suite]] = {
    suite.name: suite for suite in (DigitsLT50, DigitsTwoTasks, DigitsSpurious, DigitsLTNoisy)
}
"""Every suite the program knows."""

__all__ = [
    "SUITES",
    "DigitsLT50",
    "DigitsLTNoisy",
    "DigitsSpurious",
    "DigitsTwoTasks",
    "Gate",
    "Method",
    "Metric",
    "Outcome",
    "Suite",
    "Trial",
]
