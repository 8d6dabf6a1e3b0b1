"""Recipes with two models: train, find the errors, train again; and a biased network beside the one that is wanted."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeGuard, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from reweigh.losses.objective import Objective
from reweigh.weighting.config import check_number, check_whole
from reweigh.weighting.counting import loaders, same_random_state, subset_of
from reweigh.weighting.ranks import collect, shards
from reweigh.weighting.remembered import RelativeDifficulty, SampleWeight
from reweigh.weighting.sample import SampleTable

from ._base import PACKAGES, PREFIX, LightningCallback, _imported, evaluating, transferred, validating
from .driver import WeightingCallback, _logs_now

NAME = "JustTrainTwice"


@final
class JustTrainTwice(LightningCallback):
    r"""Train, find the training samples that the model gets wrong, train again from the start with these upweighted.

    .. math:: w_i = \lambda \text{ where } \arg\max_c f_T(x_i)_c \ne y_i, \text{ else } 1

    - :math:`f_T`: the model after ``epochs`` epochs; :math:`\lambda`: ``upweight``

    One ``fit`` is both stages. When ``epochs`` epochs are over the callback evaluates the model on the training data,
    multiplies the weights of the errors in the module's :class:`~reweigh.weighting.SampleWeight` by ``upweight``, and
    sets everything else back to where training began: parameters, buffers, the state of other weightings, optimizers
    and learning-rate schedulers. The rest of the epochs are the second stage. ``trainer.global_step`` and
    ``current_epoch`` go on counting; a :class:`WeightingCallback` in the Trainer starts counting anew.

    Which samples the model gets wrong, the LightningModule says: a method ``find_errors(batch)`` returns
    ``(index, wrong)``, positions of the batch's samples in the data set and a bool for each. A module without one whose
    batches are ``(inputs, target, index)`` needs none: ``forward(inputs)`` gives logits ``(N, C)``, compared with class
    indices. Either is called in evaluation mode, without gradient, while ``trainer.validating`` is true, with the
    batches that the collate function and the module's transfer hooks make. Random state is left as it was.

    - The training data are visited in order, each sample once, by the data set's own transforms: where they augment at
      random, give a loader without as ``dataloader``. An ``IterableDataset``, and a loader that does not batch, is
      read as training reads it.
    - Several processes: each visits its share, and errors are joined by index. One device or ``"ddp"``; strategies
      that cut up the parameters will not do.
    - Learning-rate schedules begin anew with the second stage, so plan them for the longer of the two.
    - The authors draw errors more often instead; ``reduction="weighted_mean"`` is that in expectation, while under
      ``"mean"`` the step grows with the weights. Their program adds ``up_weight`` copies to each error: one more here.
    - ``ModelCheckpoint(monitor=...)`` and ``EarlyStopping`` see both stages; :attr:`stage` says which one it is.

    State and cadence:
        ``stage`` and, until the second one begins, the initial parameters and optimizer states: saved, so that a
        checkpoint of either stage can be resumed. The weights are the module's.

    Args:
        epochs: Length of the first stage in epochs, >= 1. Short: errors must be those of the easy way out.
        upweight: Factor :math:`\lambda` > 0 on the weights of errors. 1 is neutral: training starts over, that is all.
            Default 20.0; the authors take 4 to 100.
        dataloader: Where errors are looked for, a loader or a collection of them. ``None``: the training data.
        weighting: Dotted name of the ``SampleWeight`` in the module; ``None`` for the only one.

    Raises:
        TypeError: When training starts, if the module has neither ``find_errors`` nor ``forward``.
        ValueError: When training starts, if the ``SampleWeight`` is not found, the Trainer's ``max_epochs`` leave no
            second stage (``fast_dev_run`` may), or training goes on from a checkpoint that this callback was not part
            of.

    Example:
        >>> from reweigh.lightning_callbacks import JustTrainTwice
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> from reweigh.weighting import SampleWeight
        >>> loss = Objective(CrossEntropy(), SampleWeight(50_000), "weighted_mean")  # in the LightningModule
        >>> callbacks = [JustTrainTwice(2, upweight=50.0)]  # in the Trainer

    References:
        E. Z. Liu, B. Haghgoo, A. S. Chen, A. Raghunathan, P. W. Koh, S. Sagawa, P. Liang, C. Finn, "Just Train Twice:
        Improving Group Robustness without Training Group Information", ICML 2021.
    """

    def __init__(
        self,
        epochs: int,
        *,
        upweight: float = 20.0,
        dataloader: Any = None,
        weighting: str | None = None,
    ) -> None:
        super().__init__()
        self.epochs = check_whole(self, "epochs", epochs, low=1)
        self.upweight = check_number(self, "upweight", upweight, low=0.0, open_low=True)
        self.dataloader = dataloader
        self.weighting = weighting
        self.stage = 1
        self.num_errors: int | None = None
        """How many training samples the first stage's model got wrong, once that is known."""
        self._initial: dict[str, Any] | None = None
        self._restored = False

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "num_errors": self.num_errors, "initial": self._initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stage, self.num_errors = state_dict["stage"], state_dict["num_errors"]
        self._initial = state_dict["initial"]
        self._restored = True

    # hooks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not callable(getattr(pl_module, "find_errors", None)) and not _has_forward(pl_module):
            raise TypeError(
                f"{NAME}: define find_errors(self, batch) in {type(pl_module).__name__}, returning the indices of the "
                "batch's samples and which of them the model gets wrong; or forward(self, inputs), returning logits, "
                "where batches are (inputs, target, index)"
            )
        self._table(pl_module)
        if not self._restored:
            if trainer.global_step == 0:
                self.stage, self.num_errors = 1, None
                self._initial = _beginning(trainer, pl_module)
            elif self.stage == 1 and self._initial is None:
                raise ValueError(
                    f"{NAME}: training goes on at step {trainer.global_step} from a checkpoint that holds nothing of "
                    f"this callback, so what to begin the second stage with is not known; train with {NAME} from the "
                    "start, or load the parameters alone"
                )
        self._restored = False
        last = -1 if trainer.max_epochs is None else trainer.max_epochs
        if self.stage == 1 and 0 <= last <= self.epochs and not trainer.fast_dev_run:
            raise ValueError(
                f"{NAME}: epochs must be less than the Trainer's max_epochs, which counts both stages; got "
                f"epochs={self.epochs} and max_epochs={last}"
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._turn(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._turn(trainer, pl_module)  # Lightning resumes some checkpoints without an epoch's start

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.stage == 1 and trainer.is_global_zero and not trainer.fast_dev_run:
            warnings.warn(
                f"{NAME}: training ended at step {trainer.global_step}, before the second stage, which begins after "
                f"{self.epochs} epochs",
                stacklevel=2,
            )

    # the turn from one stage to the other

    def _turn(self, trainer: Any, pl_module: Any) -> None:
        if self.stage == 2 or trainer.current_epoch < self.epochs or self._initial is None:
            return
        errors = _joined(self._errors(trainer, pl_module), trainer.strategy.root_device)
        table = self._table(pl_module)
        for module in pl_module.modules():
            if isinstance(module, SampleTable) and module is not table.table:
                module.reset()
        _begin_again(trainer, pl_module, self._initial)
        table.set(errors, self.upweight * table.table.read(errors, table).flatten().double())
        self.stage, self.num_errors, self._initial = 2, len(errors), None
        if not self.num_errors and trainer.is_global_zero:
            warnings.warn(
                f"{NAME}: the model gets every training sample right after {self.epochs} epochs, so the second stage "
                "is the first again; make the first one shorter, or regularise it more",
                stacklevel=2,
            )

    def _table(self, pl_module: Any) -> SampleWeight:
        found = {name: module for name, module in pl_module.named_modules() if isinstance(module, SampleWeight)}
        if self.weighting is not None:
            found = {name: module for name, module in found.items() if name == self.weighting}
        if len(found) != 1:
            asked = "one SampleWeight" if self.weighting is None else f"a SampleWeight named {self.weighting!r}"
            raise ValueError(
                f"{NAME}: {type(pl_module).__name__} must hold {asked} to write the errors' weights to, got "
                f"{', '.join(found) or 'none'}; with several, name one by weighting="
            )
        return next(iter(found.values()))

    def _errors(self, trainer: Any, pl_module: Any) -> Tensor:
        """Sorted indices of this rank's errors, on the CPU."""
        found = [torch.zeros(0, dtype=torch.long)]
        source = trainer.fit_loop._combined_loader if self.dataloader is None else self.dataloader
        with torch.no_grad(), same_random_state(), evaluating(pl_module), validating(trainer):
            for place, loader in enumerate(loaders(source)):
                for batch in _in_order(loader, trainer.global_rank, trainer.world_size):
                    here = transferred(trainer, pl_module, batch, place)
                    with trainer.precision_plugin.val_step_context():
                        index, wrong = _answer(pl_module, here)
                    found.append(index[wrong].cpu())
        return _each_once(torch.cat(found))


def _has_forward(pl_module: Any) -> bool:
    """Whether the module defines a forward; that of either Lightning package only raises."""
    empty = [package.LightningModule.forward for package in map(_imported, PACKAGES) if package is not None]
    return all(type(pl_module).forward is not forward for forward in empty)


def _answer(pl_module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """What the LightningModule says of a batch, or its logits do."""
    if not callable(getattr(pl_module, "find_errors", None)):
        return _by_logits(pl_module, batch)
    answer = pl_module.find_errors(batch)
    pair = answer if isinstance(answer, (tuple, list)) and len(answer) == 2 else (None, None)
    index, wrong = pair
    if not isinstance(index, Tensor) or not isinstance(wrong, Tensor) or wrong.dtype != torch.bool:
        raise TypeError(
            f"{NAME}: {type(pl_module).__name__}.find_errors must return a pair of tensors, the samples' indices and a "
            f"bool for each that is True where the model is wrong, got {_kind(answer)}"
        )
    if index.ndim != 1 or index.shape != wrong.shape or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"{NAME}: {type(pl_module).__name__}.find_errors must return integers (n,) and bools (n,), got "
            f"{_kind(answer)}"
        )
    return index.long(), wrong.to(index.device)


def _by_logits(pl_module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Where the largest logit is not the target's, of a batch ``(inputs, target, index)``."""
    name = type(pl_module).__name__
    parts = batch if isinstance(batch, (tuple, list)) and len(batch) == 3 else (None, None, None)
    inputs, target, index = parts
    if not (_whole_numbers(target) and _whole_numbers(index) and target.shape == index.shape):
        raise TypeError(
            f"{NAME}: without {name}.find_errors a batch must be (inputs, target, index), with class indices (n,) and "
            f"positions in the data set (n,), got {_kind(batch)}; define find_errors(self, batch)"
        )
    logits = pl_module(inputs)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(target) or logits.shape[1] < 2:
        raise TypeError(
            f"{NAME}: without {name}.find_errors its forward must return logits ({len(target)}, C) with C >= 2, got "
            f"{_kind(logits)}; define find_errors(self, batch)"
        )
    return index.long(), (logits.argmax(1) != target).to(index.device)


def _whole_numbers(value: Any) -> TypeGuard[Tensor]:
    kinds = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return isinstance(value, Tensor) and value.ndim == 1 and value.dtype in kinds


def _kind(answer: Any) -> str:
    if isinstance(answer, Tensor):
        return f"{answer.dtype} {tuple(answer.shape)}"
    if isinstance(answer, (tuple, list)):
        return f"({', '.join(map(_kind, answer))})"
    return type(answer).__name__


def _in_order(loader: Any, rank: int, world: int) -> Any:
    """The same data in order, this rank's share of them; what has no places of samples as it is."""
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    ):
        return loader
    subset = _subset(loader)
    places: Any = range(len(loader.dataset)) if subset is None else sorted(subset)  # type: ignore[arg-type]
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1  # a batch sampler of one's own
    return DataLoader(
        loader.dataset,
        batch_size=size,
        sampler=places[rank::world],
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _subset(loader: DataLoader[Any]) -> list[int] | None:
    """The part of the data set that training draws from, also when Lightning has wrapped its sampler for ranks."""
    for holder in (loader, loader.batch_sampler):
        inner = getattr(getattr(getattr(holder, "sampler", None), "dataset", None), "_sampler", None)
        if isinstance(inner, SubsetRandomSampler):
            return [int(i) for i in inner.indices]
    return subset_of(loader)


def _joined(errors: Tensor, device: torch.device) -> Tensor:
    """Those of all ranks, each once."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return errors
    errors = errors.to(device)
    (layout,) = shards(NAME, [len(errors)], "indices of errors", errors.device)
    return _each_once(collect(errors, layout).cpu())


def _each_once(index: Tensor) -> Tensor:
    ordered = index.sort().values
    return ordered[torch.cat([torch.ones(len(ordered[:1]), dtype=torch.bool), ordered.diff() > 0])]


def _beginning(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Everything that training starts with but numbers of single samples, on the CPU."""
    tables = [f"{name}.rows" for name, module in pl_module.named_modules() if isinstance(module, SampleTable)]
    state = {name: value for name, value in pl_module.state_dict().items() if name not in tables}
    return {
        "module": {name: _kept(value) for name, value in state.items()},
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
    }


def _kept(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def _begin_again(trainer: Any, pl_module: Any, initial: dict[str, Any]) -> None:
    pl_module.load_state_dict({**pl_module.state_dict(), **initial["module"]})
    for config, state in zip(trainer.lr_scheduler_configs, initial["schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    for optimizer, state in zip(trainer.optimizers, initial["optimizers"], strict=True):
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
    for callback in trainer.callbacks:
        if isinstance(callback, WeightingCallback):
            callback.start_over(trainer, pl_module)


class LearningFromFailure:
    r"""Mixin for a LightningModule with a biased network beside its own, before the base class (learning from failure).

    .. math:: L = \mathrm{mean}_i\big(w_i\,\mathrm{CE}(f(x_i), y_i)\big) + \mathrm{GCE}(g(x_i), y_i), \qquad
              w_i = \frac{b_i}{b_i + d_i}

    - :math:`f`: the network that is wanted; :math:`g`: the biased one, which generalised cross-entropy keeps at what it
      finds easy
    - :math:`w_i`: :class:`~reweigh.weighting.RelativeDifficulty`, near 1 where only g fails; held constant

    :meth:`failure_loss` does what ``training_step`` has to do. The module holds

    - two networks without common parameters, and in ``configure_optimizers`` the parameters of both;
    - ``self.loss``: an :class:`~reweigh.losses.Objective` with ``RelativeDifficulty`` in its weighting;
    - ``self.biased_loss``: the objective of the biased network, ``GCELoss(q=0.7)`` in the paper.

    :class:`WeightingCallback` drives both. Gradients of the two do not meet, so one optimizer, mixed precision,
    accumulation and ``"ddp"`` work as they are (clipping by a common norm couples them), and a checkpoint holds
    everything. Works with ``pytorch_lightning`` and ``lightning.pytorch``. Both losses are logged, as
    ``reweigh/debiased_loss`` and ``reweigh/biased_loss``, at the Trainer's ``log_every_n_steps``.

    In the long run only samples that g fails on have weight, and f forgets the others: choose the epoch on validation
    data.

    Raises:
        TypeError: In ``failure_loss``, if ``self.loss`` does not weigh by relative difficulty, or ``self.biased_loss``
            is no objective.

    Example:
        >>> import torch, pytorch_lightning as pl
        >>> from reweigh.lightning_callbacks import LearningFromFailure
        >>> from reweigh.losses import CrossEntropy, GCELoss, Objective
        >>> from reweigh.weighting import RelativeDifficulty
        >>> class Debiased(LearningFromFailure, pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net, self.biased = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
        ...         self.loss = Objective(CrossEntropy(), RelativeDifficulty(100, 3))
        ...         self.biased_loss = GCELoss(q=0.7)
        ...     def training_step(self, batch):
        ...         x, y, index = batch
        ...         return self.failure_loss(self.net(x), self.biased(x), y, index=index)
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters(), lr=1e-3)

    References:
        J. Nam, H. Cha, S. Ahn, J. Lee, J. Shin, "Learning from Failure: Training Debiased Classifier from Biased
        Classifier", NeurIPS 2020.
    """

    def failure_loss(
        self,
        logits: Tensor,
        biased_logits: Tensor,
        target: Tensor,
        *,
        index: Tensor,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The sum of both networks' losses, for ``training_step`` to return.

        Args:
            logits: ``(N, C)`` of the network that is wanted.
            biased_logits: ``(N, C)`` of the biased network.
            target: ``(N,)`` class indices.
            index: ``(N,)`` positions in the data set.
            mask: As in the call of an objective, for both.
            sample_weight: As in the call of an objective, for both.
        """
        module: Any = self
        debiased, biased = getattr(module, "loss", None), getattr(module, "biased_loss", None)
        if not isinstance(debiased, Objective) or not _weighs_by_difficulty(debiased):
            raise TypeError(
                f"{type(self).__name__}: self.loss must be an Objective with RelativeDifficulty in its weighting, got "
                f"{debiased!r}"
            )
        if not isinstance(biased, Objective):
            raise TypeError(
                f"{type(self).__name__}: self.biased_loss must be an Objective, such as GCELoss(), got {biased!r}"
            )
        meta: dict[str, Any] = {"mask": mask, "sample_weight": sample_weight}
        with torch.no_grad():
            failing = debiased.criterion.terms(biased_logits, target, **meta).loss
        biased_value: Tensor = biased(biased_logits, target, **meta)
        value: Tensor = debiased(logits, target, index=index, biased_loss=failing, **meta)
        if module._trainer is not None and module.training and _logs_now(module.trainer):
            parts = {f"{PREFIX}/debiased_loss": value.detach(), f"{PREFIX}/biased_loss": biased_value.detach()}
            module.log_dict(parts, on_step=True, on_epoch=False, sync_dist=False, batch_size=1)
        return value + biased_value


def _weighs_by_difficulty(objective: Objective) -> bool:
    inside = [] if objective.weighting is None else objective.weighting.modules()
    return any(isinstance(part, RelativeDifficulty) for part in inside)
