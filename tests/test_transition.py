"""Labels that passed through a known noise: orientation, both corrections, resampling, errors."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from reweigh import (
    CrossEntropy,
    Focal,
    ForwardCorrectionLoss,
    LogitAdjustment,
    NoisyCrossEntropy,
    Objective,
    TransitionReweightedLoss,
    TransitionWeight,
    dirichlet_weights,
    resample_weights,
)
from reweigh.losses.conformance import check_criterion, check_objective
from reweigh.losses.functional import forward_correction_loss, transition_reweighted_loss

F64 = torch.float64
FLIPS = [[0.7, 0.1, 0.2, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25, 0.0, 0.5, 0.25], [0.1, 0.1, 0.1, 0.7]]
CASES = {
    case["id"]: case
    for case in json.loads((Path(__file__).parent / "golden" / "adversarial_and_noise.json").read_text())["cases"]
    if case["system"] == "dws"
}


def tensor(values):
    return torch.tensor(values, dtype=F64)


def batch(n=8, classes=4, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=F64) * scale
    return logits.requires_grad_(), torch.randint(classes, (n,), generator=generator)


def random_transition(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(classes, classes, generator=generator, dtype=F64).softmax(1)


class TestAuthorsNumbers:
    @pytest.mark.parametrize("name", sorted(CASES))
    def test_weights_of_dws(self, name):
        """In the authors' file T is indexed by row; it was handed its transpose where that matters."""
        case = CASES[name]
        loss = TransitionReweightedLoss(case["inputs"]["transition"])
        found = loss.weights(tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["labels"]))
        wanted = tensor(case["expected"]["weights"])
        same = torch.allclose(found / found.sum(), wanted, rtol=1e-9, atol=1e-12)
        assert same != ("quirk" in case)

    def test_every_case_is_here(self):
        assert sorted(CASES) == ["dws_asymmetric", "dws_identity", "dws_row", "dws_symmetric"]


class TestIdentities:
    def test_no_noise_is_cross_entropy(self):
        logits, target = batch()
        clean = torch.eye(4)
        plain = F.cross_entropy(logits, target)
        for found in (
            ForwardCorrectionLoss(clean)(logits, target),
            TransitionReweightedLoss(clean)(logits, target),
            Objective(NoisyCrossEntropy(clean))(logits, target),
            forward_correction_loss(logits, target, clean),
            transition_reweighted_loss(logits, target, clean),
        ):
            torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
            torch.testing.assert_close(
                torch.autograd.grad(found, logits, retain_graph=True)[0],
                torch.autograd.grad(plain, logits, retain_graph=True)[0],
                rtol=1e-10,
                atol=1e-14,
            )

    @given(st.integers(2, 6), st.integers(0, 10_000))
    def test_forward_correction_is_nll_of_the_probabilities_times_T(self, classes, seed):
        logits, target = batch(6, classes, seed)
        matrix = random_transition(classes, seed)
        wanted = F.nll_loss((logits.softmax(1) @ matrix).log(), target)
        found = ForwardCorrectionLoss(matrix)(logits, target)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found, logits)[0], torch.autograd.grad(wanted, logits)[0])

    def test_probabilities_of_all_labels_given_add_up_to_one(self):
        """Which would fail for the transposed matrix."""
        logits, _ = batch(5)
        criterion = NoisyCrossEntropy(FLIPS)
        total = sum(criterion.terms(logits, torch.full((5,), label)).extras["log_noisy_pt"].exp() for label in range(4))
        torch.testing.assert_close(total, torch.ones(5, dtype=F64))

    def test_both_corrections_find_the_clean_classifier(self):
        """One input, all noise known: the minimisers are the clean probabilities, not those of the labels."""
        matrix, clean = tensor(FLIPS), tensor([0.4, 0.3, 0.2, 0.1])
        given_labels = clean @ matrix
        z = clean.log().requires_grad_()
        loss = ForwardCorrectionLoss(matrix, reduction="none")(z.expand(4, 4), torch.arange(4))
        (slope,) = torch.autograd.grad((given_labels * loss).sum(), z)
        assert slope.abs().max() < 1e-14
        weighted = Objective(NoisyCrossEntropy(matrix), TransitionWeight(normalize=False), "none")
        (slope,) = torch.autograd.grad((given_labels * weighted(z.expand(4, 4), torch.arange(4))).sum(), z)
        assert slope.abs().max() < 1e-14
        plain = F.cross_entropy(z.expand(4, 4), torch.arange(4), reduction="none")
        assert torch.autograd.grad((given_labels * plain).sum(), z)[0].abs().max() > 0.01

    def test_the_weight_is_bounded_by_the_diagonal(self):
        logits, target = batch(200, scale=30.0)
        objective = Objective(NoisyCrossEntropy(FLIPS), TransitionWeight(normalize=False))
        bound = 1 / tensor(FLIPS).diagonal()[target]
        assert (objective.weights(logits, target) <= bound * (1 + 1e-12)).all()

    def test_gradient_flows_through_the_loss_only(self):
        logits, target = batch()
        loss = TransitionReweightedLoss(FLIPS)
        weights = loss.weights(logits, target)
        wanted = (weights * F.cross_entropy(logits, target, reduction="none")).mean()
        torch.testing.assert_close(
            torch.autograd.grad(loss(logits, target), logits)[0], torch.autograd.grad(wanted, logits)[0]
        )

    def test_an_impossible_diagonal(self):
        """Labels that are never right: the ratio has no bound, the weights stay finite."""
        swap = [[0.0, 1.0], [1.0, 0.0]]
        logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
        for normalize in (True, False):
            loss = Objective(NoisyCrossEntropy(swap), TransitionWeight(normalize=normalize))
            value = loss(logits, torch.tensor([0, 0]))
            assert value.isfinite()
            assert torch.autograd.grad(value, logits)[0].isfinite().all()
        forward = ForwardCorrectionLoss(swap)
        torch.testing.assert_close(forward(logits, torch.tensor([0, 1])), F.cross_entropy(logits, torch.tensor([1, 0])))


