"""The public conformance suite for criteria and objectives: what each promises, checked on yours.

``check_objective(MyLoss())`` raises ``AssertionError`` naming the promise that is broken. Inputs come from the
criterion's ``example_inputs``; exceptions are declared on the classes, never listed here.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reweigh.weighting.conformance import TASKS, classes, pickled, require, require_close
from reweigh.weighting.dynamics import dynamics
from reweigh.weighting.frequency import ClassCounts
from reweigh.weighting.terms import NEUTRAL_LOG_PT

from .criteria.base import Criterion
from .criteria.binary import BinaryCrossEntropy
from .criteria.element import CrossEntropy
from .criteria.language import CausalLM
from .criteria.pair import PairSimilarity
from .criteria.region import Overlap
from .criteria.stacked import StackedLosses
from .criteria.task import TaskLosses
from .criteria.transition import NoisyCrossEntropy
from .objective import Objective
from .reductions import ReductionName

SIZE = 8

CRITERION_FOR: dict[str, Callable[[], Criterion]] = {
    "class": CrossEntropy,
    "token": CausalLM,
    "transition": lambda: NoisyCrossEntropy(
        [[0.7, 0.1, 0.2, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25, 0.0, 0.5, 0.25], [0.1, 0.1, 0.1, 0.7]]
    ),
    "binary": BinaryCrossEntropy,
    "region": Overlap,
    "pair": PairSimilarity,
    "stacked": StackedLosses,
    "task": lambda: TaskLosses(TASKS),
}
"""Makers of a criterion by what a weighting acts on (``Method.acts_on``)."""


def objective_checks() -> list[Callable[[Objective], None]]:
    """Every check of an objective; names say the promise."""
    return [
        check_value,
        check_gradient,
        check_masked_means_removed,
        check_weight_means_duplication,
        check_nothing_counts,
        check_accumulation,
        check_extremes,
        check_kinds_of_input,
        check_evaluation_is_pure,
        check_introspection,
        check_resume,
        check_copies,
        check_reads_nothing_back,
        check_functional_transforms,
        check_compile,
    ]


def check_objective(objective: Objective, *, compiled: bool = True) -> None:
    """Run the whole suite on an objective (and on its criterion).

    Args:
        objective: An instance, for four classes where it has classes. It is copied, never changed.
        compiled: Check ``torch.compile(fullgraph=True)`` as well, which takes seconds.

    Raises:
        AssertionError: Naming the first promise that does not hold.
    """
    check_criterion(_innermost(objective))
    for check in objective_checks():
        if compiled or check is not check_compile:
            check(ready(objective))


def _innermost(criterion: Criterion) -> Criterion:
    while isinstance(criterion, Objective):
        criterion = criterion.criterion
    return criterion


def ready(objective: Objective) -> Objective:
    """A copy that knows its class counts."""
    fresh = copy.deepcopy(objective)
    if any(isinstance(part, ClassCounts) and not part.known for part in dynamics(fresh)):
        fresh.update("fit", class_counts=[50.0, 20.0, 6.0, 1.0])
    return fresh


def check_criterion(criterion: Criterion) -> None:
    """The contract of loss terms: provided statistics are there, losses are float32 at least, masked is neutral."""
    criterion = copy.deepcopy(criterion)
    for part in dynamics(criterion):
        if isinstance(part, ClassCounts) and not part.known:
            part.update("fit", class_counts=[50.0, 20.0, 6.0, 1.0])
    inputs = criterion.example_inputs(SIZE)
    meta = {"index": torch.arange(SIZE)} if "index" in criterion.accepts else {}
    terms = criterion.terms(*inputs, **meta)
    for name in sorted(criterion.provides):
        require(terms.find(name) is not None, f"provides {name!r}", criterion)
    for name in ("log_pt", "log_qt"):
        value = terms.find(name)
        require(value is None or bool((value <= 1e-12).all()), f"{name!r} is a log-probability", criterion)
    for name in ("mask", "log_pt", "log_qt", "target", "category", "score"):
        value = terms.find(name)
        require(value is None or value.shape == terms.loss.shape, f"{name!r} has the terms' shape", criterion)
    half = criterion.terms(inputs[0].half(), *inputs[1:], **meta)
    require(half.loss.dtype in (torch.float32, torch.float64), "losses are at least float32", criterion)
    if not criterion.independent:
        return  # what one sample's terms are depends on who else is there
    per_sample = torch.arange(terms.loss.shape[0]) % 3 != 1
    mask = terms.spread(per_sample).expand(terms.loss.shape)
    mask = mask if terms.mask is None else mask & terms.mask
    kept = criterion.terms(*inputs, mask=per_sample, **meta)
    away = ~mask
    require(kept.mask is not None and torch.equal(kept.mask, mask), "the mask is handed on", criterion)
    require(bool((kept.loss[away] == 0).all()), "masked losses are exactly 0", criterion)
    for name in ("log_pt", "log_qt"):
        value = kept.find(name)
        require(value is None or bool((value[away] == NEUTRAL_LOG_PT).all()), f"masked {name!r} is neutral", criterion)
    require_close(kept.loss[mask], terms.loss[mask], "the mask leaves other losses alone", criterion)


def example_meta(objective: Objective, size: int = SIZE) -> dict[str, Tensor]:
    """What a call brings: groups and indices, and what the weightings ask for."""
    if _innermost(objective).pools:
        return {}
    stats: dict[str, Tensor] = {}
    for part in objective.modules():
        if isinstance(part, Objective) and part.weighting is not None:
            stats |= part.weighting.example_stats(size)
    return {"group": torch.arange(size) % 3, "index": torch.arange(size), **stats}


def _total(value: Tensor) -> Tensor:
    return value.sum() if value.ndim else value


def _pick(objective: Objective, inputs: tuple[Any, ...], rows: Tensor) -> tuple[Any, ...]:
    whole = _innermost(objective).whole
    return tuple(
        value[rows] if isinstance(value, Tensor) and place not in whole else value for place, value in enumerate(inputs)
    )


def _grad(objective: Objective, inputs: tuple[Any, ...], **meta: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient with respect to the first input."""
    first = inputs[0].detach().clone().requires_grad_()
    value = objective(first, *inputs[1:], **meta)
    (grad,) = torch.autograd.grad(_total(value), first)
    return value.detach(), grad


