"""Retrieval of digits under nuisances: which pair loss makes embeddings in which images of one digit lie together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from .base import Gate, Method, Metric, Outcome, Suite, Trial

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

    from reweigh.losses import Objective

CLASSES = 10
PARTS = {"train": 800, "val": 200, "test": 797}
SIDE = 12
"""Of the canvas; digits are 8 x 8."""
CONTRAST = (0.4, 1.0)
"""The brightest ink lies in this range."""
NOISE = 0.1
"""Standard deviation of each pixel's own noise."""

TRAINING: dict[str, Any] = {
    "steps": 220,
    "batch_size": 128,
    "lr": 1e-2,
    "weight_decay": 1e-4,
    "channels": [16, 32],
    "embedding": 32,
}
# learning rate: the best of 1e-3, 3e-3 and 1e-2 by mAP@R of the validation data, mean over seeds 100 to 105 (3e-2 is no
# better for any method that takes 1e-2). The gammas of pair and circle_16 are the best of 4, 8, 16 and 64 by the same;
# the other constants are the usual ones.
RATES = (1e-3, 3e-3, 1e-2)
GAMMAS = (4.0, 8.0, 16.0, 64.0)
OWN: Mapping[str, Mapping[str, Any]] = {
    "pair": {"m": 0.25, "gamma": 4.0},
    "pair_16": {"m": 0.25, "gamma": 16.0, "lr": 3e-3},
    "circle_16": {"m": 0.25, "gamma": 16.0},
    "circle_64": {"m": 0.25, "gamma": 64.0},
    "supcon": {"temperature": 0.1},
    "multi_similarity": {"alpha": 2.0, "beta": 50.0, "base": 0.5, "epsilon": 0.1},
    "softmax": {"lr": 3e-3},
    "triplet": {"margin": 0.2, "lr": 1e-3},
}


