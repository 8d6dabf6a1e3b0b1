"""ValidationProbe: which batches it draws, what it leaves as it was, and that nothing is recorded twice."""

import random

import numpy as np
import pytest
import torch
from lightning_kit import QUIET, trainer
from lightning_task_worker import NAMES, Notes, coba, copied, module, samples, training_data, validation_data
from pytorch_lightning import LightningDataModule
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from reweigh import DWA, CoBa, MultiTaskLoss, Objective, TaskLosses
from reweigh.lightning_callbacks import ValidationProbe, WeightingCallback

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
BOTH = ["pytorch_lightning", "lightning.pytorch"]


def notes():
    return MultiTaskLoss(NAMES, Notes("validation", update_on="validation"))


def fit(root, losses, probe, validation=None, *, made=None, others=(), **options):
    model = module(losses) if made is None else made
    run = trainer(root, [WeightingCallback(), probe, *others], **{"max_epochs": 1, **options})
    run.fit(model, training_data(), validation)
    return model, run


def drawn(model, batches):
    """Says what was drawn, by the first number of each batch; made before a fit."""
    plain = model.task_losses

    def asked(batch):
        if not model.training:
            batches.append(round(float(batch[0].reshape(-1)[0]), 6))
        return plain(batch)

    model.task_losses = asked
    return model


def first(size=14, batch_size=4, seed=2):
    x, _ = samples(size, seed)
    return [round(float(x[i, 0]), 6) for i in range(0, size, batch_size)]


# when and what


@pytest.mark.parametrize("package", BOTH)
@pytest.mark.parametrize("first_comes", ["probe", "driver"])
def test_records_before_the_first_step_and_every_n_steps(tmp_path, package, first_comes):
    batches, model = [], module({"a": notes(), "b": MultiTaskLoss(NAMES, DWA())}, package=package)
    callbacks = [WeightingCallback(), ValidationProbe(2, 3)]
    if first_comes == "probe":
        callbacks.reverse()
    run = trainer(tmp_path, callbacks, package=package, max_epochs=2, num_sanity_val_steps=0, limit_val_batches=4)
    model.validation_step = lambda batch: None
    run.fit(drawn(model, batches), training_data(), validation_data())
    kinds = model.losses["a"].weighting.kinds()
    assert [kind for kind in kinds if kind in ("val", "validation")] == (
        ["val"] * 4 + ["validation"] + (["val"] * 3 + ["validation"]) * 5
    )
    one, two, three, four = first()
    assert batches == [one, two, three, four] + [one, two, three, four] * 3 + [one, two, three]
    assert [
        i for i, kind in enumerate(kind for kind in kinds if kind in ("step", "validation")) if kind == "validation"
    ] in ([[0, 3, 6, 9, 12, 15]] if first_comes == "driver" else [[0, 2, 5, 8, 11, 14]])
    assert model.losses["b"].weighting.clock.tolist() == [0, 10, 2, 2]  # the Trainer's validations are for the others


@pytest.mark.parametrize("order", [1, -1])
def test_nothing_is_recorded_twice(tmp_path, order):
    """A validation_step that calls the loss as well: its calls and the Trainer's events are left out."""
    callbacks = [WeightingCallback(), ValidationProbe()][::order]
    losses = {"coba": MultiTaskLoss(NAMES, coba()), "notes": notes()}
    trainer(tmp_path, callbacks, max_epochs=2).fit(module(losses), training_data(), validation_data())
    assert losses["notes"].weighting.kinds().count("val") == 4 + 10
    assert losses["coba"].weighting.completed("validation") == int(losses["coba"].weighting.records) == 11


