"""Weightings over tasks in a Trainer: what they are fed with, when they move, and that a resumed run is the same."""

import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
from lightning_kit import QUIET, trainer
from lightning_task_worker import (
    NAMES,
    Notes,
    coba,
    copied,
    four,
    module,
    samples,
    training_data,
    validation_data,
)
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from ranks import run_lightning
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from reweigh import FAMO, CoBa, Fixed, MultiTaskLoss, Objective, TaskLosses
from reweigh.lightning_callbacks import ValidationProbe, WeightingCallback

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler"),
]
BOTH = ["pytorch_lightning", "lightning.pytorch"]
WORKER = Path(__file__).parent / "lightning_task_worker.py"


def notes(*feeds, update_on="step"):
    return MultiTaskLoss(NAMES, Notes(*feeds, update_on=update_on))


def fit(root, losses, data=None, validation=None, *, callbacks=(), made=None, **options):
    model = module(losses) if made is None else made
    data = training_data() if data is None else data
    run = trainer(root, [WeightingCallback(), *callbacks], **{"max_epochs": 1, **options})
    run.fit(model, data, validation)
    return model, run


def assert_same(left, right, message=""):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), f"{name} {message}"


# losses on validation data


@pytest.mark.parametrize("package", BOTH)
def test_an_ordinary_validation_step_feeds_what_lives_on_validation(tmp_path, package):
    model = module({"a": notes("validation", update_on="validation"), "b": notes()}, package=package)
    run = trainer(tmp_path, WeightingCallback(), package=package, max_epochs=2)
    run.fit(model, training_data(), validation_data())  # 4 batches, after a sanity check of 2
    fed, other = (model.losses[name].weighting for name in "ab")
    epoch = ["train", "step"] * 5
    assert fed.kinds() == (epoch + ["val"] * 4 + ["validation", "epoch"]) * 2
    assert other.kinds() == [*epoch, "validation", "epoch"] * 2
    assert fed.sums[1].tolist() == [4.0] * 3  # committed with the event
    # the same as by hand
    with torch.no_grad():
        model.eval()
        last = [torch.stack([*model.task_losses(batch).values()]) for batch in validation_data()]
    assert [values for kind, values in fed.diary if kind == "val"][4:] == [row.tolist() for row in last]


def test_validation_in_mid_epoch_and_in_several_loaders(tmp_path):
    model = module({"a": notes("validation", update_on="validation")})
    step = model.validation_step
    type(model).validation_step = lambda self, batch, batch_idx, dataloader_idx: step(batch)
    model, _ = fit(tmp_path, None, None, [validation_data(4), validation_data(8)], made=model, val_check_interval=2)
    two = ["train", "step"] * 2
    check = ["val"] * 3 + ["validation"]
    assert model.losses["a"].weighting.kinds() == [*two, *check, *two, *check, "train", "step", "epoch"]


def test_other_validations_do_not_leak(tmp_path):
    model = module({"a": notes("validation", update_on="validation")})
    run = trainer(tmp_path, WeightingCallback(), max_epochs=1)
    run.validate(model, validation_data(), verbose=False)
    assert model.losses["a"].weighting.kinds() == []
    run.fit(model, training_data(), validation_data())
    before = model.losses["a"].weighting.kinds()
    run.validate(model, validation_data(), verbose=False)
    assert model.losses["a"].weighting.kinds() == before
    assert model.losses["a"].weighting._pending["seen"].sum() == 0


class Repeats(Callback):
    """Goes through a validation's hooks once more, as Lightning 2.4 does on resuming from its end."""

    def __init__(self, data):
        self.data = data

    def on_validation_end(self, trainer, pl_module):
        driver = trainer.callbacks[0]
        driver.on_validation_start(trainer, pl_module)
        for batch in self.data:
            pl_module.losses["a"](pl_module.task_losses(batch))
        driver.on_validation_epoch_end(trainer, pl_module)


def test_a_validation_that_lightning_repeats_counts_once(tmp_path):
    losses = {"a": notes("validation", update_on="validation")}
    _, run = fit(tmp_path, losses, None, validation_data(), callbacks=[Repeats(validation_data())], max_epochs=2)
    epoch = [*["train", "step"] * 5, *["val"] * 4, "validation", "epoch"]
    assert losses["a"].weighting.kinds() == epoch * 2
    assert run.callbacks[0].state_dict() == {"offsets": {}, "validated": 9}


