"""Hidden states times a vocabulary matrix: chunked equals dense, for every weighting, and never holds the logits."""

import copy
import inspect
import math
import sys
import types

import hypothesis.strategies as st
import pytest
import torch
from gradients import agree, peak, slopes
from hypothesis import HealthCheck, given, settings
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from reweigh import losses, weighting
from reweigh.losses import CausalLM, LinearCausalLM, LinearCrossEntropy, Objective, TLDRLoss
from reweigh.losses.conformance import example_meta, ready
from reweigh.losses.kernels import linear
from reweigh.weighting import (
    KLDRO,
    TLDR,
    CVaR,
    Focal,
    InverseClassLoss,
    Linear,
    PowerLawDecay,
)

F64 = torch.float64
REDUCTIONS = ["mean", "weighted_mean", "sum", "none", "batch_mean", "sequence_mean", "group_mean"]


def case(batch=3, length=7, width=5, classes=11, dtype=F64, seed=0, ignored=True):
    """Hidden states, vocabulary, bias (all with gradient) and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64).to(dtype).requires_grad_()  # noqa: E731
    hidden, weight, bias = draw(batch, length, width), draw(classes, width), draw(classes)
    labels = torch.randint(classes, (batch, length), generator=generator)
    if ignored:
        labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.25, -100)
    return hidden, weight, bias, labels


def both(weight_by, reduction="mean", *, chunk_rows=4, **options):
    """The objective on all logits, and the one on chunks."""
    return [
        Objective(LinearCausalLM(impl=impl, chunk_rows=chunk_rows, **options), copy.deepcopy(weight_by), reduction)
        for impl in ("dense", "chunked")
    ]


# against formulas


@pytest.mark.parametrize("chunk_rows", [1, 4, 100, None])
def test_the_formula_in_torchs_own_words(chunk_rows):
    """Shift, ignored labels, bias: what F.cross_entropy says of the logits."""
    hidden, weight, bias, labels = case()
    logits = functional.linear(hidden, weight, bias)[:, :-1]
    wanted = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    expected = wanted, torch.autograd.grad(wanted, (hidden, weight, bias))
    found = Objective(LinearCausalLM(impl="chunked", chunk_rows=chunk_rows))
    agree(expected, slopes(found, (hidden, weight, labels), bias=bias), 1e-12)
    flat = Objective(LinearCrossEntropy(impl="chunked", chunk_rows=chunk_rows))
    inputs = hidden[:, :-1].flatten(0, 1), weight, labels[:, 1:].flatten()
    value = flat(*inputs, bias=bias)
    agree(expected, (value, torch.autograd.grad(value, (hidden, weight, bias))), 1e-12)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_softcap_smoothing_class_weights_and_z_loss_by_hand(impl):
    hidden, weight, bias, labels = case()
    table = torch.linspace(0.5, 2.0, 11, dtype=F64)
    logits = 3.0 * torch.tanh(functional.linear(hidden, weight, bias) / 3.0)
    flat, target = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    smooth = functional.cross_entropy(flat, target, weight=table, label_smoothing=0.2, reduction="none")
    valid = target != -100
    per = smooth + 0.05 * flat.logsumexp(-1) ** 2 * valid
    wanted = per.sum() / table[target[valid]].sum()
    expected = wanted, torch.autograd.grad(wanted, (hidden, weight, bias))
    criterion = LinearCausalLM(
        impl=impl, chunk_rows=5, softcap=3.0, label_smoothing=0.2, weight=table.tolist(), z_loss=0.05
    )
    agree(expected, slopes(Objective(criterion), (hidden, weight, labels), bias=bias), 1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_equals_the_dense_criterion_on_logits(reduction, dtype):
    """CausalLM on F.linear's logits, under decay x TLDR."""
    hidden, weight, bias, labels = case(dtype=dtype)
    by = (PowerLawDecay([1000.0 / (v + 1) for v in range(11)], alpha=0.5) * TLDR()).clip(max=1.0)
    meta = {"group": torch.tensor([0, 2, 0])}
    dense = Objective(CausalLM(), by, reduction)
    if reduction == "weighted_mean":
        by = by.detach()
        dense = Objective(CausalLM(), by, reduction)
    value = dense(functional.linear(hidden, weight, bias), labels, **meta)
    expected = value, torch.autograd.grad(value.sum(), (hidden, weight, bias))
    found = Objective(LinearCausalLM(impl="chunked", chunk_rows=4), by, reduction)
    agree(expected, slopes(found, (hidden, weight, labels), bias=bias, **meta), 1e-12 if dtype == F64 else 1e-5)


