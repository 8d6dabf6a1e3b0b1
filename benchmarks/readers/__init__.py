"""Readers of the user's own copies of benchmark data; nothing is downloaded, and all errors are :class:`DataError`."""

from __future__ import annotations

from .cifar import long_tail_counts, long_tailed, read_cifar
from .common import DataError
from .conll import Span, SpanScore, read_conll, span_f1, spans
from .dense import Scene, load_scene, read_nyuv2
from .groups import Grouped, read_celeba, read_metadata, read_waterbirds
from .lists import load_images, read_image_list
from .multilabel import MultiLabel, read_coco
from .table import Table, read_table
from .text import read_documents

__all__ = [
    "DataError",
    "Grouped",
    "MultiLabel",
    "Scene",
    "Span",
    "SpanScore",
    "Table",
    "load_images",
    "load_scene",
    "long_tail_counts",
    "long_tailed",
    "read_celeba",
    "read_cifar",
    "read_coco",
    "read_conll",
    "read_documents",
    "read_image_list",
    "read_metadata",
    "read_nyuv2",
    "read_table",
    "read_waterbirds",
    "span_f1",
    "spans",
]
