"""Asymmetric losses: identities, soft and unknown labels, the adaptive exponent, and terms that share a label."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_kit import QUIET, loader, module, trainer
from torch.nn import functional as F

from reweigh.lightning_callbacks import WeightingCallback
from reweigh.losses import (
    AsymmetricLoss,
    AsymmetricSingleLabelLoss,
    BinaryCrossEntropy,
    ClasswiseCrossEntropy,
    CrossEntropy,
    FocalLoss,
    Objective,
    SigmoidFocalLoss,
)
from reweigh.losses.functional import asymmetric_loss, asymmetric_single_label_loss
from reweigh.weighting import AdaptiveAsymmetricFocal, AsymmetricFocal, Focal, Linear

pytestmark = QUIET


def batch(n=6, labels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, labels, generator=generator, dtype=torch.float64) * 3
    return logits.requires_grad_(), (torch.rand(n, labels, generator=generator) < 0.3).double()


def same(first, second, logits, tol=1e-12):
    torch.testing.assert_close(first, second, rtol=tol, atol=tol)
    slopes = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (first, second)]
    torch.testing.assert_close(*slopes, rtol=tol, atol=tol)


class TestIdentities:
    def test_no_focusing_and_no_shift_is_binary_cross_entropy(self):
        logits, y = batch()
        for reduction in ("mean", "sum", "none"):
            loss = AsymmetricLoss(0.0, 0.0, clip=0.0, reduction=reduction)
            same(loss(logits, y), F.binary_cross_entropy_with_logits(logits, y, reduction=reduction), logits)
            soft = y * 0.7 + 0.1
            same(loss(logits, soft), F.binary_cross_entropy_with_logits(logits, soft, reduction=reduction), logits)

    @pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
    def test_equal_exponents_are_sigmoid_focal(self, gamma):
        logits, y = batch()
        asymmetric = AsymmetricLoss(gamma, gamma, clip=0.0, detach=False)
        same(asymmetric(logits, y), SigmoidFocalLoss(gamma, alpha=None)(logits, y), logits)

    def test_the_detach_switch_changes_the_gradient_only(self):
        logits, y = batch()
        loose, held = AsymmetricLoss(detach=False)(logits, y), AsymmetricLoss()(logits, y)
        assert loose.item() == held.item()
        slopes = [torch.autograd.grad(value, logits)[0] for value in (loose, held)]
        assert not torch.allclose(*slopes)

    def test_easy_negatives_are_exactly_nothing(self):
        logits = torch.tensor([[-2.95, -10.0, -700.0]], dtype=torch.float64, requires_grad=True)
        value = AsymmetricLoss(detach=False, reduction="none")(logits, torch.zeros(1, 3))
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert (value == 0).all()
        assert (grad == 0).all()

    def test_wrong_negatives_are_bounded_by_the_shift(self):
        value = AsymmetricLoss()(torch.tensor([[60.0]], dtype=torch.float64), torch.zeros(1, 1))
        torch.testing.assert_close(value.item(), -math.log(0.05) * 0.95**4, rtol=1e-12, atol=0)

    def test_single_label_without_focusing_is_cross_entropy(self):
        logits = batch()[0]
        target = torch.tensor([0, 1, 2, 3, 4, -100])
        for smoothing in (0.0, 0.1, 1.0):
            loss = AsymmetricSingleLabelLoss(0.0, 0.0, label_smoothing=smoothing)
            same(loss(logits, target), F.cross_entropy(logits, target, label_smoothing=smoothing), logits)

    @pytest.mark.parametrize("gamma", [0.0, 0.4, 2.0])
    def test_single_label_without_smoothing_is_focal(self, gamma):
        logits, target = batch()[0], torch.tensor([0, 1, 2, 3, 4, -100])
        loss = AsymmetricSingleLabelLoss(4.0, gamma, label_smoothing=0.0)
        same(loss(logits, target), FocalLoss(gamma)(logits, target), logits, tol=1e-10)

    def test_a_single_class_is_no_choice(self):
        logits = torch.randn(3, 1, requires_grad=True)
        value = AsymmetricSingleLabelLoss(2.0, 1.0)(logits, torch.zeros(3, dtype=torch.long))
        assert value.item() == 0.0
        assert (torch.autograd.grad(value, logits)[0] == 0).all()

    def test_schedules_of_the_shift_reach_zero(self):
        logits, y = batch()
        loss = AsymmetricLoss(clip=Linear(0.2, 0.0, duration=1, by="step"))
        same(loss(logits, y), AsymmetricLoss(clip=0.2)(logits, y), logits)
        loss.update("step", index=0)
        same(loss(logits, y), AsymmetricLoss(clip=0.0)(logits, y), logits)

    def test_functional_twins(self):
        logits, y = batch()
        target = torch.arange(6) % 5
        assert torch.equal(asymmetric_loss(logits, y), AsymmetricLoss()(logits, y))
        assert torch.equal(asymmetric_single_label_loss(logits, target), AsymmetricSingleLabelLoss()(logits, target))


class TestSoftLabels:
    @given(y=st.floats(0, 1), x=st.floats(-30, 30), clip=st.sampled_from([0.0, 0.05, 0.3]))
    def test_two_terms(self, y, x, clip):
        loss = AsymmetricLoss(2.0, 0.5, clip=clip)
        logits = torch.tensor([[x]], dtype=torch.float64)
        value = [loss(logits, torch.tensor([[t]], dtype=torch.float64)).item() for t in (y, 1.0, 0.0)]
        assert math.isclose(value[0], y * value[1] + (1 - y) * value[2], rel_tol=1e-9, abs_tol=1e-14)
        assert value[0] >= 0.0

    @pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "batch_mean", "sequence_mean", "none", "sum"])
    def test_hard_labels_are_the_same_either_way(self, reduction):
        """Integers take the one-term form; the same labels beside a soft one take the two-term form."""
        logits, y = batch()
        loss = AsymmetricLoss(reduction=reduction)
        terms = loss.criterion.terms(logits, y)
        assert terms.share is None
        logits_too = torch.cat([logits, logits[:1]])
        blurred = torch.cat([y, torch.full((1, 5), 0.5, dtype=torch.float64)])
        keep = torch.arange(7) < 6
        assert loss.criterion.terms(logits_too, blurred).share.shape == (7, 5, 2)
        apart = loss(logits_too, blurred, mask=keep)
        together = loss(logits, y.long())
        torch.testing.assert_close(apart[:6] if reduction == "none" else apart, together, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(loss.weights(logits_too, blurred)[:6], loss.weights(logits, y))

    def test_weights_and_masks_given_per_label(self):
        logits, y = batch()
        soft, mask = y * 0.6 + 0.2, torch.rand(6, 5) < 0.7
        times = torch.randint(0, 3, (6, 5)).double()
        each = AsymmetricLoss(reduction="none")(logits, soft)
        found = AsymmetricLoss()(logits, soft, mask=mask, sample_weight=times)
        wanted = (each * mask * times).sum() / (mask * times).sum()
        torch.testing.assert_close(found, wanted)
        parts = AsymmetricLoss().components(logits, soft, mask=mask, sample_weight=times)
        torch.testing.assert_close(parts.num_terms, (mask * times).sum().to(parts.num_terms.dtype))

    def test_mixed_terms_stay_what_they_were(self):
        logits, y = batch()
        soft = y * 0.6 + 0.2
        p = logits.sigmoid()
        p_t = p * soft + (1 - p) * (1 - soft)
        wanted = F.binary_cross_entropy_with_logits(logits, soft, reduction="none") * (1 - p_t) ** 2
        same(Objective(BinaryCrossEntropy(), Focal(2.0), "none")(logits, soft), wanted, logits)

    def test_label_smoothing_smooths_shares(self):
        logits, y = batch()
        criterion = BinaryCrossEntropy(shift=0.05, soft="sides", label_smoothing=0.2)
        smooth = Objective(criterion, AsymmetricFocal())
        same(smooth(logits, y), AsymmetricLoss()(logits, y * 0.8 + 0.1), logits)


class TestClasses:
    def test_terms_add_up_to_cross_entropy(self):
        logits = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
        target = torch.tensor([[0, 1], [2, -100], [3, 3]])
        found = Objective(ClasswiseCrossEntropy(label_smoothing=0.3), None, "none")(logits, target)
        wanted = Objective(CrossEntropy(label_smoothing=0.3), None, "none")(logits, target)
        same(found, wanted, logits)

    @pytest.mark.parametrize("gap", [5.0, 40.0, 300.0])
    def test_complement_is_exact(self, gap):
        logits = torch.tensor([[gap, 0.0, 0.3, -1.0]], dtype=torch.float64)
        found = ClasswiseCrossEntropy(label_smoothing=0.4).terms(logits, torch.tensor([0])).log_qt[0, 0]
        rest = torch.logsumexp(logits[0, 1:], 0) - torch.logsumexp(logits[0], 0)
        torch.testing.assert_close(found, rest, rtol=1e-12, atol=0)

    @pytest.mark.parametrize(
        ("target", "error", "message"),
        [
            (torch.rand(6, 5), TypeError, "target must be class indices, got torch.float32"),
            (torch.zeros(5, dtype=torch.long), ValueError, r"target must have shape \(6,\) for logits \(6, 5\)"),
            (torch.full((6,), 5), ValueError, r"target must be in \[0, 5\) or ignore_index=-100, got 5"),
        ],
    )
    def test_errors(self, target, error, message):
        with pytest.raises(error, match=f"ClasswiseCrossEntropy: {message}"):
            AsymmetricSingleLabelLoss()(batch()[0], target)


def test_class_numbers_are_no_sides():
    loss = Objective(CrossEntropy(), AsymmetricFocal())
    with pytest.raises(TypeError, match="AsymmetricFocal: needs binary targets as BinaryCrossEntropy provides them"):
        loss(batch()[0], torch.arange(6) % 5)


def test_the_grad_mode_is_left_alone():
    logits, y = batch()
    with torch.no_grad():
        AsymmetricLoss()(logits, y)
        assert not torch.is_grad_enabled()
        assert not (logits * 2).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gammas", [(0.0, 0.0), (0.1, 0.5), (4.0, 1.0)])
@pytest.mark.parametrize("clip", [0.0, 1e-6, 0.05, 0.9])
@pytest.mark.parametrize("detach", [True, False])
def test_finite_up_to_ten_thousand(dtype, gammas, clip, detach):
    x = torch.tensor([0.0, 1.0, 8.0, 17.0, 40.0, 1e3, 1e4]).to(dtype)
    logits = torch.cat([x, -x]).unsqueeze(1).requires_grad_()
    for y in (0.0, 1.0, 0.3):
        value = AsymmetricLoss(*gammas, clip=clip, detach=detach, reduction="none")(logits, torch.full((14, 1), y))
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert torch.isfinite(value).all()
        assert torch.isfinite(grad).all()
        assert (value >= 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 4.0])
def test_single_label_is_finite_up_to_ten_thousand(gamma):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 17.0]]).to(dtype).requires_grad_()
        value = AsymmetricSingleLabelLoss(gamma, gamma)(logits, torch.tensor([0, 1, 2]))
        (grad,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()


class TestAdaptive:
    def test_the_exponent_closes_the_gap(self):
        """Plain training leaves rare positives unsure of themselves; the exponent rises until they are not."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(400, 6, generator=generator)
        y = (x @ torch.randn(6, 8, generator=generator) + torch.randn(400, 8, generator=generator) > 4.0).float()

        def train(weighting):
            net = torch.nn.Linear(6, 8)
            with torch.no_grad():
                net.weight.zero_()
                net.bias.zero_()
            loss = Objective(BinaryCrossEntropy(soft="sides"), weighting)
            optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
            for step in range(800):
                optimizer.zero_grad()
                loss(net(x), y).backward()
                optimizer.step()
                loss.update("step", index=step)
            p = net(x).sigmoid()
            return (p[y == 1].mean() - (1 - p)[y == 0].mean()).item()

        adaptive = AdaptiveAsymmetricFocal(0.0, 0.0, step_size=0.05)
        plain, followed = train(AsymmetricFocal(0.0, 0.0)), train(adaptive)
        assert plain < -0.15
        assert abs(followed) < 0.05
        assert adaptive.summary()["gamma_neg"] > 0.5
        torch.testing.assert_close(adaptive.summary()["gap"].item(), followed, rtol=0, atol=0.02)

    def test_a_step_without_positives_or_negatives_changes_nothing(self):
        for y in (torch.zeros(3, 2), torch.ones(3, 2)):
            weighting = AdaptiveAsymmetricFocal(step_size=1.0)
            objective = Objective(BinaryCrossEntropy(), weighting)
            objective(torch.randn(3, 2), y)
            objective.update("step")
            assert weighting.summary()["gamma_neg"] == 4.0

    def test_accumulation_and_soft_labels(self):
        logits, y = batch()
        soft = y * 0.6 + 0.2
        whole, parts = AdaptiveAsymmetricFocal(step_size=1.0), AdaptiveAsymmetricFocal(step_size=1.0)
        criterion = BinaryCrossEntropy(shift=0.05, soft="sides")
        Objective(criterion, whole)(logits, soft)
        for rows in torch.split(torch.arange(6), 2):
            Objective(criterion, parts)(logits[rows], soft[rows])
        for weighting in (whole, parts):
            weighting.update("step")
        torch.testing.assert_close(whole.summary(), parts.summary(), rtol=1e-12, atol=0)
        p = logits.detach().sigmoid()
        gap = (soft * p).sum() / soft.sum() - ((1 - soft) * (1 - (p - 0.05).clamp_min(0))).sum() / (1 - soft).sum()
        torch.testing.assert_close(whole.summary()["gap"], gap, rtol=1e-12, atol=0)

    def test_the_exponent_stays_in_its_range(self):
        weighting = AdaptiveAsymmetricFocal(1.0, step_size=100.0, max_gamma_neg=6.0)
        objective = Objective(BinaryCrossEntropy(), weighting)
        for x, wanted in ((5.0, 0.0), (-5.0, 6.0)):
            objective(torch.tensor([[x, x]]), torch.tensor([[1.0, 0.0]]))
            objective.update("step")
            assert weighting.summary()["gamma_neg"].item() == wanted

    def test_the_callback_drives_it(self, tmp_path):
        """With micro-batches: the exponent moves once per optimizer step, as in a hand-written loop."""

        def build():
            return _OneHot(Objective(BinaryCrossEntropy(), AdaptiveAsymmetricFocal(step_size=0.5)))

        driven = module(build())
        trainer(tmp_path, [WeightingCallback()], accumulate_grad_batches=2, max_epochs=1).fit(driven, loader(24))
        by_hand = module(build())
        optimizer = by_hand.configure_optimizers()
        for step, rows in enumerate(torch.split(torch.arange(4), 2)):
            batches = list(loader(24))
            optimizer.zero_grad()
            for i in rows.tolist():
                (by_hand.training_step(batches[i]) / 2).backward()
            optimizer.step()
            by_hand.loss.objective.update("step", index=step)
        found, wanted = driven.loss.objective.weighting.summary(), by_hand.loss.objective.weighting.summary()
        assert wanted["gamma_neg"] != 4.0
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


class _OneHot(torch.nn.Module):
    """Class numbers as three binary labels."""

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, logits, target):
        return self.objective(logits, F.one_hot(target, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma_neg": -1.0}, "gamma_neg must be finite and >= 0 and <= 10, got -1.0"),
        ({"gamma_neg": 11.0}, "gamma_neg must be finite and >= 0 and <= 10, got 11.0"),
        ({"target_gap": 2.0}, "target_gap must be finite and >= -1 and <= 1, got 2.0"),
        ({"step_size": -0.1}, "step_size must be finite and >= 0, got -0.1"),
    ],
)
def test_adaptive_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"AdaptiveAsymmetricFocal: {message}"):
        AdaptiveAsymmetricFocal(**arguments)
