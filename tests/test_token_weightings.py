"""Weights of tokens: identities, other libraries' numbers, the helpers that make statistics, and errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reweigh.losses import CausalLM, CrossEntropy, LinearCausalLM, Objective
from reweigh.weighting import (
    EntropyAdaptive,
    FrequencyAware,
    Given,
    InverseDocumentFrequency,
    Linear,
    MiLe,
    PositionWeight,
    ReferenceExcess,
    Spans,
    TokenMask,
    attention_importance,
    prompt_spans,
)

F64 = torch.float64


def case(classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(3, 8, classes, generator=generator, dtype=F64)
    labels = torch.randint(classes, (3, 8), generator=generator)
    labels[0, 3:5] = -100
    return logits, labels


# a reference model


def test_all_kept_is_cross_entropy_and_no_reference_is_top_k():
    logits, labels = case()
    meta = {"reference_loss": torch.rand(3, 8, dtype=F64)}
    plain = Objective(CausalLM())(logits, labels)
    assert Objective(CausalLM(), ReferenceExcess(1.0))(logits, labels, **meta) == plain
    objective = Objective(CausalLM(), ReferenceExcess(0.3), "weighted_mean")
    losses = Objective(CausalLM(), None, "none")(logits, labels)
    valid = losses[losses != 0]
    k = round(0.3 * len(valid), 10)
    top = valid.sort(descending=True).values
    wanted = (top[: int(k)].sum() + (k - int(k)) * top[int(k)]) / k
    found = objective(logits, labels, reference_loss=torch.zeros(3, 8, dtype=F64))
    torch.testing.assert_close(found, wanted)


def test_the_soft_form_goes_from_equal_weights_to_the_largest_excess():
    logits, labels = case()
    meta = {"reference_loss": torch.rand(3, 8, dtype=F64)}
    flat = Objective(CausalLM(), ReferenceExcess(None, temperature=1e9)).weights(logits, labels, **meta)
    torch.testing.assert_close(flat[flat > 0], torch.ones_like(flat[flat > 0]), rtol=1e-8, atol=0)
    sharp = Objective(CausalLM(), ReferenceExcess(None, temperature=1e-3)).weights(logits, labels, **meta)
    excess = Objective(CausalLM(), None, "none")(logits, labels) - meta["reference_loss"]
    excess[flat == 0] = -math.inf
    assert sharp.argmax() == excess.argmax()
    assert sharp.max() == pytest.approx(float((flat > 0).sum()))


def test_ignored_tokens_are_never_kept():
    logits, labels = case()
    reference = torch.zeros(3, 8, dtype=F64)
    reference[0, 3:5] = math.nan
    weights = Objective(CausalLM(), ReferenceExcess(0.9)).weights(logits, labels, reference_loss=reference)
    assert weights.isfinite().all()
    assert not weights[0, 3:5].any()
    assert not weights[:, 0].any()


# entropy


@pytest.mark.parametrize("classes", [6, 40])
def test_entropies_are_those_of_torchs_distributions(classes):
    logits, labels = case(classes)
    shifted = logits[:, :-1]
    whole = torch.distributions.Categorical(logits=shifted).entropy()
    top = torch.distributions.Categorical(logits=shifted.topk(min(20, classes), -1).values).entropy()
    valid = labels[:, 1:] != -100
    found = Objective(CausalLM(), EntropyAdaptive(1.5)).weights(logits, labels)[:, 1:]
    torch.testing.assert_close(found[valid], (top[valid] / 3.0) ** 1.5)
    found = Objective(CausalLM(), MiLe(2.0)).weights(logits, labels)[:, 1:]
    raised = (1.0 + whole[valid]) ** 2.0
    torch.testing.assert_close(found[valid], raised / raised.mean())
    assert not found[~valid].any()


@pytest.mark.parametrize("by", [EntropyAdaptive(), MiLe(), MiLe(1.0) * EntropyAdaptive(0.5)], ids=str)
@pytest.mark.parametrize("classes", [6, 40])
def test_entropies_of_chunks_and_of_sure_rows(by, classes):
    """From hidden states, too; and a row of probability 1 has entropy 0."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 8, 5, generator=generator, dtype=F64), torch.randn(classes, 5, dtype=F64)
    hidden[1] *= 1e4
    labels = case(classes)[1]
    wanted = Objective(CausalLM(), by)(hidden @ weight.T, labels)
    found = Objective(LinearCausalLM(impl="chunked", chunk_rows=5), by)(hidden, weight, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    assert wanted.isfinite()


@pytest.mark.parametrize("classes", [6, 40])
def test_the_largest_entropy_weighs_one(classes):
    by = Objective(CausalLM(shift=False), EntropyAdaptive(2.0, scale=None))
    weights = by.weights(torch.zeros(1, 2, classes, dtype=F64), torch.zeros(1, 2).long())
    torch.testing.assert_close(weights, torch.ones(1, 2, dtype=F64))
    logits, labels = case(classes)
    logits = logits.requires_grad_()
    top = torch.distributions.Categorical(logits=logits.topk(min(20, classes), -1).values).entropy()
    found = by.weights(logits, labels)
    wanted = (top.detach() / math.log(min(20, classes))) ** 2
    torch.testing.assert_close(found, wanted.masked_fill(labels == -100, 0.0))
    assert not found.requires_grad


def test_the_largest_entropy_needs_classes():
    from reweigh.losses import FromLoss

    by = Objective(FromLoss(torch.nn.L1Loss(reduction="none")), EntropyAdaptive(scale=None))
    with pytest.raises(ValueError, match="scale must be a number where the criterion has no classes"):
        by(torch.zeros(2), torch.ones(2), top_entropy=torch.ones(2))


def test_weights_by_hand():
    """Two tokens, one of entropy 0 and one of ln 4; three of four classes seen."""
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [999.0, 0.0, 0.0, 0.0]]], dtype=F64)
    labels = torch.tensor([[0, 1]])
    raised = [(1.0 + math.log(4.0)) ** 2, 1.0]
    found = Objective(CausalLM(shift=False), MiLe(2.0)).weights(logits, labels)
    assert found.tolist() == [pytest.approx([2.0 * r / sum(raised) for r in raised])]
    found = Objective(CausalLM(shift=False), EntropyAdaptive()).weights(logits, labels)
    assert found.tolist() == [pytest.approx([math.log(4.0) / 3.0, 0.0])]
    assert FrequencyAware([8, 4, 2, 0]).table().tolist() == pytest.approx([0.0, 1.2, 1.8, 2.4])


