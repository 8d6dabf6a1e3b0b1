"""Every node against its formula in plain numbers, the operators that build them, and how their properties compose."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import weights as naive
from torch import nn

import reweigh
from reweigh.losses import CrossEntropy, FocalLoss, FromLoss, Objective
from reweigh.weighting import (
    EMA,
    Between,
    ClassWeight,
    Clip,
    Constant,
    Cosine,
    Detach,
    EffectiveNumber,
    Focal,
    Frozen,
    InClasses,
    InverseClassLoss,
    InverseFrequency,
    Linear,
    LossTerms,
    Normalize,
    Piecewise,
    Pooled,
    PositiveBalance,
    Power,
    Product,
    Sum,
    Warmup,
    Weighting,
    Where,
    learned_parameters,
)

F64 = torch.float64


class Given(Weighting):
    """Weights that arrive with the call: a leaf whose value a test chooses."""

    needs = frozenset({"given"})
    detached = False
    scope = "local"

    def weigh(self, terms):
        return terms.need("given", self).to(terms.loss.dtype)


class Scaled(Given):
    scope = "scaled"


class Unknown(Weighting):
    def weigh(self, terms):
        return torch.ones_like(terms.loss)


class Learned(Weighting):
    """A learned global scale with its regulariser."""

    detached = False
    scope = "local"

    def __init__(self, start=1.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(start), dtype=F64))

    def weigh(self, terms):
        return torch.ones_like(terms.loss) * self.log_scale.exp()

    def penalty(self, terms, weights):
        return -self.log_scale


def make(weights, times=None, mask=None, key=None, group=None):
    weights = torch.as_tensor(weights, dtype=F64)
    category = torch.zeros(weights.shape, dtype=torch.long) if key is None else torch.as_tensor(key)
    return LossTerms(
        loss=torch.ones_like(weights),
        mask=mask,
        category=category,
        group=None if group is None else torch.as_tensor(group),
        multiplicity=None if times is None else torch.as_tensor(times, dtype=F64),
        extras={"given": weights},
    )


def close(found, expected, tol=1e-14):
    expected = torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(found.expand(expected.shape).to(F64), expected, rtol=tol, atol=1e-300)


W, V = [0.0, 0.5, 2.0, 1.0], [3.0, 0.0, 0.25, 1.0]


class Other(Given):
    needs = frozenset({"other"})

    def weigh(self, terms):
        return terms.need("other", self)


def two(w=W, v=V):
    terms = make(w)
    return terms._replace(extras={**terms.extras, "other": torch.tensor(v, dtype=F64)})


def test_products_sums_constants_and_powers():
    a, b = Given(), Other()
    close((a * b).weigh(two()), [x * y for x, y in zip(W, V, strict=True)])
    close((a + b).weigh(two()), [x + y for x, y in zip(W, V, strict=True)])
    close((2 * a).weigh(two()), [2 * x for x in W])
    close((a * 2).weigh(two()), [2 * x for x in W])
    close((a + 1).weigh(two()), [x + 1 for x in W])
    close((1 + a).weigh(two()), [x + 1 for x in W])
    close(Product(a, b, 3).weigh(two()), [3 * x * y for x, y in zip(W, V, strict=True)])
    close(Sum(a, b, 3).weigh(two()), [3 + x + y for x, y in zip(W, V, strict=True)])
    close(Constant(0.7).weigh(two()), [0.7] * 4)
    for p in (0.0, 0.5, 1.0, 2.0):
        close((a**p).weigh(two()), [x**p for x in W])


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0, 1.5, 2.0])
def test_a_power_has_a_finite_gradient_at_zero(p):
    w = torch.tensor([0.0, 1e-300, 0.25, 4.0], dtype=F64, requires_grad=True)
    out = (Given() ** p).weigh(make(w))
    out.sum().backward()
    assert w.grad.isfinite().all()
    inner = torch.tensor([p * x ** (p - 1) for x in (0.25, 4.0)], dtype=F64)
    torch.testing.assert_close(w.grad[2:], inner)


def test_clip():
    close(Given().clip(0.4, 1.5).weigh(two()), [0.4, 0.5, 1.5, 1.0])
    close(Given().clip(min=0.7).weigh(two()), [0.7, 0.7, 2.0, 1.0])
    close(Given().clip(max=0.7).weigh(two()), [0.0, 0.5, 0.7, 0.7])
    w = torch.tensor([0.1, 1.0, 9.0], dtype=F64, requires_grad=True)
    Given().clip(0.5, 2.0).weigh(make(w)).sum().backward()
    assert torch.equal(w.grad, torch.tensor([0.0, 1.0, 0.0], dtype=F64))
    moving = Given().clip(max=Linear(1.0, 3.0, duration=2, by="step"))
    close(moving.weigh(make([5.0])), [1.0])
    moving.update("step")
    close(moving.weigh(make([5.0])), [2.0])


@pytest.mark.parametrize(
    ("over", "to"), [(o, t) for o in ("batch", "sample", "class", "group") for t in ("mean", "sum", "max")]
)
@given(data=st.data())
def test_normalize(over, to, data):
    if to == "max" and over in ("class", "group"):
        return
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    numbers = st.lists(st.sampled_from([0.0, 0.1, 1.0, 3.5]), min_size=rows * length, max_size=rows * length)
    weights, times = data.draw(numbers), data.draw(numbers)
    key = data.draw(st.lists(st.integers(0, 2), min_size=rows * length, max_size=rows * length))
    group = data.draw(st.lists(st.integers(-3, 10**6), min_size=rows, max_size=rows))
    shape = (rows, length)
    terms = make(
        torch.tensor(weights).reshape(shape),
        torch.tensor(times).reshape(shape),
        None,
        torch.tensor(key).reshape(shape),
        group,
    )
    found = Given().normalize(over=over, to=to).weigh(terms)
    places = {
        "batch": [0] * (rows * length),
        "sample": [i for i in range(rows) for _ in range(length)],
        "class": key,
        "group": [g for g in group for _ in range(length)],
    }[over]
    weights = make(torch.tensor(weights)).extras["given"].tolist()  # the same rounding as inside
    times = torch.tensor(times).double().tolist()
    close(found.reshape(-1), naive.normalize(weights, times, places, to), tol=1e-12)


@pytest.mark.parametrize("to", ["mean", "sum", "max"])
@pytest.mark.parametrize("over", ["batch", "sample"])
def test_normalize_can_be_differentiated(over, to):
    w = torch.rand(3, 2, dtype=F64, requires_grad=True)
    wrt_constant, whole = (Given().normalize(over=over, to=to, detach=d).weigh(make(w)) for d in (True, False))
    assert torch.equal(wrt_constant, whole)
    keep = torch.rand(3, 2, dtype=F64)
    first, second = (torch.autograd.grad((out * keep).sum(), w)[0] for out in (wrt_constant, whole))
    assert not torch.allclose(first, second)
    assert torch.autograd.gradcheck(lambda x: Given().normalize(over=over, to=to, detach=False).weigh(make(x)), w)


@pytest.mark.parametrize("over", ["sequence", "batch", "class", "group"])
@given(data=st.data())
def test_pooled(over, data):
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    numbers = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=rows * length, max_size=rows * length)
    weights, times = data.draw(numbers), data.draw(numbers)
    key = data.draw(st.lists(st.integers(0, 2), min_size=rows * length, max_size=rows * length))
    group = data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    shape = (rows, length)
    terms = make(
        torch.tensor(weights).reshape(shape),
        torch.tensor(times).reshape(shape),
        None,
        torch.tensor(key).reshape(shape),
        group,
    )
    places = {
        "sequence": [i for i in range(rows) for _ in range(length)],
        "batch": [0] * (rows * length),
        "class": key,
        "group": [g for g in group for _ in range(length)],
    }[over]
    close(Given().pooled(over).weigh(terms).reshape(-1), naive.pooled(weights, times, places), tol=1e-12)


def test_conditions():
    terms = make([5.0, 6.0, 7.0, 8.0], key=[0, 1, 2, 1])
    close(InClasses([1]).weigh(terms), [0, 1, 0, 1])
    close(InClasses([2, 0]).weigh(terms), [1, 0, 1, 0])
    close(Given().where(InClasses([1])).weigh(terms), [1, 6, 1, 8])
    close(Given().where(InClasses([1]), otherwise=0.5).weigh(terms), [0.5, 6, 0.5, 8])
    close(Given().where(InClasses([1]), otherwise=ClassWeight([2.0, 3.0, 4.0])).weigh(terms), [2, 6, 4, 8])
    close(Between("given", low=6.0).weigh(terms), [0, 1, 1, 1])
    close(Between("given", high=6.0).weigh(terms), [1, 1, 0, 0])
    close(Between("given", low=6.0, high=7.0).weigh(terms), [0, 1, 1, 0])
    moving = Between("given", low=Linear(0.0, 8.0, duration=2, by="step"))
    moving.update("step")
    moving.update("step")
    close(moving.weigh(terms), [0, 0, 0, 1])
    per_sample = LossTerms(torch.ones(2, 3), extras={"age": torch.tensor([1.0, 5.0])})
    assert Between("age", low=2.0).weigh(per_sample).expand(2, 3).tolist() == [[0.0] * 3, [1.0] * 3]


def test_where_lets_gradient_through_the_chosen_side_only():
    w = torch.tensor([5.0, 6.0], dtype=F64, requires_grad=True)
    Given().where(InClasses([1])).weigh(make(w, key=[0, 1])).sum().backward()
    assert torch.equal(w.grad, torch.tensor([0.0, 1.0], dtype=F64))


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("by", ["step", "epoch"])
def test_warmup(delay, by):
    warm = Given().warmup(4, delay=delay, by=by)
    for done in range(8):
        share = min(max((done - delay) / 4, 0.0), 1.0)
        close(warm.weigh(make([3.0, 0.0])), [1 - share + 3 * share, 1 - share], tol=1e-12)
        warm.update(by)
        warm.update("epoch" if by == "step" else "step")  # the other clock does not matter


def test_detach_and_frozen_give_constants():
    x, y = torch.randn(4, 3, dtype=F64, requires_grad=True), torch.randint(3, (4,))
    plain, cut, frozen = (
        Objective(CrossEntropy(), weighting) for weighting in (Focal(2.0), Focal(2.0).detach(), Focal(2.0).frozen())
    )
    assert torch.equal(plain(x, y), cut(x, y))
    assert torch.equal(plain(x, y), frozen(x, y))
    weights = plain.weights(x, y)
    expected = torch.autograd.grad((nn.functional.cross_entropy(x, y, reduction="none") * weights).mean(), x)[0]
    for objective in (cut, frozen):
        torch.testing.assert_close(torch.autograd.grad(objective(x, y), x)[0], expected, rtol=1e-13, atol=0)
    assert not torch.allclose(torch.autograd.grad(plain(x, y), x)[0], expected)


def test_frozen_hears_no_events_and_learns_nothing():
    base = InverseClassLoss(3, smoothing=0.5)
    objective = Objective(CrossEntropy(), base.frozen() * Focal(Linear(0.0, 2.0, duration=4, by="step")))
    x, y = torch.randn(6, 3, dtype=F64), torch.randint(3, (6,))
    before = {key: value.clone() for key, value in base.state_dict().items()}
    for _ in range(3):
        objective(x, y)
        objective.update("step")
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in before.items())
    assert all(not pending.any() for pending in base._pending.values())
    assert objective.weighting.parts()[1].gamma.completed("step") == 3
    scheduled = Focal(Linear(0.0, 2.0, duration=2, by="step")).frozen()
    scheduled.update("step")
    assert scheduled.base.gamma().item() == 0.0


def test_frozen_takes_learned_weights_out_of_training():
    learned = Learned(2.0)
    assert learned_parameters(learned) == [learned.log_scale]
    frozen = learned.frozen()
    assert learned_parameters(frozen) == []
    objective = Objective(FromLoss(nn.L1Loss(reduction="none")), frozen)
    assert objective.parameter_groups() == []
    x = torch.ones(3, dtype=F64, requires_grad=True)
    loss = objective(x, torch.zeros(3, dtype=F64))
    assert loss.item() == pytest.approx(2.0)  # no penalty either
    loss.backward()
    assert learned.log_scale.grad is None


def test_ema_against_a_loop():
    running = Given().ema(0.7, 3)
    batches = [
        ([0, 0, 1], [1.0, 3.0, 5.0]),
        ([1, 1, 1], [2.0, 2.0, 8.0]),
        ([2, 0, 0], [4.0, 0.0, 1.0]),
        ([1, 2, 2], [9.0, 1.0, 1.0]),
    ]
    met, last = naive.ema([list(zip(*batch, strict=True)) for batch in batches], 3, 0.7)
    for (key, weights), table in zip(batches, met, strict=True):
        terms = make(weights, key=key)
        close(running.weigh(terms), [table[k] for k in key], tol=1e-13)
        running.observe(terms)
        running.update("step")
    close(running.get_buffer("mean"), last, tol=1e-13)
    running.reset()
    close(running.weigh(make([3.0], key=[1])), [1.0])


@pytest.mark.parametrize("by", ["group", "position"])
def test_ema_by_group_and_position(by):
    running = Given().ema(0.5, 3, by=by)
    terms = make([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]], group=[2, 0])
    running.observe(terms)
    running.update("step")
    found = running.weigh(terms).expand(2, 3)
    expected = [[2.0] * 3, [6.0] * 3] if by == "group" else [[3.0, 4.0, 5.0]] * 2
    close(found, expected)


def test_ema_resumes():
    first, second = Given().ema(0.5, 2), Given().ema(0.5, 2)
    batches = [make(torch.rand(4), key=torch.randint(2, (4,))) for _ in range(6)]
    for i, terms in enumerate(batches):
        if i == 3:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for running in (first, second):
            running.observe(terms)
            running.update("step")
            if i < 3:
                break
    assert torch.equal(first.weigh(batches[0]), second.weigh(batches[0]))


def test_ema_counts_sample_weights_and_skips_masked_terms():
    one, other = Given().ema(0.5, 2), Given().ema(0.5, 2)
    mask = torch.tensor([True, True, False])
    one.observe(make([1.0, 4.0, 99.0], times=[2.0, 1.0, 1.0], mask=mask, key=[0, 0, 0]))
    other.observe(make([1.0, 1.0, 4.0], key=[0, 0, 0]))
    for running in (one, other):
        running.update("step")
    assert torch.equal(one.get_buffer("mean"), other.get_buffer("mean"))
    close(one.get_buffer("mean"), [2.0, 1.0])


# operators and named nodes


@pytest.mark.parametrize(
    ("sugar", "node"),
    [
        (lambda a: a * 2, lambda a: Product(a, 2)),
        (lambda a: 2 * a, lambda a: Product(2, a)),
        (lambda a: a * a, lambda a: Product(a, a)),
        (lambda a: a + 1.5, lambda a: Sum(a, 1.5)),
        (lambda a: 1.5 + a, lambda a: Sum(1.5, a)),
        (lambda a: a**0.5, lambda a: Power(a, 0.5)),
        (lambda a: a.clip(0.1, 2.0), lambda a: Clip(a, min=0.1, max=2.0)),
        (lambda a: a.normalize(), lambda a: Normalize(a, over="batch", to="mean", detach=True)),
        (lambda a: a.normalize(over="class", to="sum"), lambda a: Normalize(a, over="class", to="sum")),
        (lambda a: a.detach(), lambda a: Detach(a)),
        (lambda a: a.where(InClasses([0]), 0.5), lambda a: Where(a, InClasses([0]), otherwise=0.5)),
        (lambda a: a.warmup(3, delay=1), lambda a: Warmup(a, 3, delay=1, by="step")),
        (lambda a: a.pooled("batch"), lambda a: Pooled(a, over="batch")),
        (lambda a: a.ema(0.9, 3), lambda a: EMA(a, 0.9, num_slots=3, by="category")),
        (lambda a: a.frozen(), lambda a: Frozen(a)),
    ],
)
def test_operators_build_the_named_nodes(sugar, node):
    terms = LossTerms(
        loss=torch.rand(4, dtype=F64),
        log_pt=-torch.rand(4, dtype=F64),
        category=torch.tensor([0, 1, 2, 0]),
        num_classes=3,
    )
    built, named = sugar(Focal(2.0)), node(Focal(2.0))
    assert type(built) is type(named)
    assert torch.equal(built.weigh(terms), named.weigh(terms))
    assert (built.needs, built.detached, built.scope) == (named.needs, named.detached, named.scope)


L, S, G = Given, Scaled, Unknown
SCOPES = [
    # expression, class by performance.md: L token-local, S scaled by one detached number, G batch-global
    ("constant", lambda: Constant(2.0), "local"),
    ("table", lambda: ClassWeight([1.0, 2.0]), "local"),
    ("counts", lambda: InverseFrequency([1, 2]), "local"),
    ("focal", lambda: Focal(), "local"),
    ("learning by step", lambda: InverseClassLoss(2), "local"),
    ("learning in forward", lambda: InverseClassLoss(2, cadence="forward"), "global"),
    ("says nothing", lambda: G(), "global"),
    ("L * L", lambda: L() * L(), "local"),
    ("L * S", lambda: L() * S(), "scaled"),
    ("S * S", lambda: S() * S(), "scaled"),
    ("S * G", lambda: S() * G(), "global"),
    ("L * G", lambda: L() * G(), "global"),
    ("2 * S", lambda: 2 * S(), "scaled"),
    ("L ** p", lambda: L() ** 2, "local"),
    ("S ** p", lambda: S() ** 0.5, "scaled"),
    ("G ** p", lambda: G() ** 0.5, "global"),
    ("L.detach", lambda: L().detach(), "local"),
    ("S.detach", lambda: S().detach(), "scaled"),
    ("S.frozen", lambda: S().frozen(), "scaled"),
    ("L + L", lambda: L() + L(), "local"),
    ("S + L", lambda: S() + L(), "global"),
    ("S + 1", lambda: S() + 1, "global"),
    ("L.clip", lambda: L().clip(max=1), "local"),
    ("S.clip", lambda: S().clip(max=1), "global"),
    ("L.where(L)", lambda: L().where(InClasses([0])), "local"),
    ("S.where(L)", lambda: S().where(InClasses([0])), "global"),
    ("L.where(L, S)", lambda: L().where(InClasses([0]), S()), "global"),
    ("L.where(S)", lambda: L().where(S()), "global"),
    ("L.warmup", lambda: L().warmup(3), "local"),
    ("S.warmup", lambda: S().warmup(3), "global"),
    ("L.normalize", lambda: L().normalize(), "scaled"),
    ("L.normalize sum", lambda: L().normalize(to="sum"), "scaled"),
    ("L.normalize max", lambda: L().normalize(to="max"), "scaled"),
    ("S.normalize", lambda: S().normalize(), "scaled"),
    ("G.normalize", lambda: G().normalize(), "global"),
    ("L.normalize attached", lambda: L().normalize(detach=False), "global"),
    ("L.normalize by class", lambda: L().normalize(over="class"), "global"),
    ("L.normalize by group", lambda: L().normalize(over="group"), "global"),
    ("L.normalize by sample", lambda: L().normalize(over="sample"), "global"),
    ("L.pooled", lambda: L().pooled(), "global"),
    ("EMA reads state", lambda: G().ema(0.9, 3), "local"),
    ("deep", lambda: ((L() * S()).detach() ** 2 * ClassWeight([1.0])).normalize(), "scaled"),
    ("deep clip", lambda: (2 * L().normalize()).clip(max=5), "global"),
]


@pytest.mark.parametrize(("expression", "scope"), [row[1:] for row in SCOPES], ids=[row[0] for row in SCOPES])
def test_scopes_compose(expression, scope):
    assert expression().scope == scope


def test_a_scaled_weighting_is_local_times_one_number():
    """What the scope promises, on the weights themselves."""
    full, part = make(torch.rand(6)), None
    part = LossTerms(full.loss[:3], category=full.category[:3], extras={"given": full.extras["given"][:3]})
    for name, expression, scope in SCOPES:
        if scope == "global" or "says" in name:
            continue
        weighting = expression()
        if not weighting.needs <= {"given"}:
            continue
        ratio = weighting.weigh(full).expand(6)[:3] / weighting.weigh(part).expand(3)
        if scope == "local":
            assert torch.equal(ratio, torch.ones(3, dtype=F64)), name
        else:
            torch.testing.assert_close(ratio, ratio[:1].expand(3), rtol=1e-13, atol=0)


def test_needs_are_the_union():
    assert (Focal() * ClassWeight([1.0])).needs == {"log_pt", "category"}
    assert (Focal() + PositiveBalance()).needs == {"log_pt", "target"}
    assert Focal().normalize(over="class").needs == {"log_pt", "category"}
    assert Focal().pooled("group").needs == {"log_pt", "group"}
    assert Focal().ema(0.5, 2, by="group").needs == {"log_pt", "group"}
    assert Focal().ema(0.5, 2, by="position").needs == {"log_pt"}
    assert Focal().where(Between("urgency", low=0.0), InClasses([0])).needs == {"log_pt", "urgency", "category"}
    assert Constant().needs == frozenset()


def test_detached_is_declared():
    assert not Focal().detached
    assert Focal(detach=True).detached
    assert not (Focal() * ClassWeight([1.0])).detached
    assert (Focal(detach=True) * ClassWeight([1.0])).detached
    assert Focal().detach().detached
    assert Focal().frozen().detached
    assert Focal().ema(0.5, 2).detached
    assert not Focal().normalize().detached
    assert not Focal().where(InClasses([0])).detached
    assert Constant().where(Focal()).detached  # a condition carries no gradient
    terms = LossTerms(
        torch.rand(3), log_pt=(-torch.rand(3)).requires_grad_(), category=torch.tensor([0, 1, 1]), num_classes=2
    )
    for weighting in (
        Focal(detach=True),
        Focal().detach(),
        Focal().frozen(),
        Focal().ema(0.5, 2),
        Constant().where(Focal()),
    ):
        assert not weighting.weigh(terms).requires_grad
    for weighting in (Focal(), Focal().normalize(), Focal() * 2, Focal().clip(max=1)):
        assert weighting.weigh(terms).requires_grad


# penalties


@pytest.mark.parametrize(
    ("wrap", "factor"),
    [
        (lambda a: a, 1),
        (lambda a: a * Focal(), 1),
        (lambda a: a * a, 2),
        (lambda a: a + 1, 1),
        (lambda a: a**2, 1),
        (lambda a: a.clip(max=9.0), 1),
        (lambda a: a.normalize(), 1),
        (lambda a: a.pooled("batch"), 1),
        (lambda a: a.frozen(), 0),
        (lambda a: a.warmup(2), 0),
    ],
)
def test_penalties_pass_through_the_nodes(wrap, factor):
    learned = Learned(2.0)
    objective = Objective(CrossEntropy(), wrap(learned))
    x, y = torch.randn(4, 3, dtype=F64), torch.randint(3, (4,))
    without = (objective.weights(x, y) * nn.functional.cross_entropy(x, y, reduction="none")).mean()
    torch.testing.assert_close(objective(x, y), without - factor * learned.log_scale)


def test_a_penalty_warms_up_with_its_weights():
    learned = Learned(2.0)
    warm = learned.warmup(2)
    terms = make([1.0])
    for share in (0.0, 0.5, 1.0, 1.0):
        torch.testing.assert_close(warm.penalty(terms, warm.weigh(terms)), -share * learned.log_scale)
        warm.update("step")


def test_the_penalty_is_part_of_the_reported_value():
    learned = Learned(3.0)
    objective = Objective(CrossEntropy(), learned)
    x, y = torch.randn(4, 3, dtype=F64), torch.randint(3, (4,))
    torch.testing.assert_close(objective.components(x, y).weighted, objective(x, y).detach())


def test_learned_weights_have_their_own_optimizer_group():
    learned = Learned()
    objective = Objective(CrossEntropy(), learned * Focal())
    (group,) = objective.parameter_groups(lr=0.1)
    assert group["params"] == [learned.log_scale]
    assert group["weight_decay"] == 0.0
    assert group["lr"] == 0.1
    assert "lr" not in objective.parameter_groups()[0]
    assert Objective(CrossEntropy(), Focal()).parameter_groups() == []


# printing


def catalogue():
    return [
        Focal(),
        Focal(0.5, detach=True),
        Focal(Linear(0.0, 2.0, duration=3)),
        ClassWeight([1.0, 2.0]),
        ClassWeight(torch.tensor([1.0, 0.1], dtype=F64)),
        InverseFrequency([9, 1], power=0.5, normalize="samples"),
        InverseFrequency(num_classes=3),
        EffectiveNumber((9, 1), beta=Piecewise([0.0, 0.99], [2])),
        PositiveBalance(0.3),
        InverseClassLoss(3, to="mean", cadence="forward"),
        (Focal(1.0) * InverseFrequency([9, 1]) + 0.5) ** 2,
        (2 * Focal()).clip(0.1, max=Cosine(1.0, 2.0, duration=5, by="step")).normalize(over="class", to="sum"),
        Focal().where(InClasses([1, 2]), otherwise=ClassWeight([1.0])).warmup(3, delay=2, by="epoch"),
        Focal().where(Between("loss", low=0.5)).pooled("batch").ema(0.9, 3, by="group").detach(),
        Focal().frozen(),
        Constant(),
    ]


@pytest.mark.parametrize("weighting", catalogue(), ids=repr)
def test_repr_rebuilds(weighting):
    space = {name: getattr(reweigh, name) for name in reweigh.__all__}
    again = eval(repr(weighting), space)
    assert repr(again) == repr(weighting)
    assert type(again) is type(weighting)
    assert again.state_dict().keys() == weighting.state_dict().keys()
    assert (again.needs, again.detached, again.scope) == (weighting.needs, weighting.detached, weighting.scope)
    for (name, one), (_, other) in zip(weighting.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    "objective",
    [
        FocalLoss(),
        FocalLoss(0.5, weight=[1.0, 2.0, 3.0], ignore_index=255, label_smoothing=0.1, reduction="weighted_mean"),
        FocalLoss(alpha="balanced"),
        Objective(
            CrossEntropy(logits=reweigh.Chain(reweigh.LogitAdjustment([9, 1]), reweigh.Temperature(2.0))),
            Focal(),
            "sum",
        ),
        Objective(reweigh.BinaryCrossEntropy(pos_weight=2.0), None, reweigh.Mean(empty="nan")),
        Objective(FocalLoss(reduction="sequence_mean"), Between("loss", high=3.0)),
        Objective(FromLoss("torch.nn.functional.logsigmoid")),
    ],
    ids=repr,
)
def test_repr_rebuilds_objectives(objective):
    space = {name: getattr(reweigh, name) for name in reweigh.__all__}
    again = eval(repr(objective), space)
    assert repr(again) == repr(objective)
    assert type(again) is type(objective)


def test_repr_of_a_long_table_is_short():
    text = repr(ClassWeight(torch.ones(1000)))
    assert text.startswith("ClassWeight(<(1000,) crc32 ")
    assert len(text) < 60
    assert repr(ClassWeight([1.0] * 999 + [2.0])) != repr(ClassWeight([1.0] * 1000))


@pytest.mark.parametrize("weighting", catalogue(), ids=repr)
def test_copies(weighting):
    for again in (copy.deepcopy(weighting), pickle.loads(pickle.dumps(weighting)), copy.copy(weighting)):
        assert repr(again) == repr(weighting)
        for (name, one), (_, other) in zip(weighting.named_buffers(), again.named_buffers(), strict=True):
            assert torch.equal(one, other), name


# properties


@pytest.mark.parametrize(
    "weighting",
    [
        Focal(2.0),
        ClassWeight([1.0, 2.0, 3.0]) * Focal(1.0),
        Focal(1.0).normalize(),
        Focal(1.0).normalize(over="class"),
        Focal(1.0).normalize(over="group", to="sum"),
        (Focal(1.0) + 0.2).normalize(to="max").clip(max=0.7),
        Focal(1.0).pooled("class"),
        Focal(1.0).pooled("group"),
        Focal(1.0).where(Between("loss", low=0.5)).pooled("batch"),
        InverseClassLoss(3, cadence="forward"),
    ],
    ids=repr,
)
@given(order=st.permutations(range(6)), seed=st.integers(0, 999))
def test_permuting_terms_permutes_weights(weighting, order, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, generator=generator, dtype=F64)
    y, group = torch.randint(3, (6,), generator=generator), torch.randint(2, (6,), generator=generator)
    times = torch.randint(3, (6,), generator=generator).to(F64)
    objective = Objective(CrossEntropy(), copy.deepcopy(weighting))
    order = torch.tensor(order)
    first = objective.weights(x, y, sample_weight=times, group=group)
    second = objective.weights(x[order], y[order], sample_weight=times[order], group=group[order])
    torch.testing.assert_close(second, first[order], rtol=1e-12, atol=1e-15)
    value = objective.eval()(x, y, sample_weight=times, group=group)
    other = objective(x[order], y[order], sample_weight=times[order], group=group[order])
    torch.testing.assert_close(other, value, rtol=1e-12, atol=1e-15)


@given(a=st.floats(0, 10), b=st.floats(0, 10), p=st.floats(0, 3), q=st.floats(0, 3), w=st.floats(1e-3, 10))
def test_laws(a, b, p, q, w):
    """The algebra's identities: commuting, distributing, powers of powers, a scale that normalising takes out."""
    terms, x = make([w, 0.5, 2.0]), Given()
    close((a * (b * x)).weigh(terms), (b * (a * x)).weigh(terms), tol=1e-12)
    close(((a + x) * b).weigh(terms), (a * Constant(b) + x * b).weigh(terms), tol=1e-12)
    close(((x**p) ** q).weigh(terms), (x ** (p * q)).weigh(terms), tol=1e-9)
    if a > 1e-6:
        close((a * x).normalize().weigh(terms), x.normalize().weigh(terms), tol=1e-12)
    close(x.normalize().normalize().weigh(terms), x.normalize().weigh(terms), tol=1e-12)
    close(x.pooled("batch").pooled("batch").weigh(terms), x.pooled("batch").weigh(terms), tol=1e-12)