def check_value(objective: Objective) -> None:
    """A finite loss of the right shape, and a gradient; arguments and global switches are left alone."""
    inputs = objective.example_inputs(SIZE)
    before = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    with torch.no_grad():
        objective(*inputs, **example_meta(objective))
        require(not torch.is_grad_enabled(), "the grad mode is left alone", objective)
    value, grad = _grad(objective, inputs, **example_meta(objective))
    require(bool(torch.isfinite(value).all()), "the loss is finite", objective)
    require(value.ndim == 0 or objective.reduction.name == "none", "the loss is a scalar", objective)
    require(bool(torch.isfinite(grad).all()) and bool((grad != 0).any()), "there is a gradient", objective)
    for old, new in zip(before, inputs, strict=True):
        require(not isinstance(old, Tensor) or torch.equal(old, new), "arguments are left alone", objective)


def check_gradient(objective: Objective) -> None:
    """The gradient is right: float64 gradcheck; with detached weights, that of the same weights as constants."""
    objective.eval()
    inputs = objective.example_inputs(5)
    meta = example_meta(objective, 5)
    nested = isinstance(objective.criterion, Objective)
    if objective.weighting is not None and objective.weighting.detached and not nested:
        with torch.no_grad():
            weights = objective._weights(objective._measured(inputs, meta))
        first = inputs[0].detach().clone().requires_grad_()
        terms = objective._measured((first, *inputs[1:]), meta)
        frozen = objective.reduction(terms.loss * weights, weights, terms)
        (expected,) = torch.autograd.grad(_total(frozen), first)
        require_close(_grad(objective, inputs, **meta)[1], expected, "detached weights are constants", objective)
    elif not nested and objective.exact_gradient:
        first = inputs[0].detach().clone().requires_grad_()
        right = torch.autograd.gradcheck(
            lambda x: objective(x, *inputs[1:], **meta), (first,), eps=1e-6, atol=1e-8, rtol=1e-5, raise_exception=False
        )
        require(bool(right), "gradcheck in float64", objective)


