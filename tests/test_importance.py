"""Weights from outside knowledge: density ratios, agreement, influence, scores; and the scores themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from reweigh import (
    Accumulator,
    ClassWeight,
    CrossEntropy,
    FromLoss,
    ImportanceWeight,
    LossTerms,
    Objective,
    Piecewise,
    PredictionAgreement,
    ScoreWeight,
    SelfInfluence,
    log_ratio_from_classifier,
    scores,
)
from reweigh.weighting.functional import effective_sample_size

F64 = torch.float64
numbers = st.lists(st.floats(-20, 20), min_size=1, max_size=12)


def tensor(values):
    return torch.tensor(values, dtype=F64)


def terms(**extras):
    n = len(next(iter(extras.values())))
    return LossTerms(torch.linspace(0.1, 2.0, n, dtype=F64), extras=extras)


class TestImportance:
    @given(numbers)
    def test_the_self_normalised_estimator(self, ratios):
        """reduction 'mean' is sum r l / sum r."""
        made = terms(log_ratio=tensor(ratios))
        loss = Objective(FromLoss(torch.nn.L1Loss(reduction="none")), ImportanceWeight())
        found = loss(made.loss, torch.zeros_like(made.loss), log_ratio=tensor(ratios))
        r = np.exp(np.array(ratios))
        assert found.item() == pytest.approx(np.average(made.loss.numpy(), weights=r), rel=1e-10)

    @given(numbers, st.floats(-300, 300))
    def test_a_constant_factor_of_the_ratio_changes_nothing(self, ratios, shift):
        first = ImportanceWeight().weigh(terms(log_ratio=tensor(ratios)))
        second = ImportanceWeight().weigh(terms(log_ratio=tensor(ratios) + shift))
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_ratios_of_any_size(self, dtype, normalize):
        ratios = torch.tensor([1e4, -1e4, 0.0, 88.0], dtype=dtype)
        loss = Objective(FromLoss(torch.nn.L1Loss(reduction="none")), ImportanceWeight(self_normalize=normalize))
        value = torch.full((4,), 1e4, dtype=dtype, requires_grad=True)
        found = loss(value, torch.zeros_like(value), log_ratio=ratios)
        found.backward()
        assert found.isfinite()
        assert value.grad.isfinite().all()
        weights = loss.weights(value, torch.zeros_like(value), log_ratio=ratios)
        if normalize:
            assert weights.tolist() == [4.0, 0.0, 0.0, 0.0]

    def test_clips(self):
        ratio = tensor([0.5, 1.0, 2.0, 8.0]).log()
        plain = ImportanceWeight(clip=2.0, self_normalize=False).weigh(terms(log_ratio=ratio))
        torch.testing.assert_close(plain, tensor([0.5, 1.0, 2.0, 2.0]))
        level = ImportanceWeight(clip_quantile=0.5, self_normalize=False).weigh(terms(log_ratio=ratio))
        torch.testing.assert_close(level, tensor([0.5, 1.0, 1.0, 1.0]))
        root = ImportanceWeight(flatten=0.5, self_normalize=False).weigh(terms(log_ratio=ratio))
        torch.testing.assert_close(root, tensor([0.5, 1.0, 2.0, 8.0]).sqrt())

    @given(numbers)
    def test_effective_sample_size(self, ratios):
        ratio, made = tensor(ratios), ImportanceWeight()
        found = made.effective_sample_size(ratio).item()
        r = np.exp(np.array(ratios))
        assert found == pytest.approx(r.sum() ** 2 / (r**2).sum(), rel=1e-9)
        assert 1 - 1e-9 <= found <= len(ratios) * (1 + 1e-9)
        assert ImportanceWeight(flatten=0.0).effective_sample_size(ratio).item() == pytest.approx(len(ratios))
        weights = made.weigh(terms(log_ratio=ratio))
        assert effective_sample_size(weights).item() == pytest.approx(found, rel=1e-9)

    def test_flattening_never_lowers_the_effective_sample_size(self):
        ratio = torch.randn(200, dtype=F64) * 3
        sizes = [ImportanceWeight(flatten=a).effective_sample_size(ratio).item() for a in (1.0, 0.7, 0.4, 0.1, 0.0)]
        assert sizes == sorted(sizes)

    def test_a_classifier_of_two_gaussians_gives_their_ratio(self):
        """Bayes' classifier with unequal numbers of samples, by its closed form."""
        x = torch.linspace(-3, 4, 50, dtype=F64)
        train, test = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(1.0, 1.0)
        n_train, n_test = 300, 50
        p = n_test * test.log_prob(x).exp()
        p = p / (p + n_train * train.log_prob(x).exp())
        found = log_ratio_from_classifier(torch.logit(p), n_train=n_train, n_test=n_test)
        torch.testing.assert_close(found, test.log_prob(x) - train.log_prob(x), rtol=1e-9, atol=1e-9)

    def test_covariate_shift_is_corrected(self):
        """A straight line fitted to a parabola: with weights it is the line of the shifted inputs."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(20_000, generator=generator, dtype=F64)
        ratio = torch.distributions.Normal(0.5, 0.8).log_prob(x) - torch.distributions.Normal(0.0, 1.0).log_prob(x)
        weights = ImportanceWeight().weigh(terms(log_ratio=ratio))
        design = torch.stack([torch.ones_like(x), x], 1)
        shifted = torch.linalg.solve(design.T @ (weights[:, None] * design), design.T @ (weights * x**2))
        # of N(m, s^2) the best line for x^2 has slope 2 m
        assert shifted[1].item() == pytest.approx(1.0, abs=0.08)
        plain = torch.linalg.lstsq(design, (x**2)[:, None]).solution.flatten()
        assert plain[1].item() == pytest.approx(0.0, abs=0.08)


class TestAgreement:
    @given(st.floats(0.01, 100.0), st.floats(0.1, 3.0), st.floats(0.1, 3.0))
    def test_the_best_disagreement_is_the_logarithm_of_the_loss(self, loss, scale, strength):
        """Where no u >= 0 has to be, the stationary point of L exp(-a u) + b a u is a u = log(L / b)."""
        best = tensor([math.log(loss / strength) / scale]).requires_grad_()
        made = Objective(FromLoss(torch.nn.L1Loss(reduction="none")), PredictionAgreement(scale, strength=strength))
        value = made(tensor([loss]), tensor([0.0]), disagreement=best)
        (slope,) = torch.autograd.grad(value, best)
        assert abs(slope.item()) < 1e-9 * max(1.0, strength * scale)
        assert value.item() == pytest.approx(strength * (1 + math.log(loss / strength)), rel=1e-9, abs=1e-12)
        for other in (best.item() - 0.3, best.item() + 0.3):
            assert made(tensor([loss]), tensor([0.0]), disagreement=tensor([other])) > value

    def scripts(self, u, loss, u_scale):
        """What the authors' two training scripts add up, for one timestep mask of ones."""
        reward = (loss * torch.exp(-u_scale * u)).mean() + (u_scale * u).mean()
        depth = (loss * torch.exp(-u)).mean() + u.mean() * u_scale
        return reward, depth

    def test_both_of_the_authors_scripts(self):
        u = torch.rand(5, dtype=F64, requires_grad=True)
        loss = torch.rand(5, dtype=F64, requires_grad=True)
        wanted = self.scripts(u, loss, 0.1)
        for setting, script in zip((PredictionAgreement(0.1), PredictionAgreement(strength=0.1)), wanted, strict=True):
            made = Objective(FromLoss(torch.nn.L1Loss(reduction="none")), setting)
            found = made(loss, torch.zeros_like(loss), disagreement=u)
            torch.testing.assert_close(found, script)
            slopes = torch.autograd.grad(found, (u, loss))
            torch.testing.assert_close(slopes, torch.autograd.grad(script, (u, loss)))

    def test_detached_it_is_a_constant(self):
        u = torch.rand(5, dtype=F64, requires_grad=True)
        logits, target = torch.randn(5, 3, dtype=F64, requires_grad=True), torch.randint(3, (5,))
        free = Objective(CrossEntropy(), PredictionAgreement())(logits, target, disagreement=u)
        held = Objective(CrossEntropy(), PredictionAgreement(detach=True))(logits, target, disagreement=u)
        assert free.item() == held.item()
        assert torch.autograd.grad(held, u, allow_unused=True, retain_graph=True)[0] is None
        torch.testing.assert_close(torch.autograd.grad(held, logits), torch.autograd.grad(free, logits))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batch_mean", "sequence_mean"])
    def test_the_penalty_is_reduced_like_the_losses(self, reduction):
        u, logits = torch.rand(4, 3, dtype=F64), torch.randn(4, 5, 3, dtype=F64)
        target = torch.randint(5, (4, 3))
        target[0, 1] = -100
        found = Objective(CrossEntropy(), PredictionAgreement(), reduction)(logits, target, disagreement=u)
        terms = F.cross_entropy(logits, target, reduction="none") * torch.exp(-u) + u
        terms = torch.where(target >= 0, terms, 0.0)
        counts = (target >= 0).double()
        wanted = {
            "mean": terms.sum() / counts.sum(),
            "sum": terms.sum(),
            "none": terms,
            "batch_mean": terms.sum() / 4,
            "sequence_mean": (terms.sum(1) / counts.sum(1)).mean(),
        }[reduction]
        torch.testing.assert_close(found, wanted)

    def test_micro_batches_add_up(self):
        u, logits, target = torch.rand(6, dtype=F64), torch.randn(6, 5, dtype=F64), torch.randint(5, (6,))
        made = Objective(CrossEntropy(), 2.0 * PredictionAgreement() * ClassWeight([1.0, 2.0, 3.0, 4.0, 5.0]))
        whole = made(logits, target, disagreement=u)
        parts = [
            made(logits[rows], target[rows], disagreement=u[rows], num_items=6.0) for rows in torch.arange(6).split(4)
        ]
        torch.testing.assert_close(sum(parts), whole)
        above, below = made.parts(logits, target, disagreement=u)
        torch.testing.assert_close(above / below, whole)
        torch.testing.assert_close(made.components(logits, target, disagreement=u).weighted, whole)

    def test_an_accumulator_says_that_it_knows_no_penalty(self):
        with pytest.raises(ValueError, match="must have no penalty"):
            Accumulator(Objective(CrossEntropy(), PredictionAgreement()))

    def test_an_outer_objective_sees_it(self):
        inner = Objective(CrossEntropy(), PredictionAgreement(), "none")
        outer = Objective(inner, None, "sum")
        u, logits, target = torch.rand(6, dtype=F64), torch.randn(6, 5, dtype=F64), torch.randint(5, (6,))
        torch.testing.assert_close(outer(logits, target, disagreement=u), inner(logits, target, disagreement=u).sum())


