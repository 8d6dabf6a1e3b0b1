"""What every script of this folder does: time calls, and put rows on record."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def seconds(call: Callable[[], Any], calls: int) -> float:
    """Thread CPU time of one call, over a block of them."""
    start = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls


def record(path: str, rows: list[dict[str, Any]], **more: str) -> None:
    """Write rows as JSON, with what they were measured with; ``more`` adds to that or says it better."""
    about = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(), **more}
    Path(path).write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
