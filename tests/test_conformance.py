"""Everything that the registries know runs through the public conformance suites. There is no hand-kept list."""

import pytest
import torch

from reweigh import losses, weighting
from reweigh.losses import (
    BinaryCrossEntropy,
    ClasswiseCrossEntropy,
    CrossEntropy,
    FromLoss,
    LinearCausalLM,
    LinearCrossEntropy,
    LogitAdjustment,
    NumberTokens,
    Objective,
    Unlikelihood,
)
from reweigh.losses.conformance import (
    CRITERION_FOR,
    check_compile,
    check_criterion,
    check_kinds_of_input,
    check_objective,
    objective_checks,
)
from reweigh.losses.conformance import ready as ready_objective
from reweigh.weighting import (
    AsymmetricFocal,
    Between,
    EffectiveNumber,
    Focal,
    HardNegatives,
    InClasses,
    InverseClassLoss,
    InverseFrequency,
    Linear,
    Piecewise,
    PositiveBalance,
    Weighting,
)
from reweigh.weighting.conformance import (
    TERMS,
    check_scope,
    check_weighting,
    example_terms,
    ready,
    terms_for,
    weighting_checks,
)


def examples(registry):
    return [
        pytest.param(name, dict(example), id=f"{name}-{i}")
        for name in registry.available()
        for i, example in enumerate(registry.record(name).examples)
    ]


def through(registry, reductions=(None,)):
    """Every example through every check of an objective; the first of a method, reduced, is not a slow test."""
    for name in registry.available():
        for i, example in enumerate(registry.record(name).examples):
            for reduction in reductions:
                for check in objective_checks():
                    again = i > 0 or reduction == "none"
                    chosen = [] if reduction is None else [reduction]
                    label = "-".join([f"{name}-{i}", *chosen, check.__name__])
                    marks = [pytest.mark.slow] if again else []
                    yield pytest.param(name, dict(example), *chosen, check, id=label, marks=marks)


@pytest.mark.parametrize("check", weighting_checks(), ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "example"), examples(weighting.registry))
def test_weighting(name, example, check):
    made = ready(weighting.create(name, **example))
    check(made, terms_for(made, TERMS[weighting.registry.record(name).acts_on]))


@pytest.mark.parametrize(("name", "example", "check"), list(through(losses.registry)))
def test_objective(name, example, check):
    check(ready_objective(losses.create(name, **example)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "example"), examples(losses.registry))
def test_every_kind_of_input_in_every_reduction_and_dtype(name, example):
    check_kinds_of_input(ready_objective(losses.create(name, **example)), every=True)


@pytest.mark.parametrize(
    ("name", "example", "reduction", "check"), list(through(weighting.registry, reductions=("mean", "none")))
)
def test_weighting_in_an_objective(name, example, reduction, check):
    criterion = CRITERION_FOR[weighting.registry.record(name).acts_on]()
    if check is check_kinds_of_input and reduction != "mean":
        return  # it goes through the reductions itself
    if criterion.slots:
        if reduction == "none":
            return  # tasks have one sum
        reduction = "sum"
    check(ready_objective(Objective(criterion, weighting.create(name, **example), reduction)))


