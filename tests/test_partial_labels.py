"""ALIM: beliefs over candidate labels, against loops over samples and its limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references.alim import loss as naive_loss
from references.alim import moved, pseudo_target, ratio, term
from torch.nn.functional import cross_entropy

from reweigh import ALIMLoss, Focal, Linear, Objective, PartialLabelCrossEntropy, Piecewise
from reweigh.losses import functional
from reweigh.losses.conformance import check_criterion, check_objective


def batch(seed=0, size=6, classes=4, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    candidates = torch.rand(size, classes, generator=generator) < 0.4
    candidates = candidates.scatter(1, torch.randint(classes, (size, 1), generator=generator), True)
    return logits.requires_grad_(), candidates


def same(found, wanted, tol=1e-10):
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=found.dtype), rtol=tol, atol=tol)


def beliefs_of(loss):
    return loss.criterion.table.rows[:, :-1].double()


@given(st.integers(0, 10**6), st.floats(0.0, 1.0), st.sampled_from(["onehot", "scale"]), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_first_visit(seed, mixing, pseudo, ema):
    logits, candidates = batch(seed)
    loss = ALIMLoss(6, 4, mixing=mixing, pseudo=pseudo, ema=ema)
    found = loss(logits, candidates, index=torch.arange(6))
    given_ = {"mixing": mixing, "pseudo": pseudo, "ema": ema}
    wanted = naive_loss(logits.tolist(), candidates.long().tolist(), num_samples=6, num_classes=4, **given_)
    same(found, wanted)
    (grad,) = torch.autograd.grad(found, logits)
    belief = functional.partial_label_beliefs(logits, candidates, torch.zeros_like(logits), **given_)
    assert not belief.requires_grad
    same(grad, (logits.softmax(1) - belief).detach() / 6)  # beliefs are constants
    same(functional.alim_loss(logits, candidates, torch.zeros_like(logits), **given_), wanted)


def test_trust_in_the_set_never_leaves_it():
    """mixing 0: all belief stays within the candidates, and one candidate is an ordinary label."""
    logits, candidates = batch()
    loss = ALIMLoss(6, 4, ema=0.5)
    single = torch.nn.functional.one_hot(candidates.long().argmax(1), 4)
    alone = ALIMLoss(6, 4, ema=0.5)
    for step in range(4):
        loss(logits * (step - 1.5), candidates, index=torch.arange(6))
        loss.update("step", index=step)
        assert (beliefs_of(loss)[~candidates] == 0).all()
        same(alone(logits, single, index=torch.arange(6)), cross_entropy(logits, single.argmax(1)).item())
        alone.update("step", index=step)


@pytest.mark.parametrize("pseudo", ["onehot", "scale"])
def test_trust_in_the_model_ignores_the_set(pseudo):
    """mixing 1: after the first visit's uniform start is forgotten, the target is the prediction."""
    logits, candidates = batch()
    belief = PartialLabelCrossEntropy(6, 4, mixing=1.0, ema=0.0, pseudo=pseudo)
    found = belief.terms(logits, candidates, index=torch.arange(6)).find("belief")
    p = logits.softmax(1)
    same(found, (p if pseudo == "scale" else torch.nn.functional.one_hot(p.argmax(1), 4)).detach())


def test_tables_of_many_visits():
    """Steps of micro-batches with copies, counted, masked and empty rows, against a loop."""
    ema, mixing = 0.7, 0.4
    loss = ALIMLoss(9, 4, ema=Linear(ema, 0.3, duration=4, by="step"), mixing=mixing, pseudo="scale")
    held = {}
    for step in range(4):
        keep = ema + (0.3 - ema) * step / 4
        visits = {}
        for micro in range(2):
            logits, candidates = batch(10 * step + micro)
            candidates = batch(99)[1]
            candidates[2] = candidates[1]
            index = torch.tensor([1, 4, 4, 7, 8, -3])
            candidates[4] = False  # nothing is known of it
            mask = torch.tensor([True, True, True, True, True, False])
            times = torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0, 1.0])
            found = loss(logits, candidates, index=index, mask=mask, sample_weight=times)
            loss.eval()(logits, candidates)
            loss.train().weights(logits, candidates, index=index.clamp_min(0))
            wanted = weight = 0.0
            for place, copies in ((0, 1), (1, 3), (2, 1)):
                sample, row, members = int(index[place]), logits[place].tolist(), candidates[place].long().tolist()
                start = held.get(sample, [member / sum(members) for member in members])
                belief = moved(start, row, members, mixing, "scale", keep)
                visits.setdefault(sample, []).extend([belief] * copies)
                wanted, weight = wanted + copies * term(belief, row), weight + copies
            same(found, wanted / weight, 1e-6)
        loss.update("step", index=step)
        held |= {sample: torch.tensor(rows).double().mean(0).tolist() for sample, rows in visits.items()}
    found = beliefs_of(loss)
    for sample in range(9):
        same(found[sample], held.get(sample, [0.0] * 4), 1e-6)


