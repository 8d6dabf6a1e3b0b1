"""Bad input: exactly one ValueError or TypeError that names the argument, the rule and the value found."""

import copy
import math

import pytest
import torch
from torch import nn

import reweigh
from reweigh import losses, weighting
from reweigh.losses import (
    BalancedSoftmax,
    BinaryCrossEntropy,
    Chain,
    CrossEntropy,
    FocalLoss,
    FromLoss,
    LogitAdjustment,
    Objective,
    SigmoidFocalLoss,
    Temperature,
    functional,
)
from reweigh.weighting import (
    Between,
    ClassWeight,
    Constant,
    EffectiveNumber,
    Focal,
    InClasses,
    InverseClassLoss,
    InverseFrequency,
    Linear,
    Piecewise,
    PositiveBalance,
    Product,
    Sum,
    Weighting,
)

X, Y = torch.linspace(-1, 1, 12).reshape(4, 3), torch.tensor([0, 1, 2, 0])
B = torch.tensor([[0.0, 1.0, 0.0]] * 4)
NAN = math.nan


def t(*values):
    return torch.tensor(values)


class WrongShape(Weighting):
    def weigh(self, terms):
        return torch.ones(7)


class NotATensor(Weighting):
    def weigh(self, terms):
        return 1.0


class Charging(Weighting):
    def weigh(self, terms):
        return torch.ones_like(terms.loss)

    def penalty(self, terms, weights):
        return weights.sum()


