"""Weight curves: every method's own class, evaluated on made-up losses that vary in what it looks at.

:func:`curve` chooses by what a weighting reads (tasks, groups, samples, a statistic of the call, the target's
probability, the class, the loss), never by its name. Nothing here knows a formula of a method.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reweigh.losses import Objective
from reweigh.weighting.base import Weighting
from reweigh.weighting.conformance import TASKS, TERMS, ready
from reweigh.weighting.dynamics import dynamics
from reweigh.weighting.tasks.base import TaskWeighting
from reweigh.weighting.terms import LossTerms

from .figure import Curve, Line, Panel, numbers
from .objective_curves import objective_curve
from .records import Entry

POINTS = 121
STEPS, EPOCH = 60, 10
NAMES = "ABCD"
COUNTS = [round(1000 * 10 ** (-3 * k / 39)) for k in range(40)]

AXES = {
    "span": "part of the sequence",
    "position": "position in the sequence",
    "token_weight": "weight given with the call",
    "log_ratio": "log density ratio, test to training",
    "disagreement": "disagreement of two predictions",
    "influence": "self-influence",
    "difficulty": "difficulty score",
    "steps_to_cross": "attack steps until the sample is misclassified",
    "margin": "margin of the attacked sample",
    "reference_loss": "loss under the reference model (own loss 1.5)",
    "entropy": "entropy of the prediction",
    "top_entropy": "entropy of the likeliest tokens",
    "token_score": "score of the token",
    "target_volume": "volume of the target",
    "predicted_volume": "predicted volume",
    "log_noisy_pt": "log-probability of the given label",
    "biased_loss": "loss of the biased model",
}
"""Axis labels of statistics. One that is not listed is labelled with its name."""


class NoCurve(LookupError):
    """Nothing to draw, and no reason stated."""


REASONS: Mapping[str, str] = {}
"""Why there is nothing to draw, by ``kind/name``. Every method without a figure has to stand here."""


def curve(entry: Entry) -> Curve:
    """The figure of a method; :class:`NoCurve` where none of the kinds below fits."""
    torch.manual_seed(0)
    built, found = entry.built, None
    if isinstance(built, Objective):
        found = objective_curve(entry, built)
    else:
        kinds = (_over_tasks, _over_slots, _over_probability, _over_class, _over_statistic, _over_loss)
        found = next((made for kind in kinds if (made := kind(entry, built)) is not None), None)
    if found is None:
        raise NoCurve(f"{entry.kind}/{entry.name}: no kind of figure fits what it reads ({', '.join(entry.needs)})")
    if not any(math.isfinite(y) for panel in found.panels for line in panel.lines for y in line.y):
        raise NoCurve(f"{entry.kind}/{entry.name}: its figure is empty")
    return found


def call(entry: Entry, arguments: Mapping[str, Any]) -> str:
    """The class with arguments, as one would write it."""
    return f"{entry.cls.__name__}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


# several tasks


def _three(value: Any) -> Any:
    """Arguments for three tasks from those for the suite's eight."""
    if isinstance(value, Mapping):
        return {key: _three(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)) and len(value) == TASKS:
        return list(value[:3])
    return value


def task_losses(step: int) -> Tensor:
    """Three tasks: a large loss that falls fast, a middling one that falls slowly, a small one that comes back."""
    t = step / (STEPS - 1)
    wave = 1 + 0.04 * torch.tensor([math.sin(1.7 * step), math.sin(2.3 * step + 1), math.sin(1.1 * step + 2)])
    return torch.tensor([3.0 * math.exp(-4 * t) + 0.2, 1.5 - 0.6 * t, 0.5 - 0.5 * t + 0.6 * t * t]).double() * wave


def _over_tasks(entry: Entry, built: Weighting) -> Curve | None:
    if not isinstance(built, TaskWeighting):
        return None
    fitting = [(example, made) for example in entry.record.examples if (made := _for_three(entry, example)) is not None]
    if not fitting:
        return None
    found = [_simulated(weighting) for _, weighting in fitting]
    moving = [at for at, weights in enumerate(found) if not torch.equal(weights, weights[:1].expand_as(weights))]
    at = moving[0] if moving else 0  # the first that moves within so few steps
    weights, x = found[at], list(range(STEPS))
    losses = torch.stack([task_losses(step) for step in x])
    panels = [
        Panel("step", label, x, [Line(f"task {NAMES[k]}", numbers(values[:, k])) for k in range(3)])
        for label, values in (("loss", losses), ("weight", weights))
    ]
    example, weighting = fitting[at]
    learned = any(parameter.requires_grad for parameter in weighting.parameters())
    how = "; its parameters are trained beside it (Adam, rate 0.05)" if learned else ""
    given = call(entry, {k: _three(v) for k, v in example.items() if k != "num_tasks"})
    return Curve(panels, f"`{given}` over {STEPS} steps ({EPOCH} to an epoch) of three made-up tasks{how}.")