@pytest.mark.parametrize("noise_rate", [0.0, 0.29, 0.5, 0.99])
def test_mixing_is_the_quantile_of_margins(noise_rate):
    """Of the samples seen, at the end of an epoch, from ``start`` on, at most 1; the number is saved."""
    loss = ALIMLoss(40, 4, noise_rate=noise_rate, start=1, ema=0.5)
    logits, candidates = batch(3, size=20, scale=0.7)
    index = torch.arange(20) + 5
    margins = sorted(ratio(*row) for row in zip(logits.tolist(), candidates.long().tolist(), strict=True))
    wanted = margins[int(20 * noise_rate)]
    for epoch in range(3):
        assert float(loss.criterion.current_mixing()) == (0.0 if epoch < 2 else pytest.approx(wanted, rel=1e-6))
        loss(logits, candidates, index=index)
        loss.update("step", index=epoch)
        loss.update("epoch", index=epoch)
    clone = ALIMLoss(40, 4, noise_rate=noise_rate, start=1, ema=0.5)
    clone.load_state_dict(loss.state_dict())
    assert clone.criterion.current_mixing() == loss.criterion.current_mixing()
    loss.criterion.reset()
    assert float(loss.criterion.current_mixing()) == 0.0


def test_the_quantile_overrules_that_share_of_the_sets():
    """What the margin means: at the quantile's mixing as many one-hot targets leave their set as the noise says."""
    logits, candidates = batch(3, size=40, scale=1.5)
    candidates[candidates.all(1), 0] = False
    loss = ALIMLoss(40, 4, noise_rate=0.25)
    loss(logits, candidates, index=torch.arange(40))
    loss.update("step")
    loss.update("epoch")
    mixing = float(loss.criterion.current_mixing())
    assert 0.0 < mixing < 1.0
    left = 0
    for row, members in zip(logits.softmax(1).tolist(), candidates.long().tolist(), strict=True):
        left += not members[pseudo_target(row, members, mixing * (1 + 1e-6), "onehot").index(1.0)]
    assert left == 11  # ten below the quantile, and the one at it


def test_votes_of_another_head_decide():
    logits, candidates = batch()
    votes = batch(8)[0]
    criterion = PartialLabelCrossEntropy(6, 4, ema=0.3, mixing=0.5, pseudo="scale")
    terms = criterion.terms(logits, candidates, index=torch.arange(6), votes=votes)
    belief = functional.partial_label_beliefs(votes, candidates, torch.zeros(6, 4), ema=0.3, mixing=0.5, pseudo="scale")
    same(terms.find("belief"), belief)
    same(terms.loss.detach(), -(belief * logits.log_softmax(1)).sum(1).detach())
    assert torch.autograd.grad(terms.loss.sum(), votes, allow_unused=True) == (None,)


def test_a_first_epoch_without_moves():
    """The authors' first epoch: ema 1 until it has ended."""
    logits, candidates = batch()
    loss = ALIMLoss(6, 4, ema=Piecewise([1.0, 0.5], [1]))
    loss(logits, candidates, index=torch.arange(6))
    loss.update("step")
    uniform = candidates / candidates.sum(1, keepdim=True)
    same(beliefs_of(loss), uniform, 1e-6)
    loss.update("epoch")
    loss(logits, candidates, index=torch.arange(6))
    loss.update("step")
    assert (beliefs_of(loss) - uniform).abs().max() > 0.1