@pytest.mark.parametrize(
    "by", [ReferenceExcess(1.0), EntropyAdaptive(0.0), EntropyAdaptive(0.0, scale=None), MiLe(0.0)]
)
def test_neutral_ones_are_cross_entropy(by):
    logits, labels = case(40)
    found = Objective(CausalLM(), by)(logits, labels, reference_loss=torch.rand(3, 8, dtype=F64))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("by", "name"),
    [
        (Spans([0.5, 2.0]), "span"),
        (Given(), "token_weight"),
        (ReferenceExcess(0.5), "reference_loss"),
        (ReferenceExcess(None, temperature=0.5), "reference_loss"),
        (TokenMask(l1=0.1), "token_score"),
        (TokenMask("sigmoid", l1=0.1), "token_score"),
    ],
    ids=lambda by: by if isinstance(by, str) else repr(by),
)
def test_what_stands_at_ignored_tokens_changes_nothing(by, name):
    logits, labels = case()
    values = (torch.rand(3, 8, dtype=F64) * 2).long() if name == "span" else torch.rand(3, 8, dtype=F64)
    objective = Objective(CausalLM(), by)
    found = []
    for garbage in (-100, 10**6) if name == "span" else (math.nan, math.inf, -1e9):
        placed = values.masked_fill(labels == -100, garbage)
        if placed.is_floating_point():
            placed.requires_grad_()
        value = objective(logits, labels, **{name: placed})
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value, placed)
            assert slope.isfinite().all()
            assert not slope[labels == -100].any()
        found.append(value.detach())
    torch.testing.assert_close(torch.stack(found), objective(logits, labels, **{name: values}).expand(len(found)))


