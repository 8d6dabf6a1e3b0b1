import csv
import math
import sys

import pytest
import pytorch_lightning as pl
import torch
from lightning_kit import QUIET, loader, module, trainer
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from reweigh.lightning_callbacks import WeightingCallback, WeightingMonitor
from reweigh.losses import CrossEntropy, FocalLoss, MultiTaskLoss, Objective
from reweigh.weighting import ClassWeight, Focal, InverseClassLoss

pytestmark = QUIET
BOTH = ["pytorch_lightning", "lightning.pytorch"]


def frozen(module):
    """No training, so that rows can be computed again from the data."""
    return torch.optim.SGD(module.parameters(), lr=0.0)


def expected(model, weighting, batches):
    """The row of a window, by plain sums over its terms."""
    loss, weight, classes = [], [], []
    for x, y in batches:
        ce = torch.nn.functional.cross_entropy(model.net(x), y, reduction="none").detach()
        loss += ce.tolist()
        weight += weighting(ce, y).tolist()
        classes += y.tolist()
    n, total = len(loss), sum(weight)
    row = {
        "raw_loss": sum(loss) / n,
        "weighted_loss": sum(w * v for w, v in zip(weight, loss, strict=True)) / n,
        "mean_weight": total / n,
        "effective_sample_size": total**2 / sum(w * w for w in weight),
        "effective_share": total**2 / sum(w * w for w in weight) / n,
        "num_terms": n,
    }
    for c in sorted(set(classes)):
        mine = [w for w, k in zip(weight, classes, strict=True) if k == c]
        row[f"class_weight/{c}"] = sum(mine) / len(mine)
    return {f"reweigh/loss/{name}": value for name, value in row.items()}


@pytest.mark.parametrize("package", BOTH)
def test_rows_are_sums_over_the_terms(tmp_path, package):
    table = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    objective = Objective(CrossEntropy(), ClassWeight(table) * Focal(2.0))
    model = module(objective, package=package, optimizer=frozen)
    monitor, data = WeightingMonitor(every_n_steps=2), loader(ordered=False)
    trainer(tmp_path, monitor, package=package, max_epochs=1).fit(model, data)

    batches = list(data)
    windows = [batches[:2], batches[2:4], batches[4:]]
    rows = monitor.history()
    assert [(row.pop("step"), row.pop("epoch")) for row in rows] == [(1, 0), (3, 0), (4, 0)]
    for row, window in zip(rows, windows, strict=True):
        assert {row.pop(f"reweigh/loss.weighting.operands.0/class_weight/{c}") for c in range(3)} == {1.0, 2.0, 5.0}
        assert row == pytest.approx(expected(model, lambda ce, y: table[y] * (1 - (-ce).exp()) ** 2, window), rel=1e-12)
        assert all(type(value) is float for value in row.values())


def test_masked_terms_do_not_count(tmp_path):
    objective = Objective(CrossEntropy(), ClassWeight([1.0, 2.0, 5.0]))
    x, y = next(iter(loader(ordered=False)))
    y[::2] = -100
    monitor = WeightingMonitor()
    trainer(tmp_path, monitor, max_epochs=1).fit(module(objective), DataLoader(TensorDataset(x, y), batch_size=6))
    (row,) = monitor.history()
    weights = torch.tensor([1.0, 2.0, 5.0])[y[1::2]]
    assert row["reweigh/loss/num_terms"] == 3.0
    assert row["reweigh/loss/mean_weight"] == pytest.approx(weights.mean().item())
    assert row["reweigh/loss/effective_sample_size"] == pytest.approx((weights.sum() ** 2 / (weights**2).sum()).item())


def test_windows_follow_optimizer_steps_not_batches(tmp_path):
    monitor = WeightingMonitor(every_n_steps=1)
    trainer(tmp_path, monitor, max_epochs=1, accumulate_grad_batches=2).fit(module(FocalLoss()), loader())
    assert [row["reweigh/loss/num_terms"] for row in monitor.history()] == [12.0, 12.0, 6.0]


