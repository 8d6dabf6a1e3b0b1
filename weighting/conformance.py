"""The public conformance suite: what every weighting promises, checked on yours.

``check_weighting(MyWeighting())`` raises ``AssertionError`` naming the promise that is broken. Exceptions are declared
on the class (``detached``, ``scope``, ``needs``, ``update_on``), never listed here.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .base import Weighting
from .dynamics import dynamics
from .frequency import ClassCounts
from .tasks.base import TaskWeighting
from .terms import NEUTRAL_LOG_PT, STATISTICS, LossTerms, mask_out

T = TypeVar("T")

CLASSES = 4
"""Number of classes that the suite's examples have."""

TASKS = 8
"""Number of tasks that they have."""

TermsMaker = Callable[[int], LossTerms]


def require(condition: bool, promise: str, subject: object) -> None:
    """Raise ``AssertionError`` with the promise's name where it does not hold."""
    if not condition:
        raise AssertionError(f"{subject!r} breaks a promise: {promise}")


def require_close(found: Tensor, expected: Tensor, promise: str, subject: object, *, tol: float = 1e-12) -> None:
    """Require two float64 tensors to agree to ``tol``, relative to the largest entry."""
    try:
        scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=0.0, atol=tol * max(1.0, scale))
    except AssertionError as error:
        raise AssertionError(f"{subject!r} breaks a promise: {promise}\n{error}") from None


def example_terms(seed: int = 0, size: int = 8, *, dtype: torch.dtype = torch.float64) -> LossTerms:
    """Terms that carry every statistic, as a four-class softmax criterion would make them, without a graph."""
    generator = torch.Generator().manual_seed(seed)
    log_p = (torch.randn(size, CLASSES, generator=generator, dtype=torch.float64) * 2).log_softmax(-1)
    target = torch.randint(CLASSES, (size,), generator=generator)
    log_pt = log_p.gather(1, target[:, None]).squeeze(1).to(dtype)
    return LossTerms(
        loss=-log_pt,
        mask=None,
        log_pt=log_pt,
        target=target,
        score=torch.rand(size, generator=generator, dtype=torch.float64).to(dtype) * 2 - 1,
        group=torch.randint(3, (size,), generator=generator),
        index=torch.randperm(max(size, 1), generator=generator)[:size],
        category=target,
        num_classes=CLASSES,
    )


def binary_terms(seed: int = 0, size: int = 8, *, dtype: torch.dtype = torch.float64) -> LossTerms:
    """Terms of ``(size,)`` as a sigmoid criterion with one label would make them."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(2, (size,), generator=generator).to(torch.float64)
    margin = torch.randn(size, generator=generator, dtype=torch.float64) * 2
    log_pt, log_qt = logsigmoid(margin).to(dtype), logsigmoid(-margin).to(dtype)
    return example_terms(seed, size, dtype=dtype)._replace(
        loss=-log_pt, log_pt=log_pt, log_qt=log_qt, target=target.to(dtype), category=None, num_classes=None
    )


def region_terms(seed: int = 0, size: int = 8, *, dtype: torch.dtype = torch.float64) -> LossTerms:
    """Terms of ``(size,)`` as a criterion of regions makes them for one set: losses in (0, 1) and volumes."""
    generator = torch.Generator().manual_seed(seed)
    loss, target, predicted = 0.05 + 0.9 * torch.rand(3, size, generator=generator, dtype=torch.float64).to(dtype)
    return example_terms(seed, size, dtype=dtype)._replace(
        loss=loss, log_pt=None, extras={"target_volume": 9.0 * target, "predicted_volume": 9.0 * predicted}
    )


def pairwise_terms(seed: int = 0, size: int = 8, *, dtype: torch.dtype = torch.float64) -> LossTerms:
    """Terms of ``(size,)`` pairs with similarities in [-1, 1]; the loss is a signed margin, negative where met."""
    terms = example_terms(seed, size, dtype=dtype)
    target = torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed)).to(dtype)
    score = terms.need("score")
    margin = torch.where(target > 0, 0.75 - score, score - 0.25)
    return terms._replace(loss=margin, log_pt=None, target=target, category=None, num_classes=None)


def stacked_terms(seed: int = 0, size: int = 8, *, dtype: torch.dtype = torch.float64) -> LossTerms:
    """Terms of ``(size, 2)``: two losses of each sample."""
    generator = torch.Generator().manual_seed(seed)
    loss = 3.0 * torch.rand(size, 2, generator=generator, dtype=torch.float64)
    terms = example_terms(seed, size, dtype=dtype)
    return terms._replace(
        loss=loss.to(dtype),
        log_pt=None,
        target=None,
        score=None,
        category=torch.arange(2).expand(size, 2),
        num_classes=2,
    )


def task_terms(seed: int = 0, size: int = TASKS, *, dtype: torch.dtype = torch.float64) -> LossTerms:
    """Terms of ``(size,)`` losses, one per task, of scales between 0.1 and 10."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(2, size, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-1, 1, size, dtype=torch.float64)
    more = {"count": 1.0 + (8 * values[1]).floor(), "gradient_norm": 0.1 + values[1].to(dtype)}
    return LossTerms((scale * (0.2 + values[0])).to(dtype), category=torch.arange(size), num_classes=size, extras=more)