def test_a_statistic_of_the_call_comes_before_the_criterions():
    logits, labels = case()
    flat = logits.flatten(0, 1), labels.flatten()
    given_entropy = torch.full((24,), 3.0, dtype=F64)
    weights = Objective(CrossEntropy(), EntropyAdaptive()).weights(*flat, top_entropy=given_entropy)
    assert torch.equal(weights, (flat[1] != -100).double())


# frequency


def test_inverse_document_frequency_is_scikit_learns():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    counts = torch.randint(2, (30, 12), generator=torch.Generator().manual_seed(0))
    wanted = text.TfidfTransformer(smooth_idf=True).fit(counts.numpy()).idf_
    found = InverseDocumentFrequency(counts.sum(0), 30, normalize="none").table()
    torch.testing.assert_close(found, torch.from_numpy(wanted))


@given(st.lists(st.integers(0, 50), min_size=2, max_size=9).filter(lambda n: len({v for v in n if v}) > 1))
def test_frequency_aware_weights(counts):
    table = FrequencyAware(counts).table()
    seen = torch.tensor(counts) > 0
    assert table[torch.tensor(counts).argmax()] == 0
    assert table[seen].mean().item() == pytest.approx(1.0)
    order = torch.tensor(counts).argsort()
    assert (table[order].diff() <= 1e-12).all()


def test_counts_by_the_fit_event_and_padding_of_the_vocabulary():
    by = FrequencyAware(num_classes=4)
    objective = Objective(CrossEntropy(), by)
    objective.update("fit", class_counts=[4.0, 1.0])
    assert by.table().tolist() == pytest.approx(FrequencyAware([4, 1, 0, 0]).table().tolist())


# places


def test_spans_and_their_names():
    logits, labels = case()
    span = prompt_spans(torch.tensor([3, 0, 8]), 8)
    weights = Spans({"prompt": 0.25, "response": 2.0})
    assert weights.names() == ("prompt", "response")
    found = Objective(CausalLM(shift=False), weights).weights(logits, labels, span=span)
    wanted = torch.where(span == 0, 0.25, 2.0).double().masked_fill(labels == -100, 0.0)
    assert torch.equal(found, wanted)
    assert torch.equal(span, (torch.arange(8) >= torch.tensor([[3], [0], [8]])).long())


def test_a_span_may_be_on_a_schedule():
    weights = Spans({"prompt": Linear(1.0, 0.0, duration=2, by="step"), "response": 1.0})
    objective = Objective(CrossEntropy(), weights).train()
    meta = {"span": torch.tensor([0, 1])}
    found = []
    for step in range(3):
        found.append(objective.weights(torch.zeros(2, 4), torch.tensor([0, 1]), **meta).tolist())
        objective.update("step", index=step)
    assert found == [[1.0, 1.0], [0.5, 1.0], [0.0, 1.0]]