def nuisances(images: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """``(N, 8, 8)`` images in [0, 1] as ``(N, 12, 12)``: anywhere on the canvas, with another contrast, and noise."""
    size = len(images)
    room = SIDE - images.shape[1]
    down, right = rng.integers(0, room + 1, (2, size))
    contrast = rng.uniform(*CONTRAST, size)
    canvas = rng.normal(0.0, NOISE, (size, SIDE, SIDE))
    for at in range(size):
        canvas[at, down[at] : down[at] + 8, right[at] : right[at] + 8] += contrast[at] * images[at]
    return canvas.astype(np.float32)


def split(target: np.ndarray[Any, Any], rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Disjoint indices of the parts, at random."""
    order, found, start = rng.permutation(len(target)), {}, 0
    for part, size in PARTS.items():
        found[part] = order[start : start + size]
        start += size
    return found


# competitors that the library does not have; each gives one loss per anchor


def _pairs(embeddings: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine similarities, and which pairs are of the same class (no sample with itself) and of different ones."""
    from torch.nn.functional import normalize

    points = normalize(embeddings)
    same = label[:, None] == label
    positive = same.clone().fill_diagonal_(False)
    return points @ points.T, positive, ~same


def batch_hard_triplet(embeddings: Tensor, label: Tensor, *, margin: float) -> Tensor:
    """``max(0, margin + distance to the furthest of its class - distance to the nearest of another)``.

    Euclidean distances of embeddings of length 1; an anchor without a positive or a negative has loss 0.
    """
    similarity, positive, negative = _pairs(embeddings, label)
    distance = (2.0 - 2.0 * similarity).clamp_min(1e-8).sqrt()
    furthest = distance.masked_fill(~positive, 0.0).amax(1)
    nearest = distance.masked_fill(~negative, 4.0).amin(1)
    return (margin + furthest - nearest).relu() * (positive.any(1) & negative.any(1))


def supcon(embeddings: Tensor, label: Tensor, *, temperature: float) -> Tensor:
    """Mean over the positives of ``-log softmax`` of similarity / temperature over all others; 0 without positives."""
    import torch

    similarity, positive, _ = _pairs(embeddings, label)
    itself = torch.eye(len(label), dtype=torch.bool, device=label.device)
    logp = (similarity / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    return -logp.masked_fill(~positive, 0.0).sum(1) / positive.sum(1).clamp_min(1)


def multi_similarity(
    embeddings: Tensor, label: Tensor, *, alpha: float, beta: float, base: float, epsilon: float
) -> Tensor:
    """Soft hardest positive and negative, of pairs that are harder than the hardest of the other kind + epsilon."""
    import torch

    similarity, positive, negative = _pairs(embeddings, label)
    lowest = similarity.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
    highest = similarity.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    positive = positive & (similarity < highest + epsilon)
    negative = negative & (similarity > lowest - epsilon)
    nothing = similarity.new_zeros(len(label), 1)
    near = torch.cat([nothing, (-alpha * (similarity - base)).masked_fill(~positive, -torch.inf)], 1)
    far = torch.cat([nothing, (beta * (similarity - base)).masked_fill(~negative, -torch.inf)], 1)
    return near.logsumexp(1) / alpha + far.logsumexp(1) / beta


def retrieval(embeddings: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Average precision at R of each sample as a query among all others, and whether the nearest is of its class.

    Nearness is cosine similarity; R is how many others have the query's class. torchmetrics' average precision divides
    by the hits among the first R, this one by R ("A Metric Learning Reality Check", ECCV 2020): what is missing counts.
    """
    import torch

    similarity, positive, _ = _pairs(embeddings.double(), label)
    order = similarity.fill_diagonal_(-torch.inf).argsort(dim=1, descending=True, stable=True)
    hits = positive.gather(1, order).double()
    rank = torch.arange(1, len(label) + 1)
    relevant = positive.sum(1, keepdim=True)
    found = hits * (rank <= relevant)
    precision = found.cumsum(1) / rank
    return (found * precision).sum(1) / relevant.squeeze(1).clamp_min(1), hits[:, 0]


@final
class DigitsNuisance(Suite):
    """Section "metric learning" of the default suite."""

    name = "digits_nuisance"
    version = 1
    title = "Finding the same digit"
    summary = "given a shifted, noisy digit, find the others of its kind; circle loss and other pair losses"
    story = (
        "A small network turns an image of a handwritten digit into 32 numbers, an embedding, such that images of one "
        "digit get similar embeddings. It is tested by search: every one of 797 unseen images is a query, all others "
        "are ranked by how similar their embeddings are, and those with the query's digit should come first. Digits "
        "lie anywhere on a larger canvas, are brighter or paler and have noise on them, so that comparing pixels does "
        "not get far. What differs is the loss. Most look at pairs of images in a batch: pairs of one digit are pulled "
        "together, others pushed apart. Circle loss weighs each pair by how far it still has to go. The baseline is "
        "the same loss without those weights. In every repetition all methods get the same images, the same initial "
        "network and the same order of batches."
    )
    notes = (
        "Data: 1797 scans of 8 x 8 pixels, shipped with scikit-learn, with made nuisances: each is shifted by up to 4 "
        "pixels on a canvas of 12 x 12, its contrast is 0.4 to 1, and every pixel has noise (standard deviation 0.1). "
        "All ten digits are in training and test; no scan is in two of the training, validation and test parts. "
        "Search for digits that were not trained on is not tested: on clean digits raw pixels win it.",
        "The learning rate of each method is the best of 3 on validation data over six seeds that are not among the "
        "reported ones. Gamma, the scale of similarities, has no usual value for a task of this size, so circle loss "
        "and the baseline have each the best of the same 4. Published settings of circle loss, 80 to 256, are for "
        "other networks and far longer training; gamma 64 is shown for comparison. The others have their usual "
        "constants, and so fewer candidates.",
        "With a gamma of its own the unweighted loss is on a par with circle loss on the validation data. At circle "
        "loss's gamma it is far behind: a comparison at one gamma compares scales, not weights. No promise is made.",
        "Batch-hard triplet loss collapses: all embeddings become nearly the same, with any of the learning rates, "
        "and with a soft margin or without normalisation as well (tried on two of the seeds of the tuning). It is made "
        "for longer training and pretrained networks; that others beat it here says nothing.",
        "In R@1, the nearest image alone, raw pixels are as good as most networks; they fail at finding the others.",
        "Triplet loss, SupCon and multi-similarity are not part of the library; they are a few lines of this suite. A "
        "similarity gap is no measure of quality across losses: each stops pulling at another similarity.",
        "Six repetitions, the default, are too few for the corrected tests to be significant; the intervals and the "
        "wins are to be read.",
    )
    # The baseline is the loss that circle loss re-weights, and of that nothing is promised. Batch-hard triplet does not
    # learn here, whatever its rate: a promise to beat it says that circle loss does not collapse, and no more.
    methods = (
        Method("pair", "pair loss (gamma 4)", "Circle loss without its weights: all pairs count alike."),
        Method("circle_16", "circle (gamma 16)", "Pairs count the more, the further they are from where they belong."),
        Method("circle_64", "circle (gamma 64)", "The same, with more weight on the worst pairs.", claim=False),
        Method("pair_16", "pair loss (gamma 16)", "The baseline with the gamma that suits circle loss.", claim=False),
        Method("supcon", "SupCon", "Supervised contrastive loss: a softmax over the batch for each pair.", claim=False),
        Method("multi_similarity", "multi-similarity", "Soft hardest pairs, after leaving out easy ones.", claim=False),
        Method(
            "softmax",
            "classifier (CE)",
            "Cross-entropy of a classifier; the embedding is what its last layer reads.",
            claim=False,
        ),
        Method(
            "triplet",
            "triplet, batch-hard",
            "The least similar image of a digit has to be nearer than the most similar one of another.",
            claim=False,
        ),
        Method("pixels", "raw pixels", "The images as they are, without a network.", claim=False, trained=False),
    )
    quick = ("pair", "circle_16", "pixels")
    slow = True
    default = ("pair", "circle_16", "triplet", "pixels")
    metrics = (
        Metric(
            "map_at_r",
            "mAP@R",
            "Of the R images that are most similar to a query, with R as many as have its digit: how many have it, "
            "those in front counting more.",
        ),
        Metric("recall_at_1", "R@1", "Share of the images whose most similar image is the same digit."),
        Metric("worst_map_at_r", "mAP@R, worst digit", "mAP@R of the digit that is found worst."),
        Metric(
            "gap",
            "similarity gap",
            "Mean cosine similarity of images of one digit, minus that of images of two digits.",
            share=False,
        ),
        Metric("val_map_at_r", "mAP@R, val.", "On the validation data, by which was chosen.", shown=False),
    )
    gates = (Gate("circle_16", "map_at_r", 0.2, versus="triplet"),)
    seeds = 6
    training: Mapping[str, Any] = TRAINING

    own = OWN
    grid: Mapping[str, Mapping[str, Sequence[Any]]] = {
        **{name: {"lr": RATES} for name in OWN},
        **{name: {"gamma": GAMMAS, "lr": RATES} for name in ("pair", "circle_16")},
    }
    chosen_by = "val_map_at_r"

    def protocol(self) -> Mapping[str, Any]:
        return {"parts": PARTS, "side": SIDE, "contrast": CONTRAST, "noise": NOISE}

    def prepare(self, seed: int) -> Trial:
        return _NuisanceTrial(self, seed)

    def objective(self, method: str) -> Objective:
        """The loss of a method."""
        from functools import partial

        from reweigh.losses import CircleLoss, CrossEntropy, FromLoss, Objective
        from reweigh.weighting import Constant

        own = {name: value for name, value in self.own.get(method, {}).items() if name not in self.training}
        if method in ("circle_16", "circle_64"):
            return CircleLoss(**own)
        if method in ("pair", "pair_16"):
            return CircleLoss(**own, pacing=Constant(1.0))
        if method == "softmax":
            return Objective(CrossEntropy())
        losses: dict[str, Callable[..., Tensor]] = {
            "triplet": batch_hard_triplet,
            "supcon": supcon,
            "multi_similarity": multi_similarity,
        }
        return Objective(FromLoss(partial(losses[method], **own)))


class _NuisanceTrial(Trial):
    def __init__(self, suite: DigitsNuisance, seed: int) -> None:
        import torch
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.suite, self.seed = suite, seed
        rng = np.random.default_rng(seed)
        rows = split(digits.target, rng)
        images, target = nuisances(digits.images / 16.0, rng), digits.target.astype(np.int64)
        digest = hashlib.sha256()
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}
        for part, at in rows.items():
            arrays = images[at][:, None], target[at]
            for array in arrays:
                digest.update(array.tobytes())
            self.parts[part] = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])
        self.data_hash = digest.hexdigest()

    def run(self, method: str) -> Outcome:
        from torch import nn

        if method == "pixels":
            return self._test(nn.Flatten())
        encoder, step_ms = self._train(method)
        outcome = self._test(encoder)
        outcome.step_ms = step_ms
        return outcome

    def _train(self, method: str) -> tuple[nn.Module, float]:
        """The network that embeds, and the milliseconds of a step."""
        import torch
        from torch import nn

        from reweigh.lightning_callbacks import WeightingCallback

        from .training import reproducible, train

        options = self.suite.options(method)
        first, second = options["channels"]
        with reproducible(self.seed):  # channels last: half the time on a CPU
            encoder = nn.Sequential(
                nn.Conv2d(1, first, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(first, second, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(second * (SIDE // 4) ** 2, options["embedding"]),
            ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
            # the classifier's last layer is drawn after the encoder, which so is the same for all methods
            head = nn.Linear(options["embedding"], CLASSES) if method == "softmax" else nn.Identity()
            step_ms = train(
                nn.Sequential(encoder, head),
                self.suite.objective(method),
                self.parts["train"],
                options,
                seed=self.seed,
                callbacks=[WeightingCallback()],
            )
        return encoder.eval(), step_ms

    def _test(self, encoder: nn.Module) -> Outcome:
        import torch

        from .training import reproducible

        with reproducible(self.seed), torch.no_grad():
            inputs, label = self.parts["test"]
            embeddings = encoder(inputs)
            precision, nearest = retrieval(embeddings, label)
            by_class = torch.stack([precision[label == value].mean() for value in range(CLASSES)])
            similarity, positive, negative = _pairs(embeddings.double(), label)
            chosen = retrieval(encoder(self.parts["val"][0]), self.parts["val"][1])[0].mean()
        metrics = {
            "map_at_r": precision.mean(),
            "recall_at_1": nearest.mean(),
            "worst_map_at_r": by_class.min(),
            "gap": similarity[positive].mean() - similarity[negative].mean(),
            "val_map_at_r": chosen,
        }
        return Outcome(
            {name: float(value) for name, value in metrics.items()}, details={"class_map_at_r": by_class.tolist()}
        )