class TestInfluenceAndScores:
    @given(st.lists(st.floats(0, 50), min_size=1, max_size=9), st.floats(0.1, 10), st.floats(-1, 1))
    def test_self_influence_is_torchs_softmax(self, influence, temperature, sign):
        value = tensor(influence)
        found = SelfInfluence(temperature, sign=sign).weigh(terms(influence=value))
        torch.testing.assert_close(found, len(value) * torch.softmax(sign * value / temperature, 0))

    def test_two_stages(self):
        made = SelfInfluence(sign=Piecewise([1.0, -1.0], [1]))
        value = terms(influence=tensor([0.0, 3.0]))
        early = made.weigh(value)
        made.update("epoch")
        assert early[1] > early[0]
        torch.testing.assert_close(made.weigh(value), early.flip(0))

    def test_infinite_temperature_is_uniform_and_zero_is_the_largest(self):
        value = terms(influence=tensor([0.0, 3.0, 1.0]))
        torch.testing.assert_close(SelfInfluence(1e15).weigh(value), torch.ones(3, dtype=F64))
        torch.testing.assert_close(SelfInfluence(1e-6).weigh(value), tensor([0.0, 3.0, 0.0]))

    def test_score_keeps_the_top(self):
        value = terms(difficulty=tensor([0.4, 0.1, 1.0, 0.7]))
        torch.testing.assert_close(ScoreWeight(power=0.0, keep=0.5).weigh(value), tensor([0.0, 0.0, 2.0, 2.0]))
        easy = ScoreWeight(power=0.0, keep=0.25, largest=False).weigh(value)
        torch.testing.assert_close(easy, tensor([0.0, 4.0, 0.0, 0.0]))
        tied = ScoreWeight(power=0.0, keep=0.5).weigh(terms(difficulty=torch.ones(4, dtype=F64)))
        torch.testing.assert_close(tied, torch.ones(4, dtype=F64))
        root = tensor([0.4, 0.1, 1.0, 0.7]).sqrt()
        torch.testing.assert_close(ScoreWeight(power=0.5).weigh(value), root / root.mean())

    def test_scores_of_zero(self):
        zeros = terms(difficulty=torch.zeros(3, dtype=F64))
        for power in (-2.0, 0.0, 1.0, 2.0):
            torch.testing.assert_close(ScoreWeight(power=power).weigh(zeros), torch.ones(3, dtype=F64))
        some = ScoreWeight(power=2.0).weigh(terms(difficulty=tensor([0.0, 1.0])))
        torch.testing.assert_close(some, tensor([0.0, 2.0]))