def test_weights_of_codebooks():
    """Of (B, K, T, codes) logits; in chunks of hidden states, where rows no longer show their place, as well."""
    by = PositionWeight([1.0, 0.5, 0.25])
    target = torch.randint(7, (2, 5, 3), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(2), dtype=F64, requires_grad=True)
    from reweigh.losses import LinearCrossEntropy

    found = Objective(LinearCrossEntropy(impl="chunked", chunk_rows=4), by)(hidden, weight, target)
    logits = (hidden @ weight.T).movedim(-1, 1)
    per = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    wanted = (per * torch.tensor([1.0, 0.5, 0.25], dtype=F64)).mean()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(Objective(CrossEntropy(), by)(logits, target), wanted)
    with pytest.raises(ValueError, match=r"terms must be \(\.\.\., 3\)"):
        Objective(LinearCrossEntropy(impl="chunked"), by)(hidden[:, :, :2], weight, target[:, :, :2])
    with pytest.raises(ValueError, match=r"terms must be \(\.\.\., 3\)"):
        Objective(LinearCrossEntropy(impl="chunked"), by)(hidden[0, 0], weight, target[0, 0])


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_the_price_of_a_mask_reaches_the_users_head(impl):
    """Gradient of mean(w l + l1 w) in score and hidden states, by plain torch."""
    hidden = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=F64)
    score = torch.randn(3, 8, generator=torch.Generator().manual_seed(3), dtype=F64, requires_grad=True)
    labels = case()[1]
    found = Objective(LinearCausalLM(impl=impl, chunk_rows=4), TokenMask(l1=0.2))(
        hidden, weight, labels, token_score=score
    )
    logits = (hidden @ weight.T)[:, :-1].movedim(-1, 1)
    per = torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="none")
    valid = labels[:, 1:] != -100
    wanted = ((per + 0.2) * score[:, 1:].relu())[valid].mean()
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(value, (hidden, score)) for value in (found, wanted)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_importance_from_attention_by_loops():
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    attention = torch.randn(2, 3, 5, 5, generator=generator, dtype=F64)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    attention = attention.masked_fill(~(causal & mask[:, None, None, :]), -math.inf).softmax(-1)
    found = attention_importance(attention, 1.0, 3.0, mask=mask)
    for b, size in enumerate((5, 3)):
        share = [
            sum(attention[b, h, i, j].item() for h in range(3) for i in range(size)) / 3 / (size - j)
            for j in range(size)
        ]
        wanted = [1.0 + 2.0 * (s - min(share)) / (max(share) - min(share)) for s in share]
        assert found[b, :size].tolist() == pytest.approx(wanted)
        assert not found[b, size:].any()
    assert torch.equal(attention_importance(torch.full((1, 1, 1, 1), 1.0)), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ReferenceExcess(0.5, temperature=1.0), ValueError, "exactly one of keep and temperature"),
        (lambda: ReferenceExcess(None), ValueError, "exactly one of keep and temperature"),
        (lambda: ReferenceExcess(0.0), ValueError, "keep"),
        (lambda: EntropyAdaptive(-1.0), ValueError, "alpha"),
        (lambda: EntropyAdaptive(scale=0.0), ValueError, "scale"),
        (lambda: MiLe(-1.0), ValueError, "gamma"),
        (lambda: FrequencyAware([3, 3, 0]), ValueError, "tokens of different frequency"),
        (lambda: InverseDocumentFrequency([9, 1], 5), ValueError, "must be at most documents=5"),
        (lambda: InverseDocumentFrequency([9, 1], 0), ValueError, "documents"),
        (lambda: Spans([]), ValueError, "at least one kind"),
        (lambda: Spans({"prompt": -1.0}), ValueError, r"weights\['prompt'\]"),
        (lambda: PositionWeight([1.0, -1.0]), ValueError, "weights"),
        (lambda: Given("two words"), ValueError, "statistic must be an identifier"),
        (lambda: TokenMask("tanh"), ValueError, "kind"),
        (lambda: TokenMask(l1=-1.0), ValueError, "l1"),
        (lambda: prompt_spans(torch.tensor([1.0]), 3), TypeError, "must hold integers"),
        (lambda: prompt_spans(torch.tensor([-1]), 3), ValueError, r"\(B,\) or \(B, K\) numbers >= 0"),
        (lambda: attention_importance(torch.zeros(2, 3, 3)), ValueError, r"must be \(B, H, T, T\)"),
        (lambda: attention_importance(torch.zeros(1, 1, 3, 3), 2.0, 1.0), ValueError, "low <= high"),
        (
            lambda: attention_importance(torch.zeros(1, 1, 3, 3), mask=torch.ones(1, 2, dtype=torch.bool)),
            ValueError,
            "mask must be",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_errors_of_the_call():
    logits, labels = torch.zeros(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="'span' must be in"):
        Objective(CrossEntropy(), Spans([1.0, 2.0]))(logits, labels, span=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="pass reference_loss="):
        Objective(CrossEntropy(), ReferenceExcess())(logits, labels)
    for wrong in (-1.0, math.inf):
        with pytest.raises(ValueError, match="token_weight must be finite and >= 0"):
            Objective(CrossEntropy(), Given())(logits, labels, token_weight=torch.tensor([1.0, wrong]))