class TestCriterion:
    @pytest.mark.parametrize(
        "criterion",
        [
            NoisyCrossEntropy(FLIPS),
            NoisyCrossEntropy(FLIPS, corrected=True),
            NoisyCrossEntropy(FLIPS, logits=LogitAdjustment([50, 20, 6, 1])),
        ],
        ids=repr,
    )
    def test_the_suite(self, criterion):
        check_criterion(criterion)
        check_objective(Objective(criterion), compiled=False)

    def test_corrected_terms_are_of_the_label_given(self):
        logits, target = batch()
        terms = NoisyCrossEntropy(FLIPS, corrected=True).terms(logits, target)
        assert torch.equal(terms.loss, -terms.log_pt)
        assert torch.equal(terms.log_pt, terms.extras["log_noisy_pt"])
        focal = Objective(NoisyCrossEntropy(FLIPS, corrected=True), Focal(2.0), "none")(logits, target)
        p = terms.log_pt.exp()
        torch.testing.assert_close(focal, (1 - p) ** 2 * -p.log())

    def test_dense_targets_and_ignored_ones(self):
        logits, target = torch.randn(2, 4, 3), torch.randint(4, (2, 3))
        target[0, 1] = -100
        found = ForwardCorrectionLoss(FLIPS)(logits, target)
        rows = logits.movedim(1, -1).reshape(-1, 4)[target.reshape(-1) >= 0]
        torch.testing.assert_close(found, ForwardCorrectionLoss(FLIPS)(rows, target[target >= 0]))

    def test_rows_are_rescaled_exactly(self):
        single = torch.tensor(FLIPS, dtype=torch.float32).double() * (1 + 3e-7)
        loss = ForwardCorrectionLoss(single)
        column = loss.criterion.log_column.exp()
        torch.testing.assert_close(column.sum(0), torch.ones(4, dtype=F64), rtol=1e-15, atol=0)

    def test_its_repr_rebuilds_it(self):
        import reweigh

        text = repr(NoisyCrossEntropy(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), corrected=True))
        assert text == "NoisyCrossEntropy([[0.5, 0.5], [0.0, 1.0]], corrected=True)"
        assert repr(eval(text, {"NoisyCrossEntropy": reweigh.NoisyCrossEntropy})) == text

    def test_it_is_no_part_of_the_checkpoint(self):
        assert not ForwardCorrectionLoss(FLIPS).state_dict()


