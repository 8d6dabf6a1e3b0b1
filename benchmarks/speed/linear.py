"""Language-model scale: weighted cross-entropy of hidden states under a vocabulary matrix, beside what others do.

``python -m reweigh.benchmarks.speed.linear`` measures forward and backward, interleaved in one process with one thread
(CPU) or by device events (``--device cuda``), the memory at its peak, and how far the gradients are from float64.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from reweigh.losses import LinearCrossEntropy, Objective
from reweigh.weighting import KLDRO, TLDR, CVaR, Focal, PowerLawDecay, Weighting

from .clock import record, seconds
from .memory import held_at_most

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPES = {"cpu": [(2048, 512, 32000), (4096, 1024, 32000)], "cuda": [(8192, 4096, 128000)]}


@dataclass(frozen=True)
class Entry:
    """One way to compute a loss, and what its gradients are checked against (``None``: nothing)."""

    call: Call
    truth: Call | None = None


def counts(classes: int) -> Tensor:
    """Zipf's law: how often each token occurs."""
    return 1e6 / (1.0 + torch.arange(classes, dtype=torch.float64))


def weightings(classes: int) -> dict[str, Weighting | None]:
    """Ours, by what the tables call them."""
    return {
        "no weighting": None,
        "focal": Focal(2.0),
        "decay x TLDR": PowerLawDecay(counts(classes), alpha=0.25) * TLDR(),
        "decay x TLDR x focal": PowerLawDecay(counts(classes), alpha=0.25) * TLDR() * Focal(1.0),
        "top 40 %": CVaR(0.4),
        "softmax of losses": KLDRO(1.0),
        "focal, mean 1": Focal(2.0).normalize(),
    }


def entries(classes: int, device: str) -> dict[str, Entry]:
    """Everything that is measured; the first is the floor."""
    found = {
        "logits, F.cross_entropy": Entry(_naive, _naive),
        "logits, focal by hand": Entry(_naive_focal, _naive_focal),
    }
    if hasattr(functional, "linear_cross_entropy"):
        found["torch chunked, mean"] = Entry(_torch("mean"), _naive)
        found["torch chunked, none, focal by hand"] = Entry(_torch("none"), _naive_focal)
    found |= _peers(device)
    scale = counts(classes).add(1.0).pow(-0.25).float().to(device)
    for name, weighting in weightings(classes).items():
        ours, dense = (Objective(LinearCrossEntropy(impl=impl), weighting).to(device) for impl in ("auto", "dense"))
        found[f"reweigh, {name}"] = Entry(_ordered(ours), _ordered(dense))
    hand = _HandFused(scale)
    found["decay x TLDR x focal, fused by hand"] = Entry(hand, found["reweigh, decay x TLDR x focal"].truth)
    return found


def _ordered(objective: Objective) -> Call:
    return lambda hidden, weight, target: objective(hidden, weight, target)


def _naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(_up(functional.linear(hidden, weight)), target)