def _for_three(entry: Entry, example: Mapping[str, Any]) -> TaskWeighting | None:
    try:
        made = entry.cls(**{**_three(example), "num_tasks": 3})
    except ValueError:  # it names one of the other tasks
        return None
    return made if isinstance(made, TaskWeighting) else None


def _simulated(weighting: TaskWeighting) -> Tensor:
    """``(STEPS, 3)`` weights; learned parameters are trained as a user would."""
    torch.manual_seed(0)
    learned = [parameter for parameter in weighting.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=0.05) if learned else None

    def terms(losses: Tensor) -> LossTerms:
        extras = {"count": torch.ones(3).double(), "gradient_norm": losses * torch.tensor([1.0, 2.0, 0.5]).double()}
        return LossTerms(losses, category=torch.arange(3), num_classes=3, extras=extras)

    seen: list[Tensor] = []
    for step in range(STEPS):
        now = terms(task_losses(step))
        _observe(weighting, now, terms(task_losses(step + 1)))
        weights = weighting.weigh(now)
        seen.append(weights.detach().double().expand(3).clone())
        if optimizer is not None:
            penalty = weighting.penalty(now, weights)
            total = (weights * now.loss).sum() + (0.0 if penalty is None else penalty.sum())
            optimizer.zero_grad()
            torch.autograd.backward(total)
            optimizer.step()
        _events(weighting, step)
    return torch.stack(seen)


def _observe(weighting: Weighting, now: LossTerms, after: LossTerms | None = None) -> None:
    with torch.no_grad():
        weighting.observe(now.detach())
        if "after" in weighting.feeds:
            weighting.observe_after((after or now).detach())
        if "validation" in weighting.feeds:
            weighting.observe_validation(now.detach())
        if any(part.update_on == "forward" for part in dynamics(weighting)):
            weighting.update("forward")