L1 = FromLoss(nn.L1Loss(reduction="none"))
SOFTMAX = {
    # name: (call on a loss, error, message)
    "logits_integer": (lambda f: f(X.long(), Y), TypeError, r"logits must be a floating-point tensor, got torch.int64"),
    "logits_list": (lambda f: f([[1.0]], Y), TypeError, r"logits must be a floating-point tensor, got list"),
    "logits_complex": (
        lambda f: f(X + 0j, Y),
        TypeError,
        r"logits must be a floating-point tensor, got torch.complex64",
    ),
    "logits_scalar": (lambda f: f(X[0, 0], Y[0]), ValueError, r"logits must have a class dimension, got a scalar"),
    "logits_no_class": (
        lambda f: f(X[:, :0], Y),
        ValueError,
        r"logits must have at least one class, got shape \(4, 0\)",
    ),
    "target_length": (lambda f: f(X, Y[:2]), ValueError, r"target must have shape \(4,\).*logits \(4, 3\), got \(2,\)"),
    "target_column": (lambda f: f(X, Y[:, None]), ValueError, r"target must have shape \(4,\).*, got \(4, 1\)"),
    "target_one_hot_integers": (lambda f: f(X, B.long()), ValueError, r"target must have shape \(4,\).*, got \(4, 3\)"),
    "target_list": (
        lambda f: f(X, [0, 1, 2, 0]),
        TypeError,
        r"target must be class indices or probabilities, got list",
    ),
    "target_bool": (lambda f: f(X, Y.bool()), TypeError, r"target must be class indices or .*, got torch.bool"),
    "target_complex": (lambda f: f(X, B + 0j), TypeError, r"target must be class indices or .*, got torch.complex64"),
    "target_float_labels": (
        lambda f: f(X, Y.float()),
        ValueError,
        r"probability targets must have .* \(4, 3\), got \(4,\)",
    ),
    "label_high": (
        lambda f: f(X, t(0, 1, 3, 0)),
        ValueError,
        r"target must be in \[0, 3\) or ignore_index=-100, got 3",
    ),
    "label_low": (
        lambda f: f(X, t(0, -1, 2, 0)),
        ValueError,
        r"target must be in \[0, 3\) or ignore_index=-100, got -1",
    ),
    "probability_negative": (lambda f: f(X, -B), ValueError, r"probability targets must be finite and >= 0, got -1"),
    "probability_nan": (lambda f: f(X, B * NAN), ValueError, r"probability targets must be finite and >= 0, got nan"),
    "probability_infinite": (
        lambda f: f(X, B / 0),
        ValueError,
        r"probability targets must be finite and >= 0, got (nan|inf)",
    ),
    "inputs_one": (lambda f: f(X), TypeError, r"takes \(logits, target\), got 1 inputs"),
    "inputs_three": (lambda f: f(X, Y, Y), TypeError, r"takes \(logits, target\), got 3 inputs"),
    "mask_float": (
        lambda f: f(X, Y, mask=torch.ones(4)),
        TypeError,
        r"mask must be a bool tensor .*, got torch.float32",
    ),
    "mask_list": (lambda f: f(X, Y, mask=[True] * 4), TypeError, r"mask must be a bool tensor .*, got list"),
    "mask_length": (
        lambda f: f(X, Y, mask=Y[:3] > 0),
        ValueError,
        r"mask must have the terms' shape \(4,\) .*, got \(3,\)",
    ),
    "mask_of_logits": (
        lambda f: f(X, Y, mask=X > 0),
        ValueError,
        r"mask must have the terms' shape \(4,\) .*, got \(4, 3\)",
    ),
    "weight_length": (
        lambda f: f(X, Y, sample_weight=torch.ones(3)),
        ValueError,
        r"sample_weight must have .* \(4,\), got \(3,\)",
    ),
    "weight_scalar": (
        lambda f: f(X, Y, sample_weight=t(1.0)[0]),
        ValueError,
        r"sample_weight must have .* \(4,\), got \(\)",
    ),
    "weight_negative": (
        lambda f: f(X, Y, sample_weight=t(1, 1, -2, 1)),
        ValueError,
        r"sample_weight must be finite and >= 0, got -2",
    ),
    "weight_nan": (
        lambda f: f(X, Y, sample_weight=t(1, NAN, 1, 1)),
        ValueError,
        r"sample_weight must be finite and >= 0, got nan",
    ),
    "weight_infinite": (
        lambda f: f(X, Y, sample_weight=t(1, math.inf, 1, 1)),
        ValueError,
        r"sample_weight must be .*, got inf",
    ),
    "weight_list": (
        lambda f: f(X, Y, sample_weight=[1] * 4),
        TypeError,
        r"sample_weight must be a real tensor, got list",
    ),
    "weight_complex": (
        lambda f: f(X, Y, sample_weight=Y + 0j),
        TypeError,
        r"sample_weight must be a real tensor, got torch.complex",
    ),
    "group_float": (
        lambda f: f(X, Y, group=Y.float()),
        TypeError,
        r"group must be an integer tensor, got torch.float32",
    ),
    "group_bool": (lambda f: f(X, Y, group=Y > 0), TypeError, r"group must be an integer tensor, got torch.bool"),
    "group_length": (
        lambda f: f(X, Y, group=Y[:3]),
        ValueError,
        r"group must hold one integer per sample, shape \(4,\), got \(3,\)",
    ),
    "index_float": (
        lambda f: f(X, Y, index=Y.float()),
        TypeError,
        r"index must be an integer tensor, got torch.float32",
    ),
    "index_column": (
        lambda f: f(X, Y, index=Y[:, None]),
        ValueError,
        r"index must hold one integer per sample.*, got \(4, 1\)",
    ),
    "items_zero": (lambda f: f(X, Y, num_items=0), ValueError, r"num_items: value must be finite and > 0, got 0"),
    "items_nan": (lambda f: f(X, Y, num_items=NAN), ValueError, r"num_items: value must be finite and > 0, got nan"),
    "items_text": (lambda f: f(X, Y, num_items="3"), TypeError, r"num_items: value must be a number, got '3' \(str\)"),
    "items_vector": (
        lambda f: f(X, Y, num_items=torch.ones(2)),
        ValueError,
        r"num_items must be one number, got shape \(2,\)",
    ),
    "items_negative_tensor": (
        lambda f: f(X, Y, num_items=t(-2.0)),
        ValueError,
        r"num_items must be finite and >= 0, got -2",
    ),
    "items_nan_tensor": (
        lambda f: f(X, Y, num_items=t(NAN)),
        ValueError,
        r"num_items must be finite and >= 0, got nan",
    ),
    "statistic_list": (lambda f: f(X, Y, urgency=[1]), TypeError, r"urgency must be a tensor, got list"),
    "statistic_length": (
        lambda f: f(X, Y, urgency=torch.ones(7)),
        ValueError,
        r"urgency must have .* \(4,\), got \(7,\)",
    ),
}
SIGMOID = {
    "logits_integer": (lambda f: f(X.long(), B), TypeError, r"logits must be a floating-point tensor, got torch.int64"),
    "logits_none": (lambda f: f(None, B), TypeError, r"logits must be a floating-point tensor, got NoneType"),
    "target_rows": (lambda f: f(X, B[:2]), ValueError, r"target must have the logits' shape \(4, 3\), got \(2, 3\)"),
    "target_labels": (lambda f: f(X, Y), ValueError, r"target must have the logits' shape \(4, 3\), got \(4,\)"),
    "target_high": (lambda f: f(X, B * 2), ValueError, r"target must be in \[0, 1\] or ignore_index=-100, got 2"),
    "target_low": (lambda f: f(X, B - 1), ValueError, r"target must be in \[0, 1\] or ignore_index=-100, got -1"),
    "target_nan": (lambda f: f(X, B * NAN), ValueError, r"target must be in \[0, 1\] or ignore_index=-100, got nan"),
    "target_complex": (lambda f: f(X, B + 0j), TypeError, r"target must be a real tensor, got torch.complex64"),
    "target_list": (lambda f: f(X, [1.0]), TypeError, r"target must be a real tensor, got list"),
    "inputs_one": (lambda f: f(X), TypeError, r"takes \(logits, target\), got 1 inputs"),
    "mask_shape": (
        lambda f: f(X, B, mask=X[:, :2] > 0),
        ValueError,
        r"mask must have the terms' shape \(4, 3\) .*, got \(4, 2\)",
    ),
    "mask_integer": (lambda f: f(X, B, mask=Y), TypeError, r"mask must be a bool tensor .*, got torch.int64"),
    "weight_shape": (
        lambda f: f(X, B, sample_weight=torch.ones(3)),
        ValueError,
        r"sample_weight must have .* \(4, 3\) or \(4,\), got \(3,\)",
    ),
    "weight_negative": (
        lambda f: f(X, B, sample_weight=-torch.ones(4)),
        ValueError,
        r"sample_weight must be .* >= 0, got -1",
    ),
    "group_terms": (
        lambda f: f(X, B, group=B.long()),
        ValueError,
        r"group must hold one integer per sample, shape \(4,\), got \(4, 3\)",
    ),
}
SOFTMAX_LOSSES = {
    "focal": FocalLoss,
    "criterion": lambda: CrossEntropy().terms,
    "composed": lambda: Objective(CrossEntropy(), Focal(1.0) * ClassWeight([1.0, 2.0, 3.0]), "sum"),
    "nested": lambda: Objective(Objective(CrossEntropy(), Focal(), "none"), None, "weighted_mean"),
    "parts": lambda: FocalLoss().parts,
    "weights": lambda: FocalLoss().weights,
    "components": lambda: FocalLoss().components,
    "functional": lambda: functional.focal_loss,
}
SIGMOID_LOSSES = {
    "focal": SigmoidFocalLoss,
    "criterion": lambda: BinaryCrossEntropy().terms,
    "composed": lambda: Objective(BinaryCrossEntropy(), PositiveBalance() * Focal(1.0)),
    "functional": lambda: functional.sigmoid_focal_loss,
}


