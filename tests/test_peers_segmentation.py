"""Side by side with MONAI, segmentation_models_pytorch and kornia, where they define the same thing."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from peers import peer
from torch.nn.functional import one_hot

from reweigh import DiceLoss, GeneralizedDiceLoss, Objective, Overlap, SequenceMean, TverskyLoss

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
SHAPES = [(3, 4, 9), (2, 5, 8, 6), (2, 3, 4, 4, 4)]


@pytest.fixture
def monai():
    return pytest.importorskip("monai.losses")


@pytest.fixture
def smp():
    """Its two loss modules; the package itself imports torchvision."""
    dice, tversky = (peer("segmentation_models_pytorch", f"losses.{name}") for name in ("dice", "tversky"))
    return SimpleNamespace(DiceLoss=dice.DiceLoss, TverskyLoss=tversky.TverskyLoss)


def batch(shape, seed=0):
    """Float32 logits and labels; every class is in every sample."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    target.view(shape[0], -1)[:, : shape[1]] = torch.arange(shape[1])
    return torch.randn(shape, generator=generator) * 3, target


def agree(ours, theirs, logits, *targets):
    found = []
    for loss, target in zip((ours, theirs), targets, strict=True):
        x = logits.clone().requires_grad_()
        value = loss(x, target)
        (grad,) = torch.autograd.grad(value.sum(), x)
        found.append((value.detach(), grad))
    (value, grad), (wanted, slope) = found
    torch.testing.assert_close(value.reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("smooth_nr", "smooth_dr"), [(1e-5, 1e-5), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("background", [True, False])
def test_monai_dice(monai, shape, smooth_nr, smooth_dr, over, square, background):
    logits, target = batch(shape)
    target = target.clamp_max(shape[1] - 2)  # a class that nobody has: MONAI keeps it
    options = {"smooth_nr": smooth_nr, "smooth_dr": smooth_dr, "include_background": background}
    weight = [0.5 + c for c in range(shape[1])]
    theirs = {"batch": over == "batch", "squared_pred": square, "weight": weight if background else weight[1:]}
    for activation in ("softmax", "sigmoid"):
        other = monai.DiceLoss(to_onehot_y=True, **{activation: True}, **options, **theirs)
        ours = DiceLoss(activation=activation, over=over, square=square, empty="keep", class_weight=weight, **options)
        agree(ours, other, logits, target, target.unsqueeze(1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize("jaccard", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_monai_multi_hot_and_jaccard(monai, shape, over, jaccard, reduction):
    logits, _ = batch(shape)
    target = (torch.rand(shape) < 0.4).float()
    index = 1.0 if jaccard else 0.5  # MONAI smooths Jaccard by half of what Tversky's convention adds
    criterion = Overlap(
        activation="sigmoid", over=over, alpha=index, beta=index, smooth_nr=5e-6, smooth_dr=5e-6, empty="keep"
    )
    theirs = monai.DiceLoss(sigmoid=True, batch=over == "batch", jaccard=jaccard, reduction=reduction)
    agree(Objective(criterion, None, reduction), theirs, logits, target, target)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.7), (1.0, 1.0), (0.9, 0.1)])
def test_monai_tversky(monai, shape, over, alpha, beta):
    logits, target = batch(shape)
    for activation, background in itertools.product(("softmax", "sigmoid"), (True, False)):
        theirs = monai.TverskyLoss(
            to_onehot_y=True, alpha=alpha, beta=beta, batch=over == "batch", include_background=background,
            **{activation: True},
        )  # fmt: skip
        ours = TverskyLoss(alpha, beta, activation=activation, over=over, include_background=background, empty="keep")
        agree(ours, theirs, logits, target, target.unsqueeze(1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize(("power", "name"), [(2.0, "square"), (1.0, "simple"), (0.0, "uniform")])
@pytest.mark.parametrize("lacking", [False, True])
def test_monai_generalised_dice(monai, shape, over, power, name, lacking):
    """Without smoothing, which is added at another place; with a class that its set lacks, too."""
    logits, target = batch(shape)
    if lacking:
        target = target.clamp_max(shape[1] - 2)
    theirs = monai.GeneralizedDiceLoss(
        to_onehot_y=True, softmax=True, w_type=name, batch=over == "batch", smooth_nr=0.0, smooth_dr=0.0
    )
    ours = GeneralizedDiceLoss(power=power, over=over, smooth_nr=0.0, smooth_dr=0.0)
    agree(ours, theirs, logits, target, target.unsqueeze(1))


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize("lacking", [False, True])
def test_smp_dice(smp, shape, smooth, ignore, lacking):
    """Over the batch; an absent class counts with loss 0."""
    logits, target = batch(shape)
    if lacking:
        target = target.clamp_max(shape[1] - 2)
    if ignore is not None:
        target.view(shape[0], -1)[:, -3:] = ignore
    weight = [0.5 + c for c in range(shape[1])]
    options = {"over": "batch", "smooth_nr": 2 * smooth, "smooth_dr": 2 * smooth, "empty": "zero"}
    ours = DiceLoss(**options, ignore_index=-100 if ignore is None else ignore)
    theirs = smp.DiceLoss("multiclass", smooth=smooth, ignore_index=ignore)
    agree(ours, theirs, logits, target, target)
    weighted = DiceLoss(
        **options, class_weight=weight, reduction="weighted_mean", ignore_index=-100 if ignore is None else ignore
    )
    agree(weighted, smp.DiceLoss("multiclass", smooth=smooth, ignore_index=ignore, class_weights=weight), logits,
          target, target)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.7), (1.0, 1.0)])
def test_smp_tversky(smp, shape, alpha, beta):
    logits, target = batch(shape)
    options = {"over": "batch", "smooth_nr": 1.0, "smooth_dr": 1.0, "empty": "zero"}
    theirs = {"alpha": alpha, "beta": beta, "smooth": 1.0}
    agree(TverskyLoss(alpha, beta, **options), smp.TverskyLoss("multiclass", **theirs), logits, target, target)
    hot = one_hot(target, shape[1]).movedim(-1, 1)
    ours = TverskyLoss(alpha, beta, activation="sigmoid", **options)
    agree(ours, smp.TverskyLoss("multilabel", **theirs), logits, hot, hot)
    binary = (target == 0).long().unsqueeze(1)
    agree(ours, smp.TverskyLoss("binary", **theirs), logits[:, :1], binary, binary)


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize("lacking", [False, True])
def test_kornia_dice(ignore, lacking):
    """Macro is the mean of each sample's mean over the classes it has; micro is one dice over all classes."""
    kornia = pytest.importorskip("kornia.losses")
    logits, target = batch(SHAPES[1])
    if lacking:
        target[0] = target[0].clamp_max(3)
    if ignore is not None:
        target[:, :2] = ignore
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    options = {"smooth_nr": 0.0, "smooth_dr": 1e-8, "ignore_index": -100 if ignore is None else ignore}

    def theirs(average, weight=None):
        return lambda x, y: kornia.dice_loss(x, y, average, weight=weight, ignore_index=options["ignore_index"])

    agree(DiceLoss(**options, reduction="sequence_mean"), theirs("macro"), logits, target, target)
    weighted = DiceLoss(**options, class_weight=weight, reduction=SequenceMean(weighted=True))
    agree(weighted, theirs("macro", weight), logits, target, target)
    agree(GeneralizedDiceLoss(power=0.0, **options), theirs("micro"), logits, target, target)
    tversky = TverskyLoss(0.2, 0.8, **options, reduction="sequence_mean")
    other = functools.partial(kornia.tversky_loss, alpha=0.2, beta=0.8, ignore_index=options["ignore_index"])
    agree(tversky, other, logits, target, target)


def test_where_smp_means_something_else(smp):
    """Its gamma is the power of the mean over classes, ours of each class's loss, as in the focal Tversky paper."""
    logits, target = batch(SHAPES[1])
    ours = TverskyLoss(gamma=0.75, over="batch", smooth_nr=1.0, smooth_dr=1.0)
    theirs = smp.TverskyLoss("multiclass", alpha=0.3, beta=0.7, smooth=1.0, gamma=0.75)
    assert abs(ours(logits, target) - theirs(logits, target)) > 1e-4
    one = TverskyLoss(gamma=0.75, over="batch", smooth_nr=1.0, smooth_dr=1.0, activation="sigmoid")
    single = smp.TverskyLoss("binary", alpha=0.3, beta=0.7, smooth=1.0, gamma=0.75)
    binary = (target == 0).long().unsqueeze(1)
    agree(one, single, logits[:, :1], binary, binary)


def test_where_monai_means_something_else(monai):
    """An absent class has a loss near 1 there and no term here; smooth_dr=0 is NaN there and 0 here."""
    logits, target = batch(SHAPES[0])
    target = target.clamp_max(2)
    theirs = monai.DiceLoss(to_onehot_y=True, softmax=True)(logits, target.unsqueeze(1))
    assert theirs - DiceLoss()(logits, target) > 0.05
    nothing = torch.zeros(1, 1, 4)
    bare = {"smooth_nr": 0.0, "smooth_dr": 0.0}
    assert monai.DiceLoss(**bare)(nothing, nothing).isnan()
    assert DiceLoss(activation="none", empty="keep", **bare)(nothing, nothing) == 0.0


def test_where_masked_pixels_spread(monai, smp):
    """They multiply by the mask, and NaN times 0 is NaN."""
    logits, target = batch(SHAPES[0])
    logits[:, :, -1], target[:, -1] = torch.nan, 255
    assert monai.DiceLoss(to_onehot_y=True, softmax=True, ignore_index=255)(logits, target.unsqueeze(1)).isnan()
    assert smp.DiceLoss("multiclass", ignore_index=255)(logits, target).isnan()
    assert DiceLoss(ignore_index=255)(logits, target).isfinite()