class Stop(Exception):
    pass


def test_an_interrupted_validation_does_not_leak(tmp_path):
    model = module({"a": notes("validation", update_on="validation")})
    step, calls = model.validation_step, []

    def fails(batch):
        calls.append(1)
        step(batch)
        if len(calls) == 4:  # two of the sanity check
            raise Stop

    model.validation_step = fails
    with pytest.raises(Stop):
        fit(tmp_path, None, None, validation_data(), made=model)
    loss = model.losses["a"]
    assert loss.weighting.kinds()[-2:] == ["val", "val"]
    assert not loss._validating
    assert loss.weighting._pending["seen"].abs().sum() == 0
    loss.eval()
    loss({"seg": torch.tensor(1.0)})  # not a validation any more
    assert loss.weighting.kinds()[-2:] == ["val", "val"]


def test_coba_by_plain_validation_is_coba_by_hand(tmp_path):
    model, _ = fit(tmp_path, {"coba": MultiTaskLoss(NAMES, coba())}, None, validation_data(), max_epochs=6)
    assert model.losses["coba"].weighting.completed("validation") == 6
    alone = module({"coba": MultiTaskLoss(NAMES, coba())})
    loss, data = alone.losses["coba"], training_data()
    optimizer = torch.optim.SGD(alone.parameters(), lr=1e-3, momentum=0.9)
    for epoch in range(6):
        data.sampler.set_epoch(epoch)
        for batch in data:
            optimizer.zero_grad()
            loss(alone.task_losses(batch)).backward()
            optimizer.step()
            loss.update("step")
        alone.eval()
        with torch.no_grad(), loss.validation():
            for batch in validation_data():
                loss(alone.task_losses(batch))
        alone.train()
        loss.update("epoch")
    assert_same(copied(model), copied(alone))
    weights = torch.stack([*loss.weights.values()])
    assert not torch.allclose(weights, weights.mean(), rtol=1e-3)


# losses after the step