def refused(call, error, message):
    """The call raises exactly this type, from a message of one line, and leaves the grad mode alone."""
    with pytest.raises(error, match=message) as caught:
        call()
    assert caught.type is error
    assert "\n" not in str(caught.value)
    assert torch.is_grad_enabled()


def runs(case, loss):
    """Whether a case applies: some calls have no denominator; functions name their arguments themselves."""
    no_items = case.startswith("items") and loss in ("criterion", "composed", "parts", "weights")
    return not (no_items or (case.startswith("inputs") and loss == "functional"))


@pytest.mark.parametrize(("loss", "case"), [(a, b) for a in SOFTMAX_LOSSES for b in SOFTMAX if runs(b, a)])
def test_softmax_inputs(loss, case):
    call, error, message = SOFTMAX[case]
    before = copy.deepcopy((X, Y, B))
    refused(lambda: call(SOFTMAX_LOSSES[loss]()), error, message)
    assert all(torch.equal(now, then) for now, then in zip((X, Y, B), before, strict=True))


@pytest.mark.parametrize(("loss", "case"), [(a, b) for a in SIGMOID_LOSSES for b in SIGMOID if runs(b, a)])
def test_sigmoid_inputs(loss, case):
    call, error, message = SIGMOID[case]
    before = copy.deepcopy((X, Y, B))
    refused(lambda: call(SIGMOID_LOSSES[loss]()), error, message)
    assert all(torch.equal(now, then) for now, then in zip((X, Y, B), before, strict=True))


