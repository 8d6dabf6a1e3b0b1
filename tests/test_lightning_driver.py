import subprocess
import sys
import warnings

import pytest
import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from lightning_kit import QUIET, diary, loader, module, network, samples, trainer
from pytorch_lightning.callbacks import LearningRateFinder, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from reweigh.lightning_callbacks import FitStatistics, WeightingCallback, WeightingMonitor
from reweigh.losses import CrossEntropy, FocalLoss, LogitAdjustment, Objective
from reweigh.weighting import (
    ClassWeight,
    Constant,
    EffectiveNumber,
    InverseClassLoss,
    InverseFrequency,
    Linear,
    Piecewise,
    Weighting,
    dynamics,
)

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
BOTH = ["pytorch_lightning", "lightning.pytorch"]


def rich():
    """State of several kinds: counts by `fit`, a per-step statistic, a per-epoch switch (DRW) and a per-step ramp."""
    weighting = (
        EffectiveNumber(beta=Piecewise([0.0, 0.99], [2]))
        * InverseClassLoss(3, smoothing=0.3, to="mean")
        * Constant(Linear(0.5, 1.0, duration=13, by="step"))
    )
    return Objective(CrossEntropy(logits=LogitAdjustment(tau=0.5)), weighting)


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# events


@pytest.mark.parametrize("package", BOTH)
def test_events_and_their_order_in_both_packages(tmp_path, package):
    model = module(diary(), package=package)
    run = trainer(tmp_path, WeightingCallback(), package=package)  # one callback, not in a list
    run.fit(model, loader(), loader())
    epoch = [("step", 6.0)] * 5 + ["validation", "epoch"]
    assert model.loss.weighting.events == epoch * 2  # the sanity check is not among them
    assert model.loss.weighting.clock.tolist() == [0, 10, 2, 2]


def hand_written(objective, epochs, every=1, size=30, batch_size=6):
    """The loop that the Trainer stands for."""
    net, data = network(), loader(size, batch_size)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    objective.train()
    step = 0
    for epoch in range(epochs):
        data.sampler.set_epoch(epoch)
        for i, (x, y) in enumerate(data):
            (objective(net(x), y) / every).backward()
            if (i + 1) % every == 0 or i + 1 == len(data):
                optimizer.step()
                optimizer.zero_grad()
                objective.update("step", index=step)
                step += 1
        objective.update("epoch", index=epoch)
    return {**{f"net.{k}": v for k, v in net.state_dict().items()}, **states(objective)}


@pytest.mark.parametrize("every", [1, 2])
def test_same_bits_as_a_hand_written_loop(tmp_path, every):
    model, alone = module(rich()), rich()
    for objective in (model.loss, alone):
        objective.update("fit", class_counts=[3, 2, 1])
    run = trainer(tmp_path, [WeightingCallback()], max_epochs=4, accumulate_grad_batches=every)
    run.fit(model, loader())
    expected = hand_written(alone, 4, every)
    for name, value in model.state_dict().items():
        found = expected[name] if name.startswith("net.") else expected[name.removeprefix("loss.")]
        assert torch.equal(value, found), name
    assert model.loss.weighting.get_submodule("operands.0.operands.1").completed("step") == 4 * -(-5 // every)


def test_accumulation_commits_once_per_optimizer_step_and_the_last_window_is_short(tmp_path):
    model = module(diary())
    trainer(tmp_path, WeightingCallback(), max_epochs=1, accumulate_grad_batches=2).fit(model, loader())
    assert model.loss.weighting.events == [("step", 12.0), ("step", 12.0), ("step", 6.0), "epoch"]


def test_lbfgs_closures_are_not_steps(tmp_path):
    model = module(diary(), optimizer=lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=4))
    trainer(tmp_path, WeightingCallback(), max_epochs=1).fit(model, loader())
    *steps, last = model.loss.weighting.events
    assert last == "epoch"
    assert [event for event, _ in steps] == ["step"] * 5
    assert all(seen >= 12.0 for _, seen in steps)  # every closure call is in its step's statistics


def test_manual_optimisation_with_two_optimizers(tmp_path):
    model = module(diary(), optimizer=lambda m: [torch.optim.SGD([p], lr=0.1) for p in (m.net.weight, m.net.bias)])
    model.automatic_optimization = False

    def training_step(batch):
        loss = model.loss(model.net(batch[0]), batch[1])
        for optimizer in model.optimizers():
            optimizer.zero_grad()
        model.manual_backward(loss)
        for optimizer in model.optimizers():
            optimizer.step()

    model.training_step = training_step
    run = trainer(tmp_path, WeightingCallback(), max_epochs=1)
    run.fit(model, loader())
    assert model.loss.weighting.events == [("step", 6.0)] * 5 + ["epoch"]
    assert model.loss.weighting.completed("step") == run.global_step == 10