def _naive_focal(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _focal(functional.cross_entropy(_up(functional.linear(hidden, weight)), target, reduction="none"))


def _up(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _focal(ce: Tensor) -> Tensor:
    return ((1.0 - torch.exp(-ce)) ** 2 * ce).mean()


def _torch(reduction: str) -> Call:
    def call(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        found: Tensor = functional.linear_cross_entropy(hidden, weight, target, reduction=reduction, options=options)
        return _focal(found.float()) if reduction == "none" else found

    return call


def _peers(device: str) -> dict[str, Entry]:
    """Liger-Kernel and cut-cross-entropy, where they are installed and run on the device."""
    found: dict[str, Entry] = {}
    if device != "cuda":
        return found
    with contextlib.suppress(ImportError):
        liger = importlib.import_module("liger_kernel.transformers")
        mean, none = (liger.LigerFusedLinearCrossEntropyLoss(reduction=name) for name in ("mean", "none"))
        scaled = liger.LigerFusedLinearCrossEntropyLoss(use_token_scaling=True)
        found["Liger, mean"] = Entry(lambda h, w, y: mean(w, h, y), _naive)
        found["Liger, its token scaling (p_t)"] = Entry(lambda h, w, y: scaled(w, h, y))
        found["Liger, none, focal by hand"] = Entry(lambda h, w, y: _focal(none(w, h, y).float()), _naive_focal)
    with contextlib.suppress(ImportError):
        cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        found["cut-cross-entropy, mean"] = Entry(lambda h, w, y: cut(h, w, y), _naive)
        found["cut-cross-entropy, none, focal by hand"] = Entry(
            lambda h, w, y: _focal(cut(h, w, y, reduction="none").float()), _naive_focal
        )
    return found


class _HandFused:
    """decay x TLDR x focal(1) in one loop over chunks, value and derivative written out: what composing may cost."""

    def __init__(self, scale: Tensor, rows: int = 256) -> None:
        self.scale, self.rows = scale, rows

    def __call__(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        found: Tensor = _HandFusedFunction.apply(hidden, weight, target, self.scale, self.rows)  # type: ignore[no-untyped-call]
        return found


class _HandFusedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, scale: Tensor, rows: int) -> Tensor:
        number = len(target)
        buffer = hidden.new_empty(min(rows, number), len(weight))
        by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = hidden.new_zeros(())
        for start in range(0, number, rows):
            part, y = hidden[start : start + rows], target[start : start + rows]
            soft = torch.mm(part, weight.t(), out=buffer[: len(y)])
            soft.sub_(soft.amax(1, keepdim=True))
            at = soft.gather(1, y.unsqueeze(1)).squeeze(1)
            sums = soft.exp_().sum(1)
            ce = sums.log() - at
            p = torch.exp(-ce)
            q = -torch.expm1(-ce)
            bend, factor = 1.0 + torch.cos(math.pi * p), scale.to(ce.dtype)[y]
            total += (factor * bend * q * ce).sum()
            slope = math.pi * p * torch.sin(math.pi * p) * q * ce + bend * p * ce + bend * q
            slope = factor * slope
            soft.mul_((slope / sums).unsqueeze(1)).scatter_(1, y.unsqueeze(1), (-slope * q).unsqueeze(1))
            torch.mm(soft, weight, out=by_hidden[start : start + rows])
            by_weight.addmm_(soft.t(), part)
        ctx.found = by_hidden, by_weight
        ctx.number = number
        return total / number

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = ctx.found
        return by_hidden.mul_(grad / ctx.number), by_weight.mul_(grad / ctx.number), None, None, None


# measuring


def problem(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, vocabulary matrix and targets."""
    number, width, classes = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(number, width, generator=generator, device=device)
    weight = torch.randn(classes, width, generator=generator, device=device) * width**-0.5
    target = torch.randint(classes, (number,), generator=generator, device=device)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def once(call: Call, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Seconds of a forward and backward."""
    for value in inputs[:2]:
        value.grad = None
    if inputs[0].is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call(*inputs).backward()  # type: ignore[no-untyped-call]
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    return seconds(lambda: call(*inputs).backward(), 1)  # type: ignore[no-untyped-call]


def peak_bytes(call: Call, inputs: tuple[Tensor, Tensor, Tensor]) -> int:
    """Most memory held at once beyond the inputs."""
    for value in inputs[:2]:
        value.grad = None
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*inputs).backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return held_at_most(lambda: call(*inputs).backward())  # type: ignore[no-untyped-call]


def error(entry: Entry, inputs: tuple[Tensor, Tensor, Tensor], rows: int = 320) -> float | None:
    """Largest error of a gradient on a few rows, against float64, relative to its largest entry."""
    if entry.truth is None:
        return None
    hidden, weight, target = inputs[0].detach()[:rows], inputs[1].detach(), inputs[2][:rows]
    found = []
    for call, dtype in ((entry.call, hidden.dtype), (entry.truth, torch.float64)):
        at = [value.to(dtype).requires_grad_() for value in (hidden, weight)]
        found.append(torch.autograd.grad(call(at[0], at[1], target), at))
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))


def measure(shape: tuple[int, int, int], device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """All entries on one shape, in shuffled rounds, as ratios to the first."""
    inputs, calls = problem(shape, device, dtype), entries(shape[2], device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    try:
        for turn in range(rounds + 1):  # the first is a warm-up
            for name in random.sample(list(calls), len(calls)):
                seconds = once(calls[name].call, inputs)
                if turn:
                    times[name].append(seconds)
    finally:
        gc.enable()
    floor = times[next(iter(calls))]
    rows = []
    for name, entry in calls.items():
        ratios = [a / b for a, b in zip(times[name], floor, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
        rows.append(
            {
                "shape": list(shape),
                "entry": name,
                "milliseconds": 1e3 * min(times[name]),
                "ratio": middle,
                "quartiles": [low, high],
                "ratio_of_minima": min(times[name]) / min(floor),
                "peak_mib": peak_bytes(entry.call, inputs) / 2**20,
                "gradient_error": error(entry, inputs),
            }
        )
    return rows


def page(found: dict[str, Any]) -> str:
    """A Markdown table of results."""
    about = found["environment"]
    lines = [
        f"One thread, {about['machine']}, torch {about['torch']}, float32; ratios are medians over interleaved rounds.",
        "",
        "| rows x width x vocabulary | loss | time, of plain | peak memory (of plain) |",
        "|---|---|---:|---:|",
    ]
    floors = {tuple(row["shape"]): row for row in reversed(found["rows"])}
    for row in found["rows"]:
        floor = floors[tuple(row["shape"])]
        shape = " x ".join(map(str, row["shape"]))
        memory = f"{row['peak_mib']:.0f} MiB ({row['peak_mib'] / floor['peak_mib']:.2f})"
        lines.append(f"| {shape} | {row['entry']} | {row['ratio']:.2f} | {memory} |")
    return "\n".join(lines)


def publish(found: dict[str, Any], path: Path) -> None:
    """Put the table between the markers of a page."""
    before, begin, rest = path.read_text(encoding="utf-8").partition("<!-- results: begin -->")
    _, end, after = rest.partition("<!-- results: end -->")
    if not end:
        raise ValueError(f"{path} has no markers for results")
    path.write_text(f"{before}{begin}\n{page(found)}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = ArgumentParser(prog="python -m reweigh.benchmarks.speed.linear", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds per shape")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", type=str, help="rows,width,vocabulary instead of the usual shapes")
    parser.add_argument("--out", type=str, help="file for the numbers, as JSON")
    parser.add_argument("--publish", type=str, help="page to put the numbers of --out into; measures nothing")
    options = parser.parse_args()
    if options.publish:
        publish(json.loads(Path(options.out).read_text()), Path(options.publish))
        return
    torch.set_num_threads(1)
    shapes = SHAPES[options.device]
    if options.shape:
        number, width, classes = map(int, options.shape.split(","))
        shapes = [(number, width, classes)]
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    rows = [row for shape in shapes for row in measure(shape, options.device, dtype, options.rounds)]
    title = "Forward and backward against plain cross-entropy on all logits"
    table = Table(title=f"{title} ({options.device}, {str(dtype)[6:]})", title_justify="left")
    for heading in ("rows x width x vocabulary", "entry", "ms", "ratio [quartiles]", "of minima", "peak MiB", "error"):
        table.add_column(heading, justify="left" if heading in ("rows x width x vocabulary", "entry") else "right")
    for row in rows:
        low, high = row["quartiles"]
        off = row["gradient_error"]
        table.add_row(
            " x ".join(map(str, row["shape"])),
            row["entry"],
            f"{row['milliseconds']:.0f}",
            f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]",
            f"{row['ratio_of_minima']:.2f}",
            f"{row['peak_mib']:.0f}",
            "" if off is None else f"{off:.0e}",
        )
    Console(width=150).print(table)
    if options.out:
        more = {} if options.device == "cpu" else {"machine": torch.cuda.get_device_name()}
        more["allocator"] = "tuned" if os.environ.get("GLIBC_TUNABLES") else "default"
        record(options.out, rows, **more)


if __name__ == "__main__":
    main()