NUMBERS = {
    # constructor of one number, its rule in the message, values out of range
    "Focal.gamma": (
        Focal,
        "gamma must be finite and >= 0",
        [-1.0, NAN, math.inf, torch.tensor(-1.0), Linear(-1.0, 1.0, duration=2)],
    ),
    "FocalLoss.gamma": (FocalLoss, "gamma must be finite and >= 0", [-1e-9, NAN]),
    "SigmoidFocalLoss.gamma": (SigmoidFocalLoss, "gamma must be finite and >= 0", [-1.0, math.inf]),
    "SigmoidFocalLoss.alpha": (
        lambda v: SigmoidFocalLoss(alpha=v),
        "alpha must be finite and >= 0 and <= 1",
        [-0.1, 1.5, NAN],
    ),
    "FocalLoss.alpha": (lambda v: FocalLoss(alpha=v), "alpha must be finite and >= 0", [-1.0, NAN, torch.tensor(-1.0)]),
    "label_smoothing": (
        lambda v: FocalLoss(label_smoothing=v),
        "label_smoothing must be finite and >= 0 and <= 1",
        [-0.1, 1.1, NAN],
    ),
    "pos_weight": (
        lambda v: BinaryCrossEntropy(pos_weight=v),
        "pos_weight must be finite and >= 0",
        [-1.0, NAN, math.inf],
    ),
    "EffectiveNumber.beta": (
        lambda v: EffectiveNumber([1, 2], beta=v),
        "beta must be finite and >= 0 and < 1",
        [-0.1, 1.0, NAN, Linear(0.0, 1.0, duration=2)],
    ),
    "InverseFrequency.power": (
        lambda v: InverseFrequency([1, 2], power=v),
        "power must be finite and >= 0",
        [-1.0, NAN],
    ),
    "LogitAdjustment.tau": (lambda v: LogitAdjustment([1, 2], tau=v), "tau must be finite and >= 0", [-1.0, math.inf]),
    "Temperature": (Temperature, "temperature must be finite and > 0", [0.0, -1.0, NAN]),
    "PositiveBalance": (PositiveBalance, "alpha must be finite and >= 0 and <= 1", [-0.5, 2.0]),
    "Constant": (Constant, "value must be finite and >= 0", [-1.0, NAN]),
    "factor": (lambda v: v * Focal(), "Constant: value must be finite and >= 0", [-1.0, NAN]),
    "summand": (lambda v: Focal() + v, "Constant: value must be finite and >= 0", [-1.0, math.inf]),
    "exponent": (lambda v: Focal() ** v, "Power: exponent must be finite and >= 0", [-1.0, NAN]),
    "clip.min": (lambda v: Focal().clip(min=v), "Clip: min must be finite and >= 0", [-1.0, NAN]),
    "clip.max": (lambda v: Focal().clip(max=v), "Clip: max must be finite and >= 0", [-1.0, math.inf]),
    "ema.beta": (lambda v: Focal().ema(v, 3), "EMA: beta must be finite and >= 0 and < 1", [-0.1, 1.0, NAN]),
    "smoothing": (
        lambda v: InverseClassLoss(2, smoothing=v),
        "smoothing must be finite and > 0 and <= 1",
        [0.0, 1.5, NAN],
    ),
    "eps": (lambda v: InverseClassLoss(2, eps=v), "eps must be finite and > 0", [0.0, -1.0]),
    "Linear.end": (lambda v: Linear(0.0, v, duration=2), "end must be finite", [math.inf, NAN]),
    "Between.low": (lambda v: Between("loss", low=v), "low must be finite", [NAN, -math.inf]),
    "star.gamma": (lambda v: functional.sigmoid_focal_loss_star(X, B, v), "gamma must be finite and > 0", [0.0, -1.0]),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, row in NUMBERS.items() for value in row[2]], ids=str
)
def test_numbers_out_of_range(name, value):
    make, rule, _ = NUMBERS[name]
    refused(lambda: make(value), ValueError, f"{rule}, got ")


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"FocalLoss.alpha", "pos_weight"}))
@pytest.mark.parametrize("value", ["2", [1.0, 2.0], True, 1j, {}, torch.tensor([1.0, 2.0])], ids=str)
def test_numbers_of_the_wrong_type(name, value):
    make, rule, _ = NUMBERS[name]
    refused(lambda: make(value), TypeError, rule.split(" must")[0] + " must be a number, got ")