class TestSampling:
    def test_counts_have_the_weights_as_expectation(self):
        generator = torch.Generator().manual_seed(0)
        weights = tensor([0.0, 1.0, 2.0, 5.0])
        draws = torch.stack([resample_weights(weights, generator=generator) for _ in range(4000)])
        assert (draws.sum(1) == 4).all()
        assert (draws == draws.round()).all()
        torch.testing.assert_close(draws.mean(0), 4 * weights / weights.sum(), rtol=0.05, atol=1e-12)

    def test_resampling_is_a_mean_over_the_drawn(self):
        logits, target = batch()
        counts = resample_weights(
            TransitionReweightedLoss(FLIPS).weights(logits, target), generator=torch.Generator().manual_seed(0)
        )
        found = Objective(CrossEntropy())(logits, target, sample_weight=counts)
        rows = torch.arange(8).repeat_interleave(counts.long())
        torch.testing.assert_close(found, F.cross_entropy(logits[rows], target[rows]))
        assert resample_weights(counts, num_samples=0, generator=torch.Generator()).sum() == 0
        assert resample_weights(counts, num_samples=100, generator=torch.Generator()).sum() == 100

    @pytest.mark.slow
    def test_dirichlet_moments(self):
        """Mean m and variance m (1 - m) / (alpha + 1) of each share."""
        generator = torch.Generator().manual_seed(0)
        weights, alpha = tensor([1.0, 2.0, 5.0]), 4.0
        draws = torch.stack([dirichlet_weights(weights, alpha, generator=generator) for _ in range(20_000)]) / 3
        share = weights / weights.sum()
        torch.testing.assert_close(draws.sum(1), torch.ones(20_000, dtype=F64))
        torch.testing.assert_close(draws.mean(0), share, rtol=0.02, atol=0.0)
        torch.testing.assert_close(draws.var(0), share * (1 - share) / (alpha + 1), rtol=0.05, atol=0.0)

    def test_a_large_concentration_gives_the_weights_back(self):
        weights = tensor([1.0, 2.0, 5.0, 0.0])
        found = dirichlet_weights(weights, 1e12, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(found, weights / weights.mean(), rtol=1e-4, atol=0)

    def test_a_small_one_picks_a_sample_and_is_no_zero_by_zero(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            found = dirichlet_weights(torch.rand(5, generator=generator), 1e-6, generator=generator)
            assert sorted(found.tolist())[-1] == pytest.approx(5.0)
            assert found.sum().item() == pytest.approx(5.0)

    def test_the_global_generator_is_left_alone(self):
        before = torch.get_rng_state()
        generator = torch.Generator().manual_seed(1)
        first = (
            dirichlet_weights(torch.ones(3), 1.0, generator=generator),
            resample_weights(torch.ones(3), generator=generator),
        )
        generator.manual_seed(1)
        second = (
            dirichlet_weights(torch.ones(3), 1.0, generator=generator),
            resample_weights(torch.ones(3), generator=generator),
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(before, torch.get_rng_state())


ERRORS = [
    (lambda: NoisyCrossEntropy("T"), TypeError, r"NoisyCrossEntropy: transition must be a matrix of numbers"),
    (lambda: NoisyCrossEntropy([0.5, 0.5]), ValueError, r"must be a square matrix, got shape \(2,\)"),
    (lambda: NoisyCrossEntropy([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), ValueError, r"square matrix, got shape \(2, 3\)"),
    (lambda: NoisyCrossEntropy([[1.2, -0.2], [0.0, 1.0]]), ValueError, r"numbers in \[0, 1\]"),
    (lambda: NoisyCrossEntropy([[math.nan, 0.2], [0.0, 1.0]]), ValueError, r"numbers in \[0, 1\]"),
    (lambda: NoisyCrossEntropy([[0.6, 0.2], [0.0, 1.0]]), ValueError, r"row 0 sums to 0.8"),
    (
        lambda: ForwardCorrectionLoss(torch.tensor(FLIPS).T),
        ValueError,
        r"T\[k, j\] = P\(label j \| clean class k\), but row 0 sums to 1.05 \(its columns do: transpose it\)",
    ),
    (lambda: NoisyCrossEntropy([[0.0, 1.0], [0.0, 1.0]]), ValueError, r"column 0 of transition is 0"),
    (
        lambda: NoisyCrossEntropy(FLIPS).terms(torch.zeros(2, 3), torch.tensor([0, 1])),
        ValueError,
        r"must have the 4 classes of transition in dimension 1, got shape \(2, 3\)",
    ),
    (
        lambda: NoisyCrossEntropy(FLIPS).terms(torch.zeros(2, 4), torch.zeros(2, 4)),
        TypeError,
        r"target must be class indices, got torch.float32",
    ),
    (
        lambda: NoisyCrossEntropy(FLIPS).terms(torch.zeros(2, 4), torch.tensor([0])),
        ValueError,
        r"target must have shape \(2,\)",
    ),
    (lambda: NoisyCrossEntropy(FLIPS).terms(torch.zeros(2, 4), torch.tensor([0, 4])), ValueError, r"in \[0, 4\)"),
    (lambda: NoisyCrossEntropy(FLIPS).terms(torch.zeros(2, 4)), TypeError, r"takes \(logits, target\), got 1 inputs"),
    (
        lambda: Objective(CrossEntropy(), TransitionWeight())(torch.zeros(2, 4), torch.tensor([0, 1])),
        ValueError,
        r"TransitionWeight: 'log_noisy_pt' is missing",
    ),
    (
        lambda: dirichlet_weights(torch.ones(2), 0.0, generator=torch.Generator()),
        ValueError,
        r"dirichlet_weights: concentration must be finite and > 0",
    ),
    (
        lambda: resample_weights(torch.zeros(2), generator=torch.Generator()),
        ValueError,
        r"resample_weights: weights must be finite, >= 0 and some of them positive",
    ),
    (lambda: resample_weights(torch.ones(2, 2), generator=torch.Generator()), ValueError, r"must be a vector"),
    (lambda: resample_weights([1.0], generator=torch.Generator()), TypeError, r"must be a floating-point tensor"),
]


@pytest.mark.parametrize(("bad", "kind", "message"), ERRORS)
def test_errors_say_what_is_wrong(bad, kind, message):
    with pytest.raises(kind, match=message):
        bad()