CRITERIA = [
    CrossEntropy(),
    CrossEntropy(weight=[1.0, 2.0, 0.5, 3.0], label_smoothing=0.1),
    CrossEntropy(logits=LogitAdjustment([50, 20, 6, 1], tau=Linear(0.0, 1.0, duration=3, by="step"))),
    CrossEntropy(weight="balanced", label_smoothing=Linear(0.0, 0.2, duration=3, by="step")),
    BinaryCrossEntropy(weight=[1.0, 2.0, 0.5, 3.0], pos_weight=2.0, label_smoothing=0.1),
    BinaryCrossEntropy(shift=0.05, soft="sides", pos_weight=2.0),
    BinaryCrossEntropy(shift=0.2),
    ClasswiseCrossEntropy(label_smoothing=0.2),
    FromLoss(torch.nn.SmoothL1Loss(reduction="none")),
    LinearCrossEntropy(weight=[1.0, 2.0, 0.5, 3.0]),
    LinearCausalLM(impl="chunked", chunk_rows=5, softcap=3.0, z_loss=0.01, label_smoothing=0.1),
    NumberTokens([0.0, None, 1.0, 3.0]),
    NumberTokens([0.0, None, 1.0, 3.0], "mse", shift=False),
    Unlikelihood(),
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_criterion(criterion):
    check_criterion(criterion)


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none", "batch_mean", "sequence_mean"])
@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_every_reduction(criterion, reduction):
    whole(Objective(criterion, None, reduction))


def whole(objective):
    """The whole suite; what goes through the reductions itself, or takes long, under ``mean`` alone."""
    if objective.reduction.name == "mean":
        check_objective(objective)
        return
    for check in objective_checks():
        if check not in (check_compile, check_kinds_of_input):
            check(ready_objective(objective))


COMPOSITIONS = [
    (InverseFrequency([50, 20, 6, 1]) * Focal(1.0)).clip(max=2.0).normalize(),
    0.5 * Focal(Linear(0.0, 2.0, duration=3, by="step")) ** 2.0 + 0.1,
    EffectiveNumber(beta=Piecewise([0.0, 0.99], [1])).warmup(3),
    InverseClassLoss(4, cadence="forward", to="mean"),
    Focal(2.0).detach() * InverseClassLoss(4),
    Focal(1.0).ema(0.9, 4),
    Focal(1.0).normalize(over="class").where(InClasses([1, 2])),
    Focal(2.0).pooled("group") * Between("loss", low=0.5),
    InverseClassLoss(4).frozen(),
]
SHARED = [
    (InverseFrequency([50, 20, 6, 1]) * AsymmetricFocal()).clip(max=2.0).normalize(),
    PositiveBalance(0.3) * Focal(1.0),
    Focal(1.0).pooled("class"),
    AsymmetricFocal(detach=False).ema(0.9, 4),
    HardNegatives(1.0),
    InverseClassLoss(4),
]


@pytest.mark.parametrize("composed", COMPOSITIONS, ids=repr)
def test_compositions(composed):
    check_weighting(composed)
    check_objective(Objective(CrossEntropy(), composed))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighting", SHARED, ids=repr)
def test_weightings_of_labels_that_are_several_terms(weighting, reduction):
    whole(Objective(BinaryCrossEntropy(shift=0.05, soft="sides"), weighting, reduction))


class _Broken(Weighting):
    """A weighting that breaks one promise at a time."""

    needs = frozenset({"log_pt"})
    scope = "local"

    def __init__(self, flaw):
        super().__init__()
        self.flaw = flaw
        self.update_on = "never" if flaw == "says never" else "step"
        self.add_state("calls", torch.zeros((), dtype=torch.float64))
        self.add_pending("sum")

    def weigh(self, terms):
        p = terms.need("log_pt").detach().exp()
        match self.flaw:
            case "negative":
                return -p
            case "infinite":
                return 1.0 / (1.0 - p) ** 2
            case "impure":
                self.calls.add_(1.0)
                return p + self.calls.to(p.dtype)
            case "random":
                return p + torch.rand(())
            case "hidden need":
                return p + terms.need("category")
            case "graph":
                return terms.need("log_pt").exp()
            case "not local":
                return p / p.sum()
            case "order":
                return p + torch.arange(len(p))
            case "mask blind":
                return p + p.mean()
            case "unlearned reset" | "noise" | "says never":
                return p + self.calls.to(p.dtype)
            case "negative later":
                return torch.where(self.calls > 0, -p, p)
            case "not local later":
                return torch.where(self.calls > 0, p / p.sum(), p)
        return p

    def reset(self):
        super().reset()
        if self.flaw != "unlearned reset":
            self.calls.zero_()

    def observe(self, terms):
        self.accumulate("sum", (terms.counts() * terms.loss).sum().double() ** (2 if self.flaw == "noise" else 1))

    def commit(self, sums):
        if self.flaw in ("unlearned reset", "noise", "says never", "negative later", "not local later"):
            self.calls.add_(sums["sum"])


@pytest.mark.parametrize(
    ("flaw", "promise"),
    [
        ("negative", "not negative"),
        ("infinite", "finite"),
        ("impure", "weigh gives the same twice"),
        ("random", "weigh gives the same twice"),
        ("hidden need", "needs is complete"),
        ("graph", "detached weights carry no gradient"),
        ("not local", "."),
        ("order", "."),
        ("mask blind", "masked means removed"),
        ("unlearned reset", "reset restores"),
        ("noise", "."),
        ("says never", "update_on 'never'"),
        ("negative later", "not negative"),
        ("not local later", "."),
    ],
)
def test_the_suite_catches(flaw, promise):
    with pytest.raises(AssertionError, match=f"breaks a promise: .*{promise}"):
        check_weighting(_Broken(flaw))


def test_scope_is_checked_on_learned_weights():
    weighting = _Broken("not local later")
    with pytest.raises(AssertionError, match="scope 'local'"):
        check_scope(weighting, example_terms)


def test_compositions_with_classes_from_elsewhere():
    check_objective(Objective(CrossEntropy(), (_Broken("none") * Focal(1.0)).clip(max=4.0)), compiled=False)


class _Careless(Objective):
    """An objective that breaks one promise at a time."""

    def __init__(self, flaw):
        super().__init__(CrossEntropy())
        self.flaw = flaw
        self.register_buffer("count", torch.zeros(()))

    def forward(self, *inputs, **meta):
        logits, target = inputs
        match self.flaw:
            case "mask":
                meta["mask"] = None
            case "sample weight":
                meta["sample_weight"] = None
            case "evaluation":
                self.count += 1
                return super().forward(logits * (1 + self.count), target, **meta)
            case "gradient":
                return super().forward(logits.detach() * 1 + 0 * logits, target, **meta)
            case "detached":
                return super().forward(logits, target, **meta).detach()
            case "overflow":
                return super().forward(logits, target, **meta) + logits.pow(300).sum() * 0
            case "item":
                return super().forward(logits, target, **meta) * (1.0 if logits.sum().item() else 2.0)
        return super().forward(logits, target, **meta)


@pytest.mark.parametrize(
    "flaw", ["mask", "sample weight", "evaluation", "gradient", "detached", "overflow", "item"]
)  # fmt: skip
def test_the_objective_suite_catches(flaw):
    with pytest.raises((AssertionError, RuntimeError)):
        check_objective(_Careless(flaw))


def test_the_objective_suite_passes_what_is_sound():
    check_objective(_Careless("none"))