TABLES = {
    "ClassWeight": (ClassWeight, "ClassWeight: weight"),
    "InverseFrequency": (InverseFrequency, "InverseFrequency: counts"),
    "EffectiveNumber": (EffectiveNumber, "EffectiveNumber: counts"),
    "LogitAdjustment": (LogitAdjustment, "LogitAdjustment: counts"),
    "FocalLoss.alpha": (lambda v: FocalLoss(alpha=v), "FocalLoss: alpha"),
    "FocalLoss.weight": (lambda v: FocalLoss(weight=v), "CrossEntropy: weight"),
    "pos_weight": (lambda v: BinaryCrossEntropy(pos_weight=v), "BinaryCrossEntropy: pos_weight"),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("value", "error", "rule"),
    [
        ([1.0, NAN], ValueError, "must be finite and >= 0, got nan at position 1"),
        ([math.inf, 1.0], ValueError, "must be finite and >= 0, got inf at position 0"),
        ([1.0, 2.0, -3.0], ValueError, "must be finite and >= 0, got -3 at position 2"),
        ([], ValueError, r"must be a non-empty vector \(one number per class\), got shape \(0,\)"),
        ([[1.0, 2.0]], ValueError, r"must be a non-empty vector .*, got shape \(1, 2\)"),
        (torch.ones(2, 2), ValueError, r"must be a non-empty vector .*, got shape \(2, 2\)"),
        ([1.0, "a"], TypeError, "must be a sequence of numbers, got list"),
        ({"a": 1.0}, TypeError, "must be a sequence of numbers, got dict"),
        (torch.tensor([1j]), TypeError, "must be a sequence of numbers, got Tensor"),
    ],
    ids=str,
)
def test_tables(name, value, error, rule):
    make, owner = TABLES[name]
    refused(lambda: make(value), error, f"{owner} {rule}")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: FocalLoss(alpha="ballanced"),
            ValueError,
            r"alpha must be one of 'balanced', 'sqrt', 'effective', got 'ballanced'",
        ),
        (lambda: FocalLoss(weight="ballanced"), ValueError, r"weight must be one of .*, got 'ballanced'"),
        (lambda: FocalLoss(ignore_index=1.5), TypeError, r"ignore_index must be an integer, got 1.5"),
        (lambda: FocalLoss(ignore_index=None), TypeError, r"ignore_index must be an integer, got None"),
        (lambda: FocalLoss(reduction=None), ValueError, r"reduction must be one of .*, got None"),
        (lambda: FocalLoss(reduction=["mean"]), ValueError, r"reduction must be one of .*, got \['mean'\]"),
        (lambda: InverseFrequency([0, 0]), ValueError, r"counts must hold at least one positive number, got all zeros"),
        (lambda: InverseFrequency([1, 2], num_classes=3), ValueError, r"counts must have num_classes=3 entries, got 2"),
        (
            lambda: InverseFrequency([1, 2], normalize="mean"),
            ValueError,
            r"normalize must be one of 'classes', .*, got 'mean'",
        ),
        (lambda: EffectiveNumber(num_classes=0), ValueError, r"EffectiveNumber: num_classes must be >= 1, got 0"),
        (lambda: CrossEntropy(logits=nn.ReLU()), TypeError, r"logits must be a LogitTransform, got ReLU"),
        (lambda: Chain(nn.ReLU()), TypeError, r"transforms must be LogitTransforms, got ReLU"),
        (lambda: FromLoss("nowhere.nothing"), ValueError, r"fn must be importable, got 'nowhere.nothing'"),
        (lambda: FromLoss("torch.nothing"), ValueError, r"fn must be importable, got 'torch.nothing'"),
        (lambda: FromLoss("l1_loss"), ValueError, r"fn must be importable, got 'l1_loss'"),
        (lambda: FromLoss(3), TypeError, r"fn must be callable or a dotted path, got int"),
        (
            lambda: Objective(nn.L1Loss()),
            TypeError,
            r"criterion must be a Criterion, got L1Loss; wrap a loss function in FromLoss",
        ),
        (lambda: Objective(3), TypeError, r"criterion must be a Criterion, got int"),
        (lambda: Objective(nn.CrossEntropyLoss()), TypeError, r"got CrossEntropyLoss; use CrossEntropy\(\)"),
        (lambda: Objective(nn.BCEWithLogitsLoss()), TypeError, r"got BCEWithLogitsLoss; use BinaryCrossEntropy\(\)"),
        (lambda: Objective(Focal(), CrossEntropy()), TypeError, r"got Focal; the weighting is the second argument"),
        (
            lambda: Objective(CrossEntropy(), BalancedSoftmax([1, 2])),
            TypeError,
            r"weighting must be .* got BalancedSoftmax; it changes logits: CrossEntropy\(logits=\.\.\.\)",
        ),
        (
            lambda: Focal() * BalancedSoftmax([1, 2]),
            TypeError,
            r"must be a Weighting, a number or a schedule, got BalancedSoftmax; .*CrossEntropy\(logits=\.\.\.\)",
        ),
        (lambda: BalancedSoftmax([1, 2])(torch.zeros(2, 3)), ValueError, r"^BalancedSoftmax: has counts of 2 classes"),
        (lambda: Objective(CrossEntropy(), 3.0), TypeError, r"weighting must be a Weighting or None, got float"),
        (
            lambda: Objective(L1, Focal()),
            TypeError,
            r"Focal needs 'log_pt', which FromLoss does not provide \(it provides 'loss'\)",
        ),
        (
            lambda: Objective(L1, (2 * Focal()).clip(max=1).normalize()),
            TypeError,
            r"Focal needs 'log_pt', which FromLoss",
        ),
        (
            lambda: Objective(L1, Constant().normalize(over="class")),
            TypeError,
            r"Normalize needs 'category', which FromLoss",
        ),
        (lambda: Objective(L1, Constant().ema(0.5, 3)), TypeError, r"EMA needs 'category', which FromLoss"),
        (lambda: Objective(FocalLoss(), Focal()), TypeError, r"Focal needs 'log_pt', which FocalLoss does not provide"),
        (lambda: Product(), ValueError, r"Product: needs at least one factor, got none"),
        (lambda: Sum(), ValueError, r"Sum: needs at least one summand, got none"),
        (lambda: Focal() * "a", TypeError, r"Constant: value must be a number, got 'a'"),
        (lambda: Focal().clip(), ValueError, r"at least one of min and max must be given, got neither"),
        (lambda: Focal().clip(2, 1), ValueError, r"min must be <= max, got min=2, max=1"),
        (lambda: Focal().normalize(over="sequence"), ValueError, r"over must be one of 'batch', .*, got 'sequence'"),
        (lambda: Focal().normalize(to="median"), ValueError, r"to must be one of 'mean', 'sum', 'max', got 'median'"),
        (lambda: Focal().normalize(over="class", to="max"), ValueError, r"to='max' works over .*, got over='class'"),
        (lambda: Focal().pooled("sample"), ValueError, r"over must be one of 'sequence', .*, got 'sample'"),
        (lambda: Focal().where(1.0), TypeError, r"condition must be a weighting, got float"),
        (lambda: InClasses([]), ValueError, r"classes must not be empty"),
        (lambda: InClasses([1.5]), TypeError, r"classes must be an integer, got 1.5"),
        (lambda: InClasses([-1]), ValueError, r"classes must be >= 0, got -1"),
        (lambda: Between("loss"), ValueError, r"at least one of low and high must be given, got neither"),
        (lambda: Between(3, low=0.0), TypeError, r"statistic must be a name, got 3"),
        (lambda: Focal().warmup(0), ValueError, r"duration must be >= 1, got 0"),
        (lambda: Focal().warmup(2.5), TypeError, r"duration must be an integer, got 2.5"),
        (lambda: Focal().warmup(2, by="batch"), ValueError, r"by must be one of 'step', 'epoch', got 'batch'"),
        (lambda: Focal().ema(0.5, 0), ValueError, r"num_slots must be >= 1, got 0"),
        (lambda: Focal().ema(0.5, 3, by="sample"), ValueError, r"by must be one of 'category', .*, got 'sample'"),
        (lambda: Linear(0, 1, duration=1, delay=-1), ValueError, r"delay must be >= 0, got -1"),
        (
            lambda: Piecewise([0.0, 1.0], [1, 2]),
            ValueError,
            r"milestones must be increasing and one fewer than values, got \[1, 2\] for 2",
        ),
        (lambda: Piecewise([0.0, 1.0, 2.0], [2, 1]), ValueError, r"milestones must be increasing .*, got \[2, 1\]"),
        (lambda: InverseClassLoss(0), ValueError, r"num_classes must be >= 1, got 0"),
        (lambda: InverseClassLoss(2.5), TypeError, r"num_classes must be an integer, got 2.5"),
        (lambda: InverseClassLoss(2, to="max"), ValueError, r"to must be one of 'sum', 'mean', got 'max'"),
        (
            lambda: InverseClassLoss(2, cadence="epoch"),
            ValueError,
            r"cadence must be one of 'step', 'forward', got 'epoch'",
        ),
        (lambda: FocalLoss(2.0, 0.25), TypeError, r"takes from 1 to 2 positional arguments but 3 were given"),
        (lambda: FocalLoss(gama=2.0), TypeError, r"unexpected keyword argument 'gama'"),
        (lambda: losses.create("fokal"), ValueError, r"no objective is called 'fokal'; did you mean 'focal'"),
        (
            lambda: weighting.create("inverse_freq"),
            ValueError,
            r"no weighting is called 'inverse_freq'; did you mean 'inverse_frequency'",
        ),
    ],
)
def test_constructors(make, error, message):
    refused(make, error, message)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: FocalLoss(alpha=[1.0, 2.0])(X, Y),
            ValueError,
            r"has 2 class weights, but the criterion has 3 classes",
        ),
        (
            lambda: FocalLoss(alpha=[1.0, 2.0])(X, B),
            ValueError,
            r"has 2 class weights, but the criterion has 3 classes",
        ),
        (lambda: FocalLoss(weight=[1.0, 2.0])(X, Y), ValueError, r"weight must have one entry per class \(3\), got 2"),
        (
            lambda: Objective(BinaryCrossEntropy(weight=[1.0, 2.0]))(X, B),
            ValueError,
            r"weight must have one entry per class \(3\), got 2",
        ),
        (
            lambda: Objective(BinaryCrossEntropy(pos_weight=[1.0, 2.0]))(X, B),
            ValueError,
            r"pos_weight must be one number or one per label \(3\), got 2",
        ),
        (
            lambda: Objective(CrossEntropy(logits=LogitAdjustment([1, 2])))(X, Y),
            ValueError,
            r"has counts of 2 classes, but the logits have 3 along dimension 1",
        ),
        (
            lambda: Objective(CrossEntropy(logits=BalancedSoftmax([1, 2])))(X, Y),
            ValueError,
            r"has counts of 2 classes, but the logits have 3",
        ),
        (
            lambda: functional.posthoc_logit_adjustment(X, [1, 2]),
            ValueError,
            r"has counts of 2 classes, but the logits have 3 along dimension -1",
        ),
        (
            lambda: FocalLoss(alpha="balanced")(X, Y),
            ValueError,
            r"InverseFrequency: counts are not known yet; .*update\('fit', class_counts=...\)",
        ),
        (lambda: FocalLoss(weight="effective")(X, Y), ValueError, r"EffectiveNumber: counts are not known yet"),
        (
            lambda: Objective(CrossEntropy(logits=LogitAdjustment()))(X, Y),
            ValueError,
            r"LogitAdjustment: counts are not known yet",
        ),
        (
            lambda: Objective(CrossEntropy(), Focal().normalize(over="group"))(X, Y),
            ValueError,
            r"Normalize: 'group' is missing; pass group= when calling",
        ),
        (
            lambda: Objective(CrossEntropy(), Focal().pooled("group"))(X, Y),
            ValueError,
            r"Pooled: 'group' is missing; pass group= when calling",
        ),
        (
            lambda: Objective(CrossEntropy(), None, "group_mean")(X, Y),
            ValueError,
            r"group_mean: 'group' is missing; pass group= when calling",
        ),
        (
            lambda: Objective(CrossEntropy(), Between("urgency", low=0.0))(X, Y),
            ValueError,
            r"Between: 'urgency' is missing; pass urgency= when calling",
        ),
        (
            lambda: Objective(CrossEntropy(), Between("index", low=0.0))(X, Y),
            ValueError,
            r"Between: 'index' is missing; pass index= when calling",
        ),
        (
            lambda: Objective(CrossEntropy(), Focal().ema(0.5, 3, by="group"))(X, Y),
            ValueError,
            r"EMA: 'group' is missing; pass group=",
        ),
        (
            lambda: Objective(CrossEntropy(), Focal().ema(0.5, 3, by="group"))(X, Y, group=t(0, 5, 1, 2)),
            ValueError,
            r"EMA: 'group' must be in \[0, 3\), got 0..5",
        ),
        (
            lambda: Objective(CrossEntropy(), Focal().ema(0.5, 3, by="group"))(X, Y, group=t(0, -1, 1, 2)),
            ValueError,
            r"EMA: 'group' must be in \[0, 3\), got -1..2",
        ),
        (
            lambda: Objective(CrossEntropy(), Focal().ema(0.5, 2))(X, Y),
            ValueError,
            r"EMA: has 2 class weights, but the criterion has 3 classes",
        ),
        (
            lambda: Objective(BinaryCrossEntropy(), Focal().ema(0.5, 2, by="position"))(X, B),
            ValueError,
            r"EMA: 'position' must be in \[0, 2\), got 0..2",
        ),
        (
            lambda: Objective(CrossEntropy(), InverseClassLoss(2))(X, Y),
            ValueError,
            r"InverseClassLoss: has 2 class weights, but the criterion has 3 classes",
        ),
        (
            lambda: Objective(CrossEntropy(), InverseClassLoss(5))(X, Y),
            ValueError,
            r"InverseClassLoss: has 5 class weights, but the criterion has 3 classes",
        ),
        (
            lambda: Objective(CrossEntropy(), WrongShape())(X, Y),
            ValueError,
            r"WrongShape: weights must broadcast to the terms' shape \(4,\), got \(7,\)",
        ),
        (
            lambda: Objective(CrossEntropy(), NotATensor())(X, Y),
            TypeError,
            r"NotATensor: weigh must return a tensor, got float",
        ),
        (
            lambda: Objective(CrossEntropy(), Charging(), "none")(X, Y),
            ValueError,
            r"a weighting with a penalty needs a scalar reduction, not 'none'",
        ),
        (
            lambda: Objective(FocalLoss(), None, "sequence_mean")(X, Y),
            ValueError,
            r"'sequence_mean' needs loss terms with at least one dimension",
        ),
        (
            lambda: Objective(FromLoss(nn.L1Loss()))(X, X),
            ValueError,
            r'fn must return one loss per element \(reduction="none"\), got a scalar',
        ),
        (lambda: Objective(FromLoss(lambda a, b: 3))(X, X), TypeError, r"fn must return a tensor, got int"),
        (
            lambda: Objective(L1)(X, X, mask=torch.ones(9, dtype=torch.bool)),
            ValueError,
            r"mask must have the terms' shape \(4, 3\) .*, got \(9,\)",
        ),
        (
            lambda: functional.sigmoid_focal_loss_star(X, B[:1]),
            ValueError,
            r"target must have the logits' shape \(4, 3\), got \(1, 3\)",
        ),
        (
            lambda: functional.sigmoid_focal_loss_star(X.long(), B),
            TypeError,
            r"logits must be a floating-point tensor, got torch.int64",
        ),
        (lambda: functional.sigmoid_focal_loss_star(X, [1.0]), TypeError, r"target must be a real tensor, got list"),
    ],
)
def test_calls(call, error, message):
    refused(call, error, message)