def check_masked_means_removed(objective: Objective) -> None:
    """Masked samples change nothing, whatever stands there: value, gradient, weights."""
    objective.eval()
    inputs = objective.example_inputs(SIZE)
    keep = torch.arange(SIZE) % 3 != 1
    if _innermost(objective).slots:
        _check_empty_slots(objective, inputs[0], keep)
        return
    value, grad = _grad(
        objective, _pick(objective, inputs, keep), **{k: v[keep] for k, v in example_meta(objective).items()}
    )
    for garbage in (float("nan"), float("inf"), 1e4):
        dirty = (inputs[0].clone(), *inputs[1:])
        dirty[0][~keep] = garbage
        masked_value, masked_grad = _grad(objective, dirty, mask=keep, **example_meta(objective))
        per_sample = not _innermost(objective).pools
        if masked_value.ndim and per_sample:
            require(bool((masked_value[~keep] == 0).all()), "masked losses are exactly 0", objective)
            masked_value = masked_value[keep]
        if masked_value.shape != value.shape:  # terms of pairs: masked samples are columns as well
            masked_value, value = _total(masked_value), _total(value)
        require_close(masked_value, value, f"masked means removed (value, {garbage} there)", objective)
        require_close(masked_grad[keep], grad, f"masked means removed (gradient, {garbage} there)", objective)
        require(bool((masked_grad[~keep] == 0).all()), "no gradient at masked places", objective)
        weights = objective.weights(*dirty, mask=keep, **example_meta(objective))
        require(not per_sample or bool((weights[~keep] == 0).all()), "masked weights are 0", objective)


def _check_empty_slots(objective: Objective, losses: Tensor, keep: Tensor) -> None:
    """Whatever stands in empty slots changes nothing."""
    value, grad = _grad(objective, (losses,), mask=keep)
    for garbage in (float("nan"), float("inf"), 1e4):
        dirty = torch.where(keep, losses, garbage)
        masked_value, masked_grad = _grad(objective, (dirty,), mask=keep)
        require_close(masked_value, value, f"masked means removed (value, {garbage} there)", objective)
        require_close(masked_grad, grad, f"masked means removed (gradient, {garbage} there)", objective)
        require(bool((masked_grad[~keep] == 0).all()), "no gradient at masked places", objective)
        require(bool((objective.weights(dirty, mask=keep)[~keep] == 0).all()), "masked weights are 0", objective)


def check_weight_means_duplication(objective: Objective) -> None:
    """``sample_weight`` 2 is the same as a second copy, 0 the same as removal."""
    if _innermost(objective).slots:
        return  # a slot is not doubled
    objective.eval()
    inputs, times = objective.example_inputs(SIZE), torch.tensor([1, 2, 0, 3, 1, 1, 2, 0])
    rows = torch.arange(SIZE).repeat_interleave(times)
    copied = objective(
        *_pick(objective, inputs, rows), **{name: value[rows] for name, value in example_meta(objective).items()}
    )
    counted = objective(*inputs, sample_weight=times.double(), **example_meta(objective))
    require_close(_total(counted), _total(copied), "integer sample_weight means duplication", objective)


def check_nothing_counts(objective: Objective) -> None:
    """An empty batch and one that is masked throughout give 0 with a connected zero gradient."""
    full = objective.example_inputs(SIZE)
    nothing = torch.zeros(SIZE, dtype=torch.bool)
    cases = [(full, {"mask": nothing, **example_meta(objective)})]
    if not _innermost(objective).slots:
        cases.append((_pick(objective, full, nothing), example_meta(objective, 0)))
    for inputs, meta in cases:
        value, grad = _grad(objective, inputs, **meta)
        require(bool((value == 0).all()), "nothing that counts gives 0", objective)
        require(bool((grad == 0).all()), "nothing that counts gives a zero gradient", objective)


def check_accumulation(objective: Objective) -> None:
    """With ``num_items`` the sum over micro-batches is the full batch, where weights look at their own term only."""
    undivided = ("none", "sum", "group_mean", "log_mean_exp")
    if objective.reduction.name in undivided or isinstance(objective.criterion, Objective):
        return
    weighting = objective.weighting
    if not objective.independent:
        return
    if weighting is not None and weighting.scope != "local":
        return
    if weighting is not None and not weighting.detached and objective.reduction.name == "weighted_mean":
        return  # gradient flows through the denominator, so no constant can stand for it
    objective.eval()
    inputs, meta = objective.example_inputs(SIZE), example_meta(objective)
    _, count = objective.parts(*inputs, **meta)
    value, grad = _grad(objective, inputs, **meta)
    for size in (1, 2, 4):
        total = torch.zeros_like(value)
        parts: list[Tensor] = []
        for rows in torch.split(torch.arange(SIZE), size):
            part, slope = _grad(
                objective, _pick(objective, inputs, rows), num_items=count, **{k: v[rows] for k, v in meta.items()}
            )
            total, parts = total + part, [*parts, slope]
        require_close(total, value, f"accumulation over batches of {size} (value)", objective)
        require_close(torch.cat(parts), grad, f"accumulation over batches of {size} (gradient)", objective)