def test_coba_by_the_probe_is_coba_by_hand(tmp_path):
    model, _ = fit(tmp_path, {"coba": MultiTaskLoss(NAMES, coba())}, ValidationProbe(), validation_data(), max_epochs=2)
    alone = module({"coba": MultiTaskLoss(NAMES, coba())})
    loss, data = alone.losses["coba"], training_data()
    optimizer = torch.optim.SGD(alone.parameters(), lr=1e-3, momentum=0.9)
    held = list(validation_data())

    def record(batches):
        alone.eval()
        with torch.no_grad():
            for batch in batches:
                loss.observe_validation(alone.task_losses(batch))
        alone.train()
        loss.update("validation")

    record(held)
    for epoch in range(2):
        data.sampler.set_epoch(epoch)
        for i, batch in enumerate(data):
            optimizer.zero_grad()
            loss(alone.task_losses(batch)).backward()
            optimizer.step()
            loss.update("step")
            record([held[(5 * epoch + i) % 4]])
        loss.update("epoch")
    found, wanted = copied(model), copied(alone)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert len({round(weight.item(), 4) for weight in model.losses["coba"].weights.values()}) == 3


def test_the_baseline_can_be_a_probe(tmp_path):
    model, _ = fit(tmp_path, {"a": notes()}, ValidationProbe(3, 2, baseline="probe"), validation_data())
    kinds = [kind for kind in model.losses["a"].weighting.kinds() if kind != "train"]
    record = ["val", "val", "validation"]
    assert kinds == [*record, *["step"] * 3, *record, *["step"] * 2, "epoch"]


def test_a_baseline_is_for_those_that_have_none(tmp_path):
    losses = {"old": notes(), "new": notes()}
    losses["old"].update("validation")
    fit(tmp_path, losses, ValidationProbe(5), validation_data())
    assert [loss.weighting.kinds().count("val") for loss in losses.values()] == [1, 5]
    fit(tmp_path, losses, ValidationProbe(5), validation_data())  # a new Trainer on the trained module
    assert [loss.weighting.kinds().count("validation") for loss in losses.values()] == [3, 3]


def test_several_objectives_take_what_they_know_and_frozen_ones_nothing(tmp_path):
    losses = {
        "left": MultiTaskLoss(["seg"], Notes("validation", update_on="validation")),
        "right": MultiTaskLoss(["normal", "depth"], Notes("validation", update_on="validation")),
        "still": notes(),
    }
    losses["still"].freeze()
    made = module(losses)
    plain = made.task_losses
    made.training_step = lambda batch: sum(
        loss({k: v for k, v in plain(batch).items() if k in loss.tasks}) for loss in losses.values()
    )
    made.validation_step = lambda batch: None
    made.task_losses = lambda batch: (plain(batch), {"depth": len(batch[0])})
    fit(tmp_path, None, ValidationProbe(1, 4), validation_data(), made=made)
    assert losses["left"].weighting.sums[1].tolist() == [4.0]
    assert losses["right"].weighting.sums[1].tolist() == [4.0, 14.0]
    assert losses["still"].weighting.kinds() == []


# what it leaves alone


class Noisy(Dataset):
    """Augments with all three generators."""

    def __init__(self, size=14):
        self.x, self.y = samples(size, 2)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return self.x[i] + noise, self.y[i]


def test_randomness_and_modes_are_as_without_it(tmp_path):
    ends = []
    for with_probe in (False, True):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        own = torch.Generator().manual_seed(5)
        made = module({"a": notes()}, dropout=0.5, norm=True, validates=False)
        made.net[2].eval()
        validation = DataLoader(Noisy(), batch_size=4, shuffle=True, generator=own)
        probe = [ValidationProbe(dataloader=validation)] if with_probe else []
        run = trainer(tmp_path, [WeightingCallback(), *probe], max_epochs=2)
        with pytest.warns(UserWarning, match="evaluation mode|eval mode|never happened"):
            run.fit(made, training_data())
        assert [part.training for part in made.net] == [True, True, False, True, True]
        made.net[2].train()
        rest = {
            "torch": torch.get_rng_state(),
            "own": own.get_state(),
            "numpy": np.random.rand(),  # noqa: NPY002
            "py": random.random(),
        }
        ends.append(
            {k: v for k, v in copied(made).items() if k.startswith("net")}
            | {k: torch.as_tensor(v) for k, v in rest.items()}
        )
        assert (made.losses["a"].weighting.kinds().count("val") > 0) == with_probe
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_it_measures_in_evaluation_mode_without_gradient_while_validating(tmp_path):
    made, seen = module({"a": notes()}, dropout=0.5), []
    plain = made.task_losses

    def asked(batch):
        if not made.training:
            seen.append((torch.is_grad_enabled(), made.trainer.validating, made.net[2].training))
        return plain(batch)

    moved = []
    made.task_losses = asked
    made.on_after_batch_transfer = lambda batch, i: (moved.append(made.trainer.training), batch)[1]
    _, run = fit(
        tmp_path, None, ValidationProbe(), validation_data(), made=made, limit_val_batches=3, num_sanity_val_steps=0
    )
    assert set(seen) == {(False, True, False)}
    assert moved.count(True) == 5
    assert moved.count(False) == 3 + 5 + 3  # baseline, probes, the Trainer's own validation
    assert not run.validating


