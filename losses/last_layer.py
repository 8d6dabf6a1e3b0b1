"""Sample weights for the worst group, learned on frozen features: influence functions of a softmax last layer."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from reweigh.weighting.config import Configured, check_choice, check_number, check_whole

Mix = Literal["softmax", "eg"]

_SOLVED = 1e-18
"""Squared Newton decrement after which one more step is exact to rounding."""
_STUCK = 1e-10
"""The same where rounding leaves nothing to gain: large features and a small ``l2``."""
_NEWTON_STEPS = 100
_HALVINGS = 30
_TRIALS = 10
"""How often a step of the weights is halved before they count as settled."""


class _Data(NamedTuple):
    """Float64 rows, with a column of ones where the layer has a bias, and one-hot labels."""

    rows: Tensor
    onehot: Tensor

    def losses(self, layer: Tensor) -> Tensor:
        """``(n,)`` cross-entropy under ``layer`` ``(C, columns)``."""
        logits = self.rows @ layer.T
        return logits.logsumexp(1) - (logits * self.onehot).sum(1)

    def residuals(self, layer: Tensor) -> Tensor:
        """``(n, C)`` gradient of each loss with respect to its logits."""
        return (self.rows @ layer.T).softmax(1) - self.onehot


class _Groups(NamedTuple):
    """The target set, and who is in which group."""

    data: _Data
    member: Tensor
    sizes: Tensor

    def losses(self, layer: Tensor) -> Tensor:
        """``(G,)`` mean loss of each group, ``-inf`` for one without samples."""
        total = self.member.T @ self.data.losses(layer)
        return torch.where(self.sizes > 0, total / self.sizes, -torch.inf)

    def accuracies(self, layer: Tensor) -> Tensor:
        """``(G,)`` share of each group whose largest logit is its label's, NaN for one without samples."""
        right = (self.data.rows @ layer.T).argmax(1) == self.data.onehot.argmax(1)
        return (self.member.T @ right.double()) / self.sizes


