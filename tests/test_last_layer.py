"""Last-layer reweighting: the solver, the influence, and that the worst group gains."""

import math

import pytest
import torch
from torch.nn import functional

from reweigh.losses import CrossEntropy, GroupRobustLastLayer, Objective

F64 = torch.float64


def together(layer):
    """(C, D) or (C, D + 1): weights, and the bias as the last column."""
    parts = [layer.weight] if layer.bias is None else [layer.weight, layer.bias.unsqueeze(1)]
    return torch.cat(parts, 1).detach()


def small(n=14, classes=3, width=2, groups=2, seed=0):
    """Training data and a target set with a few samples of every group."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda size: torch.randn(size, width, generator=generator, dtype=F64)  # noqa: E731
    labels = lambda size, high: torch.randint(high, (size,), generator=generator)  # noqa: E731
    target = {
        "target_features": draw(9),
        "target_labels": labels(9, classes),
        "target_group": torch.arange(9) % groups,
    }
    return draw(n), labels(n, classes), target


def trained(features, labels, weight, l2, classes):
    """The layer (C, D + 1) by torch's own optimizer, from the formula."""
    rows = torch.cat([features, torch.ones(len(features), 1, dtype=F64)], 1)
    layer = torch.zeros(classes, rows.shape[1], dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([layer], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def value(layer):
        ce = functional.cross_entropy(rows @ layer.T, labels, reduction="none")
        return (weight * ce).sum() / weight.sum() + 0.5 * l2 * layer.square().sum()

    def closure():
        optimizer.zero_grad()
        loss = value(layer)
        loss.backward()
        return loss

    optimizer.step(closure)
    for _ in range(2):  # to rounding
        (slope,) = torch.autograd.grad(value(layer), layer)
        hessian = torch.autograd.functional.hessian(value, layer.detach())
        step = torch.linalg.solve(hessian.reshape(slope.numel(), -1), slope.reshape(-1))
        layer = (layer.detach() - step.reshape(slope.shape)).requires_grad_()
    return layer.detach()


def group_losses(layer, target):
    rows = torch.cat([target["target_features"], torch.ones(len(target["target_features"]), 1, dtype=F64)], 1)
    ce = functional.cross_entropy(rows @ layer.T, target["target_labels"], reduction="none")
    groups = range(int(target["target_group"].max()) + 1)
    return torch.stack([ce[target["target_group"] == g].mean() for g in groups])


def soft_worst(layer, target, temperature):
    losses = group_losses(layer, target)
    return temperature * ((losses / temperature).exp().mean()).log()


def test_the_solver_finds_what_torchs_optimizer_finds():
    features, labels, target = small()
    tool = GroupRobustLastLayer(3, l2=0.05, rounds=0)
    weights = tool.fit(features, labels, **target)
    assert torch.equal(weights, torch.ones(len(features), dtype=F64))
    wanted = trained(features, labels, weights, 0.05, 3)
    found = together(tool.layer())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(tool.history()[0], group_losses(found, target), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("l2", [1e-4, 0.01, 1.0])
def test_the_gradient_at_the_optimum_is_zero(bias, l2):
    """By autograd, under the weights that were learned."""
    features, labels, target = small(n=40)
    tool = GroupRobustLastLayer(3, l2=l2, bias=bias, rounds=4)
    weights = tool.fit(features, labels, **target)
    assert weights.std() > 0
    layer = tool.layer()
    assert (layer.bias is not None) == bias
    ce = functional.cross_entropy(layer(features), labels, reduction="none")
    value = (weights * ce).mean() + 0.5 * l2 * sum(p.square().sum() for p in layer.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(layer.parameters()))])
    assert gradient.norm() < 1e-10


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_solver_finds_what_sklearn_finds(classes, bias):
    """LogisticRegression minimises C sum_i w_i l_i + |theta|^2 / 2; for two classes theta is the layer's difference."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels, target = small(n=60, classes=classes, width=3)
    l2 = 0.03
    tool = GroupRobustLastLayer(classes, l2=l2, bias=bias, rounds=3)
    weights = tool.fit(features, labels, **target)
    assert weights.std() > 0
    strength = (2.0 if classes == 2 else 1.0) / (l2 * weights.sum().item())
    peer = linear_model.LogisticRegression(
        C=strength, fit_intercept=False, solver="newton-cg", tol=1e-12, max_iter=1000
    )
    rows = torch.cat([features, torch.ones(len(features), 1, dtype=F64)], 1) if bias else features  # penalised bias
    peer.fit(rows.numpy(), labels.numpy(), sample_weight=weights.numpy())
    layer = together(tool.layer())
    found = layer[1:] - layer[:1] if classes == 2 else layer
    torch.testing.assert_close(found, torch.from_numpy(peer.coef_), rtol=1e-6, atol=1e-8)


def test_without_a_bias_a_constant_feature_serves_as_one():
    features, labels, target = small(n=30)
    ones = lambda rows: torch.cat([rows, torch.ones(len(rows), 1, dtype=F64)], 1)  # noqa: E731
    one, other = GroupRobustLastLayer(3, rounds=3), GroupRobustLastLayer(3, bias=False, rounds=3)
    weights = one.fit(features, labels, **target)
    same = other.fit(ones(features), labels, **{**target, "target_features": ones(target["target_features"])})
    assert torch.equal(weights, same)
    assert torch.equal(together(one.layer()), together(other.layer()))


@pytest.mark.parametrize(("temperature", "classes"), [(1.0, 3), (0.1, 2)])
def test_influence_is_what_retraining_does(temperature, classes):
    """Central differences of training anew with one weight moved."""
    features, labels, target = small(classes=classes)
    generator = torch.Generator().manual_seed(5)
    weight, l2, step = 0.5 + torch.rand(len(features), generator=generator, dtype=F64), 0.1, 1e-4
    tool = GroupRobustLastLayer(classes, l2=l2, temperature=temperature)
    found = tool.influence(features, labels, weight, **target)
    wanted = []
    for i in range(len(features)):
        ends = []
        for sign in (1.0, -1.0):
            moved = weight.clone()
            moved[i] += sign * step
            ends.append(soft_worst(trained(features, labels, moved, l2, classes), target, temperature))
        wanted.append(-weight.sum() * (ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-6, atol=1e-9)
    assert (weight * found).sum().item() == pytest.approx(0.0, abs=1e-12)


def test_influence_is_the_authors_formula():
    """Hessian by autograd, and each sample's gradient with the regulariser's: the same at the optimum."""
    features, labels, target = small()
    rows = torch.cat([features, torch.ones(len(features), 1, dtype=F64)], 1)
    weight, l2 = torch.ones(len(features), dtype=F64), 0.2
    tool = GroupRobustLastLayer(3, l2=l2, rounds=0)
    tool.fit(features, labels, **target)
    layer = together(tool.layer())
    shape = layer.shape

    def training(flat):
        ce = functional.cross_entropy(rows @ flat.reshape(shape).T, labels, reduction="none")
        return (weight * ce).mean() + 0.5 * l2 * flat.square().sum()

    hessian = torch.autograd.functional.hessian(training, layer.reshape(-1))
    start = layer.clone().requires_grad_()
    (slope,) = torch.autograd.grad(soft_worst(start, target, 1.0), start)
    pull = torch.linalg.solve(hessian, slope.reshape(-1))
    for i, score in enumerate(tool.influence(features, labels, **target)):
        one = layer.clone().requires_grad_()
        ce = functional.cross_entropy((rows[i] @ one.T).unsqueeze(0), labels[i : i + 1])
        (gradient,) = torch.autograd.grad(ce + 0.5 * l2 * one.square().sum(), one)
        assert score.item() == pytest.approx((gradient.reshape(-1) @ pull).item(), rel=1e-8, abs=1e-12)


def spurious(n, aligned, seed):
    """A class that one feature shows through noise and an attribute shows clearly; they go together too often."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (n,), generator=generator)
    attribute = torch.where(torch.rand(n, generator=generator) < aligned, label, 1 - label)
    features = torch.randn(n, 5, generator=generator, dtype=F64)
    features[:, 0] += 1.2 * (2 * label - 1)
    features[:, 1] = 0.3 * features[:, 1] + (2 * attribute - 1)
    return features, label, 2 * label + attribute


def worst_accuracy(layer, features, label, group):
    right = (layer(features).argmax(1) == label).double()
    return min(right[group == g].mean().item() for g in range(4))


@pytest.mark.parametrize("mix", ["softmax", "eg"])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_the_worst_group_gains(mix, temperature):
    features, label, group = spurious(500, 0.95, 0)
    target = dict(zip(("target_features", "target_labels", "target_group"), spurious(200, 0.5, 1), strict=True))
    test = spurious(4000, 0.5, 2)
    plain = GroupRobustLastLayer(2, rounds=0)
    plain.fit(features, label, **target)
    tool = GroupRobustLastLayer(2, mix=mix, temperature=temperature, rounds=15)
    weights = tool.fit(features, label, **target)
    assert weights.shape == (500,)
    assert (weights >= 0).all()
    assert weights.mean().item() == pytest.approx(1.0)
    minority = (group == 1) | (group == 2)
    assert weights[minority].mean() > 2.0 * weights[~minority].mean()
    assert worst_accuracy(plain.layer(), *test) < 0.6
    assert worst_accuracy(tool.layer(), *test) > 0.75
    worst = tool.history().amax(1)
    torch.testing.assert_close(group_losses(together(tool.layer()), target).max(), worst.min(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("mix", ["softmax", "eg"])
def test_the_worst_group_of_held_out_data_gains_on_every_seed(mix):
    """Paired: the same data under uniform weights and under the learned ones."""
    gains = []
    for seed in range(100, 106):
        features, label, _ = spurious(400, 0.95, seed)
        names = ("target_features", "target_labels", "target_group")
        target = dict(zip(names, spurious(200, 0.5, seed + 1000), strict=True))
        test = spurious(4000, 0.5, seed + 2000)
        tool, plain = (GroupRobustLastLayer(2, mix=mix, temperature=0.2, rounds=r) for r in (10, 0))
        weights = tool.fit(features, label, **target)
        assert (weights >= 0).all()
        assert weights.mean().item() == pytest.approx(1.0)
        plain.fit(features, label, **target)
        gains.append(worst_accuracy(tool.layer(), *test) - worst_accuracy(plain.layer(), *test))
    assert min(gains) > 0.2


def test_weights_are_clamped_where_a_step_goes_below_zero():
    """And renormalised: some are exactly 0, all stay >= 0 with mean 1."""
    features, label, _ = spurious(300, 0.95, 9)
    target = dict(zip(("target_features", "target_labels", "target_group"), spurious(80, 0.5, 10), strict=True))
    weights = GroupRobustLastLayer(2, outer_lr=20.0, rounds=5).fit(features, label, **target)
    assert (weights == 0).any()
    assert (weights >= 0).all()
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-12)


def test_one_round_is_the_written_update():
    """w = clamp(1 + outer_lr * influence, 0), mean 1: small enough a step is taken whole."""
    features, labels, target = small(n=30)
    tool = GroupRobustLastLayer(3, outer_lr=0.05, rounds=1)
    weights = tool.fit(features, labels, **target)
    moved = (1.0 + 0.05 * tool.influence(features, labels, **target)).clamp_min(0.0)
    torch.testing.assert_close(weights, moved / moved.mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_two_rounds_of_the_eg_mix_by_hand(temperature):
    """q_g becomes proportional to exp of the group's losses so far, over T; it mixes the groups' own influences."""
    features, labels, target = small(n=30, groups=3)
    rate, weights, total = 0.05, torch.ones(30, dtype=F64), torch.zeros(3, dtype=F64)
    alone = [{name: value[target["target_group"] == g] for name, value in target.items()} for g in range(3)]
    alone = [{**one, "target_group": torch.zeros_like(one["target_group"])} for one in alone]
    tool = GroupRobustLastLayer(3, mix="eg", temperature=temperature, outer_lr=rate, rounds=2)
    found = tool.fit(features, labels, **target)
    for losses in tool.history()[:2]:
        total = total + losses / temperature
        q = total.exp() / total.exp().sum()
        each = [GroupRobustLastLayer(3).influence(features, labels, weights, **one) for one in alone]
        weights = (weights + rate * sum(q[g] * each[g] for g in range(3))).clamp_min(0.0)
        weights = weights / weights.mean()
    assert int(tool.history().amax(1).argmin()) == 2
    torch.testing.assert_close(found, weights, rtol=1e-10, atol=0)


@pytest.mark.parametrize("mix", ["softmax", "eg"])
def test_fitting_again_gives_the_same_bits(mix):
    """Nothing is drawn, nothing is left from the last fit, and the global generator is not touched."""
    features, labels, target = small(n=40)
    before = torch.get_rng_state()
    tool = GroupRobustLastLayer(3, mix=mix, rounds=5)
    first = tool.fit(features, labels, **target), together(tool.layer()), tool.history(), tool.accuracy_history()
    tool.fit(features.flip(0), labels, **target)
    again = tool.fit(features, labels, **target), together(tool.layer()), tool.history(), tool.accuracy_history()
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_the_accuracy_history_is_counted():
    features, label, _ = spurious(300, 0.95, 11)
    drawn = spurious(120, 0.5, 12)
    target = dict(zip(("target_features", "target_labels", "target_group"), drawn, strict=True))
    plain = GroupRobustLastLayer(2, rounds=0)
    plain.fit(features, label, **target)
    tool = GroupRobustLastLayer(2, temperature=0.2, rounds=8)
    tool.fit(features, label, **target)
    found = tool.accuracy_history()
    assert found.shape == tool.history().shape
    assert found[0].min().item() == pytest.approx(worst_accuracy(plain.layer(), *drawn))
    best = int(tool.history().amax(1).argmin())
    assert found[best].min().item() == pytest.approx(worst_accuracy(tool.layer(), *drawn))
    assert found[best].min() > found[0].min()


def test_the_soft_target_never_rises():
    features, label, _ = spurious(300, 0.95, 3)
    target = dict(zip(("target_features", "target_labels", "target_group"), spurious(80, 0.5, 4), strict=True))
    tool = GroupRobustLastLayer(2, temperature=0.5, rounds=10, outer_lr=50.0)
    tool.fit(features, label, **target)
    values = (tool.history() / 0.5).logsumexp(1)
    assert (values.diff() < 0).all()
    assert len(values) > 3


def test_the_weights_serve_as_sample_weight():
    """A layer trained under an objective with them is the tool's."""
    features, labels, target = small(n=30)
    tool = GroupRobustLastLayer(3, l2=0.1, rounds=3)
    weights = tool.fit(features, labels, **target)
    layer, objective = tool.layer(), Objective(CrossEntropy())
    loss = objective(layer(features), labels, sample_weight=weights)
    loss = loss + 0.05 * sum(p.square().sum() for p in layer.parameters())
    for gradient in torch.autograd.grad(loss, list(layer.parameters())):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


def test_a_high_temperature_is_the_mean_over_groups():
    features, labels, target = small()
    hot = GroupRobustLastLayer(3, temperature=1e6).influence(features, labels, **target)
    alone = [
        GroupRobustLastLayer(3).influence(
            features, labels, **{name: value[target["target_group"] == g] for name, value in target.items()}
        )
        for g in range(2)
    ]
    torch.testing.assert_close(hot, torch.stack(alone).mean(0), rtol=1e-5, atol=1e-8)


def test_the_temperature_of_the_eg_mix_counts():
    """Trap of the authors' code, where it cancels."""
    features, label, _ = spurious(200, 0.9, 5)
    target = dict(zip(("target_features", "target_labels", "target_group"), spurious(80, 0.5, 6), strict=True))
    found = [
        GroupRobustLastLayer(2, mix="eg", temperature=t, rounds=1).fit(features, label, **target) for t in (1.0, 0.1)
    ]
    assert (found[0] - found[1]).abs().max() > 0.01


def test_groups_without_target_samples_do_not_matter():
    features, labels, target = small()
    skipping = {**target, "target_group": 3 * target["target_group"]}  # groups 0 and 3; 1 and 2 are empty
    for mix in ("softmax", "eg"):
        one, other = (GroupRobustLastLayer(3, mix=mix, rounds=4) for _ in range(2))
        torch.testing.assert_close(one.fit(features, labels, **target), other.fit(features, labels, **skipping))
        assert other.history()[:, 1:3].isnan().all()
        torch.testing.assert_close(other.history()[:, [0, 3]], one.history())
        assert other.accuracy_history()[:, 1:3].isnan().all()
        torch.testing.assert_close(other.accuracy_history()[:, [0, 3]], one.accuracy_history())


def test_float32_features_of_any_scale():
    features, labels, target = small(n=40)
    for scale in (1e-3, 1.0, 1e3):
        scaled = {**target, "target_features": (scale * target["target_features"]).float()}
        weights = GroupRobustLastLayer(3, rounds=2).fit((scale * features).float(), labels, **scaled)
        assert weights.isfinite().all()
        assert weights.dtype == F64


def test_settings_are_printed_and_rebuilt():
    tool = GroupRobustLastLayer(3, l2=0.5, mix="eg")
    assert repr(tool) == "GroupRobustLastLayer(3, l2=0.5, mix='eg')"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(14, 2, dtype=torch.long)}, TypeError, "features must be a floating tensor"),
        ({"features": torch.zeros(14, dtype=F64)}, ValueError, "features must be (samples, features)"),
        ({"features": torch.full((14, 2), math.nan)}, ValueError, "features must be finite"),
        ({"labels": torch.zeros(14)}, TypeError, "labels must be an integer tensor, got torch.float32"),
        ({"labels": torch.zeros(13, dtype=torch.long)}, ValueError, "labels must have shape (14,), got (13,)"),
        ({"labels": torch.full((14,), 3)}, ValueError, "labels must be in [0, 3), got 3..3"),
        ({"target_features": torch.zeros(9, 3)}, ValueError, "target_features must have 2 columns, got 3"),
        (
            {"target_features": torch.zeros(0, 2)},
            ValueError,
            "target_features must be (samples, features) with samples",
        ),
        ({"target_features": torch.full((9, 2), math.inf)}, ValueError, "target_features must be finite"),
        ({"target_labels": torch.full((9,), 5)}, ValueError, "target_labels must be in [0, 3), got 5..5"),
        ({"target_group": torch.zeros(8, dtype=torch.long)}, ValueError, "target_group must have shape (9,), got (8,)"),
        ({"target_group": torch.full((9,), -1)}, ValueError, "target_group must be >= 0, got -1..-1"),
    ],
)
def test_what_is_refused(change, error, message):
    features, labels, target = small()
    given = {"features": features, "labels": labels, **target, **change}
    with pytest.raises(error) as found:
        GroupRobustLastLayer(3).fit(**given)
    assert message in str(found.value)


def test_more_that_is_refused():
    features, labels, target = small()
    tool = GroupRobustLastLayer(3)
    with pytest.raises(ValueError, match=r"call fit\(\) before layer\(\)"):
        tool.layer()
    with pytest.raises(ValueError, match=r"call fit\(\) before history\(\)"):
        tool.history()
    with pytest.raises(ValueError, match=r"call fit\(\) before accuracy_history\(\)"):
        tool.accuracy_history()
    with pytest.raises(ValueError, match="l2 must be finite and > 0, got 0"):
        GroupRobustLastLayer(3, l2=0.0)
    with pytest.raises(ValueError, match="mix must be one of 'softmax', 'eg', got 'worst'"):
        GroupRobustLastLayer(3, mix="worst")
    with pytest.raises(ValueError, match="weight must be finite, >= 0 and not all 0"):
        tool.influence(features, labels, torch.zeros(14), **target)
    with pytest.raises(ValueError, match=r"weight must be a tensor of shape \(14,\), got \(3,\)"):
        tool.influence(features, labels, torch.ones(3), **target)