# where batches come from


class Endless(IterableDataset):
    def __init__(self, stop=None):
        self.stop = stop

    def __iter__(self):
        x, y = samples(14, 2)
        i = 0
        while self.stop is None or i < self.stop:
            yield x[i % 14], y[i % 14]
            i += 1


@pytest.mark.parametrize("stop", [14, None])
def test_iterable_data(tmp_path, stop):
    batches = []
    made = drawn(module({"a": notes()}, validates=False), batches)
    data = DataLoader(Endless(stop), batch_size=4)
    fit(tmp_path, None, ValidationProbe(dataloader=data, baseline="probe"), made=made)
    one, two, three, four = first()
    if stop is None:
        x, _ = samples(14, 2)
        assert batches == [round(float(x[4 * i % 14, 0]), 6) for i in range(6)]
    else:
        assert batches == [one, two, three, four, one, two]


def test_loaders_with_workers_that_stay(tmp_path):
    batches = []
    made = drawn(module({"a": notes()}), batches)
    made.validation_step = lambda batch: None
    data = validation_data(num_workers=1, persistent_workers=True)
    fit(tmp_path, None, ValidationProbe(), data, made=made, max_epochs=2, val_check_interval=2)
    assert batches == first() * 3 + first()[:2]


def test_several_loaders_give_a_record_together(tmp_path):
    batches = []
    made = drawn(module({"a": notes()}), batches)
    type(made).validation_step = lambda self, batch, batch_idx, dataloader_idx: None
    small = DataLoader(TensorDataset(*samples(6, 9)), batch_size=3)
    fit(tmp_path, None, ValidationProbe(), [validation_data(), small], made=made)
    long, short = first(), first(6, 3, 9)
    assert batches == [*long, *short] + [b for i in range(5) for b in (long[i % 4], short[i % 2])]
    assert made.losses["a"].weighting.kinds().count("validation") == 6


def test_loaders_that_come_together(tmp_path):
    made, seen = module({"a": notes()}, validates=False), []
    plain = made.task_losses

    def asked(batch):
        if isinstance(batch, dict):
            seen.append((round(float(batch["left"][0][0, 0]), 6), round(float(batch["right"][0][0, 0]), 6)))
            return {"seg": plain(batch["left"])["seg"], "depth": plain(batch["right"])["depth"]}
        return plain(batch)

    made.task_losses = asked
    both = {"left": validation_data(), "right": DataLoader(TensorDataset(*samples(6, 9)), batch_size=3)}
    probe = ValidationProbe(dataloader=CombinedLoader(both, "max_size_cycle"))
    fit(tmp_path, None, probe, made=made)
    pairs = list(zip(first(), first(6, 3, 9) * 2, strict=True))
    assert seen == pairs + pairs + pairs[:1]


class Data(LightningDataModule):
    def train_dataloader(self):
        return training_data()

    def val_dataloader(self):
        return validation_data()