def test_a_separate_validation_run_sends_nothing(tmp_path):
    model = module(diary())
    run = trainer(tmp_path, WeightingCallback(), max_epochs=1)
    run.validate(model, loader(), verbose=False)
    assert model.loss.weighting.events == []
    run.fit(model, loader(), loader())
    before = list(model.loss.weighting.events)
    run.validate(model, loader(), verbose=False)
    assert model.loss.weighting.events == before
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(), loader())  # with a sanity check of its own
    assert model.loss.weighting.events == before * 2


def test_forwards_of_the_learning_rate_finder_are_forgotten(tmp_path):
    found, plain = module(rich()), module(rich())
    finder = LearningRateFinder(num_training_steps=7, update_attr=False)
    statistics = FitStatistics()
    trainer(tmp_path, [WeightingCallback(), finder, statistics], max_epochs=1).fit(found, loader())
    trainer(tmp_path, [WeightingCallback(), FitStatistics()], max_epochs=1).fit(plain, loader())
    assert len(finder.optimal_lr.results["loss"]) > 0
    assert_same(states(found), states(plain))


# resuming

SAVES = {
    "validation_end": {"save_on_train_epoch_end": False},
    "epoch_end": {"save_on_train_epoch_end": True},
    "last_batch": {"every_n_train_steps": 5},
}


def run_to(tmp_path, epochs, model, save="epoch_end", **fit):
    saver = ModelCheckpoint(tmp_path / "saved", filename="{epoch}-{step}", save_top_k=-1, **SAVES[save])
    run = trainer(tmp_path, [WeightingCallback(), FitStatistics(), saver], max_epochs=epochs, enable_checkpointing=True)
    # Lightning does not make up for a validation that was due after a save on an epoch's last batch
    run.fit(model, loader(), None if save == "last_batch" else loader(), **fit)
    return run


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "trained_before"])
@pytest.mark.parametrize("save", SAVES)
def test_resume_is_bit_equal(tmp_path, save, warm):
    def start():
        model = module(rich())
        if warm:  # its clocks are ahead of the next Trainer's counters
            trainer(tmp_path, [WeightingCallback(), FitStatistics()], max_epochs=1).fit(model, loader())
        return model

    straight = start()
    run_to(tmp_path, 4, straight, save)
    path = tmp_path / "saved" / "epoch=1-step=10.ckpt"
    content = torch.load(path, weights_only=True)
    assert {key for key in content["state_dict"] if key.endswith("clock")}

    resumed = module(rich())
    run_to(tmp_path / "again", 4, resumed, save, ckpt_path=path, weights_only=True)
    assert_same(states(straight), states(resumed))
    switch = resumed.get_submodule("loss.weighting.operands.0.operands.0.beta")
    assert switch.completed("epoch") == 4 + warm


def test_a_new_trainer_goes_on_where_the_clocks_stand(tmp_path):
    model, callback = module(diary()), WeightingCallback()
    for _ in range(2):
        trainer(tmp_path, callback, max_epochs=1).fit(model, loader())
    assert model.loss.weighting.events == ([("step", 6.0)] * 5 + ["epoch"]) * 2
    assert model.loss.weighting.clock.tolist() == [0, 10, 2, 0]


def test_fit_again_with_the_same_trainer(tmp_path):
    model = module(diary())
    run = trainer(tmp_path, WeightingCallback(), max_epochs=1)
    run.fit(model, loader())
    run.fit_loop.max_epochs = 2
    run.fit(model, loader())
    assert model.loss.weighting.clock.tolist() == [0, 10, 2, 0]


