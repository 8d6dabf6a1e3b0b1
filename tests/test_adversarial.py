"""Weights for adversarial training: what the authors' functions print, identities, the epochs of DAFA, errors."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reweigh import DAFA, GAIRAT, LRAT, MAIL, CrossEntropy, Focal, LossTerms, Objective, Piecewise, probability_margin
from reweigh.weighting.functional import counted_quantile, mean_one_weight, top_share

F64 = torch.float64
CASES = {
    case["id"]: case
    for case in json.loads((Path(__file__).parent / "golden" / "adversarial_and_noise.json").read_text())["cases"]
}


def named(system):
    return [name for name, case in CASES.items() if case["system"] == system]


def tensor(values):
    return torch.tensor(values, dtype=F64)


def terms(n=6, seed=0, **extras):
    loss = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return LossTerms(loss, category=torch.arange(n) % 3, num_classes=3, extras=extras)


class TestAuthorsNumbers:
    @pytest.mark.parametrize("name", named("gairat"))
    def test_gairat(self, name):
        case = CASES[name]
        kappa = tensor(case["inputs"]["kappa"])
        made = GAIRAT(case["config"]["num_steps"], shift=case["config"]["Lambda"])
        found = made.weigh(terms(len(kappa), steps_to_cross=kappa))
        torch.testing.assert_close(found, tensor(case["expected"]["weights"]), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("name", named("mail"))
    def test_mail_up_to_its_factor_of_three(self, name):
        case = CASES[name]
        margin = probability_margin(tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["target"]))
        torch.testing.assert_close(-margin, tensor(case["expected"]["negative_margin"]), rtol=1e-9, atol=1e-12)
        wanted = tensor(case["expected"]["weights"])
        found = MAIL(case["config"]["slope"], beta=case["config"]["bias"]).weigh(terms(len(margin), margin=margin))
        torch.testing.assert_close(found, wanted / wanted.mean(), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("name", named("dafa"))
    def test_dafa(self, name):
        case = CASES[name]
        rows, labels = tensor(case["inputs"]["probs"]), torch.tensor(case["inputs"]["labels"])
        classes = rows.shape[1]
        made = DAFA(classes, strength=case["config"]["lamb"], warmup=1)
        loss = Objective(CrossEntropy(), made)
        for part in torch.arange(len(labels)).split(7):
            loss(rows[part].log(), labels[part], probabilities=rows[part])
            loss.update("step")
        loss.update("epoch")
        wanted, found = tensor(case["expected"]["weights"]), made.eps_scale()
        assert found.sum().item() == pytest.approx(classes, rel=1e-14)
        if "quirk" in case:  # the classes that are equal leave each other alone, so less is taken
            assert wanted.sum() < classes - 0.1
            assert found[0] > wanted[0]
            assert found[1] > wanted[1]
        else:
            held = wanted.clamp_min(0.0)
            torch.testing.assert_close(found, held * classes / held.sum(), rtol=1e-9, atol=1e-12)

    def test_a_large_strength_made_their_weights_negative(self):
        assert min(CASES["dafa_negative"]["expected"]["weights"]) < 0

    def test_no_case_is_left_out(self):
        assert {case["system"] for case in CASES.values()} == {"gairat", "mail", "dafa", "dws"}


class TestGAIRAT:
    @given(st.integers(1, 30), st.floats(-50, 50), st.data())
    def test_mean_one_and_decreasing(self, steps, shift, data):
        kappa = tensor(data.draw(st.lists(st.integers(0, steps), min_size=2, max_size=9)))
        found = GAIRAT(steps, shift=shift).weigh(terms(len(kappa), steps_to_cross=kappa))
        assert found.mean().item() == pytest.approx(1.0, rel=1e-12)
        ordered = found[kappa.argsort()]
        assert (ordered[:-1] >= ordered[1:] * (1 - 1e-12)).all()

    def test_constant_steps_and_an_endless_shift_are_plain_training(self):
        same = GAIRAT(10).weigh(terms(steps_to_cross=torch.full((6,), 4)))
        assert torch.allclose(same, torch.ones(6, dtype=F64), rtol=1e-14)
        kappa = torch.arange(6)
        for shift in (math.inf, 100.0):
            assert torch.equal(GAIRAT(10, shift=shift).weigh(terms(steps_to_cross=kappa)), torch.ones(6, dtype=F64))

    def test_a_shift_at_which_the_tanh_rounds_to_minus_one_is_no_division_by_zero(self):
        kappa = tensor([0.0, 5.0, 10.0])
        naive = (1 + torch.tanh(-1e4 + 5 * (1 - 2 * kappa / 10))) / 2
        assert naive.sum() == 0
        found = GAIRAT(10, shift=-1e4).weigh(terms(3, steps_to_cross=kappa))
        torch.testing.assert_close(found, 3 * torch.softmax(-2 * kappa, 0), rtol=1e-9, atol=0)

    def test_the_authors_schedule(self):
        made = GAIRAT(10, shift=Piecewise([100.0, -1.0], [2]))
        loss = Objective(CrossEntropy(), made)
        call = {"steps_to_cross": torch.tensor([0, 10])}
        logits, target = torch.zeros(2, 4), torch.tensor([0, 1])
        for epoch in range(3):
            flat = torch.equal(loss.weights(logits, target, **call), torch.ones(2))
            assert flat == (epoch < 2)
            loss.update("epoch")


class TestMargins:
    def test_two_classes(self):
        p = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=F64)
        margin = probability_margin(p.log(), torch.tensor([0, 0]))
        torch.testing.assert_close(margin, tensor([0.4, -0.6]))

    def test_other_shapes_dtypes_and_ignored_targets(self):
        logits = torch.randn(2, 5, 3, 4)
        target = torch.randint(5, (2, 3, 4))
        target[0, 0, 0] = -100
        found = probability_margin(logits, target)
        assert found.shape == target.shape
        p = logits.softmax(1)
        right = p.argmax(1) == target
        assert ((found > 0) == right)[target >= 0].all()
        assert probability_margin(logits.half(), target).dtype == torch.float32
        assert probability_margin(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)).tolist() == [1.0, 1.0]

    def test_a_steep_mail_is_a_sum_of_the_few_below_beta(self):
        margin = tensor([-0.9, -0.8, 0.1, 0.6])
        found = MAIL(1e4, beta=-0.5).weigh(terms(4, margin=margin))
        torch.testing.assert_close(found, tensor([2.0, 2.0, 0.0, 0.0]))

    def test_all_margins_far_above_beta(self):
        found = MAIL(1e4, beta=-0.5).weigh(terms(2, margin=tensor([0.5, 0.5001])))
        torch.testing.assert_close(found, 2 * torch.softmax(tensor([0.0, -1.0]), 0), rtol=1e-9, atol=0)


class TestLRAT:
    @given(st.floats(0.01, 100.0), st.integers(0, 1000))
    def test_mean_one_within_each_pair_and_decreasing(self, temperature, seed):
        generator = torch.Generator().manual_seed(seed)
        pair = torch.randint(-3, 4, (12,), generator=generator)
        margin = torch.randn(12, generator=generator, dtype=F64)
        found = LRAT(temperature).weigh(terms(12, pair=pair, margin=margin))
        for q in pair.unique():
            own = pair == q
            assert found[own].mean().item() == pytest.approx(1.0, rel=1e-12)
            ordered = found[own][margin[own].argsort()]
            assert (ordered[:-1] >= ordered[1:] * (1 - 1e-12)).all()

    def test_pairs_at_any_distance_do_not_touch(self):
        pair, margin = torch.tensor([1, 1, 2, 2]), tensor([1e4, 1e4 + 1, -1e4, -1e4 + 1])
        found = LRAT().weigh(terms(4, pair=pair, margin=margin))
        two = 2 * torch.softmax(tensor([0.0, -1.0]), 0)
        torch.testing.assert_close(found, torch.cat([two, two]), rtol=1e-9, atol=0)

    def test_one_pair_is_a_softmax_and_single_terms_weigh_one(self):
        margin = torch.randn(6, dtype=F64)
        found = LRAT(0.5).weigh(terms(pair=torch.zeros(6, dtype=torch.long), margin=margin))
        torch.testing.assert_close(found, 6 * torch.softmax(-margin / 0.5, 0))
        found = LRAT().weigh(terms(pair=torch.arange(6), margin=margin))
        assert torch.equal(found, torch.ones(6, dtype=F64))

    def test_masked_members_leave_their_pair(self):
        mask = torch.tensor([True, True, False])
        made = terms(3, pair=torch.tensor([0, 0, 0]), margin=tensor([1.0, 0.0, math.nan]))._replace(mask=mask)
        found = LRAT().weigh(made)
        torch.testing.assert_close(found[:2], 2 * torch.softmax(tensor([-1.0, 0.0]), 0))


class TestDAFA:
    @given(st.integers(2, 7), st.floats(0.0, 50.0), st.integers(0, 10_000))
    def test_what_one_class_gets_others_give(self, classes, strength, seed):
        generator = torch.Generator().manual_seed(seed)
        made = DAFA(classes, strength=strength, warmup=None)
        made.fit_similarity(torch.randn(classes, classes, generator=generator, dtype=F64).softmax(1))
        assert made.eps_scale().sum().item() == pytest.approx(classes, rel=1e-13)
        assert (made.eps_scale() >= 0).all()

    def test_equal_classes_leave_each_other_alone(self):
        made = DAFA(3, warmup=None)
        made.fit_similarity([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.2, 0.2, 0.6]])
        assert made.eps_scale().tolist() == [1.0, 1.0, 1.0]

    def test_once_after_the_warmup(self):
        made = DAFA(2, warmup=2)
        loss = Objective(CrossEntropy(), made)
        target, rows = torch.tensor([0, 1]), torch.tensor([[0.6, 0.4], [0.1, 0.9]])
        other = torch.tensor([[0.9, 0.1], [0.4, 0.6]])

        def epoch(p):
            loss(p.log().requires_grad_(), target, probabilities=p)
            loss.update("step")
            loss.update("epoch")
            return made.eps_scale().tolist()

        assert epoch(other) == [1.0, 1.0]
        assert epoch(rows) == pytest.approx([1.36, 0.64])  # of this epoch alone
        assert epoch(other) == pytest.approx([1.36, 0.64])
        assert made.class_margins(0.5).tolist() == pytest.approx([0.68, 0.32])

    def test_every_epoch(self):
        made = DAFA(2, warmup=1, recompute=True)
        loss = Objective(CrossEntropy(), made)
        target = torch.tensor([0, 1])
        found = []
        for rows in ([[0.6, 0.4], [0.1, 0.9]], [[0.9, 0.1], [0.4, 0.6]]):
            p = torch.tensor(rows)
            loss(p.log().requires_grad_(), target, probabilities=p)
            loss.update("epoch")
            found.append(made.eps_scale())
        assert torch.allclose(found[0], found[1].flip(0), rtol=1e-6)

    def test_an_epoch_without_a_forward_waits(self):
        made = DAFA(2, warmup=1)
        made.update("epoch")
        assert made.eps_scale().tolist() == [1.0, 1.0]
        loss = Objective(CrossEntropy(), made)
        p = torch.tensor([[0.6, 0.4], [0.1, 0.9]])
        loss(p.log().requires_grad_(), torch.tensor([0, 1]), probabilities=p)
        loss.update("epoch")
        assert made.eps_scale()[0] > 1.3

    def test_numbers_that_are_not_finite_are_not_learned(self):
        made = DAFA(2, warmup=1)
        loss = Objective(CrossEntropy(), made)
        good, bad = torch.tensor([[0.6, 0.4], [0.1, 0.9]]), torch.tensor([[math.nan, 0.4], [0.1, 0.9]])
        for p in (good, bad):
            loss(good.log().requires_grad_(), torch.tensor([0, 1]), probabilities=p)
            loss.update("step")
        loss.update("epoch")
        assert made.eps_scale().tolist() == pytest.approx([1.36, 0.64])

    def test_evaluation_needs_no_probabilities(self):
        loss = Objective(CrossEntropy(), DAFA(4)).eval()
        assert torch.isfinite(loss(torch.zeros(2, 4), torch.tensor([0, 1])))


ERRORS = [
    (lambda: GAIRAT(0), ValueError, r"GAIRAT: num_steps must be >= 1, got 0"),
    (lambda: GAIRAT(shift=math.nan), ValueError, r"GAIRAT: shift must be finite"),
    (lambda: MAIL(-1.0), ValueError, r"MAIL: gamma must be finite and >= 0, got -1.0"),
    (lambda: LRAT(0.0), ValueError, r"LRAT: temperature must be finite and > 0, got 0.0"),
    (lambda: DAFA(3, strength=-1.0), ValueError, r"DAFA: strength must be finite and >= 0"),
    (lambda: DAFA(3, warmup=0), ValueError, r"DAFA: warmup must be >= 1, got 0"),
    (lambda: DAFA(3).fit_similarity(torch.eye(2)), ValueError, r"similarity must have shape \(3, 3\), got \(2, 2\)"),
    (lambda: DAFA(2).fit_similarity([[2.0, -1.0], [0.0, 1.0]]), ValueError, r"numbers in \[0, 1\]"),
    (lambda: DAFA(2).class_margins(-1.0), ValueError, r"DAFA: eps must be finite and >= 0"),
    (
        lambda: LRAT().weigh(terms(pair=torch.zeros(6), margin=torch.zeros(6))),
        TypeError,
        r"LRAT: pair must hold integers, got torch.float32",
    ),
    (
        lambda: Objective(CrossEntropy(), GAIRAT())(torch.zeros(2, 4), torch.tensor([0, 1])),
        ValueError,
        r"GAIRAT: 'steps_to_cross' is missing; pass steps_to_cross= when calling the objective",
    ),
    (
        lambda: DAFA(3).observe(terms(probabilities=torch.zeros(6, 2))),
        ValueError,
        r"DAFA: probabilities must hold one number per sample and class, \(6, 3\)",
    ),
]


@pytest.mark.parametrize(("bad", "kind", "message"), ERRORS)
def test_errors_say_what_is_wrong(bad, kind, message):
    with pytest.raises(kind, match=message):
        bad()


def test_they_compose():
    """Adversarial weights times a class table, clipped, on attacked logits."""
    logits, target = torch.randn(6, 4, dtype=F64, requires_grad=True), torch.randint(4, (6,))
    weighting = (MAIL(5.0, beta=0.0) * Focal(1.0).detach()).clip(max=2.0)
    call = {"margin": probability_margin(logits.detach(), target)}
    loss = Objective(CrossEntropy(), weighting, "weighted_mean")
    loss(logits, target, **call).backward()
    assert logits.grad.isfinite().all()
    assert (loss.weights(logits, target, **call) <= 2.0).all()


class TestPureParts:
    @given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=12), st.data())
    def test_mean_one(self, values, data):
        counts = tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values))))
        found = mean_one_weight(tensor(values), counts)
        assert found.isfinite().all()
        if counts.sum() > 0:
            assert (counts * found).sum().item() == pytest.approx(counts.sum().item(), rel=1e-12)
        assert (found[counts == 0] == 0).all()

    @given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.floats(0.0, 1.0), st.booleans(), st.data())
    def test_top_share_keeps_the_share_and_shares_ties(self, values, keep, largest, data):
        counts = tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values))))
        value = tensor(values)
        found = top_share(value, counts, keep, largest=largest)
        assert (counts * found).sum().item() == pytest.approx(keep * counts.sum().item(), abs=1e-9)
        for a in range(len(values)):
            for b in range(len(values)):
                if counts[a] > 0 and counts[b] > 0:
                    better = values[a] > values[b] if largest else values[a] < values[b]
                    assert not better or found[a] >= found[b]
                    assert values[a] != values[b] or found[a] == found[b]

    @given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12), st.floats(0.01, 1.0))
    def test_counted_quantile_is_numpys_inverted_cdf(self, values, level):
        import numpy as np

        found = counted_quantile(tensor(values), torch.ones(len(values), dtype=F64), level)
        assert found.item() == np.quantile(np.array(values), level, method="inverted_cdf")