@pytest.mark.parametrize(
    ("signals", "error", "message"),
    [
        ({}, ValueError, r"InverseFrequency: update\('fit'\) must bring class_counts=, got \[\]"),
        ({"counts": [1, 2]}, ValueError, r"must bring class_counts=, got \['counts'\]"),
        ({"class_counts": [1, -1]}, ValueError, r"class_counts must be finite and >= 0, got -1 at position 1"),
        ({"class_counts": [0, 0]}, ValueError, r"class_counts must hold at least one positive number, got all zeros"),
        ({"class_counts": "many"}, TypeError, r"class_counts must be a sequence of numbers, got str"),
    ],
)
def test_fit(signals, error, message):
    loss = FocalLoss(weight="balanced")
    refused(lambda: loss.update("fit", **signals), error, message)
    assert not loss.criterion.weight.counts.known


def test_fit_checks_the_number_of_classes():
    refused(
        lambda: Objective(CrossEntropy(), InverseFrequency(num_classes=3)).update("fit", class_counts=[1, 2]),
        ValueError,
        r"InverseFrequency: class_counts must have num_classes=3 entries, got 2",
    )


@pytest.mark.parametrize("event", ["steps", "never", None, 3])
def test_events(event):
    refused(lambda: FocalLoss().update(event), ValueError, rf"event must be one of 'fit', .*, got {event!r}")