def test_a_checkpoint_from_before_the_loss_loads_with_a_warning(tmp_path):
    plain = module(Objective(CrossEntropy()))
    run_to(tmp_path, 1, plain)
    model = module(Objective(CrossEntropy(), InverseClassLoss(3)))
    with pytest.warns(UserWarning, match=r"InverseClassLoss: the checkpoint has no .*class_loss.*; starting fresh"):
        run_to(tmp_path / "again", 2, model, ckpt_path=tmp_path / "saved" / "epoch=0-step=5.ckpt")
    assert model.loss.weighting.clock.tolist() == [0, 10, 2, 1]
    assert not torch.equal(model.loss.weighting.class_loss, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_own_state_is_integers_and_keys_differ():
    callback = WeightingCallback()
    assert callback.state_dict() == {"offsets": {}}
    callback.load_state_dict({"offsets": {"loss": [3, 1]}})
    assert callback.state_dict() == {"offsets": {"loss": [3, 1]}}
    different = [WeightingCallback(), WeightingCallback(False), WeightingCallback(max_entries=4)]
    assert len({c.state_key for c in different}) == 3


# precision


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
def test_statistics_stay_float64_in_bf16(tmp_path):
    objective = Objective(CrossEntropy(), InverseFrequency() * InverseClassLoss(3))
    model = module(objective, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    run = trainer(tmp_path, [FitStatistics(), WeightingCallback()], max_epochs=1, precision="bf16-true")
    run.fit(model, loader())
    assert model.net.weight.dtype == torch.bfloat16
    state = model.loss.weighting.get_submodule("operands.1")
    assert state.class_loss.dtype == torch.float64
    assert not torch.equal(state.class_loss, state.class_loss.bfloat16().double())
    assert model.loss.weighting.get_submodule("operands.0").counts().dtype == torch.float64
    assert model.half().loss.weighting.get_submodule("operands.1").class_loss.dtype == torch.float64


# logging


def test_summaries_are_logged_at_the_interval(tmp_path, monkeypatch):
    made, summary = [], InverseClassLoss.summary
    monkeypatch.setattr(InverseClassLoss, "summary", lambda self: made.append(1) or summary(self))
    logger = CSVLogger(tmp_path, name="log")
    model = module(Objective(CrossEntropy(), InverseClassLoss(3) * Constant(Linear(0.0, 1.0, duration=10, by="step"))))
    run = trainer(tmp_path, WeightingCallback(), max_epochs=2, logger=logger, log_every_n_steps=2)
    run.fit(model, loader())
    logger.save()
    header, *rows = (line.split(",") for line in (tmp_path / "log/version_0/metrics.csv").read_text().splitlines())
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7, 9]
    assert len(made) == 5  # none is made in vain
    assert {name for name in header if name.startswith("reweigh/")} == {
        *(f"reweigh/loss.weighting.operands.0/{kind}/{c}" for kind in ("class_weight", "class_loss") for c in range(3)),
        "reweigh/loss.weighting.operands.1.value/value",
    }
    assert [float(row["reweigh/loss.weighting.operands.1.value/value"]) for row in rows] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0]
    )
    weights = [float(rows[-1][f"reweigh/loss.weighting.operands.0/class_weight/{c}"]) for c in range(3)]
    assert weights == pytest.approx(model.loss.weighting.get_submodule("operands.0").table().tolist())


def test_long_tables_are_logged_as_a_range(tmp_path):
    model = module(Objective(CrossEntropy(), ClassWeight([1.0, 2.0, 6.0])))
    run = trainer(tmp_path, WeightingCallback(max_entries=2), max_epochs=1, log_every_n_steps=1)
    run.fit(model, loader())
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    name = "reweigh/loss.weighting/class_weight"
    assert logged == {f"{name}/min": 1.0, f"{name}/mean": 3.0, f"{name}/max": 6.0}


def test_logging_can_be_turned_off(tmp_path):
    run = trainer(tmp_path, WeightingCallback(log=False), max_epochs=1, log_every_n_steps=1)
    run.fit(module(Objective(CrossEntropy(), InverseClassLoss(3))), loader())
    assert not run.callback_metrics


class HostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_train_hooks_do_not_wait_for_the_device(tmp_path, monkeypatch):
    reads, calls = HostReads(), []
    tolist = torch.Tensor.tolist

    def counted(self):
        reads.count += torch.utils._python_dispatch._len_torch_dispatch_stack() > 0
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    callback, monitor = WeightingCallback(), WeightingMonitor(every_n_steps=1000)

    def under_watch(hook):
        def call(*args, **kwargs):
            calls.append(hook.__name__)
            with reads:
                return hook(*args, **kwargs)

        return call

    for owner in (callback, monitor):
        for name in ("on_train_batch_start", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end"):
            setattr(owner, name, under_watch(getattr(owner, name)))
    with reads:  # the counter sees both ways of reading
        torch.ones(1).item()
        torch.ones(1).tolist()
    assert reads.count >= 2
    reads.count = 0
    model = module(rich())
    trainer(tmp_path, [FitStatistics(), callback, monitor], max_epochs=3, log_every_n_steps=1).fit(model, loader())
    assert len(calls) == 2 * 3 * (5 + 5 + 2)
    assert reads.count == 0
    assert len(monitor.history()) == 1


# warnings


def warned(run, model, *data):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, *data)
    return [str(w.message) for w in caught if "WeightingCallback" in str(w.message)]


class LearnedScale(Weighting):
    def __init__(self):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def weigh(self, terms):
        return self.log_scale.exp()[terms.need("category")]