# every weighting


def registered():
    """Every example of every weighting whose terms are tokens or classes."""
    for name in weighting.available():
        record = weighting.registry.record(name)
        if record.acts_on in ("class", "token"):
            for i, example in enumerate(record.examples):
                yield pytest.param(name, dict(example), id=f"{name}-{i}")


def steps(objective, dtype, how, per_sample):
    """Value and gradients of three steps, and what has been learned."""
    found = []
    for step in range(3):
        hidden, weight, bias, labels = case(8, 3, 3, 4, dtype=dtype, seed=step)
        if per_sample:
            hidden, labels = hidden.detach()[:, 0].requires_grad_(), labels[:, 0]
        meta = example_meta(objective)
        if how != "plain":
            meta["sample_weight"] = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0, 3.0, 0.0])
            meta["mask"] = torch.rand(labels.shape, generator=torch.Generator().manual_seed(step)) < 0.8
        if how == "accumulated":
            meta["num_items"] = 7.5
        learned = [p for p in objective.parameters() if p.requires_grad]
        value, grads = slopes(objective, (hidden, weight, labels), learned, bias=bias, **meta)
        found += [value, *grads]
        objective.update("step", index=step)
    return found, [value.double() for value in objective.state_dict().values()]


@pytest.mark.parametrize("how", ["plain", "weights and masks", "accumulated"])
@pytest.mark.parametrize(("name", "example"), list(registered()))
def test_every_registered_weighting(name, example, how):
    """Value, all gradients and state: 1e-10 in float64; in float32 1e-5, or as near to float64 as dense is."""
    by = weighting.create(name, **example)
    per_sample = bool(by.rows) or name == "relative_difficulty"
    made = LinearCrossEntropy if per_sample else LinearCausalLM
    found = {}
    for dtype in (F64, torch.float32):
        for impl in ("dense", "chunked"):
            objective = ready(Objective(made(impl=impl, chunk_rows=4), by)).train()
            found[dtype, impl] = steps(objective, dtype, how, per_sample)
    truth = found[F64, "dense"]
    for exact, same, dense, chunked in zip(*(values for values, _ in found.values()), strict=True):
        scale = max(1e-30, exact.abs().max().item())
        torch.testing.assert_close(same, exact, rtol=0.0, atol=1e-10 * scale)
        off = (dense.double() - exact).abs().max().item()
        torch.testing.assert_close(chunked, dense, rtol=0.0, atol=max(1e-5 * scale, 2.0 * off))
    for one, other in zip(truth[1], found[F64, "chunked"][1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


FACTORS = st.sampled_from(
    [
        "Focal(1.5)",
        "TLDR()",
        "TLDR(detach=True)",
        "PowerLawDecay([50, 20, 6, 1], alpha=0.5)",
        "InverseClassLoss(4)",
        "Focal(1.0).ema(0.9, 4, by='position')",
        "KLDRO(1.0)",
        "CVaR(0.4)",
        "Between('loss', low=0.5)",
        "SuperLoss(lam=1.0)",
        "SelfPaced(threshold=1.2)",
        "GeneralizedCrossEntropy(0.7)",
        "InverseFrequency([50, 20, 6, 1])",
        "DFT()",
    ]
)
SHAPES = st.sampled_from(
    ["{}", "({}).clip(max=1.5)", "({}).normalize()", "({}) ** 0.5", "({}) + 0.1", "({}).warmup(2)"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    factors=st.lists(FACTORS, min_size=3, max_size=3),
    shape=SHAPES,
    reduction=st.sampled_from([name for name in REDUCTIONS if name != "none"]),
    chunk_rows=st.integers(1, 30),
    items=st.sampled_from([None, 9.0]),
    softcap=st.sampled_from([None, 4.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_any_composition_of_three(factors, shape, reduction, chunk_rows, items, softcap, smoothing):
    by = eval(shape.format(" * ".join(factors)), dict(vars(weighting)))
    if not by.detached and reduction == "weighted_mean":
        by = by.detach()
    options = {"softcap": softcap, "label_smoothing": smoothing, "chunk_rows": chunk_rows}
    made = [o.train() for o in both(by, reduction, **options)]
    hidden, weight, bias, labels = case(6, 4, 3, 4)
    meta = {"bias": bias, "group": torch.arange(6) % 2, "sample_weight": torch.tensor([1.0, 2.0, 0.5, 0.0, 1.0, 1.0])}
    if items is not None and reduction != "sum":
        meta["num_items"] = items
    for step in range(2):
        agree(*(slopes(o, (hidden, weight, labels), **meta) for o in made), 1e-10)
        for objective in made:
            objective.update("step", index=step)


# use in training


def test_micro_batches_add_up_to_the_batch():
    hidden, weight, _, labels = case(6)
    by = PowerLawDecay([1000.0 / (v + 1) for v in range(11)], alpha=0.5) * TLDR()
    objective = Objective(LinearCausalLM(impl="chunked", chunk_rows=5), by)
    whole = slopes(objective, (hidden, weight, labels))
    items = (labels[:, 1:] != -100).sum()
    parts = [slopes(objective, (hidden[r], weight, labels[r]), num_items=items) for r in (slice(0, 2), slice(2, 6))]
    value = sum(v for v, _ in parts)
    agree(whole, (value, (torch.cat([g[0] for _, g in parts]), sum(g[1] for _, g in parts))), 1e-12)


def test_learned_parameters_of_a_weighting_get_their_gradient():
    """A weighting of our own with two parameters, in the middle of a product."""

    class Learned(weighting.Weighting):
        needs = frozenset({"log_pt"})
        detached = False
        scope = "local"

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.7, dtype=F64))
            self.unused = torch.nn.Parameter(torch.zeros(3, dtype=F64))

        def weigh(self, terms):
            return torch.exp(self.scale * terms.log_pt)

    dense, chunked = both(Learned() * Focal(1.0))
    inputs = case()[0], case()[1], case()[3]
    results = []
    for objective in (dense, chunked):
        objective(*inputs).backward()
        learned = objective.weighting.parts()[0]
        results.append(learned.scale.grad)
        assert learned.unused.grad is None or not learned.unused.grad.any()
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=0)
    assert results[0] != 0


def test_weights_that_come_from_the_users_own_head_get_gradient():
    """A statistic of the call with gradient: the plain way, with its gradient."""

    class Asked(weighting.Weighting):
        needs = frozenset({"opinion"})
        detached = False
        scope = "local"

        def weigh(self, terms):
            return terms.need("opinion", self).sigmoid()

    hidden, weight, _, labels = case()
    opinion = torch.randn(3, 7, dtype=F64, requires_grad=True)
    agree(*(slopes(o, (hidden, weight, labels), opinion=opinion) for o in both(Asked())), 1e-12)


def test_tied_weights_add_both_gradients():
    grads = []
    for impl in ("dense", "chunked"):
        embedding = torch.nn.Embedding(11, 5, dtype=F64)
        torch.nn.init.normal_(embedding.weight, generator=torch.Generator().manual_seed(3))
        labels = case()[3]
        hidden = embedding(labels.clamp_min(0)).tanh()
        Objective(LinearCausalLM(impl=impl, chunk_rows=4), Focal(1.0))(hidden, embedding.weight, labels).backward()
        grads.append(embedding.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=1e-14)


class Products(TorchDispatchMode):
    """Counts matrix products of the vocabulary's size."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.number = classes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.number += any(isinstance(a, torch.Tensor) and self.classes in a.shape for a in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("by", "frozen", "wanted"),
    [
        (None, (), 3),
        (PowerLawDecay([1.0] * 11) * TLDR() * Focal(2.0), (), 3),
        (InverseClassLoss(11), (), 3),
        (Focal(2.0), ("head",), 2),
        (Focal(2.0), ("hidden",), 2),
        (KLDRO(1.0), (), 4),
        (Focal(2.0).normalize(), (), 4),
    ],
    ids=str,
)
def test_number_of_matrix_products(by, frozen, wanted):
    """Per chunk, forward and backward together."""
    hidden, weight, _, labels = case(4, 8, ignored=False)
    hidden, weight = hidden.detach(), weight.detach()
    hidden.requires_grad_("hidden" not in frozen)
    weight.requires_grad_("head" not in frozen)
    objective = Objective(LinearCausalLM(impl="chunked", chunk_rows=14), by)
    with Products(11) as count:
        objective(hidden, weight, labels).backward()
    assert count.number == 2 * wanted  # 28 rows count
    assert (hidden.grad is None, weight.grad is None) == ("hidden" in frozen, "head" in frozen)


def test_selection_pays_for_what_it_keeps():
    """The two largest of ten fifths: one product over all rows, three over the kept ones."""
    hidden, weight, _, labels = case(1, 41, ignored=False)
    objective = Objective(LinearCausalLM(impl="chunked", chunk_rows=8), CVaR(0.4))
    with Products(11) as count:
        objective(hidden, weight, labels).backward()
    assert count.number == 5 + 3 * 2


def test_ignored_and_masked_rows_are_never_computed():
    hidden, weight, _, labels = case(2, 20, ignored=False)
    labels[:, 5:] = -100
    dirty = hidden.detach().clone()
    dirty[:, 4:] = math.nan
    dirty.requires_grad_()
    objective = Objective(LinearCausalLM(impl="chunked", chunk_rows=4), Focal(1.0))
    with Products(11) as count:
        value = objective(dirty, weight, labels)
        value.backward()
    assert count.number == 2 * 3  # 8 of 40 rows
    clean = slopes(objective, (hidden, weight, labels))
    torch.testing.assert_close(value, clean[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(dirty.grad, clean[1][0], rtol=1e-13, atol=1e-16)
    assert not dirty.grad[:, 4:].any()


@pytest.mark.parametrize("by", [None, Focal(1.0) * TLDR(), KLDRO(1.0), CVaR(0.4)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_where_a_device_must_not_be_asked(by, reduction, monkeypatch):
    """While a graph is recorded nobody can tell how many rows count: all are computed, and the result is the same."""
    hidden, weight, bias, labels = case()
    by = None if by is None else by.detach()
    dirty = hidden.detach().clone()
    dirty[:, :-1][labels[:, 1:] == -100] = math.nan
    meta = {"bias": bias, "group": torch.tensor([0, 1, 0])}
    dense, chunked = both(by, reduction)
    wanted = slopes(dense, (hidden, weight, labels), **meta)
    monkeypatch.setattr(linear, "unreadable", lambda _: True)
    found = slopes(chunked, (dirty.requires_grad_(), weight, labels), **meta)
    agree(wanted, found, 1e-12)


@pytest.mark.parametrize("by", [None, KLDRO(1.0)], ids=str)
def test_nothing_counts(by):
    hidden, weight, _, labels = case()
    objective = Objective(LinearCausalLM(impl="chunked", chunk_rows=4), by)
    for inputs in ((hidden, weight, torch.full_like(labels, -100)), (hidden[:0], weight, labels[:0])):
        value = objective(*inputs)
        grads = torch.autograd.grad(value, (hidden, weight))
        assert value == 0
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("by", [Focal(1.0), KLDRO(1.0)], ids=str)
def test_a_second_backward_is_exact_and_a_double_one_is_refused(by):
    hidden, weight, bias, labels = case()
    objective = Objective(LinearCausalLM(impl="chunked", chunk_rows=4), by)
    value = objective(hidden, weight, labels, bias=bias)
    first = [g.clone() for g in torch.autograd.grad(value, (hidden, weight, bias), retain_graph=True)]
    for factor in (1.0, -2.0):
        again = torch.autograd.grad(value, (hidden, weight, bias), torch.tensor(factor, dtype=F64), retain_graph=True)
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(b, factor * a, rtol=1e-12, atol=1e-15)
    with pytest.raises(RuntimeError, match='impl="dense"'):
        torch.autograd.grad(objective(hidden, weight, labels), hidden, create_graph=True)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, hidden)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("by", [Focal(1.0), KLDRO(1.0)], ids=str)
def test_gradient_checkpointing(by, reentrant):
    hidden, weight, _, labels = case()
    objective = Objective(LinearCausalLM(impl="chunked", chunk_rows=4), by)
    expected = slopes(objective, (hidden, weight, labels))
    run = lambda h, w: objective(h.tanh(), w, labels)  # noqa: E731
    wanted = torch.autograd.grad(run(hidden, weight), (hidden, weight))
    value = torch.utils.checkpoint.checkpoint(run, hidden, weight, use_reentrant=reentrant)
    value.backward()
    torch.testing.assert_close(hidden.grad, wanted[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(weight.grad, wanted[1], rtol=1e-12, atol=1e-15)
    assert expected[0] != value


# precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", [None, Focal(2.0), CVaR(0.4)], ids=str)
def test_half_precision_is_as_near_as_plain_torch(dtype, by):
    """Softmax and the sum of the head's gradient in float32: no worse than logits in that dtype, upcast."""
    hidden, weight, bias, labels = case(4, 40, 64, 300, seed=1)
    truth = slopes(Objective(LinearCausalLM(impl="dense"), by), (hidden, weight, labels), bias=bias)
    low = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    logits = functional.linear(low[0], low[1], low[2])
    plain = Objective(CausalLM(), by)(logits, labels)
    naive = plain, torch.autograd.grad(plain, low)
    chunked = Objective(LinearCausalLM(impl="chunked", chunk_rows=16), by)
    found = slopes(chunked, (low[0], low[1], labels), bias=low[2])
    assert found[0].dtype == torch.float32
    assert [g.dtype for g in found[1]] == [dtype] * 3
    error = lambda got: [(a - b).abs().max() / b.abs().max() for a, b in zip((got[0], *got[1]), (truth[0], *truth[1]))]  # noqa: B905, E731
    for mine, theirs in zip(error(found), error(naive), strict=True):
        assert mine < 1.5 * theirs + 2 * torch.finfo(dtype).eps


def test_mixed_dtypes_are_promoted_and_autocast_is_obeyed():
    hidden, weight, _, labels = case(4, 10, 16, 50, dtype=torch.float32)
    objective = Objective(LinearCausalLM(impl="chunked", chunk_rows=7), Focal(1.0))
    wanted = slopes(objective, (hidden.bfloat16().float(), weight, labels))[0]
    found = objective(hidden.bfloat16(), weight, labels)
    torch.testing.assert_close(found, wanted)
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    expected = slopes(objective, (*low, labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = objective(hidden, weight, labels)
    grads = torch.autograd.grad(value, (hidden, weight))
    assert [g.dtype for g in grads] == [torch.float32] * 2
    agree((expected[0], [g.float() for g in expected[1]]), (value, grads), 1e-6)


def test_loss_scaling_goes_through():
    hidden, weight, _, labels = case(dtype=torch.float32)
    objective = Objective(LinearCausalLM(impl="chunked", chunk_rows=7), Focal(1.0))
    plain = slopes(objective, (hidden, weight, labels))
    (65536.0 * objective(hidden, weight, labels)).backward()
    torch.testing.assert_close(hidden.grad / 65536.0, plain[1][0])
    torch.testing.assert_close(weight.grad / 65536.0, plain[1][1])


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("by", [None, Focal(0.5), Focal(2.0), KLDRO(1.0)], ids=str)
def test_saturated_rows(scale, by):
    """Probabilities of 0 and 1: finite, and what float64 says."""
    hidden, weight, _, labels = case(dtype=torch.float32, ignored=False)
    large = (scale * hidden.detach()).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (large, weight)]
    dense, chunked = both(by)
    wanted, found = slopes(dense, (*exact, labels)), slopes(chunked, (large, weight, labels))
    for a, b in zip((wanted[0], *wanted[1]), (found[0], *found[1]), strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(b.double(), a, rtol=0, atol=2e-4 * a.abs().max().item())


def test_vocabulary_entries_that_are_shut_off():
    """A bias of minus infinity (masked vocabulary): such entries have probability and gradient 0."""
    hidden, weight, bias, labels = case(ignored=False)
    labels = labels.clamp_max(8)
    shut = bias.detach().clone()
    shut[9:] = -math.inf
    open_ = Objective(LinearCausalLM(impl="chunked", chunk_rows=4), Focal(1.0))
    wanted = slopes(open_, (hidden, weight[:9], labels), bias=bias[:9])
    found = slopes(open_, (hidden, weight, labels), bias=shut.requires_grad_())
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1][0], wanted[1][0], rtol=1e-11, atol=1e-14)
    assert not found[1][1][9:].any()


# memory


@pytest.mark.parametrize("by", [None, Focal(2.0) * TLDR(), KLDRO(1.0)], ids=str)
def test_memory_is_a_chunk_beside_the_gradients(by):
    """Doubling the rows adds hidden gradients and a few numbers per row, and no logits."""
    width, classes, rows = 16, 4000, 32
    found = {}
    for number in (256, 512):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(number, width, generator=generator, requires_grad=True)
        weight = torch.randn(classes, width, generator=generator, requires_grad=True)
        target = torch.randint(classes, (number,), generator=generator)
        objective = Objective(LinearCrossEntropy(impl="chunked", chunk_rows=rows), by)
        found[number] = peak(lambda o=objective, i=(hidden, weight, target): o(*i).backward())
    gradients = 4 * classes * width
    chunk = 4 * rows * classes
    assert found[256] < 1.1 * chunk + gradients + 4 * 256 * (2 * width + 60) + 2**16
    assert found[512] - found[256] < 4 * 256 * (2 * width + 60)
    assert chunk < 4 * 256 * classes / 4


def test_the_default_chunk_fits_its_budget():
    for classes, dtype in ((32000, torch.float32), (128256, torch.bfloat16), (1000, F64)):
        spec = linear.Spec()
        problem = linear.Linear(
            torch.empty(9000, 8, dtype=dtype), torch.empty(classes, 8, dtype=dtype), None, torch.zeros(9000), None, spec
        )
        rows = linear.chunk_rows(problem)
        size = max(4, torch.empty((), dtype=dtype).element_size())
        assert 0.5 * linear.BUDGET["cpu"] < rows * classes * size <= linear.BUDGET["cpu"]


def test_evaluation_makes_no_gradient_and_small_batches_go_the_plain_way():
    hidden, weight, _, labels = case(4, 8, ignored=False)
    objective = Objective(LinearCausalLM(impl="chunked", chunk_rows=14), Focal(1.0))
    with torch.no_grad(), Products(11) as count:
        value = objective(hidden, weight, labels)
    assert count.number == 2
    torch.testing.assert_close(value, objective(hidden, weight, labels).detach(), rtol=1e-14, atol=0)
    assert LinearCausalLM()._in_parts(hidden, weight, labels) is False
    many = torch.empty(40000, 40, 1), torch.empty(32000, 1), torch.empty(40000, 40)
    assert LinearCausalLM()._in_parts(*many) is True


# who looks on


def test_what_is_observed_is_observed_once_and_watchers_see_whole_batches():
    seen = []
    dense, chunked = (o.train() for o in both(InverseClassLoss(11)))
    for objective in (dense, chunked):
        objective.watch(lambda _, terms, weights: seen.append((terms, weights)))
        objective(*[case()[i] for i in (0, 1, 3)])
    (one, first), (other, second) = seen
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(second, first, rtol=1e-13, atol=1e-15)
    for objective in (dense, chunked):
        objective.update("step", index=0)
    for a, b in zip(dense.state_dict().values(), chunked.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_parts_weights_and_components():
    hidden, weight, bias, labels = case()
    dense, chunked = both(Focal(1.0) * TLDR())
    for ask in ("parts", "weights", "components"):
        for a, b in zip(*(getattr(o, ask)(hidden, weight, labels, bias=bias) for o in (dense, chunked)), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)


def test_hyper_parameters_on_a_schedule():
    dense, chunked = (o.train() for o in both(Focal(Linear(0.0, 2.0, duration=3, by="step")), label_smoothing=0.1))
    inputs = [case()[i] for i in (0, 1, 3)]
    values = []
    for step in range(4):
        agree(slopes(dense, inputs), slopes(chunked, inputs), 1e-12)
        values.append(chunked(*inputs).item())
        for objective in (dense, chunked):
            objective.update("step", index=step)
    assert len(set(values)) == 4


def test_compiled_and_transformed_calls_take_the_plain_way():
    hidden, weight, _, labels = case(2, 4)
    objective = Objective(LinearCausalLM(impl="chunked", chunk_rows=4), Focal(1.0))
    expected = slopes(objective, (hidden, weight, labels))
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    value = compiled(hidden, weight, labels)
    agree(expected, (value, torch.autograd.grad(value, (hidden, weight))), 1e-12)
    torch._dynamo.reset()
    grad = torch.func.grad(lambda h: objective(h, weight.detach(), labels))(hidden.detach())
    torch.testing.assert_close(grad, expected[1][0], rtol=1e-11, atol=1e-14)


def test_torchs_own_operation_behind_the_same_name():
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("torch < 2.13")
    inputs = [case(dtype=torch.float32)[i] for i in (0, 1, 3)]
    for by in (None, Focal(2.0), KLDRO(1.0)):
        dense = Objective(LinearCausalLM(impl="dense"), by)
        agree(slopes(dense, inputs), slopes(Objective(LinearCausalLM(impl="torch"), by), inputs), 1e-5)
    for name, options in {
        "softcap": {"softcap": 3.0},
        "z_loss": {"z_loss": 0.1},
        "label_smoothing": {"label_smoothing": 0.1},
    }.items():
        with pytest.raises(ValueError, match=f"impl='torch' has no {name}"):
            Objective(LinearCausalLM(impl="torch", **options))(*inputs)


PEERS = {
    "liger": ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"),
    "cut_cross_entropy": ("cut_cross_entropy", "linear_cross_entropy"),
}


def stand_in(impl):
    """A module with the peer's signature and the formula."""
    found = types.ModuleType(impl)

    class LigerFusedLinearCrossEntropyLoss:
        def __init__(self, *, reduction, softcap):
            assert reduction == "none"
            self.softcap = softcap

        def __call__(self, lin_weight, _input, target, bias=None):
            return plain(functional.linear(_input, lin_weight, bias), target, self.softcap)

    def linear_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", *, filter_eps="high"):
        assert (reduction, filter_eps) == ("none", None)
        return plain(functional.linear(e, c), targets, softcap)

    def plain(logits, target, softcap):
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return functional.cross_entropy(logits, target, reduction="none")

    found.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
    found.linear_cross_entropy = linear_cross_entropy
    return found


@pytest.mark.parametrize("impl", list(PEERS))
def test_other_libraries_operations(impl, monkeypatch):
    """With a stand-in of the same signature: what they are given, and that ignored rows never reach them."""
    module, _ = PEERS[impl]
    hidden, weight, bias, labels = case()
    meta = {"bias": bias} if impl == "liger" else {}
    monkeypatch.setitem(sys.modules, module.split(".")[0], stand_in(impl))
    monkeypatch.setitem(sys.modules, module, stand_in(impl))
    dirty = hidden.detach().clone()
    dirty[:, :-1][labels[:, 1:] == -100] = math.nan
    for by in (None, Focal(2.0), KLDRO(1.0)):
        for softcap in (None, 4.0):
            expected = slopes(
                Objective(LinearCausalLM(impl="dense", softcap=softcap), by), (hidden, weight, labels), **meta
            )
            other = Objective(LinearCausalLM(impl=impl, softcap=softcap), by)
            agree(expected, slopes(other, (dirty.requires_grad_(), weight, labels), **meta), 1e-12)
    with pytest.raises(ValueError, match=f"impl='{impl}' has no label_smoothing"):
        Objective(LinearCausalLM(impl=impl, label_smoothing=0.1))(hidden, weight, labels)


def test_other_libraries_that_are_not_there(monkeypatch):
    hidden, weight, bias, labels = case()
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    with pytest.raises(ValueError, match="needs the package cut-cross-entropy"):
        Objective(LinearCausalLM(impl="cut_cross_entropy"))(hidden, weight, labels)
    with pytest.raises(ValueError, match="has no bias"):
        Objective(LinearCausalLM(impl="cut_cross_entropy"))(hidden, weight, labels, bias=bias)


@pytest.mark.parametrize(("impl", "module", "name"), [(impl, *where) for impl, where in PEERS.items()])
def test_other_libraries_have_the_signature_that_is_used(impl, module, name):
    """Where they are installed; their kernels need a device."""
    found = getattr(pytest.importorskip(module, exc_type=ImportError), name)
    parameters = inspect.signature(found).parameters
    assert {"reduction", "softcap"} <= set(parameters), impl


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*")
def test_compiled_chunks():
    """The passes over a chunk by torch.compile, for chunks of two sizes, with everything that a chunk may hold."""
    inputs = [case()[i] for i in (0, 1, 3)]
    for by, options in ((Focal(2.0), {}), (KLDRO(1.0), {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.1})):
        dense, compiled = (
            Objective(LinearCausalLM(impl=impl, chunk_rows=4, **options), by) for impl in ("dense", "compiled")
        )
        agree(slopes(dense, inputs), slopes(compiled, inputs), 1e-11)


def test_named_objectives_change_their_criterion():
    """The same weighting and reduction on hidden states."""
    named = TLDRLoss()
    hidden, weight, _, labels = case()
    fused = Objective(LinearCausalLM(impl="chunked", chunk_rows=4), named.weighting, named.reduction)
    torch.testing.assert_close(fused(hidden, weight, labels), named(hidden @ weight.T, labels), rtol=1e-12, atol=0)


def test_functional_twins():
    hidden, weight, bias, labels = case()
    options = {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01, "weight": [1.0] * 10 + [2.0]}
    by, meta = Focal(1.0), {"bias": bias, "sample_weight": torch.tensor([1.0, 2.0, 0.0])}
    wanted = Objective(LinearCausalLM(**options), by, "sequence_mean")(hidden, weight, labels, **meta)
    found = losses.functional.linear_causal_lm_loss(
        hidden, weight, labels, by, **options, **meta, impl="chunked", chunk_rows=4, reduction="sequence_mean"
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    flat = losses.functional.linear_cross_entropy(
        hidden.flatten(0, 1), weight, labels.flatten(), by, bias=bias, **options, impl="chunked"
    )
    unshifted = Objective(LinearCausalLM(shift=False, **options), by)(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(flat, unshifted, rtol=1e-12, atol=0)


# errors


@pytest.mark.parametrize(
    ("inputs", "more", "error", "words"),
    [
        ((torch.zeros(2, 3, 4), torch.zeros(5, 4)), {}, TypeError, r"takes \(hidden, vocab_weight, labels\), got 2"),
        ((torch.zeros(2, 3, 4), torch.zeros(5, 3), torch.zeros(2, 3).long()), {}, ValueError, "hidden must be"),
        ((torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 4).long()), {}, ValueError, "hidden must be"),
        ((torch.zeros(2, 3, 4), torch.zeros(5), torch.zeros(2, 3).long()), {}, ValueError, "vocab_weight must be"),
        ((torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3)), {}, TypeError, "labels must be integers"),
        ((torch.zeros(2, 3, 4).long(), torch.zeros(5, 4), torch.zeros(2, 3).long()), {}, TypeError, "hidden must be"),
        ((torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.full((2, 3), 5)), {}, ValueError, r"in \[0, 5\)"),
        ((torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2).long()), {}, ValueError, r"labels must be \(B, T\)"),
        (
            (torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3).long()),
            {"bias": torch.zeros(4)},
            ValueError,
            r"bias must be \(5,\)",
        ),
    ],
)
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_errors_name_what_is_wrong(inputs, more, error, words, impl):
    with pytest.raises(error, match=words):
        Objective(LinearCausalLM(impl=impl))(*inputs, **more)


@pytest.mark.parametrize(
    "options", [{"softcap": 0.0}, {"softcap": -1.0}, {"z_loss": -0.1}, {"impl": "fast"}, {"chunk_rows": 0}]
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LinearCausalLM(**options)