def test_event_indices():
    refused(lambda: FocalLoss().update("step", index=-1), ValueError, r"index must be >= 0, got -1")
    refused(lambda: FocalLoss().update("step", index=1.0), TypeError, r"index must be an integer, got 1.0")


def test_validation_can_be_switched_off():
    """``validate=False`` looks at no value: a wrong probability passes, a wrong shape does not."""
    unchecked = Objective(CrossEntropy(validate=False))
    assert unchecked(X, -B).isfinite()
    refused(lambda: unchecked(X, Y[:2]), ValueError, r"target must have shape")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_grad_mode_is_the_callers(mode):
    loss = Objective(CrossEntropy(), Focal(1.0) * InverseClassLoss(3, cadence="forward"))
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        loss(X, Y)
        loss.weights(X, Y)
        loss.components(X, Y)
        with pytest.raises(ValueError, match="target"):
            loss(X, Y[:2])
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def test_an_error_while_looking_leaves_an_inner_objective_in_training_mode():
    inner = Objective(CrossEntropy(), InverseClassLoss(3), "none")
    outer = Objective(inner, Focal())
    with pytest.raises(ValueError, match="target"):
        outer.weights(X, Y[:2])
    assert inner.training
    assert outer.training


def test_a_single_alpha_says_that_it_only_rescales():
    with pytest.warns(UserWarning, match=r"a single alpha=0.25 only rescales the softmax loss"):
        loss = FocalLoss(alpha=0.25)
    torch.testing.assert_close(loss(X, Y), 0.25 * FocalLoss()(X, Y))


def test_every_public_error_case_is_counted():
    """At least ten bad inputs per objective."""
    assert len(SOFTMAX) >= 10
    assert len(SIGMOID) >= 10
    assert set(reweigh.losses.available()) >= {"focal", "sigmoid_focal"}