def test_rows_reach_the_csv_logger(tmp_path):
    logger = CSVLogger(tmp_path, name="log", flush_logs_every_n_steps=1)
    monitor = WeightingMonitor(every_n_steps=2)
    model = module(Objective(CrossEntropy(), InverseClassLoss(3)))
    callbacks = [WeightingCallback(log=False), monitor]
    trainer(tmp_path, callbacks, max_epochs=2, logger=logger, log_every_n_steps=1).fit(model, loader())
    with open(tmp_path / "log/version_0/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["reweigh/loss/raw_loss"]]
    history = monitor.history()
    assert [int(row["step"]) for row in rows] == [row["step"] for row in history] == [1, 3, 5, 7, 9]
    for logged, kept in zip(rows, history, strict=True):
        found = {name: float(value) for name, value in logged.items() if value and name.startswith("reweigh/")}
        assert found == {name: value for name, value in kept.items() if name.startswith("reweigh/")}
        assert {f"reweigh/loss.weighting/class_loss/{c}" for c in range(3)} < found.keys()
    final = [history[-1][f"reweigh/loss.weighting/class_loss/{c}"] for c in range(3)]
    assert final == model.loss.weighting.class_loss.tolist()


def test_several_and_unweighted_objectives(tmp_path):
    model = module(torch.nn.ModuleList([Objective(CrossEntropy()), FocalLoss()]))
    model.training_step = lambda batch: sum(loss(model.net(batch[0]), batch[1]) for loss in model.loss)
    monitor = WeightingMonitor()
    trainer(tmp_path, monitor, max_epochs=1).fit(model, loader())
    (row,) = monitor.history()
    assert row["reweigh/loss.0/mean_weight"] == row["reweigh/loss.0/effective_share"] == 1.0
    assert row["reweigh/loss.1/mean_weight"] < 1.0
    assert row["reweigh/loss.1/raw_loss"] == row["reweigh/loss.0/raw_loss"]


def test_warns_once_about_a_small_effective_sample(tmp_path):
    x, y = loader().dataset.tensors
    y[0] = 2
    y[1:] = 0
    data = DataLoader(TensorDataset(x, y), batch_size=30)
    model = module(Objective(CrossEntropy(), ClassWeight([1e-3, 1.0, 1.0])), optimizer=frozen)
    with pytest.warns(UserWarning, match=r"effective sample size of loss is 3\..% of its terms") as caught:
        trainer(tmp_path, WeightingMonitor(every_n_steps=1), max_epochs=3).fit(model, data)
    assert sum("effective sample size" in str(w.message) for w in caught) == 1
    trainer(tmp_path, WeightingMonitor(every_n_steps=1, warn_below=0.0), max_epochs=1).fit(model, data)


def test_watchers_are_let_go_at_the_end_and_after_an_exception(tmp_path):
    model = module(FocalLoss())
    monitor = WeightingMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor, max_epochs=1)
    run.fit(model, loader())
    assert model.loss._watchers == []

    step = model.training_step

    def fails(batch):
        assert len(model.loss._watchers) == 1
        step(batch)
        raise RuntimeError("interrupted")

    model.training_step = fails
    run.fit_loop.max_epochs = 2
    with pytest.raises(RuntimeError, match="interrupted"):
        run.fit(model, loader())
    assert model.loss._watchers == []
    assert len(monitor.history()) == 5


def test_figure_shows_the_curves(tmp_path):
    monitor = WeightingMonitor(every_n_steps=2)
    model = module(Objective(CrossEntropy(), ClassWeight([1.0, 2.0, 5.0])))
    trainer(tmp_path, monitor, max_epochs=2).fit(model, loader())
    figure = monitor.plot()
    history = monitor.history()
    steps = [row["step"] for row in history]
    curves = [{line.get_label(): line for line in axes.get_lines()} for axes in figure.axes]
    assert [axes.get_ylabel() for axes in figure.axes] == ["mean loss per term", "effective share", "weight"]
    for axes, label, name in [
        (0, "raw", "raw_loss"),
        (0, "weighted", "weighted_loss"),
        (1, "effective sample size / terms", "effective_share"),
        (2, "mean", "mean_weight"),
        (2, "class 2", "class_weight/2"),
    ]:
        line = curves[axes][label]
        assert list(line.get_xdata()) == steps
        assert list(line.get_ydata()) == [row[f"reweigh/loss/{name}"] for row in history]
    assert all(axes.get_legend() is not None for axes in figure.axes)
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[2].get_lines()}
    assert len(styles) == 4
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"nothing was recorded for other, only for \['loss'\]"):
        monitor.plot("other")


def test_plot_without_rows_or_matplotlib(monkeypatch):
    with pytest.raises(ValueError, match="nothing was recorded for any objective"):
        WeightingMonitor().plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install reweigh\[plot\]"):
        WeightingMonitor().plot()


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"warn_below": 1.5}, {"max_entries": 0}])
def test_arguments_are_checked(options):
    with pytest.raises(ValueError, match=f"WeightingMonitor: {next(iter(options))} must be"):
        WeightingMonitor(**options)


def test_many_classes_are_given_by_their_range(tmp_path):
    monitor = WeightingMonitor(max_entries=2)
    model = module(Objective(CrossEntropy(), ClassWeight([1.0, 2.0, 6.0])), optimizer=frozen)
    trainer(tmp_path, monitor, max_epochs=1).fit(model, loader())
    (row,) = monitor.history()
    found = {name.rsplit("/", 1)[1]: value for name, value in row.items() if "loss/class_weight" in name}
    assert found == pytest.approx({"min": 1.0, "mean": 3.0, "max": 6.0})
    assert math.isfinite(row["reweigh/loss/raw_loss"])


def test_tasks_have_their_names_and_their_own_units(tmp_path):
    losses = [(4.0, 100.0), (2.0, 50.0), (1.0, 100.0), (1.0, 50.0)]

    class Tasks(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
            self.loss = MultiTaskLoss(["seg", "depth"], [1.0, 3.0], init="first")

        def training_step(self, batch, batch_idx):
            seg, depth = losses[batch_idx]
            return self.loss({"seg": seg * self.scale, "depth": depth * self.scale})

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    monitor = WeightingMonitor(every_n_steps=4)
    trainer(tmp_path, [monitor], max_epochs=1).fit(Tasks(), DataLoader(range(4)))
    (row,) = monitor.history()
    assert row["reweigh/loss/task_weight/seg"] == 1.0
    assert row["reweigh/loss/task_weight/depth"] == 3.0
    assert row["reweigh/loss/task_loss/seg"] == 2.0
    assert row["reweigh/loss/task_loss/depth"] == 75.0
    assert not any("class_weight" in name for name in row)
    labels = [line.get_label() for line in monitor.plot().axes[2].get_lines()]
    assert labels == ["mean", "seg", "depth"]
