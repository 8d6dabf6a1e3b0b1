"""The suites, by name."""

from __future__ import annotations

from .base import Gate, Method, Metric, Outcome, Published, Recorded, Suite, Trial
from .cifar_lt import CIFAR_LT
from .conll import Conll
from .diabetes_skewed import DiabetesSkewed
from .digits_lt50 import DigitsLT50
from .digits_lt_noisy import DigitsLTNoisy
from .digits_nuisance import DigitsNuisance
from .digits_overlay_ml import DigitsOverlayML
from .digits_spurious import DigitsSpurious
from .digits_two_tasks import DigitsTwoTasks
from .group_images import CelebABlond, Waterbirds
from .image_lists import ImageNetLT, INaturalist18, PlacesLT
from .multilabel_images import Coco, CocoMLT, VocMLT
from .nyuv2 import NYUv2
from .pydoc_lm import PydocLM
from .pydoc_quotes import PydocQuotes
from .unicode_category import UnicodeCategory
from .user_table import TableClasses, TableNumbers
from .user_text import TextLM

_ALL: tuple[type[Suite], ...] = (
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
    *CIFAR_LT,
    ImageNetLT,
    PlacesLT,
    INaturalist18,
    Waterbirds,
    CelebABlond,
    Coco,
    VocMLT,
    CocoMLT,
    Conll,
    TextLM,
    NYUv2,
    TableClasses,
    TableNumbers,
)
SUITES: dict[str, type[Suite]] = {suite.name: suite for suite in _ALL}
"""Every suite the program knows."""

__all__ = [
    "CIFAR_LT",
    "CelebABlond",
    "Coco",
    "CocoMLT",
    "Conll",
    "DiabetesSkewed",
    "DigitsLT50",
    "DigitsLTNoisy",
    "DigitsNuisance",
    "DigitsOverlayML",
    "DigitsSpurious",
    "DigitsTwoTasks",
    "Gate",
    "INaturalist18",
    "ImageNetLT",
    "Method",
    "Metric",
    "NYUv2",
    "Outcome",
    "PlacesLT",
    "Published",
    "PydocLM",
    "PydocQuotes",
    "Recorded",
    "SUITES",
    "Suite",
    "TableClasses",
    "TableNumbers",
    "TextLM",
    "Trial",
    "UnicodeCategory",
    "VocMLT",
    "Waterbirds",
]