def check_extremes(objective: Objective) -> None:
    """Finite value and gradient for inputs up to 1e4, in every floating dtype."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for scale in (0.0, 30.0, 1e3, 1e4):
            inputs = objective.example_inputs(SIZE, dtype=dtype)
            large = (inputs[0].sign() * scale, *inputs[1:])
            value, grad = _grad(objective, large, **example_meta(objective))
            require(bool(torch.isfinite(value).all()), f"finite loss at {scale:g} in {dtype}", objective)
            require(bool(torch.isfinite(grad).all()), f"finite gradient at {scale:g} in {dtype}", objective)
            require(value.dtype in (torch.float32, torch.float64), "the loss is at least float32", objective)


def check_kinds_of_input(objective: Objective, *, every: bool = False) -> None:
    """Every shape and kind of target, with masks and sample weights, in every dtype and reduction.

    Finite, at least float32, and what float64 arithmetic says of the same (rounded) numbers. All reductions in float32;
    ``every`` takes them all in the other dtypes as well.
    """
    objective.eval()
    classes = objective.criterion.terms(*objective.example_inputs()).num_classes
    by_class = objective.weighting is not None and "category" in objective.weighting.needs
    asked = frozenset() if objective.weighting is None else objective.weighting.needs - objective.criterion.provides
    everything: list[ReductionName] = ["mean", "weighted_mean", "sum", "none", "batch_mean", "sequence_mean"]
    slots = _innermost(objective).slots
    if slots:
        everything = ["sum"]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for kind, inputs in objective.example_variants(dtype=dtype).items():
            exact = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs]
            terms = objective.criterion.terms(*inputs)
            if by_class and terms.num_classes != classes:
                continue  # its tables are for the classes of the usual inputs
            batched = terms.fold(terms.loss).ndim > 0
            if asked and not batched:
                continue  # what a call brings, it brings per sample
            rows = torch.arange(inputs[0].shape[0])
            given = example_meta(objective, len(rows)) if batched else {}
            metas: list[dict[str, Tensor]] = [{}]
            if batched:
                metas += [{"mask": rows % 3 != 1}, {"sample_weight": rows % 4 / 2.0}]
            if slots:
                metas.pop()
            for meta in metas:
                for name in everything if every or dtype == torch.float32 else everything[:1]:
                    reduced = Objective(objective.criterion, objective.weighting, name).eval()
                    if name == "sequence_mean" and not batched:
                        continue
                    found, slope = _grad(reduced, inputs, **given, **meta)
                    case = f"{kind} in {dtype}, reduction {name!r}, {sorted(meta)}"
                    require(bool(found.isfinite().all() and slope.isfinite().all()), f"finite: {case}", objective)
                    require(found.dtype in (torch.float32, torch.float64), f"at least float32: {case}", objective)
                    if dtype == torch.float32 or (dtype != torch.float64 and not _innermost(objective).rounds):
                        wanted = reduced(*exact, **given, **meta)
                        require_close(found.double(), wanted, f"right: {case}", objective, tol=2e-5)


def check_evaluation_is_pure(objective: Objective) -> None:
    """Evaluation learns nothing, gives the same twice, and the same as training does before it learns."""
    inputs = objective.example_inputs(SIZE)
    objective.eval()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    first, second = objective(*inputs, **example_meta(objective)), objective(*inputs, **example_meta(objective))
    require(torch.equal(first, second), "evaluation gives the same twice", objective)
    objective.update("step")
    objective.eval()
    for name, value in objective.state_dict().items():
        require(
            name.endswith("clock") or torch.equal(value, before[name]), f"evaluation leaves {name!r} alone", objective
        )
    fresh = ready(objective)
    for part in dynamics(fresh):
        part.reset()
    fresh = ready(fresh)
    if not any(part.update_on == "forward" for part in dynamics(fresh)):
        trained = fresh.train()(*inputs, **example_meta(objective))
        require_close(
            trained, fresh.eval()(*inputs, **example_meta(objective)), "training and evaluation agree", objective
        )


def check_introspection(objective: Objective) -> None:
    """``weights`` and ``components`` describe the call and change nothing."""
    inputs = objective.example_inputs(SIZE)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.eval()
    weights, parts = (
        objective.weights(*inputs, **example_meta(objective)),
        objective.components(*inputs, **example_meta(objective)),
    )
    require_close(
        parts.weighted,
        _total(objective(*inputs, **example_meta(objective))),
        "components give the call's value",
        objective,
    )
    objective.train()
    objective.weights(*inputs, **example_meta(objective))
    objective.update("step")
    for name, value in objective.state_dict().items():
        require(name.endswith("clock") or torch.equal(value, before[name]), f"weights leaves {name!r} alone", objective)
    require(bool((weights >= 0).all()) and bool(torch.isfinite(weights).all()), "weights are valid", objective)
    require(
        0 < float(parts.effective_sample_size) <= float(parts.num_terms) * (1 + 1e-9),
        "the effective sample size is between 0 and the number of terms",
        objective,
    )


def _train(objective: Objective, start: int, stop: int) -> list[Tensor]:
    values = []
    for step in range(start, stop):
        values.append(objective(*objective.example_inputs(SIZE, seed=step), **example_meta(objective)).detach().clone())
        objective.update("step", index=step)
        if step % 2:
            objective.update("epoch", index=step // 2)
    return values


def check_resume(objective: Objective) -> None:
    """Saved after any step, loaded with ``weights_only``, the training goes on bit-equal."""
    objective.train()
    expected = _train(copy.deepcopy(objective), 0, 6)
    for stop in range(1, 6):
        first, second = copy.deepcopy(objective), copy.deepcopy(objective)
        _train(first, 0, stop)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        for value, wanted in zip(_train(second, stop, 6), expected[stop:], strict=True):
            require(torch.equal(value, wanted), f"resume after step {stop} is bit-equal", objective)


def check_copies(objective: Objective) -> None:
    """deepcopy, pickle and (where the arguments fit on a line) ``eval(repr(x))`` give the same loss."""
    inputs = objective.example_inputs(SIZE)
    objective.eval()
    expected = objective(*inputs, **example_meta(objective))
    for clone in (copy.deepcopy(objective), pickled(objective)):
        require(
            torch.equal(clone(*inputs, **example_meta(objective)), expected), "copies give the same loss", objective
        )
    if "<" not in repr(objective) and type(objective).__module__.startswith("reweigh."):
        rebuilt = ready(eval(repr(objective), classes(objective)))
        require(repr(rebuilt) == repr(objective), "repr rebuilds the same repr", objective)
        require(
            torch.equal(rebuilt.eval()(*inputs, **example_meta(objective)), expected),
            "eval(repr(x)) is the same loss",
            objective,
        )


def check_reads_nothing_back(objective: Objective) -> None:
    """Training reads no value back from a device: it runs on tensors that have none."""
    inputs = [value.to("meta") if isinstance(value, Tensor) else value for value in objective.example_inputs(SIZE)]
    meta = {name: value.to("meta") for name, value in example_meta(objective).items()}
    objective.train().to("meta")
    try:
        value, grad = _grad(objective, tuple(inputs), **meta)
    except (NotImplementedError, RuntimeError) as error:
        raise AssertionError(
            f"{objective!r} breaks a promise: all is on the device of the inputs, and nothing is read back ({error})"
        ) from error
    require(value.is_meta and grad.is_meta, "the loss stays on the inputs' device", objective)


def check_functional_transforms(objective: Objective) -> None:
    """``torch.func.grad`` under ``vmap`` equals a loop over autograd."""
    objective.eval()
    batches = [objective.example_inputs(SIZE, seed=seed) for seed in range(2)]
    stacked = [torch.stack(values) for values in zip(*batches, strict=True)]
    meta = example_meta(objective)  # made outside: vmap draws no random numbers
    slope = torch.func.grad(lambda first, *rest: _total(objective(first, *rest, **meta)))
    try:
        found = torch.func.vmap(slope)(*stacked)
    except RuntimeError as error:
        raise AssertionError(f"{objective!r} breaks a promise: it runs under torch.func.vmap ({error})") from error
    for row, inputs in zip(found, batches, strict=True):
        require_close(
            row, _grad(objective, inputs, **example_meta(objective))[1], "vmap of grad equals a loop", objective
        )


def check_compile(objective: Objective) -> None:
    """``torch.compile(fullgraph=True)`` gives the same value and gradient, in training mode, without recompiling."""
    torch._dynamo.reset()
    objective.train()
    plain = copy.deepcopy(objective)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    for step in range(3):
        inputs = objective.example_inputs(SIZE, seed=step)
        wanted, slope = _grad(plain, inputs, **example_meta(objective))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            first = inputs[0].detach().clone().requires_grad_()
            value = compiled(first, *inputs[1:], **example_meta(objective))
            (grad,) = torch.autograd.grad(_total(value), first)
        require_close(value, wanted, "torch.compile gives the same value", objective, tol=1e-10)
        require_close(grad, slope, "torch.compile gives the same gradient", objective, tol=1e-10)
        for part in (objective, plain):
            part.update("step", index=step)
    torch._dynamo.reset()