def by_slot(weighting: Weighting) -> bool:
    """Whether a weighting's terms are slots in a fixed order: such terms are emptied, but not taken away or doubled."""
    return any(isinstance(part, TaskWeighting) for part in weighting.modules())


def noisy_terms(seed: int = 0, size: int = 8, *, dtype: torch.dtype = torch.float64) -> LossTerms:
    """Terms of ``(size,)`` whose labels may have been changed, with the log-probability of the label given."""
    terms = example_terms(seed, size, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    given = torch.rand(size, generator=generator, dtype=torch.float64).log().to(dtype)
    return terms._replace(extras={"log_noisy_pt": given})


def token_terms(seed: int = 0, size: int = 8, *, dtype: torch.dtype = torch.float64) -> LossTerms:
    """Terms of ``(size,)`` tokens, with the entropy of each row and of its likeliest entries."""
    generator = torch.Generator().manual_seed(seed)
    log_p = (torch.randn(size, CLASSES, generator=generator, dtype=torch.float64) * 2).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).to(dtype)
    return example_terms(seed, size, dtype=dtype)._replace(extras={"entropy": entropy, "top_entropy": entropy})


TERMS: dict[str, TermsMaker] = {
    "class": example_terms,
    "token": token_terms,
    "transition": noisy_terms,
    "binary": binary_terms,
    "region": region_terms,
    "pair": pairwise_terms,
    "stacked": stacked_terms,
    "task": task_terms,
}
"""Makers of example terms by what a method acts on (``Method.acts_on``)."""


def terms_for(weighting: Weighting, make: TermsMaker) -> TermsMaker:
    """The maker's terms together with what the weighting wants of a call (:meth:`Weighting.example_stats`)."""

    def made(seed: int) -> LossTerms:
        terms = make(seed)
        stats = weighting.example_stats(terms.loss.shape[0], seed=seed, dtype=terms.loss.dtype)
        return terms._replace(extras={**(terms.extras or {}), **stats}) if stats else terms

    return made


def each(terms: LossTerms, change: Callable[[Tensor], Tensor]) -> LossTerms:
    """The terms with ``change`` applied to every tensor."""
    extras = None if terms.extras is None else {name: change(value) for name, value in terms.extras.items()}
    changed = {name: None if (value := terms.find(name)) is None else change(value) for name in STATISTICS}
    return LossTerms(**changed, num_classes=terms.num_classes, extras=extras)  # type: ignore[arg-type]