def test_warns_when_nothing_is_found(tmp_path):
    loss = FocalLoss()
    model = module(None)
    model.loss = None
    model.losses = [loss]  # a list hides it
    model.training_step = lambda batch: loss(model.net(batch[0]), batch[1])
    (message,) = warned(trainer(tmp_path, WeightingCallback()), model, loader())
    assert "found no objective or weighting" in message
    assert "self.loss = ..." in message


def test_a_static_loss_is_nothing_to_warn_about(tmp_path):
    assert warned(trainer(tmp_path, WeightingCallback()), module(FocalLoss()), loader()) == []


def test_warns_when_a_learned_weight_is_in_no_optimizer(tmp_path):
    def only_net(model):
        return torch.optim.SGD(model.net.parameters(), lr=0.1)

    model = module(Objective(CrossEntropy(), LearnedScale()), optimizer=only_net)
    (message,) = warned(trainer(tmp_path, WeightingCallback()), model, loader())
    assert "in no optimizer" in message
    assert "loss.weighting.log_scale" in message
    assert "parameter_groups()" in message

    complete = module(Objective(CrossEntropy(), LearnedScale()))
    assert warned(trainer(tmp_path, WeightingCallback()), complete, loader()) == []


def test_warns_when_an_event_never_comes(tmp_path):
    (message,) = warned(trainer(tmp_path, WeightingCallback()), module(diary("validation")), loader())
    assert "loss.weighting (Diary) changes on 'validation', which never happened" in message
    assert "check_val_every_n_epoch" in message
    assert warned(trainer(tmp_path, WeightingCallback()), module(diary("validation")), loader(), loader()) == []


def test_warns_when_a_per_forward_weighting_is_never_called(tmp_path):
    model = module(FocalLoss())
    model.other = Objective(CrossEntropy(), InverseClassLoss(3, cadence="forward"))
    (message,) = warned(trainer(tmp_path, WeightingCallback()), model, loader())
    assert "other.weighting (InverseClassLoss) changes on 'forward'" in message
    assert "training_step" in message


def test_warns_when_data_and_loss_are_both_reweighted(tmp_path):
    data = TensorDataset(*samples())
    drawn = DataLoader(data, batch_size=6, sampler=WeightedRandomSampler([1.0] * 30, 30))
    weighed = module(Objective(CrossEntropy(), InverseFrequency([3, 2, 1])))
    (message,) = warned(trainer(tmp_path, WeightingCallback()), weighed, drawn)
    assert "WeightedRandomSampler" in message
    assert "loss.weighting (InverseFrequency)" in message
    assert warned(trainer(tmp_path, WeightingCallback()), module(FocalLoss()), drawn) == []
    assert warned(trainer(tmp_path, WeightingCallback()), weighed, loader()) == []
    wrapped = DistributedSamplerWrapper(drawn.sampler, num_replicas=2, rank=0)  # what Lightning makes of it for ranks
    (message,) = warned(trainer(tmp_path, WeightingCallback()), weighed, DataLoader(data, sampler=wrapped))
    assert "WeightedRandomSampler" in message


def test_nothing_is_warned_in_an_ordinary_run(tmp_path):
    assert warned(trainer(tmp_path, [WeightingCallback(), FitStatistics()]), module(rich()), loader(), loader()) == []


def test_a_failed_fit_leaves_pending_sums_out_of_the_next(tmp_path):
    model = module(diary())
    step, model.calls = model.training_step, 0

    def fails_on_the_second(batch):
        loss = step(batch)
        model.calls += 1
        if model.calls == 2:
            raise RuntimeError("interrupted")
        return loss

    model.training_step = fails_on_the_second
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(tmp_path, WeightingCallback(), max_epochs=1).fit(model, loader())
    trainer(tmp_path, WeightingCallback(), max_epochs=1).fit(model, loader())
    assert model.loss.weighting.events == [("step", 6.0)] * 6 + ["epoch"]


# imports


def python(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_the_core_does_not_import_lightning():
    done = python(
        "import sys, reweigh, reweigh.losses\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('lightning', 'pytorch_lightning', 'matplotlib')]"
    )
    assert done.returncode == 0, done.stderr


def test_without_lightning_the_error_names_the_extra():
    done = python(
        "import sys\nsys.modules.update(dict.fromkeys(['lightning', 'pytorch_lightning']))\n"
        "import reweigh.lightning_callbacks"
    )
    assert done.returncode == 1
    assert "ImportError: reweigh.lightning_callbacks needs Lightning" in done.stderr
    assert "pip install reweigh[lightning]" in done.stderr


def test_every_dynamic_part_of_the_rich_objective_is_driven():
    assert sum(part.tracks_events for part in dynamics(rich())) >= 4