@pytest.mark.parametrize("package", BOTH)
@pytest.mark.parametrize("every", [1, 2])
def test_after_the_step_the_same_batches_are_seen_again(tmp_path, package, every):
    model = module({"a": notes("after")}, package=package)
    run = trainer(tmp_path, WeightingCallback(), package=package, max_epochs=1, accumulate_grad_batches=every)
    run.fit(model, training_data())
    one = ["train"] * every + ["after"] * every + ["step"]
    last = [] if every == 1 else ["train", "after", "step"]  # a window of one batch ends the epoch
    assert model.losses["a"].weighting.kinds() == [*one * (5 // every), *last, "epoch"]

    alone = module({"a": notes("after")})
    loss, optimizer = alone.losses["a"], torch.optim.SGD(alone.parameters(), lr=1e-3, momentum=0.9)
    batches = list(training_data())
    for start in range(0, 5, every):
        window = batches[start : start + every]
        optimizer.zero_grad()
        for batch in window:
            (loss(alone.task_losses(batch)) / every).backward()
        optimizer.step()
        for batch in window:
            with torch.no_grad():
                loss.observe_after(alone.task_losses(batch))
        loss.update("step")
    assert loss.weighting.diary == model.losses["a"].weighting.diary[:-1]


def by_hand(losses, made, data, epochs=2):
    """What FAMO's authors do: step, the same batch again, update."""
    loss, optimizer = made.losses[losses], torch.optim.SGD(made.parameters(), lr=1e-3, momentum=0.9)
    for epoch in range(epochs):
        data.sampler.set_epoch(epoch)
        for batch in data:
            optimizer.zero_grad()
            loss(made.task_losses(batch)).backward()
            optimizer.step()
            with torch.no_grad():
                loss.update("step", losses=made.task_losses(batch))
        loss.update("epoch")
    return made


def test_famo_is_famo_by_hand(tmp_path):
    model, _ = fit(tmp_path, {"famo": MultiTaskLoss(NAMES, FAMO())}, max_epochs=2)
    alone = by_hand("famo", module({"famo": MultiTaskLoss(NAMES, FAMO())}), training_data())
    assert_same(copied(model), copied(alone))
    assert model.losses["famo"].weighting.logits.abs().max() > 0.05


def test_the_second_look_leaves_randomness_modes_and_batch_norms_alone(tmp_path):
    """A run with it ends in the same model as one without."""
    ends = []
    for feeds in ((), ("after",)):
        torch.manual_seed(3)
        made = module({"a": notes(*feeds)}, dropout=0.5, norm=True)
        made.net[1].eval()  # as a frozen norm is
        made.net.append(torch.nn.BatchNorm1d(3, dtype=torch.float64))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's, about modules in evaluation mode
            model, _ = fit(tmp_path, None, made=made, max_epochs=2)
        ends.append({k: v for k, v in copied(model).items() if k.startswith("net")} | {"rng": torch.get_rng_state()})
        assert [part.training for part in model.net] == [True, False, True, True, True, True]
        assert model.asked == (20 if feeds else 10)
        assert int(model.net[-1].num_batches_tracked) == 10
    assert_same(*ends)


def test_dropout_masks_are_those_of_the_step(tmp_path):
    """With a learning rate of 0 the losses after the step are those before it, masks included."""
    made = module({"a": notes("after")}, dropout=0.5, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    model, _ = fit(tmp_path, None, made=made, accumulate_grad_batches=2)
    diary = model.losses["a"].weighting.diary
    before = [values for kind, values in diary if kind == "train"]
    after = [values for kind, values in diary if kind == "after"]
    assert before == after
    assert len(before) == 5


def test_each_objective_takes_the_tasks_it_knows_and_counts_go_along(tmp_path):
    losses = {
        "left": MultiTaskLoss(["seg"], Notes("after")),
        "right": MultiTaskLoss(["normal", "depth"], Notes("after")),
    }
    made = module(losses)
    made.training_step = lambda batch: sum(
        loss({k: v for k, v in type(made).task_losses(made, batch).items() if k in loss.tasks})
        for loss in losses.values()
    )
    plain = made.task_losses
    made.task_losses = lambda batch: (plain(batch), {"seg": 5.0, "depth": 2})
    fit(tmp_path, None, made=made)
    assert losses["left"].weighting.kinds() == ["train", "after", "step"] * 5 + ["epoch"]
    assert losses["left"].weighting.sums[1].tolist() == [5.0]
    assert losses["right"].weighting.sums[1].tolist() == [1.0, 2.0]


def test_without_task_losses_the_error_says_what_to_do(tmp_path):
    made = module({"a": MultiTaskLoss(NAMES, FAMO())})
    made.training_step = lambda batch: made.losses["a"](type(made).task_losses(made, batch))
    made.task_losses = None
    with pytest.raises(TypeError, match=r"FAMO needs losses.*define task_losses\(self, batch\) in Tasks.*seg, depth"):
        fit(tmp_path, None, made=made)
    made.losses["a"] = MultiTaskLoss(NAMES, FAMO(next_batch=True))
    fit(tmp_path, None, made=made)
    assert made.losses["a"].weighting.logits.abs().max() > 0.05


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        (lambda found: torch.stack([*found.values()]), TypeError, "must return a dict of losses by task"),
        (lambda found: {**found, "sge": found["seg"]}, ValueError, "names 'sge'; the tasks are depth, normal, seg"),
    ],
)
def test_a_wrong_answer_is_refused(tmp_path, answer, error, match):
    made = module({"a": notes("after")})
    plain = made.task_losses
    made.training_step = lambda batch: made.losses["a"](plain(batch))
    made.task_losses = lambda batch: answer(plain(batch))
    with pytest.raises(error, match=f"WeightingCallback: Tasks.task_losses {match}"):
        fit(tmp_path, None, made=made)
    assert made.trainer.callbacks[0]._window == []


def kept(root, made, **options):
    """How many batches the callback holds after each training batch."""
    callback, sizes = WeightingCallback(), []
    made.on_train_batch_end = lambda *args: sizes.append(len(callback._window))
    trainer(root, callback, max_epochs=1, accumulate_grad_batches=3).fit(made, training_data())
    assert callback._window == []
    return sizes


def test_batches_are_kept_only_while_they_are_wanted(tmp_path):
    assert kept(tmp_path, module({"a": notes("after")})) == [1, 2, 0, 1, 0]
    assert kept(tmp_path, module({"a": notes()})) == [0] * 5
    frozen = module({"a": notes("after")})
    frozen.losses["a"].freeze()
    plain, frozen.task_losses = frozen.task_losses, None  # not wanted either
    frozen.training_step = lambda batch: frozen.losses["a"](plain(batch))
    assert kept(tmp_path, frozen) == [0] * 5
    assert frozen.losses["a"].weighting.kinds() == []


# precision


class Overflows(torch.amp.GradScaler):
    """Finds an infinite gradient at the steps it is told."""

    def __init__(self, steps):
        super().__init__("cpu", init_scale=1024.0, growth_interval=2)
        self.steps, self.number = steps, -1

    def unscale_(self, optimizer):
        self.number += 1
        if self.number in self.steps:
            next(p for g in optimizer.param_groups for p in g["params"] if p.grad is not None).grad.fill_(torch.inf)
        super().unscale_(optimizer)


def test_a_step_that_the_scaler_skipped_has_no_losses_after_it(tmp_path):
    scaler = Overflows({1, 4})
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    made = module({"a": notes("after"), "famo": MultiTaskLoss(NAMES, FAMO())}).float()
    moves = []
    made.on_train_batch_end = lambda *args: moves.append(int(made.losses["famo"].weighting.moves[0]))
    fit(tmp_path, None, made=made, plugins=[plugin], max_epochs=1)
    good, skipped = ["train", "after", "step"], ["train", "step"]
    assert made.losses["a"].weighting.kinds() == [*good, *skipped, *good * 2, *skipped, "epoch"]
    assert moves == [1, 1, 2, 3, 3]
    assert scaler.get_scale() == 512.0  # halved, doubled by the next two, halved


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision(tmp_path, precision):
    losses = four()
    made = module(losses, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3)).float()
    if precision == "bf16-mixed":
        dtypes, plain = [], made.task_losses
        made.task_losses = lambda batch: dtypes.append(made.net(batch[0].float()).dtype) or plain(batch)
    start = copied(made)
    model, _ = fit(
        tmp_path,
        None,
        None,
        validation_data(),
        made=made,
        precision=precision,
        max_epochs=3,
        callbacks=[ValidationProbe()],
    )
    assert model.net[0].weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    if precision == "bf16-mixed":
        assert set(dtypes) == {torch.bfloat16}  # training, validation, after the step and probe alike
    assert losses["learned"].weighting.log_scale.dtype == torch.float32
    for name, part in (("coba", "ratios"), ("famo", "logits"), ("dwa", "means"), ("learned", "log_scale")):
        state = getattr(losses[name].weighting, part)
        assert part == "log_scale" or state.dtype == torch.float64
        assert not torch.equal(state, state.bfloat16().to(state.dtype)), part  # no rounding on the way
        assert not torch.equal(state, start[f"losses.{name}.weighting.{part}"])
    assert losses["coba"].weighting.completed("validation") == 16