@final
class GroupRobustLastLayer(Configured):
    r"""Learn sample weights that make a last layer good on the worst group of a small labelled target set (GSR).

    .. math::
        \theta(w) = \arg\min_\theta \frac{\sum_i w_i \ell_i(\theta)}{\sum_i w_i} + \frac{\lambda}{2}\|\theta\|^2,
        \qquad w_i \leftarrow \big[w_i + \eta\, I_i\big]_+, \qquad
        I_i = \nabla F(\theta)^\top H^{-1}\Big(\nabla \ell_i - \frac{\sum_k w_k \nabla \ell_k}{\sum_k w_k}\Big)

    - :math:`\ell_i`: cross-entropy of training sample i under a softmax layer :math:`\theta` on frozen features
    - :math:`F`: the target set's group losses :math:`L_g`, mixed by q with more weight on the worse ones
    - :math:`H`: Hessian of the training objective; solved exactly
    - :math:`I_i`: influence, n times as much as F falls per unit of sample i's weight (weights have mean 1)

    The layer (an optimum) and the influence (the derivative of training anew) are exact to rounding; what a whole step
    does to F is found by training anew. Training data needs no groups. The weights returned serve as ``sample_weight=``
    of any objective, or for resampling.

    Use when:
        Only a small set has group labels, and features are good (a trained network's, best on data that it has not
        been fitted to: the authors hold a tenth of the training data out for this).
    Avoid when:
        Features do not separate the classes within groups, or ``num_classes * features`` is beyond some ten thousand:
        the Hessian has that number squared of entries. Try the layer trained on the target set alone first: where that
        set is not tiny it often does as well.

    Deviations:
        The update is a line search from ``outer_lr`` downwards, where the authors take fixed steps with clipped norm.
        Weights never turn negative (their option ``pgd``). Group mixes follow losses, not accuracies. ``mix="eg"``
        multiplies q by :math:`e^{L_g/T}`; the authors' code by :math:`e^{L_g}/T`, where T cancels in the
        normalisation, so that their temperature has no effect. The result is the round with the lowest worst-group
        loss of the target set; theirs is chosen by accuracy on validation data.

    Args:
        num_classes: Number of classes C.
        l2: :math:`\lambda` > 0, on weights and bias. Default 0.01; the authors' Waterbirds run is 0.2 in this scale.
        outer_lr: Largest step :math:`\eta` > 0. Default 1 (authors' code).
        temperature: T > 0. ``mix="softmax"``: q is the softmax of :math:`L_g/T`, and F is
            :math:`T \ln \frac{1}{G}\sum_g e^{L_g/T}`, from the mean over groups (large T) to the worst group (small).
            Default 1 (authors' code).
        mix: ``"softmax"``, or ``"eg"``: q moves by exponentiated gradient, from uniform, once per round.
        bias: Whether the layer has a bias, regularised like its weights. Default True.
        rounds: Most updates of the weights. It ends before where no step lowers F.

    Raises:
        TypeError, ValueError: If an argument is out of its range.

    Shapes:
        ``fit(features (n, D), labels (n,), target_features (m, D), target_labels (m,), target_group (m,))``; returns
        ``(n,)`` float64 with mean 1. Everything is computed in float64 on the features' device.
        A round is a few Newton steps of :math:`O(n (DC)^2 + (DC)^3)` each, in :math:`O((DC)^2 + n(D + C))` memory.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [-1.0, 1.0]])
        >>> y = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> tool = GroupRobustLastLayer(2, rounds=5)
        >>> weights = tool.fit(x, y, target_features=x, target_labels=y, target_group=(x[:, 0] == x[:, 1]).long())
        >>> bool(weights[2] > weights[0])
        True

    References:
        R. Qiao, Z. Wu, J. Wang, P. W. Koh, B. K. H. Low, "Group-robust Sample Reweighting for Subpopulation Shifts via
        Influence Functions", ICLR 2025.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        l2: float = 0.01,
        outer_lr: float = 1.0,
        temperature: float = 1.0,
        mix: Mix = "softmax",
        bias: bool = True,
        rounds: int = 100,
    ) -> None:
        self.num_classes = check_whole(self, "num_classes", num_classes, low=2)
        self.l2 = check_number(self, "l2", l2, low=0.0, open_low=True)
        self.outer_lr = check_number(self, "outer_lr", outer_lr, low=0.0, open_low=True)
        self.temperature = check_number(self, "temperature", temperature, low=0.0, open_low=True)
        self.mix = check_choice(self, "mix", mix, ("softmax", "eg"))
        self.bias = bool(bias)
        self.rounds = check_whole(self, "rounds", rounds)
        self._layer: Tensor | None = None
        self._history: list[Tensor] = []
        self._accuracies: list[Tensor] = []

    @torch.no_grad()
    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        target_features: Tensor,
        target_labels: Tensor,
        target_group: Tensor,
    ) -> Tensor:
        """Learn weights ``(n,)`` of the training samples, with mean 1."""
        data = self._data("features", features, "labels", labels)
        target = self._groups(target_features, target_labels, target_group, like=data.rows)
        weight = data.rows.new_ones(len(data.rows))
        layer = self._solve(data, weight, data.rows.new_zeros(self.num_classes, data.rows.shape[1]))
        losses = target.losses(layer)
        log_q = torch.where(target.sizes > 0, 0.0, -torch.inf).log_softmax(0)
        best, self._layer = weight, layer
        self._history, self._accuracies = [losses], [target.accuracies(layer)]
        lowest = losses.max()
        for _ in range(self.rounds):
            if self.mix == "eg":
                log_q = (log_q + torch.where(target.sizes > 0, losses / self.temperature, 0.0)).log_softmax(0)
            influence = self._influence(data, target, weight, layer, self._shares(losses, log_q))
            found = self._step(data, target, weight, layer, losses, influence, log_q)
            if found is None:
                break
            weight, layer, losses = found
            self._history.append(losses)
            self._accuracies.append(target.accuracies(layer))
            if bool(losses.max() < lowest):
                best, self._layer, lowest = weight, layer, losses.max()
        return best

    @torch.no_grad()
    def influence(
        self,
        features: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        *,
        target_features: Tensor,
        target_labels: Tensor,
        target_group: Tensor,
    ) -> Tensor:
        """``(n,)``: what the weight of each sample does to the target loss F of ``mix="softmax"``.

        ``-weight.sum() * dF / dweight``, for the layer trained under ``weight`` (default: all equal). Positive: more of
        it helps the worst groups. Times ``weight`` they add up to 0, because only relative weights matter.
        """
        data = self._data("features", features, "labels", labels)
        target = self._groups(target_features, target_labels, target_group, like=data.rows)
        weight = data.rows.new_ones(len(data.rows)) if weight is None else self._weight(weight, data.rows)
        layer = self._solve(data, weight, data.rows.new_zeros(self.num_classes, data.rows.shape[1]))
        shares = (target.losses(layer) / self.temperature).softmax(0)
        return self._influence(data, target, weight, layer, shares)

    def layer(self) -> nn.Linear:
        """The last layer under the weights that :meth:`fit` returned, float64."""
        if self._layer is None:
            raise ValueError("GroupRobustLastLayer: call fit() before layer()")
        width = self._layer.shape[1] - self.bias
        # initial values would be drawn from the global generator
        made = nn.Linear(width, self.num_classes, bias=self.bias, dtype=torch.float64, device="meta")
        made = made.to_empty(device=self._layer.device)
        with torch.no_grad():
            made.weight.copy_(self._layer[:, :width])
            if self.bias:
                made.bias.copy_(self._layer[:, width])
        return made

    def history(self) -> Tensor:
        """``(rounds + 1, G)`` group losses of the target set before all updates and after each; NaN without samples."""
        if not self._history:
            raise ValueError("GroupRobustLastLayer: call fit() before history()")
        return torch.stack(self._history).masked_fill(self._history[0] == -torch.inf, torch.nan)

    def accuracy_history(self) -> Tensor:
        """``(rounds + 1, G)`` group accuracies of the target set, beside :meth:`history`; NaN without samples."""
        if not self._accuracies:
            raise ValueError("GroupRobustLastLayer: call fit() before accuracy_history()")
        return torch.stack(self._accuracies)

    # the target loss

    def _shares(self, losses: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() if self.mix == "eg" else (losses / self.temperature).softmax(0)

    def _target(self, losses: Tensor, log_q: Tensor) -> Tensor:
        """F up to a constant."""
        if self.mix == "eg":
            return (log_q.exp() * torch.where(losses > -torch.inf, losses, 0.0)).sum()
        return self.temperature * (losses / self.temperature).logsumexp(0)

    def _step(
        self,
        data: _Data,
        target: _Groups,
        weight: Tensor,
        layer: Tensor,
        losses: Tensor,
        influence: Tensor,
        log_q: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The first of ever smaller steps that lowers F: weights, layer and group losses after it."""
        before, rate = self._target(losses, log_q), self.outer_lr
        for _ in range(_TRIALS):
            # sum_i w_i I_i = 0, so some weight stays positive
            moved = (weight + rate * influence).clamp_min(0.0)
            moved = moved / moved.mean()
            after = self._solve(data, moved, layer)
            found = target.losses(after)
            if bool(self._target(found, log_q) < before):
                return moved, after, found
            rate = 0.5 * rate
        return None

    # the layer

    def _solve(self, data: _Data, weight: Tensor, layer: Tensor) -> Tensor:
        """Newton's method, damped by halving: the training objective is strictly convex."""
        share = weight / weight.sum()
        value = self._value(data, share, layer)
        for _ in range(_NEWTON_STEPS):
            slope = data.residuals(layer).mul(share.unsqueeze(1)).T @ data.rows + self.l2 * layer
            step = self._divide(data, share, layer, slope)
            decrement = (slope * step).sum()
            rate, slack = 1.0, 1e-14 * (1.0 + value.abs())
            for _ in range(_HALVINGS):
                moved = layer - rate * step
                reached = self._value(data, share, moved)
                if bool(reached <= value - 1e-4 * rate * decrement + slack):
                    break
                rate *= 0.5
            if bool((decrement <= _SOLVED) | ((decrement <= _STUCK) & (reached >= value))):
                return moved
            layer, value = moved, reached
        raise ValueError(
            f"GroupRobustLastLayer: the last layer has not settled after {_NEWTON_STEPS} Newton steps; standardise the "
            f"features, or raise l2, got {self.l2}"
        )

    def _value(self, data: _Data, share: Tensor, layer: Tensor) -> Tensor:
        return (share * data.losses(layer)).sum() + 0.5 * self.l2 * layer.square().sum()

    def _divide(self, data: _Data, share: Tensor, layer: Tensor, slope: Tensor) -> Tensor:
        """``H^-1 slope`` for the Hessian of the training objective at ``layer``."""
        p, rows = (data.rows @ layer.T).softmax(1), data.rows
        classes, width = layer.shape
        hessian = rows.new_zeros(classes, width, classes, width)
        for a in range(classes):
            for b in range(a + 1):
                curve = share * p[:, a] * ((1.0 - p[:, a]) if a == b else -p[:, b])
                hessian[a, :, b] = hessian[b, :, a] = rows.T @ (curve.unsqueeze(1) * rows)
        flat = hessian.reshape(classes * width, classes * width)
        flat.diagonal().add_(self.l2)
        factor, failed = torch.linalg.cholesky_ex(flat)
        if bool(failed != 0):
            raise ValueError(
                f"GroupRobustLastLayer: the Hessian is singular to rounding; standardise the features, or raise l2, "
                f"got {self.l2}"
            )
        return torch.cholesky_solve(slope.reshape(-1, 1), factor).reshape(classes, width)

    def _influence(self, data: _Data, target: _Groups, weight: Tensor, layer: Tensor, shares: Tensor) -> Tensor:
        mix = target.member @ (shares / target.sizes.clamp_min(1.0))
        slope = target.data.residuals(layer).mul(mix.unsqueeze(1)).T @ target.data.rows
        share = weight / weight.sum()
        pull = self._divide(data, share, layer, slope)
        each = (data.residuals(layer) * (data.rows @ pull.T)).sum(1)
        return each - (share * each).sum()

    # arguments

    def _data(self, name: str, features: Tensor, label_name: str, labels: Tensor, like: Tensor | None = None) -> _Data:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise TypeError(
                f"GroupRobustLastLayer: {name} must be a floating tensor, got "
                f"{features.dtype if isinstance(features, Tensor) else type(features).__name__}"
            )
        if features.ndim != 2 or not len(features):
            raise ValueError(
                f"GroupRobustLastLayer: {name} must be (samples, features) with samples, got {tuple(features.shape)}"
            )
        if like is not None and features.shape[1] != like.shape[1] - self.bias:
            raise ValueError(
                f"GroupRobustLastLayer: {name} must have {like.shape[1] - self.bias} columns, got {features.shape[1]}"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"GroupRobustLastLayer: {name} must be finite, got NaN or infinity")
        at = self._whole(label_name, labels, len(features), self.num_classes)
        rows = features.detach().to(torch.float64 if like is None else like)
        if self.bias:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        return _Data(rows, nn.functional.one_hot(at.to(rows.device), self.num_classes).double())

    def _groups(self, features: Tensor, labels: Tensor, group: Tensor, *, like: Tensor) -> _Groups:
        data = self._data("target_features", features, "target_labels", labels, like)
        at = self._whole("target_group", group, len(data.rows), None).to(like.device)
        member = nn.functional.one_hot(at, int(at.max()) + 1).double()
        return _Groups(data, member, member.sum(0))

    def _weight(self, weight: Tensor, rows: Tensor) -> Tensor:
        if not isinstance(weight, Tensor) or weight.shape != rows.shape[:1]:
            raise ValueError(
                f"GroupRobustLastLayer: weight must be a tensor of shape ({len(rows)},), got "
                f"{tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__}"
            )
        weight = weight.detach().to(rows)
        total = float(weight.sum())
        if not (bool((weight >= 0).all()) and 0.0 < total < math.inf):
            raise ValueError(
                f"GroupRobustLastLayer: weight must be finite, >= 0 and not all 0, got {float(weight.min()):g}.."
                f"{float(weight.max()):g}"
            )
        return weight

    def _whole(self, name: str, value: Tensor, size: int, high: int | None) -> Tensor:
        whole = isinstance(value, Tensor) and not (
            value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
        )
        if not whole:
            raise TypeError(
                f"GroupRobustLastLayer: {name} must be an integer tensor, got "
                f"{value.dtype if isinstance(value, Tensor) else type(value).__name__}"
            )
        if value.shape != (size,):
            raise ValueError(f"GroupRobustLastLayer: {name} must have shape ({size},), got {tuple(value.shape)}")
        if int(value.min()) < 0 or (high is not None and int(value.max()) >= high):
            raise ValueError(
                f"GroupRobustLastLayer: {name} must be {'>= 0' if high is None else f'in [0, {high})'}, got "
                f"{int(value.min())}..{int(value.max())}"
            )
        return value.detach().long()