@pytest.mark.parametrize("case", ["no step", "no batches", "data module"])
def test_data_that_the_trainer_does_not_validate_on(tmp_path, case):
    batches, options = [], {"limit_val_batches": 0} if case == "no batches" else {"num_sanity_val_steps": 0}
    made = drawn(module({"a": notes()}, validates=case != "no step"), batches)
    if case == "data module":
        made.validation_step = lambda batch: None
    run = trainer(tmp_path, [WeightingCallback(), ValidationProbe()], max_epochs=1, **options)
    run.fit(
        made,
        **(
            {"datamodule": Data()}
            if case == "data module"
            else {"train_dataloaders": training_data(), "val_dataloaders": validation_data()}
        ),
    )
    assert batches == first() * 2 + first()[:1]


def test_without_data_the_error_says_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"ValidationProbe: there is no validation data; .* give the probe a dataloader"
    ):
        fit(tmp_path, {"a": notes()}, ValidationProbe())
    once = iter(list(validation_data()))
    with pytest.raises(ValueError, match="can be read again"):
        fit(tmp_path, {"a": notes()}, ValidationProbe(dataloader=once))


def test_limits_hold_and_an_empty_loader_is_no_endless_one(tmp_path):
    batches = []
    made = drawn(module({"a": notes()}), batches)
    made.validation_step = lambda batch: None
    fit(tmp_path, None, ValidationProbe(), validation_data(), made=made, limit_val_batches=2)
    one, two, *_ = first()
    assert batches == [one, two, one, two, one, two, one]
    empty = module({"a": notes()})
    fit(tmp_path, None, ValidationProbe(dataloader=DataLoader(Endless(0), batch_size=4)), made=empty)
    assert empty.losses["a"].weighting.kinds().count("validation") == 6


# resuming