def test_no_comparison_operators():
    """``==`` is identity: the algebra overloads no comparisons."""
    a, b = Focal(), Focal()
    assert a == a
    assert a != b
    assert len({a, b}) == 2
    with pytest.raises(TypeError):
        a < b  # noqa: B015


def test_reweighted_shares_its_parts():
    base = FocalLoss(weight=[1.0, 2.0, 3.0])
    extra = base.reweighted(ClassWeight([1.0, 0.0, 2.0]))
    x, y = torch.randn(5, 3, dtype=F64), torch.randint(3, (5,))
    torch.testing.assert_close(extra.weights(x, y), base.weights(x, y) * torch.tensor([1.0, 0.0, 2.0], dtype=F64)[y])
    assert extra.criterion is base.criterion
    bare = Objective(CrossEntropy()).reweighted(Focal())
    assert isinstance(bare.weighting, Focal)


def test_a_shared_part_hears_each_event_once():
    shared = Focal(Linear(0.0, 1.0, duration=10, by="step"))
    objective = Objective(CrossEntropy(), shared * shared + shared.clip(max=0.5))
    objective.update("step")
    assert shared.gamma.completed("step") == 1


def test_a_shared_learner_sees_each_batch_once():
    """One learner at two places of an expression: its sums count a batch once."""
    shared = InverseClassLoss(2, smoothing=1.0)
    objective = Objective(CrossEntropy(), shared * shared.clip(max=0.9))
    objective(torch.zeros(3, 2, dtype=F64), torch.tensor([0, 1, 1]))
    assert shared._pending["loss_count"].tolist() == [1.0, 2.0]


def test_every_term_statistic_survives_composition():
    for first, second in itertools.product([Focal(1.0), ClassWeight([1.0, 2.0])], repeat=2):
        objective = Objective(CrossEntropy(), (first * second).normalize() + 0.1)
        assert objective(torch.zeros(3, 2), torch.tensor([0, 1, 1])).isfinite()