@pytest.mark.parametrize("pseudo", ["onehot", "scale"])
@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_extremes_are_finite(dtype, mixing, pseudo):
    """Also where all candidates have probability 0 in the dtype."""
    logits = torch.tensor([[1e4, -1e4, -1e4], [0.0, 0.0, 0.0], [1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    candidates = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    loss = ALIMLoss(3, 3, mixing=mixing, pseudo=pseudo, ema=0.5, noise_rate=0.3)
    for step in range(3):
        value = loss(logits, candidates, index=torch.arange(3))
        assert value.isfinite()
        assert torch.autograd.grad(value, logits)[0].isfinite().all()
        loss.update("step", index=step)
        loss.update("epoch", index=step)
        same(beliefs_of(loss).sum(1), torch.ones(3), 1e-6)


def test_what_is_not_finite_is_not_learned():
    logits, candidates = batch()
    loss = ALIMLoss(6, 4)
    loss(torch.cat([logits[:1] * torch.nan, logits[1:]]), candidates, index=torch.arange(6))
    loss.update("step")
    assert (beliefs_of(loss)[0] == 0).all()
    assert (beliefs_of(loss)[1:].sum(1) > 0.99).all()


def test_it_finds_labels_that_are_missing_from_their_sets():
    """Blobs whose sets miss the true label in three of ten samples: within the sets none of those can be right."""
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(200) % 4
    x = torch.nn.functional.one_hot(true, 4).float() * 2.5 + torch.randn(200, 4, generator=generator) * 0.7
    candidates = (torch.rand(200, 4, generator=generator) < 0.3).long().scatter(1, true[:, None], 1)
    lost = torch.rand(200, generator=generator) < 0.3
    candidates[lost] = candidates[lost].scatter(1, true[lost][:, None], 0).scatter(1, (true[lost][:, None] + 1) % 4, 1)
    found = {}
    for name, given_ in {"set": {}, "quantile": {"noise_rate": 0.3, "start": 5}}.items():
        model = torch.nn.Linear(4, 4)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        loss = ALIMLoss(200, 4, ema=0.8, **given_)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for epoch in range(40):
            optimizer.zero_grad()
            loss(model(x), candidates, index=torch.arange(200)).backward()
            optimizer.step()
            loss.update("step", index=epoch)
            loss.update("epoch", index=epoch)
        found[name] = (beliefs_of(loss).argmax(1) == true)[lost].double().mean().item()
    assert found["set"] == 0.0
    assert found["quantile"] > 0.5


def test_weightings_compose():
    criterion = PartialLabelCrossEntropy(8, 4, mixing=0.2)
    check_criterion(criterion)
    check_objective(Objective(criterion, Focal(1.0).detach()), compiled=False)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ALIMLoss(3, 1), "num_classes must be >= 2"),
        (lambda: ALIMLoss(3, 2, mixing=1.5), "mixing must be finite and >= 0 and <= 1"),
        (lambda: ALIMLoss(3, 2, noise_rate=1.0), "noise_rate must be finite and >= 0 and < 1"),
        (lambda: ALIMLoss(3, 2, start=-1), "start must be >= 0"),
        (lambda: ALIMLoss(3, 2, pseudo="soft"), "pseudo must be one of 'onehot', 'scale'"),
        (lambda: ALIMLoss(3, 2, ema=Linear(0.5, 1.5, duration=2)), "ema must be finite and >= 0 and <= 1"),
        (lambda: ALIMLoss(3, 2)(torch.zeros(2, 3), torch.ones(2, 3)), r"logits must have shape \(N, 2\)"),
        (lambda: ALIMLoss(3, 2)(torch.zeros(2, 2), torch.ones(2)), r"candidates must have the logits' shape \(2, 2\)"),
        (lambda: ALIMLoss(3, 2)(torch.zeros(2, 2), torch.full((2, 2), 0.5)), "candidates must be 0 or 1, or bool"),
        (lambda: ALIMLoss(3, 2)(torch.zeros(2, 2), torch.ones(2, 2)), "'index' is missing; pass index="),
        (
            lambda: ALIMLoss(3, 2)(torch.zeros(2, 2), torch.ones(2, 2), index=torch.tensor([3, 0])),
            r"PartialLabelCrossEntropy: index must be in \[0, 3\)",
        ),
        (
            lambda: ALIMLoss(3, 2)(torch.zeros(2, 2), torch.ones(2, 2), index=torch.arange(2), votes=torch.zeros(2)),
            r"PartialLabelCrossEntropy: votes must have shape \(2, 2\)",
        ),
        (
            lambda: functional.partial_label_beliefs(torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2)),
            "logits, candidates and beliefs must be",
        ),
    ],
)
def test_values_that_do_not_fit(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ALIMLoss(3, 2)(torch.zeros(2, 2)), r"takes \(logits, candidates\), got 1 inputs"),
        (lambda: ALIMLoss(3, 2)(torch.zeros(2, 2), [[1, 0]]), "candidates must be a real tensor, got list"),
        (lambda: ALIMLoss(3, 2)(torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2)), "logits must be a floating"),
        (lambda: functional.alim_loss(torch.zeros(2, 2), torch.ones(2, 2), 1.0), "beliefs must be a real tensor"),
    ],
)
def test_kinds_that_do_not_fit(make, match):
    with pytest.raises(TypeError, match=match):
        make()