def _events(weighting: Weighting, step: int) -> None:
    weighting.update("step", index=step)
    if step % 2:
        weighting.update("validation", index=step // 2)
    if step % EPOCH == EPOCH - 1:
        weighting.update("epoch", index=step // EPOCH)


# what is remembered of groups, classes or samples


def slot_losses(step: int, slots: int) -> Tensor:
    """One loss per slot: each falls, the later ones from higher up and more slowly."""
    t = step / (STEPS - 1)
    return torch.tensor([(0.6 + 0.6 * k) * math.exp(-t * (2.5 - 0.7 * k)) for k in range(slots)]).double()


def _over_slots(entry: Entry, built: Weighting) -> Curve | None:
    slot = next((name for name in ("group", "index", "category") if name in built.needs), None)
    stateful = built.update_on != "never"
    if slot is None or not stateful:
        return None
    slots = 3
    weighting, two = ready(built), entry.record.acts_on == "stacked"
    at = torch.arange(slots)

    def terms(step: int) -> LossTerms:
        loss = slot_losses(step, slots)
        if two:
            loss = torch.stack([loss, torch.full_like(loss, 0.7)], -1)
        seen = {}
        if "biased_loss" in built.needs:
            seen["biased_loss"] = slot_losses(step, slots).flip(0)
        if "probabilities" in built.needs:
            right = (-slot_losses(step, slots)).exp()
            others = ((1 - right) / 3)[:, None].expand(slots, 4).clone()
            seen["probabilities"] = others.scatter(1, at[:, None], right[:, None])
        category = torch.arange(2).expand(slots, 2) if two else torch.zeros_like(at) if slot == "index" else at
        classes = 2 if two else 4
        return LossTerms(loss, group=at, index=at, category=category, num_classes=classes, extras=seen)

    seen: list[Tensor] = []
    for step in range(STEPS):
        now = terms(step)
        with torch.no_grad():
            weights = weighting.weigh(now).expand_as(now.loss)
        seen.append((weights[..., 0] if two else weights).double().clone())
        _observe(weighting, now)
        _events(weighting, step)
    word = {"group": "group", "index": "sample", "category": "class"}[slot]
    x, weights = list(range(STEPS)), torch.stack(seen)
    losses = torch.stack([slot_losses(step, slots) for step in x])
    what = "first of two losses, weight" if two else "weight"
    panels = [
        Panel("step", "loss", x, [Line(f"{word} {NAMES[k]}", numbers(losses[:, k])) for k in range(slots)]),
        Panel("step", what, x, [Line(f"{word} {NAMES[k]}", numbers(weights[:, k])) for k in range(slots)]),
    ]
    return Curve(panels, f"Weights over {STEPS} steps ({EPOCH} to an epoch), one made-up loss for each {word}.")


# the probability of the target


def _over_probability(entry: Entry, built: Weighting) -> Curve | None:
    if "log_pt" not in built.needs or built.needs - {"log_pt", "log_qt", "loss", "target", "category", "log_noisy_pt"}:
        return None
    p = torch.linspace(0.02, 0.98, POINTS, dtype=torch.float64)
    sides = {"positive": 1.0, "negative": 0.0} if "target" in built.needs else {"": 1.0}
    weights, slopes = [], []
    for label, target in sides.items():
        weighting = ready(built)
        logit = (p.log() - torch.log1p(-p)).requires_grad_()
        log_pt, log_qt = torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)
        stat = {"log_noisy_pt": torch.full_like(p, math.log(0.6))} if "log_noisy_pt" in built.needs else None
        terms = LossTerms(-log_pt, None, log_pt, log_qt, torch.full_like(p, target), extras=stat)
        found = weighting.weigh(terms).expand_as(p)
        (slope,) = torch.autograd.grad((found * terms.loss).sum(), logit)
        weights.append(Line(f"{label} label".strip() if label else "weight", numbers(found)))
        slopes.append(Line(f"{label} label".strip() if label else "weighted loss", numbers(slope.abs())))
        later = _later(entry, weighting, terms)
        if later is not None:
            weights.append(Line(f"{label} label, after 50 steps", numbers(later), dashed=True))
    plain = Line("unweighted", numbers(1 - p), dashed=True)
    panels = [
        Panel("probability of the target", "weight", numbers(p), weights),
        Panel("probability of the target", "gradient on the logit", numbers(p), [*slopes, plain]),
    ]
    return Curve(panels, "The weight of a term, and how strongly it pulls, by the probability of its target.")


def _later(entry: Entry, weighting: Weighting, terms: LossTerms) -> Tensor | None:
    """The weights after steps on the suite's example terms; ``None`` where nothing is learned."""
    if weighting.update_on == "never":
        return None
    make = TERMS[entry.record.acts_on]
    for step in range(50):
        _observe(weighting, make(step))
        _events(weighting, step)
    with torch.no_grad():
        return weighting.weigh(terms.detach()).expand_as(terms.loss)


# the class of the target


def _over_class(entry: Entry, built: Weighting) -> Curve | None:
    slot = next((name for name in ("category", "group") if name in built.needs), None)
    if slot is None or built.needs - {"category", "group"}:
        return None
    asked = inspect.signature(entry.cls.__init__).parameters
    name = next((name for name in ("counts", "group_counts", "document_counts") if name in asked), None)
    word = "group" if slot == "group" else "token" if "token" in entry.cls.__module__ else "class"
    if name is None:
        return _by_number(entry, built, word)
    given = {**entry.record.examples[0], name: COUNTS, **({"documents": 1000} if "documents" in asked else {})}
    weighting = entry.cls(**given)
    at = torch.arange(len(COUNTS))
    terms = LossTerms(torch.ones(len(COUNTS)).double(), group=at, category=at, num_classes=len(COUNTS))
    lines = [Line(_said(given, leave=(name, "documents")), numbers(weighting.weigh(terms)))]
    for example in entry.record.examples[1:3]:
        if name in example and not _differs_in_size(example):
            more = {**example, name: COUNTS, **({"documents": 1000} if "documents" in asked else {})}
            found = entry.cls(**more).weigh(terms).expand_as(terms.loss)
            lines.append(Line(_said(more, leave=(name, "documents")), numbers(found), dashed=True))
    panel = Panel(f"how often the {word} occurs", "weight", [float(n) for n in COUNTS], _distinct(lines), log_x=True)
    return Curve([panel], f"The weight of a {word} by its frequency, for 40 of them between 1 and 1000.")


def _by_number(entry: Entry, built: Weighting, word: str) -> Curve | None:
    at = torch.arange(4)
    terms = LossTerms(torch.ones(4).double(), group=at, category=at, num_classes=4)
    found = ready(built).weigh(terms).expand_as(terms.loss)
    said = _said(entry.record.examples[0])
    return Curve(
        [Panel(f"number of the {word}", "weight", numbers(at), [Line(said, numbers(found))], points=True)],
        f"The weights of four terms, one of each {word}.",
    )


def _differs_in_size(example: Mapping[str, Any]) -> bool:
    """Whether an example brings more than one list, so that another list does not fit beside it."""
    return sum(isinstance(value, (list, tuple)) for value in example.values()) > 1


def _said(arguments: Mapping[str, Any], leave: Sequence[str] = ()) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items() if name not in leave) or "defaults"


def _distinct(lines: Sequence[Line]) -> list[Line]:
    kept: dict[str, Line] = {}
    for line in lines:
        kept.setdefault(line.label, line)
    return list(kept.values())


# a statistic that the call brings