class TestScoreFunctions:
    @given(st.integers(2, 6), st.integers(0, 10_000))
    def test_el2n_bounds_and_identity(self, classes, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(7, classes, generator=generator, dtype=F64) * 5
        target = torch.randint(classes, (7,), generator=generator)
        found = scores.el2n(logits, target)
        assert ((found >= 0) & (found <= math.sqrt(2) * (1 + 1e-12))).all()
        naive = (logits.softmax(1) - F.one_hot(target, classes)).norm(dim=1)
        torch.testing.assert_close(found, naive, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(scores.el2n(logits, F.one_hot(target, classes).double()), naive)
        if classes == 2:
            p = logits.softmax(1).gather(1, target[:, None]).squeeze(1)
            torch.testing.assert_close(found, math.sqrt(2) * (1 - p), rtol=1e-9, atol=1e-12)

    def test_el2n_does_not_cancel(self):
        logits = torch.tensor([[20.0, 0.0]])
        wanted = math.sqrt(2) * math.exp(-20) / (1 + math.exp(-20))
        assert scores.el2n(logits, torch.tensor([0])).item() == pytest.approx(wanted, rel=1e-5)
        assert (logits.softmax(1) - torch.tensor([[1.0, 0.0]])).norm().item() == pytest.approx(
            wanted / math.sqrt(2), rel=1e-3
        )  # the plain form has lost the target's half

    def test_dense_targets(self):
        found = scores.el2n(torch.randn(2, 3, 4), torch.randint(3, (2, 4)))
        assert found.shape == (2, 4)

    @pytest.mark.parametrize("bias", [True, False])
    def test_the_last_layer_by_closed_form_and_by_autograd(self, bias):
        trunk = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh()).double()
        head = torch.nn.Linear(5, 4, bias=bias).double()
        x, y = torch.randn(6, 3, dtype=F64), torch.randint(4, (6,))
        features = trunk(x)
        found = scores.grand_last_layer(head(features), y, features, bias=bias)
        wanted = []
        for i in range(6):
            slopes = torch.autograd.grad(F.cross_entropy(head(trunk(x[i : i + 1])), y[i : i + 1]), head.parameters())
            wanted.append(torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt())
        torch.testing.assert_close(found, torch.stack(wanted))
        frozen = torch.nn.Sequential(trunk.requires_grad_(False), head)
        torch.testing.assert_close(scores.grand(frozen, F.cross_entropy, x, y), found.detach())

    @pytest.mark.parametrize("chunk", [None, 1, 4])
    def test_grand_is_a_loop_of_backwards(self, chunk):
        model = torch.nn.Sequential(
            torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(), torch.nn.Linear(5, 2)
        )
        model = model.double().eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        x, y = torch.randn(6, 3, dtype=F64), torch.randint(2, (6,))
        found = scores.grand(model, F.cross_entropy, x, y, chunk_size=chunk)
        wanted = []
        for i in range(6):
            model.zero_grad()
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            wanted.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters())))
        assert found.tolist() == pytest.approx(wanted, rel=1e-10)
        assert not found.requires_grad
        assert scores.self_influence(model, F.cross_entropy, x, y).tolist() == pytest.approx([w * w for w in wanted])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_forgetting(self):
        history = torch.tensor(
            [[1, 0, 0, 1, 1], [0, 0, 1, 1, 0], [1, 0, 1, 1, 1], [0, 0, 1, 1, 0], [1, 0, 1, 1, 1]], dtype=torch.bool
        )
        assert scores.forgetting_counts(history).tolist() == [2.0, 5.0, 0.0, 0.0, 2.0]
        assert scores.forgetting_counts(history, never_learned=math.inf)[1].item() == math.inf
        assert scores.forgetting_counts(history[:1]).tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]