def masked(terms: LossTerms, samples: Tensor) -> LossTerms:
    """The terms with neutral values for the samples that are False, as a criterion hands them out."""
    mask = terms.spread(samples).expand_as(terms.loss)
    out = terms._replace(mask=mask, loss=mask_out(terms.loss, mask, 0.0))
    if terms.log_pt is not None:
        out = out._replace(log_pt=mask_out(terms.log_pt, mask, NEUTRAL_LOG_PT))
    if terms.log_qt is not None:
        out = out._replace(log_qt=mask_out(terms.log_qt, mask, NEUTRAL_LOG_PT))
    if terms.category is not None:
        out = out._replace(category=terms.category.masked_fill(~mask, 0))
    if terms.group is not None:
        out = out._replace(group=terms.group.masked_fill(~samples, 0))
    return out


def ready(weighting: Weighting) -> Weighting:
    """A copy that knows its class counts."""
    fresh = copy.deepcopy(weighting)
    if any(isinstance(part, ClassCounts) and not part.known for part in dynamics(fresh)):
        fresh.update("fit", class_counts=[50.0, 20.0, 6.0, 1.0])
    return fresh


def train(weighting: Weighting, batches: Iterator[LossTerms] | list[LossTerms], start: int = 0) -> list[Tensor]:
    """Drive a weighting through steps, epochs of two steps and validations; the weights before each step."""
    seen: list[Tensor] = []
    for step, terms in enumerate(batches, start=start):
        with torch.no_grad():
            weighting.observe(terms.detach())
            if "after" in weighting.feeds:
                weighting.observe_after(terms.detach()._replace(loss=0.9 * terms.loss.detach()))
            if "validation" in weighting.feeds:
                weighting.observe_validation(terms.detach())
            if any(part.update_on == "forward" for part in dynamics(weighting)):
                weighting.update("forward")
            seen.append(weighting.weigh(terms).expand_as(terms.loss).clone())
        weighting.update("step", index=step)
        if step % 2:
            weighting.update("validation", index=step // 2)
            weighting.update("epoch", index=step // 2)
    return seen


def trained(weighting: Weighting, make: TermsMaker) -> Weighting:
    """A copy that has gone through four steps and two epochs."""
    later = copy.deepcopy(weighting)
    train(later, [make(seed) for seed in range(4)])
    return later


def state_of(weighting: Weighting) -> dict[str, Tensor]:
    """A copy of everything a checkpoint would hold."""
    return {name: value.clone() for name, value in weighting.state_dict().items()}


def weighting_checks() -> list[Callable[[Weighting, TermsMaker], None]]:
    """Every check, each callable as ``check(weighting, make_terms)``; names say the promise."""
    return [
        check_weights_are_valid,
        check_weigh_is_pure,
        check_needs_are_complete,
        check_masked_means_removed,
        check_permutation,
        check_multiplicity_means_duplication,
        check_edges,
        check_dtypes,
        check_gradient,
        check_scope,
        check_cadence,
        check_observe_is_additive,
        check_state_is_clean,
        check_resume,
        check_idempotent_events,
        check_reset,
        check_copies,
    ]


def check_weighting(weighting: Weighting, *, terms: TermsMaker = example_terms) -> None:
    """Run the whole suite on a weighting.

    Args:
        weighting: An instance, for four classes where it has classes. It is copied, never changed.
        terms: Makes example terms from a seed, for weightings that read statistics of their own.

    Raises:
        AssertionError: Naming the first promise that does not hold.
    """
    for check in weighting_checks():
        check(ready(weighting), terms_for(weighting, terms))


def check_weights_are_valid(weighting: Weighting, make: TermsMaker) -> None:
    """Weights broadcast to the terms, are finite and not negative."""
    for part, seed in [(weighting, 0), (weighting, 1), (weighting, 2), (trained(weighting, make), 0)]:
        terms = make(seed)
        weights = part.weigh(terms)
        require(
            weights.ndim <= terms.loss.ndim and (weights + terms.loss).shape == terms.loss.shape,
            f"weights broadcast to {tuple(terms.loss.shape)}, got {tuple(weights.shape)}",
            weighting,
        )
        require(bool(torch.isfinite(weights).all()), "weights are finite", weighting)
        require(bool((weights >= 0).all()), "weights are not negative", weighting)


def check_weigh_is_pure(weighting: Weighting, make: TermsMaker) -> None:
    """Weighing twice gives the same and changes no state, no argument and no random number."""
    terms, before, rng = make(0), state_of(weighting), torch.get_rng_state()
    kept = each(terms, torch.clone)
    first, second = weighting.weigh(terms), weighting.weigh(terms)
    require(torch.equal(first, second), "weigh gives the same twice", weighting)
    require(torch.equal(rng, torch.get_rng_state()), "weigh draws no random numbers", weighting)
    for name, value in state_of(weighting).items():
        require(torch.equal(value, before[name]), f"weigh leaves {name!r} alone", weighting)
    for name in STATISTICS:
        old, new = kept.find(name), terms.find(name)
        require(old is None or (new is not None and torch.equal(old, new)), f"weigh leaves terms.{name}", weighting)


def check_needs_are_complete(weighting: Weighting, make: TermsMaker) -> None:
    """Nothing is read that ``needs`` does not name."""
    terms = make(0)
    spare = {
        name: None
        for name in STATISTICS - weighting.needs - {"loss", "mask", "multiplicity", "norm"}
        if name != "log_qt"
    }
    bare = terms._replace(**spare)  # type: ignore[arg-type]
    try:
        weights = weighting.weigh(bare)
        weighting.observe(bare)
    except ValueError as error:
        raise AssertionError(f"{weighting!r} breaks a promise: needs is complete ({error})") from error
    require_close(weights, weighting.weigh(terms), "statistics outside needs change nothing", weighting)


def check_masked_means_removed(weighting: Weighting, make: TermsMaker) -> None:
    """A masked term changes neither the other weights nor what is learned."""
    terms = make(1)
    mask = torch.arange(terms.loss.shape[0]) % 3 != 1
    if by_slot(weighting):
        _check_empty_slots(weighting, make, mask)
        return
    whole, kept = copy.deepcopy(weighting), copy.deepcopy(weighting)
    full = [masked(make(seed), mask) for seed in range(4)]
    part = [each(make(seed), lambda value: value[mask]) for seed in range(4)]
    for weights, expected in zip(train(whole, full), train(kept, part), strict=True):
        require_close(weights[mask], expected, "masked means removed", weighting)


def _check_empty_slots(weighting: Weighting, make: TermsMaker, mask: Tensor) -> None:
    """Whatever stands in empty slots changes nothing."""
    runs = []
    for garbage in (0.0, 1e4, torch.nan):
        batches = [make(seed) for seed in range(4)]
        dirty = [terms._replace(mask=mask, loss=torch.where(mask, terms.loss, garbage)) for terms in batches]
        runs.append(train(copy.deepcopy(weighting), dirty))
    for other in runs[1:]:
        for weights, expected in zip(other, runs[0], strict=True):
            require_close(weights[mask], expected[mask], "masked means removed", weighting)


def check_permutation(weighting: Weighting, make: TermsMaker) -> None:
    """Permuting terms permutes weights."""
    terms = make(2)
    order = torch.randperm(terms.loss.shape[0], generator=torch.Generator().manual_seed(0))
    if by_slot(weighting):
        if all(part.symmetric for part in weighting.modules() if isinstance(part, TaskWeighting)):
            batches = [make(seed) for seed in range(4)]
            straight = train(copy.deepcopy(weighting), batches)
            mixed = train(
                copy.deepcopy(weighting),
                [each(batch, lambda value: value[order])._replace(category=batch.category) for batch in batches],
            )
            for weights, wanted in zip(mixed, straight, strict=True):
                require_close(weights, wanted[order], "permuting tasks permutes their weights", weighting)
        return
    moved = each(terms, lambda value: value[order])
    weights = weighting.weigh(terms).expand_as(terms.loss)
    require_close(weighting.weigh(moved).expand_as(terms.loss), weights[order], "permutation equivariance", weighting)


def check_multiplicity_means_duplication(weighting: Weighting, make: TermsMaker) -> None:
    """An integer sample weight is the same as that many copies, 0 the same as none."""
    if by_slot(weighting):
        return  # a task is not doubled
    times = torch.tensor([1, 2, 0, 3, 1, 1, 2, 1])
    counted, copied = copy.deepcopy(weighting), copy.deepcopy(weighting)
    batches = [make(seed) for seed in range(4)]
    times = times[: batches[0].loss.shape[0]]
    full = [terms._replace(multiplicity=times.to(terms.loss.dtype)) for terms in batches]
    long = [each(terms, lambda value: value.repeat_interleave(times, dim=0)) for terms in batches]
    for weights, expected in zip(train(counted, full), train(copied, long), strict=True):
        require_close(
            weights.repeat_interleave(times, dim=0), expected, "integer multiplicity means duplication", weighting
        )


def check_edges(weighting: Weighting, make: TermsMaker) -> None:
    """Right and wrong beyond doubt, one term, no term, everything masked: finite weights, and nothing is learned."""
    terms = make(0)
    for log_pt in (0.0, -1e4):
        if terms.log_pt is not None:
            edge = terms._replace(log_pt=torch.full_like(terms.log_pt, log_pt), log_qt=None)
            edge = edge._replace(loss=torch.full_like(terms.loss, -log_pt))
            require(
                bool(torch.isfinite(weighting.weigh(edge)).all()), f"weights are finite at log_pt={log_pt}", weighting
            )
    nothing = [masked(terms, torch.zeros(terms.loss.shape[0], dtype=torch.bool))]
    if by_slot(weighting):
        for number in (0.0, 1e-30, 1e4, 1e30):
            first = torch.arange(len(terms.loss)) == 0
            for loss in (torch.full_like(terms.loss, number), torch.where(first, number, terms.loss)):
                batch = terms._replace(loss=loss)
                fine = all(bool(w.isfinite().all()) for w in train(copy.deepcopy(weighting), [batch, terms, batch]))
                require(fine, f"weights are finite where losses are {number:g}", weighting)
    else:
        one = weighting.weigh(each(terms, lambda v: v[:1]))
        require(bool(torch.isfinite(one).all()), "one term is enough", weighting)
        nothing.append(each(terms, lambda v: v[:0]))
    for empty in nothing:
        fresh, idle = copy.deepcopy(weighting), copy.deepcopy(weighting)
        for step in range(2):
            fresh.observe(empty)
            require(bool(torch.isfinite(fresh.weigh(empty)).all()), "no valid term: finite weights", weighting)
            fresh.update("step", index=step)
            idle.update("step", index=step)
        for name, value in state_of(fresh).items():
            require(torch.equal(value, state_of(idle)[name]), f"no valid term: {name!r} is left alone", weighting)


def check_dtypes(weighting: Weighting, make: TermsMaker) -> None:
    """float32 terms give float32 weights near those of float64; statistics keep their dtype under ``.half()``."""
    terms = make(0)
    single = each(terms, lambda value: value.float() if value.is_floating_point() else value)
    weights = weighting.weigh(single)
    require(weights.dtype in (torch.float32, torch.float64), "weights are at least float32", weighting)
    require_close(weights.double(), weighting.weigh(terms), "float32 agrees with float64", weighting, tol=1e-5)
    before = state_of(weighting)
    for name, value in state_of(copy.deepcopy(weighting).half()).items():
        exact = any(name.endswith(kept) for part in dynamics(weighting) for kept in part._exact)
        require(not exact or torch.equal(value, before[name]), f"{name!r} keeps its dtype under .half()", weighting)


def check_gradient(weighting: Weighting, make: TermsMaker) -> None:
    """``detached`` is true: no gradient flows; or false: the gradient is right (float64 gradcheck)."""
    terms = make(3)
    names = [name for name in ("loss", "log_pt", "log_qt", "score") if terms.find(name) is not None]
    extras = [name for name, value in (terms.extras or {}).items() if value.is_floating_point()]
    inputs = [terms.need(name).clone().requires_grad_() for name in names + extras]

    def weigh(*values: Tensor) -> Tensor:
        changed: dict[str, Any] = dict(zip(names + extras, values, strict=True))
        more = {**(terms.extras or {}), **{name: changed.pop(name) for name in extras}} or None
        return weighting.weigh(terms._replace(**changed, extras=more)).expand_as(terms.loss)

    weights = weigh(*inputs)
    if weighting.detached:
        require(not weights.requires_grad, "detached weights carry no gradient", weighting)
    else:
        require(weights.requires_grad, "weights that are not detached carry gradient", weighting)
        if weighting.exact_gradient:
            right = torch.autograd.gradcheck(weigh, inputs, raise_exception=False)
            require(bool(right), "gradcheck in float64", weighting)


def check_scope(weighting: Weighting, make: TermsMaker) -> None:
    """``local``: a weight depends on its own term only; ``scaled``: ratios of weights do."""
    if weighting.scope == "global":
        return
    terms = make(4)
    for part in (weighting, trained(weighting, make)):  # before the first step many weights are all 1
        alone = part.weigh(each(terms, lambda value: value[:3])).expand_as(terms.loss[:3])
        together = part.weigh(terms).expand_as(terms.loss)[:3]
        if weighting.scope == "scaled":
            alone, together = alone * together.sum(), together * alone.sum()
        require_close(alone, together, f"scope {weighting.scope!r}", weighting)


def check_cadence(weighting: Weighting, make: TermsMaker) -> None:
    """Where ``update_on`` is ``"never"`` throughout, training changes no weight."""
    if any(part.update_on != "never" for part in dynamics(weighting)):
        return
    later = trained(weighting, make).weigh(make(9))
    require(torch.equal(later, weighting.weigh(make(9))), "update_on 'never': weights stay as they are", weighting)


def check_observe_is_additive(weighting: Weighting, make: TermsMaker) -> None:
    """Two micro-batches teach the same as the joined batch."""
    split, joined = copy.deepcopy(weighting), copy.deepcopy(weighting)
    for step in range(3):
        terms = make(step)
        if by_slot(weighting):
            few, many = make(step), make(step + 7)
            parts = [few.need("count"), many.need("count")]
            mean = (few.loss * parts[0] + many.loss * parts[1]) / sum(parts)
            more = {
                name: value if name == "count" else (value * parts[0] + many.need(name) * parts[1]) / sum(parts)
                for name, value in (few.extras or {}).items()
            }
            for how in ("observe", "observe_after", "observe_validation"):
                getattr(split, how)(few)
                getattr(split, how)(many)
                getattr(joined, how)(few._replace(loss=mean, extras={**more, "count": parts[0] + parts[1]}))
            for event in ("validation", "step", "epoch"):
                split.update(event, index=step)
                joined.update(event, index=step)
            continue
        split.observe(each(terms, lambda value: value[:3]))
        split.observe(each(terms, lambda value: value[3:]))
        joined.observe(terms)
        split.update("step", index=step)
        joined.update("step", index=step)
    for name, value in state_of(split).items():
        require_close(value.double(), state_of(joined)[name].double(), f"observe is additive in {name!r}", weighting)


def check_state_is_clean(weighting: Weighting, make: TermsMaker) -> None:
    """State keeps its shape and no graph; pending sums are not saved; the checkpoint loads with ``weights_only``."""
    shapes = {name: value.shape for name, value in weighting.state_dict().items()}
    graph = each(make(0), lambda value: value.clone().requires_grad_() * 1 if value.is_floating_point() else value)
    weighting.observe(graph)
    for part in dynamics(weighting):
        for name, value in [*part.named_buffers(recurse=False), *part._pending.items()]:
            require(value.grad_fn is None and not value.requires_grad, f"{name!r} holds no graph", weighting)
    train(weighting, [make(seed) for seed in range(3)])
    saved = weighting.state_dict()
    require(
        {name: value.shape for name, value in saved.items()} == shapes, "state keeps its names and shapes", weighting
    )
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    torch.load(file, weights_only=True)


def check_resume(weighting: Weighting, make: TermsMaker) -> None:
    """Saved after any step and loaded into a fresh one, the weights go on bit-equal."""
    batches = [make(seed) for seed in range(6)]
    for stop in range(1, 6):
        whole, first, second = (copy.deepcopy(weighting) for _ in range(3))
        expected = train(whole, batches)
        train(first, batches[:stop])
        second.load_state_dict(first.state_dict())
        for weights, wanted in zip(train(second, batches[stop:], start=stop), expected[stop:], strict=True):
            require(torch.equal(weights, wanted), f"resume after step {stop} is bit-equal", weighting)


def check_idempotent_events(weighting: Weighting, make: TermsMaker) -> None:
    """An event sent twice with the same index counts once."""
    once, twice = copy.deepcopy(weighting), copy.deepcopy(weighting)
    for step in range(3):
        for part in (once, twice):
            part.observe(make(step))
        once.update("step", index=step)
        once.update("epoch", index=step)
        for _ in range(2):
            twice.update("step", index=step)
            twice.update("epoch", index=step)
    for name, value in state_of(once).items():
        require(torch.equal(value, state_of(twice)[name]), f"events are idempotent by index in {name!r}", weighting)


def check_reset(weighting: Weighting, make: TermsMaker) -> None:
    """``reset`` of every part brings back the initial weights (class counts included)."""
    batches = [make(seed) for seed in range(4)]
    fresh = train(copy.deepcopy(weighting), batches)
    train(weighting, batches)
    for part in dynamics(weighting):
        part.reset()
    for weights, wanted in zip(train(ready(weighting), batches), fresh, strict=True):
        require(torch.equal(weights, wanted), "reset restores the initial behaviour", weighting)


def pickled(subject: T) -> T:
    """What comes back from pickle; a class that pickle cannot find breaks the promise of copies."""
    try:
        clone: T = pickle.loads(pickle.dumps(subject))
    except (pickle.PicklingError, AttributeError) as error:
        raise AssertionError(f"{subject!r} breaks a promise: it can be pickled ({error})") from error
    return clone


def classes(subject: nn.Module) -> dict[str, Any]:
    """What ``repr`` may name: this library's public names, and the classes of all parts (a plugin's, too)."""
    import reweigh

    public = {name: getattr(reweigh, name) for name in reweigh.__all__}
    return public | {type(part).__name__: type(part) for part in subject.modules()}


def check_copies(weighting: Weighting, make: TermsMaker) -> None:
    """deepcopy, pickle and (where the arguments fit on a line) ``eval(repr(x))`` give the same weights."""
    train(weighting, [make(seed) for seed in range(2)])
    terms = make(9)
    expected = weighting.weigh(terms)
    for clone in (copy.deepcopy(weighting), pickled(weighting)):
        require(torch.equal(clone.weigh(terms), expected), "copies weigh the same", weighting)
    if "<" not in repr(weighting) and type(weighting).__module__.startswith("reweigh."):
        rebuilt = ready(eval(repr(weighting), classes(weighting)))
        rebuilt.load_state_dict(weighting.state_dict())
        require(repr(rebuilt) == repr(weighting), "repr rebuilds the same repr", weighting)
        require(torch.equal(rebuilt.weigh(terms), expected), "eval(repr(x)) weighs the same", weighting)