class Dies(Callback):
    """Saves a file in the middle of a step's hooks, before or after the probe's."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")


class Reshuffled(DataLoader):
    """Has a generator of its own."""

    def __init__(self):
        super().__init__(Noisy(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(9))


LOADERS = {
    "ordered": validation_data,
    "shuffled": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True),
    "generator": Reshuffled,
    "iterable": lambda: DataLoader(Endless(14), batch_size=4),
    "endless": lambda: DataLoader(Endless(), batch_size=4),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_resumed_run_draws_the_same_batches(tmp_path, kind):
    """Killed at every step: shuffled, augmented, of unknown length."""

    def run(start=None, others=(), **options):
        torch.manual_seed(0 if start is None else 77)  # a new process starts elsewhere
        batches, made = [], module({"coba": MultiTaskLoss(NAMES, coba())}, validates=False)
        probe = ValidationProbe(2, 3, dataloader=LOADERS[kind](), baseline="probe" if kind == "endless" else "full")
        runner = trainer(tmp_path, [WeightingCallback(), probe, *others], max_epochs=2, **options)
        runner.fit(drawn(made, batches), training_data(), ckpt_path=start, weights_only=start and True)
        return batches, copied(made)

    saved = tmp_path / "saved"
    saver = ModelCheckpoint(saved, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    batches, whole = run(others=[saver], enable_checkpointing=True)
    files = sorted(saved.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert len(files) == 10
    for step, path in enumerate(files[:-1], 1):
        again, state = run(path)
        assert again == batches[len(batches) - 3 * (5 - step // 2) :]  # and no baseline
        for name, value in whole.items():
            assert torch.equal(value, state[name]), f"{name} after {path.name}"
    if kind in ("shuffled", "generator"):
        assert len(set(batches[4:])) == 15  # other noise for each, after a baseline that was the first pass


@pytest.mark.parametrize("before", [True, False])
def test_a_file_saved_among_the_hooks_of_a_step(tmp_path, before):
    """A probe that was still to come when the file was saved is made up for."""

    def run(start=None):
        losses = {"coba": MultiTaskLoss(NAMES, coba())}
        parts = [WeightingCallback(), ValidationProbe(2)]
        parts.insert(1 if before else 2, Dies(tmp_path) if start is None else Callback())
        made = module(losses)
        trainer(tmp_path, parts, max_epochs=1, num_sanity_val_steps=0).fit(
            made, training_data(), validation_data(), ckpt_path=start, weights_only=start and True
        )
        return copied(made)

    whole = run()
    for step in (1, 2, 3, 4):
        state = run(tmp_path / f"{step}.ckpt")
        for name, value in whole.items():
            assert torch.equal(value, state[name]), f"{name} after step {step}"


def test_state_is_integers_and_nothing_lives_on(tmp_path):
    probe = ValidationProbe(2, 3)
    model, run = fit(tmp_path, {"a": notes()}, probe, validation_data())
    assert probe.state_dict() == {"drawn": 6, "records": 3, "last_step": 5}
    assert probe._streams == []
    run.fit_loop.max_epochs = 2
    run.fit(model, training_data(), validation_data())  # the same Trainer goes on
    assert probe.state_dict() == {"drawn": 15, "records": 6, "last_step": 10}
    fit(tmp_path, {"a": notes()}, probe, validation_data())  # another starts anew
    assert probe.state_dict() == {"drawn": 6, "records": 3, "last_step": 5}


class Stop(Exception):
    pass


def test_an_interrupted_record_does_not_leak(tmp_path):
    made = module({"a": notes()})
    plain, calls = made.task_losses, []

    def fails(batch):
        calls.append(made.training)
        if calls.count(False) == 4 + 2:
            raise Stop
        return plain(batch)

    made.task_losses = fails
    made.validation_step = lambda batch: None
    with pytest.raises(Stop):
        fit(tmp_path, None, ValidationProbe(1, 2), validation_data(), made=made)
    assert made.losses["a"].weighting.kinds()[-1] == "val"
    assert made.losses["a"].weighting._pending["seen"].abs().sum() == 0
    assert made.training


# mistakes


def test_mistakes_are_named(tmp_path):
    for arguments, match in (({"every_n_steps": 0}, "every_n_steps"), ({"num_batches": 0}, "num_batches")):
        with pytest.raises(ValueError, match=match):
            ValidationProbe(**arguments)
    with pytest.raises(ValueError, match="baseline"):
        ValidationProbe(baseline="none")
    with pytest.warns(UserWarning, match="nothing to feed"):
        fit(tmp_path, {"a": MultiTaskLoss(NAMES, DWA())}, ValidationProbe(), validation_data())
    made = module({"a": MultiTaskLoss(NAMES, CoBa())})
    made.training_step = lambda batch: made.losses["a"](type(made).task_losses(made, batch))
    made.validation_step = lambda batch: None
    made.task_losses = None
    with pytest.raises(TypeError, match=r"ValidationProbe: CoBa needs losses .* define task_losses\(self, batch\)"):
        fit(tmp_path, None, ValidationProbe(), validation_data(), made=made)


def test_warns_where_nothing_ever_came(tmp_path):
    made = module({"a": notes(), "b": MultiTaskLoss(["other"], CoBa())})
    made.training_step = lambda batch: made.losses["a"](made.task_losses(batch))
    made.validation_step = lambda batch: None
    with pytest.warns(
        UserWarning, match=r"losses.b \(MultiTaskLoss with CoBa\) lives on .* none of its tasks \(other\)"
    ):
        fit(tmp_path, None, ValidationProbe(), validation_data(), made=made)


def test_an_objective_of_another_kind_stays_with_the_driver(tmp_path):
    weighting = Notes("validation", update_on="validation", num_tasks=3)
    losses = {"a": notes(), "b": Objective(TaskLosses(NAMES), weighting, "sum")}
    fit(tmp_path, losses, ValidationProbe(), validation_data())
    assert losses["a"].weighting.kinds().count("validation") == 6
    assert weighting.kinds().count("val") == 4
    assert weighting.kinds().count("validation") == 1


def test_without_the_driver_it_still_records(tmp_path):
    made = module({"a": notes()})
    trainer(tmp_path, ValidationProbe(), max_epochs=1).fit(made, training_data(), validation_data())
    assert made.losses["a"].weighting.kinds().count("validation") == 6
