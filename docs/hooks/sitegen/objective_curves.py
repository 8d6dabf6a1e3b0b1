"""Figures of objectives: the loss of one term, and how strongly it pulls, by how right the model is.

What the inputs have to look like follows from those the objective's own ``example_inputs`` makes.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from reweigh.losses import Objective
from reweigh.losses.criteria.pair import PairLogSumExp
from reweigh.losses.criteria.proxy import ProxyCrossEntropy

from .figure import Curve, Line, Panel, numbers
from .records import Entry

POINTS = 121
CLASSES = 4


def grid() -> Tensor:
    """Probabilities from one end to the other."""
    return torch.linspace(0.02, 0.98, POINTS, dtype=torch.float64)


def softmax_logits(p: Tensor, classes: int = CLASSES) -> Tensor:
    """``(N, C)`` logits under which class 0 has probability ``p``, and the others share the rest."""
    first = p.log() - ((1 - p) / (classes - 1)).log()
    return torch.cat([first[:, None], torch.zeros(len(p), classes - 1, dtype=p.dtype)], 1)


def innermost(objective: Any) -> Any:
    """The criterion at the bottom."""
    return innermost(objective.criterion) if isinstance(objective, Objective) else objective


def objective_curve(entry: Entry, built: Objective) -> Curve | None:
    """The figure of an objective; ``None`` where its inputs are of no kind known here."""
    inputs = built.example_inputs(8)
    shapes = [tuple(value.shape) for value in inputs]
    first, second = inputs[0], inputs[1]
    objective = copy.deepcopy(built).eval()
    if isinstance(innermost(built), PairLogSumExp):
        return _pairs(objective)
    if isinstance(innermost(built), ProxyCrossEntropy):
        return _proxies(entry)
    if first.ndim == 1 and shapes[0] == shapes[1]:
        return _stacked(built)
    if first.ndim > 3:
        return _regions(objective)
    if first.ndim == 3:
        return _tokens(objective)
    if second.dtype == torch.bool:
        return _partial(objective)
    if shapes[0] == shapes[1]:
        return _binary(objective)
    return _classes(entry, objective)


def term(objective: Objective, first: Tensor, *rest: Any, **meta: Any) -> tuple[Tensor, Tensor]:
    """Each sample's weighted loss and the norm of its gradient, from one batch of ``(N, ...)`` inputs."""
    first = first.detach().clone().requires_grad_()
    terms = objective._measured((first, *rest), dict(meta))
    with torch.no_grad():
        losses = terms.fold(terms.times(terms.loss * objective._weights(terms)))
    value = objective(first, *rest, **meta)
    (slope,) = torch.autograd.grad(value * len(first), first)
    return losses.reshape(len(first), -1).sum(1), slope.reshape(len(first), -1).norm(dim=1)


def two_panels(x: Tensor, lines: dict[str, tuple[Tensor, Tensor]], xlabel: str, of: str) -> list[Panel]:
    """Loss on the left, gradient on the right."""
    return [
        Panel(xlabel, "weighted loss", numbers(x), [Line(k, numbers(v[0])) for k, v in lines.items()]),
        Panel(xlabel, f"gradient on {of}", numbers(x), [Line(k, numbers(v[1])) for k, v in lines.items()]),
    ]


def _classes(entry: Entry, objective: Objective) -> Curve:
    p = grid()
    target = torch.zeros(POINTS, dtype=torch.int64)
    meta: dict[str, Tensor] = {}
    if "index" in objective.criterion.accepts:
        meta["index"] = torch.zeros(POINTS, dtype=torch.int64)
    if "group" in entry.needs:
        return _groups(objective)
    found = term(objective, softmax_logits(p), target, **meta)
    plain = torch.nn.functional.cross_entropy
    logits = softmax_logits(p).requires_grad_()
    value = plain(logits, target, reduction="none")
    (slope,) = torch.autograd.grad(value.sum(), logits)
    lines = {entry.cls.__name__: found, "cross-entropy": (value, slope.norm(dim=1))}
    panels = two_panels(p, lines, "probability of the right class", "the logits")
    panels[0] = Panel(panels[0].xlabel, "loss of the term", panels[0].x, panels[0].lines)
    return Curve(panels, "Four classes, of which the wrong ones are equally likely; all points are one batch.")