# optimisation by other means


def manual(losses, optimizers):
    made = module(losses, optimizer=optimizers)
    made.automatic_optimization = False

    def training_step(batch):
        total = sum(loss(named) for named in [made.task_losses(batch)] for loss in losses.values())
        for optimizer in made.optimizers():
            optimizer.zero_grad()
        made.manual_backward(total)
        for optimizer in made.optimizers():
            optimizer.step()

    made.training_step = training_step
    return made


def two(model):
    learned = [p for name, p in model.named_parameters() if not name.startswith("net.0")]
    return [torch.optim.SGD(model.net[0].parameters(), lr=1e-3), torch.optim.SGD(learned, lr=1e-3)]


def test_manual_optimisation_with_two_optimizers(tmp_path):
    losses = {"a": notes("after", "validation"), **four()}
    _, run = fit(
        tmp_path, None, None, validation_data(), made=manual(losses, two), max_epochs=3, callbacks=[ValidationProbe()]
    )
    assert run.global_step == 30  # Lightning counts each optimizer's steps
    seen = losses["a"].weighting.kinds()
    one = ["train", "after", "step", "val", "validation"]
    assert [kind for kind in seen if kind not in ("epoch",)] == ["val"] * 4 + ["validation"] + one * 15
    assert losses["famo"].weighting.moves.tolist() == [15] * 3
    assert losses["coba"].weighting.completed("validation") == 16
    for loss in losses.values():
        assert loss is losses["a"] or len({round(w.item(), 6) for w in loss.weights.values()}) > 1