def _over_statistic(entry: Entry, built: Weighting) -> Curve | None:
    asked = built.example_stats(400)
    extras = set(TERMS[entry.record.acts_on](0).extras or {})
    names = sorted((built.needs & (asked.keys() | extras)) | (built.needs & {"score", "index"}) | asked.keys())
    if not names:
        return None
    panels = [_panel(entry, built, name) for name in names if name != "pair"]
    return Curve(panels, "The weight of a term by what is known of it, the terms of one made-up batch.")


def _panel(entry: Entry, built: Weighting, name: str) -> Panel:
    """The weights of one batch in which a single statistic varies from end to end of what the suite draws."""
    drawn = _drawn(entry, built, name)
    whole = not drawn.is_floating_point()
    if whole:
        x = torch.unique(drawn)
    else:
        x = torch.linspace(float(drawn.min()), float(drawn.max()), POINTS, dtype=torch.float64)
    sides = {"positive pair": 1.0, "negative pair": 0.0} if "target" in built.needs else {"weight": 1.0}
    lines = []
    for label, target in sides.items():
        with torch.no_grad():
            found = built.weigh(_terms(built, entry, name, x, target)).expand(len(x))
        lines.append(Line(label, numbers(found)))
    label = {"score": "similarity", "index": "number of the sample"}.get(name, AXES.get(name, name))
    return Panel(label, "weight", numbers(x), lines, points=whole)


def _drawn(entry: Entry, built: Weighting, name: str) -> Tensor:
    if name == "score":
        return torch.tensor([-1.0, 1.0])
    if name == "index":
        return torch.arange(8)
    stats = built.example_stats(400)
    value = stats[name] if name in stats else TERMS[entry.record.acts_on](0).need(name)
    if value.is_floating_point() and name not in stats:
        many = torch.stack([TERMS[entry.record.acts_on](seed).need(name) for seed in range(40)])
        return many.clamp_min(0.05) if "volume" in name else many
    return value


def _terms(built: Weighting, entry: Entry, name: str, x: Tensor, target: float) -> LossTerms:
    size = len(x)
    extras: dict[str, Tensor] = {}
    for other, value in {**(TERMS[entry.record.acts_on](0).extras or {}), **built.example_stats(size)}.items():
        middle = value.double().median() if value.is_floating_point() else value.flatten()[0]
        extras[other] = middle.expand(size).clone()
    if "pair" in extras:
        extras["pair"] = torch.zeros(size, dtype=torch.int64)
    extras[name] = x
    loss = torch.full((size,), 1.5, dtype=torch.float64)
    terms = LossTerms(loss, log_pt=-loss, target=torch.full((size,), target).double(), extras=extras)
    if name == "score":
        terms = terms._replace(score=x)
    elif name == "index":
        terms = terms._replace(index=x)
    return terms


# the loss itself


def _over_loss(entry: Entry, built: Weighting) -> Curve | None:
    if built.needs - {"loss", "target"}:
        return None
    top = 1.0 if entry.record.acts_on == "region" else 5.0
    x = torch.linspace(0.01 * top, top, POINTS, dtype=torch.float64)
    if "target" in built.needs:
        return _over_sides(built, x)
    terms = LossTerms(x, log_pt=-x)
    weighting = ready(copy.deepcopy(built))
    lines: list[Line] = []
    dynamic = built.update_on != "never"
    for step in range(STEPS if dynamic else 1):
        if step in (0, EPOCH, 4 * EPOCH):
            with torch.no_grad():
                found = weighting.weigh(terms).expand_as(x)
            lines.append(Line(f"after {step} steps" if dynamic else "weight", numbers(found), dashed=step > 0))
        if dynamic:
            _observe(weighting, terms._replace(loss=x * (1.0 - 0.6 * step / STEPS)))
            _events(weighting, step)
    same = len({tuple(line.y) for line in lines}) == 1
    panels = [Panel("loss of the term", "weight", numbers(x), [Line("weight", lines[0].y)] if same else lines)]
    return Curve(panels, f"The weight of a term by its loss, in a batch of losses spread evenly up to {top:g}.")


def _over_sides(built: Weighting, x: Tensor) -> Curve:
    """Two labels in one batch: a quarter of the terms are positive."""
    target = (torch.arange(len(x)) % 4 == 0).double()
    with torch.no_grad():
        found = built.weigh(LossTerms(x, target=target, log_pt=-x)).expand_as(x)
    panel = Panel(
        "loss of the term",
        "weight",
        numbers(x),
        [
            Line("positive", numbers(torch.where(target > 0, found, torch.nan))),
            Line("negative", numbers(torch.where(target > 0, torch.nan, found))),
        ],
        points=True,
    )
    return Curve([panel], "The weight of a term by its loss and label, in a batch of which a quarter is positive.")