def _groups(objective: Objective) -> Curve:
    """The weights that groups get over steps, from the objective's own events."""
    objective.train()
    steps, groups = 60, 3
    losses, weights = [], []
    for step in range(steps):
        level = torch.tensor([(0.6 + 0.6 * k) * math.exp(-step / steps * (2.5 - 0.7 * k)) for k in range(groups)])
        logits = softmax_logits((-level.double()).exp())
        group, target = torch.arange(groups), torch.zeros(groups, dtype=torch.int64)
        objective(logits.requires_grad_(), target, group=group)
        with torch.no_grad():
            weights.append(objective.weights(logits, target, group=group))
        losses.append(level)
        objective.update("step", index=step)
    x = list(range(steps))
    panels = [
        Panel("step", label, x, [Line(f"group {'ABC'[k]}", numbers(torch.stack(values)[:, k])) for k in range(groups)])
        for label, values in (("loss", losses), ("weight", weights))
    ]
    return Curve(panels, f"Weights over {steps} steps, one made-up loss for each group.")


def _binary(objective: Objective) -> Curve:
    p = grid()
    logit = (p.log() - torch.log1p(-p))[:, None]
    ones = torch.ones_like(logit)
    lines = {
        "positive label": term(objective, logit, ones),
        "negative label": term(objective, -logit, 0 * ones),
    }
    panels = two_panels(p, lines, "probability of the label", "the logit")
    return Curve(panels, "One yes-or-no label, by the probability given to the right answer.")


def _tokens(objective: Objective) -> Curve:
    """Sequences of two tokens, the second of which is predicted."""
    p = grid()
    lines = {}
    for token in (0, CLASSES - 1) if any(True for _ in objective.buffers()) else (0,):
        order = torch.arange(CLASSES).roll(token)
        logits = softmax_logits(p)[:, order.argsort()] if token == 0 else softmax_logits(p).roll(token, 1)
        padded = torch.stack([logits, torch.zeros_like(logits)], 1)
        labels = torch.full((POINTS, 2), token)
        label = f"token {token}" if token or any(True for _ in objective.buffers()) else "loss"
        lines[label] = term(objective, padded, labels)
    panels = two_panels(p, lines, "probability of the right token", "the logits")
    return Curve(panels, "A vocabulary of four tokens, of which the wrong ones are equally likely.")


def _partial(objective: Objective) -> Curve:
    p = grid()
    lines = {}
    for size in (1, 2, 3):
        candidates = (torch.arange(CLASSES) < size).expand(POINTS, CLASSES)
        meta = {"index": torch.zeros(POINTS, dtype=torch.int64)}
        lines[f"{size} candidates"] = term(objective, softmax_logits(p), candidates, **meta)
    panels = two_panels(p, lines, "probability of the right class", "the logits")
    return Curve(panels, "Four classes; the candidates are the right class and others, before anything is learned.")