def test_manual_optimisation_that_steps_every_other_batch(tmp_path):
    made = manual({"a": notes("after")}, lambda m: torch.optim.SGD(m.parameters(), lr=1e-3))
    number = iter(range(100))

    def training_step(batch):
        made.manual_backward(made.losses["a"](made.task_losses(batch)))
        if next(number) % 2:
            made.optimizers().step()
            made.optimizers().zero_grad()

    made.training_step = training_step
    fit(tmp_path, None, made=made)
    assert made.losses["a"].weighting.kinds() == ["train", "train", "after", "after", "step"] * 2 + ["train", "epoch"]


def test_lbfgs_closures(tmp_path):
    losses = {"a": notes("after"), **four()}
    made = module(losses, optimizer=lambda m: torch.optim.LBFGS(m.parameters(), lr=1e-2, max_iter=3))
    fit(tmp_path, None, None, validation_data(), made=made, max_epochs=3, callbacks=[ValidationProbe()])
    kinds = losses["a"].weighting.kinds()
    assert kinds.count("step") == kinds.count("after") == 15
    assert kinds.count("train") > 30  # several per step
    assert losses["famo"].weighting.moves.tolist() == [15] * 3
    assert losses["coba"].weighting.completed("validation") == 16
    assert losses["dwa"].weighting.completed("epoch") == 3
    assert all(value.isfinite().all() for value in made.state_dict().values())


@pytest.mark.parametrize("package", BOTH)
def test_all_methods_at_once_in_both_packages(tmp_path, package):
    model = module(four(), package=package)
    callbacks = [WeightingCallback(), ValidationProbe()]
    run = trainer(tmp_path, callbacks, package=package, max_epochs=3, accumulate_grad_batches=2, log_every_n_steps=1)
    run.fit(model, training_data(), validation_data())
    clocks = {name: loss.weighting.clock.tolist() for name, loss in model.losses.items()}
    assert clocks == {  # forwards, steps, epochs, validations: the probe's for CoBa, the Trainer's for the others
        "coba": [0, 9, 3, 10],
        "famo": [0, 9, 3, 3],
        "dwa": [0, 9, 3, 3],
        "window": [0, 9, 3, 3],
        "learned": [0, 9, 3, 3],
    }
    for name, loss in model.losses.items():
        for task, weight in loss.weights.items():
            assert abs(weight.item() - {"learned": 0.5}.get(name, 1.0)) > 1e-6 or task == "never", (name, task)


# resuming


def run_to(root, *, every, start=None, save=None, probe=True, **options):
    """20 optimizer steps; the state of everything afterwards."""
    model = module(four())
    saver = [] if save is None else [ModelCheckpoint(root, filename="{epoch}-{step}", save_top_k=-1, **save)]
    callbacks = [WeightingCallback(log=False), *([ValidationProbe(2, 3)] if probe else []), *saver]
    run = trainer(
        root,
        callbacks,
        max_epochs=4,
        accumulate_grad_batches=every,
        enable_checkpointing=bool(saver),
        num_sanity_val_steps=0,
        **options,
    )
    size = 30 if every == 1 else 54  # 5 or 9 batches: with two per step, the last window is short
    run.fit(
        model, training_data(size), validation_data(), ckpt_path=start, weights_only=None if start is None else True
    )
    momenta = run.optimizers[0].state_dict()["state"]
    return copied(model) | {f"momentum{i}": entry["momentum_buffer"] for i, entry in momenta.items()}, run