ERRORS = [
    (lambda: ImportanceWeight(flatten=-1.0), ValueError, r"ImportanceWeight: flatten must be finite and >= 0"),
    (lambda: ImportanceWeight(clip=0.0), ValueError, r"ImportanceWeight: clip must be finite and > 0"),
    (lambda: ImportanceWeight(clip_quantile=1.0), ValueError, r"clip_quantile must be finite and > 0 and < 1"),
    (lambda: ImportanceWeight(clip=1.0, clip_quantile=0.5), ValueError, r"exclude each other, got 1.0 and 0.5"),
    (lambda: log_ratio_from_classifier(torch.zeros(1), 0, 5), ValueError, r"n_train must be finite and > 0, got 0"),
    (lambda: PredictionAgreement(-1.0), ValueError, r"PredictionAgreement: scale must be finite and >= 0"),
    (lambda: PredictionAgreement(strength=-1.0), ValueError, r"PredictionAgreement: strength must be"),
    (lambda: SelfInfluence(0.0), ValueError, r"SelfInfluence: temperature must be finite and > 0"),
    (lambda: SelfInfluence(sign=2.0), ValueError, r"SelfInfluence: sign must be finite and >= -1 and <= 1"),
    (lambda: ScoreWeight(keep=0.0), ValueError, r"ScoreWeight: keep must be finite and > 0 and <= 1"),
    (lambda: scores.el2n(torch.zeros(3), torch.tensor(0)), ValueError, r"el2n: logits must have shape \(N, C, ...\)"),
    (lambda: scores.el2n(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)), ValueError, r"shape \(3,\), got \(2,\)"),
    (lambda: scores.el2n(torch.zeros(3, 2), torch.zeros(3)), ValueError, r"must have the logits' shape \(3, 2\)"),
    (lambda: scores.el2n(torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool)), TypeError, r"indices or probabilities"),
    (
        lambda: scores.grand_last_layer(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(2, 4)),
        ValueError,
        r"features must have shape \(N, d\)",
    ),
    (
        lambda: scores.grand(torch.nn.ReLU(), F.cross_entropy, torch.zeros(1, 2), torch.zeros(1)),
        ValueError,
        r"no parameter that needs gradient",
    ),
    (lambda: scores.forgetting_counts(torch.zeros(2, 3)), TypeError, r"correct must be a bool tensor"),
    (lambda: scores.forgetting_counts(torch.zeros(2, dtype=torch.bool)), ValueError, r"shape \(looks, N\)"),
]


@pytest.mark.parametrize(("bad", "kind", "message"), ERRORS)
def test_errors_say_what_is_wrong(bad, kind, message):
    with pytest.raises(kind, match=message):
        bad()