def _regions(objective: Objective) -> Curve:
    """An image of 8 by 8 with an object of 8 pixels, every pixel equally right."""
    p = grid()
    channels = objective.example_inputs(1)[0].shape[1]
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[:, 3:5, 2:6] = 1
    values, on, off = [], [], []
    for one in p:
        column = softmax_logits(one[None], channels)[0]
        logits = column.expand(1, 8, 8, channels).clone()
        logits[target == 1] = column.roll(1)
        first = logits.permute(0, 3, 1, 2).clone().requires_grad_()
        value = objective(first, target)
        (slope,) = torch.autograd.grad(value, first)
        size = slope.norm(dim=1)
        values.append(value.detach().reshape(()))
        on.append(size[target == 1].mean() * 64)
        off.append(size[target == 0].mean() * 64)
    x = numbers(p)
    label = "probability of the right class"
    panels = [
        Panel(label, "loss", x, [Line("loss", numbers(torch.stack(values)))]),
        Panel(
            label,
            "gradient on a pixel, times 64",
            x,
            [Line("object", numbers(torch.stack(on))), Line("background", numbers(torch.stack(off)))],
        ),
    ]
    return Curve(panels, "An image of 8 by 8 pixels with an object of 8, all of them equally right.")


def _pairs(objective: Objective) -> Curve:
    """Three points of the plane: an anchor, a positive and a negative; one similarity moves, the other stays."""
    s = torch.linspace(-0.99, 0.99, POINTS, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    lines: dict[str, tuple[Tensor, Tensor]] = {}
    for moved, label in ((1, "to the positive"), (2, "to the negative")):
        values, slopes = [], []
        for similarity in s:
            angles = torch.tensor([0.0, math.acos(0.5), -math.acos(0.5)], dtype=torch.float64)
            angles[moved] = torch.acos(similarity) * (1 if moved == 1 else -1)
            points = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
            value = objective(points, labels)
            (slope,) = torch.autograd.grad(value, points)
            values.append(value.detach())
            slopes.append(slope[moved].norm())
        lines[label] = (torch.stack(values), torch.stack(slopes))
    x = numbers(s)
    panels = [
        Panel("similarity that moves", "loss", x, [Line(k, numbers(v[0])) for k, v in lines.items()]),
        Panel(
            "similarity that moves",
            "gradient on the moved point",
            x,
            [Line(k, numbers(v[1])) for k, v in lines.items()],
        ),
    ]
    return Curve(panels, "An anchor, a positive and a negative; one of the two similarities moves, the other is 0.5.")


def _proxies(entry: Entry) -> Curve:
    """An embedding that turns from the wrong proxy to the right one, both unit vectors of a plane."""
    objective: Objective = entry.cls(num_classes=2, embedding_dim=2, proxies=[[1.0, 0.0], [0.0, 1.0]])
    objective = objective.double()
    s = torch.linspace(0.01, 0.99, POINTS, dtype=torch.float64)
    embeddings = torch.stack([s, (1 - s * s).sqrt()], 1)
    target = torch.zeros(POINTS, dtype=torch.int64)
    lines = {entry.cls.__name__: term(objective, embeddings, target)}
    panels = two_panels(s, lines, "similarity to the right proxy", "the embedding")
    return Curve(
        panels, "Two classes with proxies at right angles; the embedding turns from the wrong to the right one."
    )


def _stacked(built: Objective) -> Curve:
    """Two losses of each sample, over steps, with the weights that the first one gets."""
    objective = copy.deepcopy(built)
    objective.train()
    steps, samples = 60, 3
    first, weights = [], []
    index = torch.arange(samples)
    for step in range(steps):
        level = torch.tensor([(0.6 + 0.6 * k) * math.exp(-step / steps * (2.5 - 0.7 * k)) for k in range(samples)])
        losses = level.double().requires_grad_(), torch.full((samples,), 0.7, dtype=torch.float64)
        objective(*losses, index=index)
        with torch.no_grad():
            weights.append(objective.weights(*losses, index=index)[:, 0])
        first.append(level)
        objective.update("step", index=step)
    x = list(range(steps))
    panels = [
        Panel(
            "step", label, x, [Line(f"sample {'ABC'[k]}", numbers(torch.stack(values)[:, k])) for k in range(samples)]
        )
        for label, values in (("first loss (the second is 0.7)", first), ("weight of the first loss", weights))
    ]
    return Curve(panels, f"Weights over {steps} steps of three samples with two losses each.")