@pytest.mark.parametrize("every", [1, 2])
def test_killed_at_every_optimizer_step_and_resumed_the_bits_are_the_same(tmp_path, every):
    """A probe every two steps, FAMO after the step, DWA by epoch and by steps, learned scales, in one module.

    Without the Trainer's own validation: Lightning leaves out the one that was due when a file was saved just before.
    """
    saved, no_validation = tmp_path / "saved", {"check_val_every_n_epoch": 10}
    whole, run = run_to(saved, every=every, save={"every_n_train_steps": 1}, **no_validation)
    assert run.global_step == 20
    files = sorted(saved.glob("*.ckpt"), key=lambda path: int(path.stem.rsplit("step=")[1]))
    assert [int(path.stem.rsplit("step=")[1]) for path in files] == list(range(1, 21))
    for path in files[:-1]:
        again, _ = run_to(tmp_path / "again", every=every, start=path, **no_validation)
        assert_same(whole, again, f"after {path.name}")
    moved = whole["losses.coba.weighting.shares"]
    assert not torch.allclose(moved, moved.mean(), rtol=1e-2)


@pytest.mark.parametrize("when", ["validation_end", "epoch_end"])
def test_killed_at_the_end_of_an_epoch_and_resumed_the_bits_are_the_same(tmp_path, when):
    """The same with CoBa by plain validation, for which an epoch's end is the place to stop."""
    save = {"save_on_train_epoch_end": when == "epoch_end"}
    for probe in (False, True):
        saved = tmp_path / f"saved{probe}"
        whole, _ = run_to(saved, every=1, save=save, probe=probe)
        files = sorted(saved.glob("*.ckpt"))
        assert len(files) == 4
        for path in files[:-1]:
            again, _ = run_to(tmp_path / "again", every=1, start=path, probe=probe)
            assert_same(whole, again, f"after {path.name}")


# logging


def test_losses_weights_and_total_are_logged_by_name(tmp_path):
    losses = {"famo": MultiTaskLoss(NAMES, FAMO()), "fixed": MultiTaskLoss(NAMES, [1.0, 2.0, 3.0])}
    made, rows = module(losses), []
    seen, plain = [], made.training_step
    made.training_step = lambda batch: seen.append(made.task_losses(batch)) or plain(batch)
    made.on_train_batch_end = lambda *args: rows.append(
        {k: v.item() for k, v in made.trainer.callback_metrics.items() if k.startswith("reweigh")}
    )
    _, run = fit(tmp_path, None, None, validation_data(), made=made, log_every_n_steps=1)
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    for name in losses:
        for task in NAMES:
            assert logged[f"reweigh/losses.{name}/loss/{task}"] == pytest.approx(seen[-1][task].item(), rel=1e-6)
    assert [logged[f"reweigh/losses.fixed/weight/{task}"] for task in NAMES] == [1.0, 2.0, 3.0]
    total = sum((k + 1) * seen[-1][task].item() for k, task in enumerate(NAMES))
    assert logged["reweigh/losses.fixed/total"] == pytest.approx(total, rel=1e-6)
    assert {f"reweigh/losses.famo.weighting/logits/{task}" for task in NAMES} <= logged.keys()


class Held:
    """Batches without a DataLoader, which reads a seed (on the host) at the start of every pass."""

    def __init__(self):
        self.batches = list(validation_data())

    def __iter__(self):
        return iter(self.batches)


class HostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_hooks_do_not_wait_for_the_device(tmp_path, monkeypatch):
    """Feeding, events and logging of every kind, after the first step, at which counters are read once."""
    reads, calls, tolist = HostReads(), [], torch.Tensor.tolist
    inside = torch.utils._python_dispatch._len_torch_dispatch_stack

    def counted(self):
        reads.count += inside() > 0
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def under_watch(hook):
        def call(run, *args, **kwargs):
            if run.sanity_checking or run.global_step < 2:
                return hook(run, *args, **kwargs)
            calls.append(hook.__name__)
            with reads:
                return hook(run, *args, **kwargs)

        return call

    callbacks = [WeightingCallback(), ValidationProbe(dataloader=Held())]
    for callback in callbacks:
        for name in ("batch_start", "batch_end", "epoch_start", "epoch_end"):
            setattr(callback, f"on_train_{name}", under_watch(getattr(callback, f"on_train_{name}")))
        for name in ("start", "epoch_end"):
            setattr(callback, f"on_validation_{name}", under_watch(getattr(callback, f"on_validation_{name}")))
    made = module(four())
    run = trainer(tmp_path, callbacks, max_epochs=3, log_every_n_steps=1)
    run.fit(made, training_data(), validation_data())
    assert len(calls) > 60
    assert reads.count == 0


# warnings


def warned(root, made, *data, callbacks=(), **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(root, [WeightingCallback(), *callbacks], **{"max_epochs": 1, **options}).fit(made, *data)
    return [str(w.message) for w in caught if "WeightingCallback" in str(w.message) or "Probe" in str(w.message)]


def test_warns_when_validation_never_calls_the_objective(tmp_path):
    made = module({"coba": MultiTaskLoss(NAMES, CoBa())})
    made.validation_step = lambda batch: None
    (message,) = warned(tmp_path, made, training_data(), validation_data())
    assert "losses.coba (MultiTaskLoss with CoBa) lives on validation losses, and validation ran" in message
    assert "ValidationProbe" in message
    made = module({"coba": MultiTaskLoss(NAMES, CoBa() * Fixed(2.0))})
    made.validation_step = lambda batch: None
    (message,) = warned(tmp_path, made, training_data(), validation_data())
    assert "with Product) lives on validation losses" in message
    made = module({"coba": MultiTaskLoss(NAMES, CoBa())})
    (message,) = warned(tmp_path, made, training_data())
    assert "losses.coba.weighting (CoBa) changes on 'validation', which never happened" in message
    assert warned(tmp_path, module({"a": MultiTaskLoss(NAMES, CoBa())}), training_data(), validation_data()) == []
    frozen = module({"a": MultiTaskLoss(NAMES, CoBa())})
    frozen.losses["a"].freeze()
    frozen.validation_step = lambda batch: None
    assert warned(tmp_path, frozen, training_data(), validation_data()) == []


def test_warns_when_losses_after_the_step_never_come(tmp_path):
    made = module({"a": MultiTaskLoss(NAMES, FAMO()), "b": MultiTaskLoss(["other"], FAMO())})
    made.training_step = lambda batch: made.losses["a"](made.task_losses(batch))
    (message,) = warned(tmp_path, made, training_data())
    assert "losses.b (MultiTaskLoss with FAMO) lives on losses after" in message
    assert "task_losses named none of its tasks" in message
    made = module({"a": Objective(TaskLosses(NAMES), FAMO(num_tasks=3), "sum")})
    (message,) = warned(tmp_path, made, training_data())
    assert "which only a MultiTaskLoss can take" in message


def test_nothing_is_warned_where_nothing_was_due_any_more(tmp_path):
    """A run that is resumed for an epoch without validation."""
    made = module({"coba": MultiTaskLoss(NAMES, CoBa()), "famo": MultiTaskLoss(NAMES, FAMO())})
    saver = ModelCheckpoint(tmp_path / "saved", filename="one")
    options = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
    assert warned(tmp_path, made, training_data(), validation_data(), callbacks=[saver], **options) == []
    again = module({"coba": MultiTaskLoss(NAMES, CoBa()), "famo": MultiTaskLoss(NAMES, FAMO())})
    again.load_state_dict(torch.load(tmp_path / "saved" / "one.ckpt", weights_only=True)["state_dict"])
    assert warned(tmp_path, again, training_data(), validation_data(), check_val_every_n_epoch=2) == []


def test_nothing_is_warned_in_an_ordinary_run(tmp_path):
    assert warned(tmp_path, module(four()), training_data(), validation_data()) == []
    assert warned(tmp_path, module(four()), training_data(), validation_data(), callbacks=[ValidationProbe()]) == []


# several processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks has after the same runs."""
    return run_lightning(WORKER, tmp_path_factory.mktemp("ranks"))


RUNS = ["probe1", "probe2", "plain", "empty", "uneven", "split"]


@pytest.mark.parametrize("run", RUNS)
def test_ranks_agree_to_the_bit(ranks, run):
    assert_same(*(rank[run]["state"] for rank in ranks))


def alone(tmp_path, losses, validation, *, every=1, probe=True, batch=8):
    """One process, each batch what both ranks see together."""
    model = module(losses)
    data = DataLoader(TensorDataset(*samples(32, 1)), batch_size=batch)
    callbacks = [WeightingCallback(log=False), *([ValidationProbe()] if probe else [])]
    run = trainer(tmp_path, callbacks, max_epochs=3, num_sanity_val_steps=0, accumulate_grad_batches=every)
    run.fit(model, data, validation)
    return copied(model)


def assert_near(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # learned scales are float32
        rtol = 1e-9 if value.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("run", ["probe1", "probe2", "plain"])
def test_two_ranks_equal_one_process_on_the_joined_batches(ranks, tmp_path, run):
    validation = DataLoader(TensorDataset(*samples(16, 2)), batch_size=8)
    every = 2 if run == "probe2" else 1
    wanted = alone(tmp_path, four(), validation, every=every, probe=run != "plain")
    assert_near(ranks[1][run]["state"], wanted)


def test_a_rank_without_validation_data_neither_hangs_nor_counts(ranks, tmp_path):
    validation = DataLoader(TensorDataset(*samples(16, 2)), batch_size=4)  # all of it is on the other rank
    wanted = alone(tmp_path, {"coba": MultiTaskLoss(NAMES, coba())}, validation)
    assert_near(ranks[0]["empty"]["state"], wanted)


def test_a_rank_with_fewer_validation_batches_starts_over(ranks):
    state = ranks[0]["uneven"]["state"]
    assert state["losses.coba.weighting.records"] == 13
    assert state["losses.coba.weighting.clock"].tolist() == [0, 12, 3, 13]
    assert not torch.equal(
        state["losses.coba.weighting.shares"], ranks[0]["empty"]["state"]["losses.coba.weighting.shares"]
    )


# the page that shows it

PAGE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "multitask-lightning.md"


@pytest.fixture(scope="module")
def blocks():
    """The page's code; it starts processes and Trainers, so its blocks are ``py``, which test_docs.py leaves alone."""
    text = PAGE.read_text(encoding="utf-8")
    assert "```python" not in text
    return re.findall(r"^```py\n(.*?)^```", text, re.M | re.S)


def start(folder):
    """``python train.py``, in a process group of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "SLURM"))}
    for name in ("LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        env.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "train.py"],
        cwd=folder,
        env={**env, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process):
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="process groups and gloo over fork")
def test_the_script_of_the_page_killed_and_run_again_ends_with_the_same_bits(blocks, tmp_path):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        (folder / "train.py").write_text(blocks[0], encoding="utf-8")
    output = finished(start(folders[0]))
    assert "MEMBER: 2/2" in output
    weights = eval(re.findall(r"^\{'kind.*\}$", output, re.M)[-1])
    assert len(set(weights.values())) == 3

    process = start(folders[1])
    until = time.monotonic() + 100
    while not (folders[1] / "runs" / "epoch=1.ckpt").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folders[1] / "runs" / "epoch=5.ckpt").exists()
    assert eval(re.findall(r"^\{'kind.*\}$", finished(start(folders[1])), re.M)[-1]) == weights

    whole, again = (torch.load(folder / "runs" / "epoch=5.ckpt", weights_only=True) for folder in folders)
    assert whole["global_step"] == again["global_step"] == 48
    assert_same(whole["state_dict"], again["state_dict"])
    for old, new in zip(*(run["optimizer_states"][0]["state"].values() for run in (whole, again)), strict=True):
        assert_same(old, new)
    probes = [run["callbacks"]["ValidationProbe"] for run in (whole, again)]
    assert probes[0] == probes[1] == {"drawn": 48, "records": 49, "last_step": 48}

    rows = (folders[0] / "runs" / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    logged = {name for name in rows[0].split(",") if name.startswith("reweigh")}
    assert logged == set(re.findall(r"`(reweigh/[^`]+)`", PAGE.read_text(encoding="utf-8")))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_other_blocks_of_the_page(blocks, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType("train")
    monkeypatch.setitem(sys.modules, "train", page)
    exec(compile(blocks[0], str(PAGE), "exec"), page.__dict__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, about the size of the example
        exec(compile(blocks[number], str(PAGE), "exec"), page.__dict__)
    assert len(blocks) == 4
    assert len({round(weight.item(), 6) for weight in page.model.loss.weights.values()}) == 3
