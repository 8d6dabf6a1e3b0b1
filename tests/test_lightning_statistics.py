import pickle
import random
from importlib import import_module

import numpy as np
import pytest
import torch
from lightning_kit import QUIET, loader, module, samples, trainer
from pytorch_lightning import LightningDataModule
from pytorch_lightning.callbacks import LearningRateFinder
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from reweigh.lightning_callbacks import FitStatistics, WeightingCallback
from reweigh.losses import BinaryCrossEntropy, CrossEntropy, FocalLoss, LogitAdjustment, Objective
from reweigh.weighting import InverseFrequency, class_counts

pytestmark = QUIET
BOTH = ["pytorch_lightning", "lightning.pytorch"]
X, Y = samples(40, classes=4)
TRUE = torch.from_numpy(np.bincount(Y.numpy(), minlength=4))


class Pairs(Dataset):
    """Knows its labels only one at a time, uses random numbers, and counts how often it is read."""

    def __init__(self, form=lambda x, y: (x, y), targets=Y):
        self.form, self.labels_, self.reads = form, targets, 0

    def __len__(self):
        return len(self.labels_)

    def __getitem__(self, i):
        self.reads += 1
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return self.form(X[i] + noise, self.labels_[i])


class Known(Pairs):
    """Holds its labels as a whole, like the data sets of torchvision."""

    target_transform = None

    def __init__(self, targets, name="targets"):
        super().__init__(targets=torch.as_tensor(targets))
        setattr(self, name, targets)


class Stream(IterableDataset):
    def __iter__(self):
        return zip(X, Y, strict=True)


class Once(IterableDataset):
    def __init__(self):
        self.pairs = zip(X, Y, strict=True)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.pairs)


SOURCES = {
    "tensor": Y,
    "array": Y.numpy(),
    "list": Y.tolist(),
    "int16": Y.to(torch.int16),
    "tensor data set": TensorDataset(X, Y),
    "targets": Known(Y.tolist()),
    "labels": Known(Y.numpy(), "labels"),
    "pairs": Pairs(),
    "list of pairs": list(zip(X, Y.tolist(), strict=True)),
    "subset": Subset(TensorDataset(X, Y), range(40)),
    "concat": ConcatDataset([TensorDataset(X[:15], Y[:15]), Known(Y[15:])]),
    "concat of pairs": ConcatDataset([Pairs(targets=Y[:15]), TensorDataset(X[15:], Y[15:])]),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True, drop_last=True),
    "loader of pairs": DataLoader(Pairs(), batch_size=7, shuffle=True, drop_last=True),
    "loader of dicts": DataLoader(Pairs(lambda x, y: {"x": x, "label": y}), batch_size=7),
    "unbatched loader": DataLoader(Pairs(), batch_size=None),
    "stream": DataLoader(Stream(), batch_size=7),
    "bare stream": Stream(),
    "stream with a stray attribute": type("Stray", (Stream,), {"targets": [0, 0]})(),
    "list of loaders": [DataLoader(TensorDataset(X[:9], Y[:9])), DataLoader(Pairs(targets=Y[9:]))],
    "dict of loaders": {"a": DataLoader(TensorDataset(X[:9], Y[:9])), "b": DataLoader(Pairs(targets=Y[9:]))},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_counts_equal_numpy(kind):
    counts = class_counts(SOURCES[kind])
    assert counts.dtype == torch.int64
    assert torch.equal(counts, TRUE)


def test_labels_held_as_a_whole_are_read_at_once():
    data = Known(Y)
    assert torch.equal(class_counts(DataLoader(data, shuffle=True)), TRUE)
    assert data.reads == 0


def test_a_target_transform_is_respected():
    data = Known(Y)
    data.form, data.target_transform = lambda x, y: (x, 3 - y), lambda y: 3 - y
    assert torch.equal(class_counts(data), TRUE.flip(0))


def test_subset_and_subset_sampler_count_their_part():
    part = [0, 5, 6, 7, 30]
    expected = torch.from_numpy(np.bincount(Y[part].numpy(), minlength=4))
    for data in (TensorDataset(X, Y), Pairs()):
        assert torch.equal(class_counts(Subset(data, part), num_classes=4), expected)
        drawn = DataLoader(data, batch_size=2, sampler=SubsetRandomSampler(part))
        assert torch.equal(class_counts(drawn, num_classes=4), expected)


@pytest.mark.parametrize("labels", [0, "0", lambda batch: batch[0], -2])
def test_labels_may_stand_elsewhere(labels):
    assert torch.equal(class_counts(DataLoader(Pairs(lambda x, y: (y, x)), batch_size=7), labels=labels), TRUE)
    assert torch.equal(class_counts(Pairs(lambda x, y: (y, x)), labels=labels), TRUE)


def test_labels_by_dotted_name():
    data = Pairs(lambda x, y: {"x": x, "meta": {"fine": y}})
    assert torch.equal(class_counts(DataLoader(data, batch_size=7), labels="meta.fine"), TRUE)
    assert torch.equal(class_counts(Known(Y, "coarse"), labels="coarse"), TRUE)


def test_segmentation_maps_count_pixels_without_the_ignored():
    maps = torch.randint(0, 3, (40, 5, 6), dtype=torch.uint8)
    maps[:, 0] = 255
    expected = torch.from_numpy(np.bincount(maps[maps != 255].numpy(), minlength=3))
    for data in (maps, Pairs(targets=maps), DataLoader(Pairs(targets=maps), batch_size=7), TensorDataset(X, maps)):
        assert torch.equal(class_counts(data, ignore_index=255), expected)


def test_tokens_are_counted_with_what_the_collate_function_pads():
    def pad(batch):
        xs, ys = zip(*batch, strict=True)
        return torch.stack(xs), torch.nn.utils.rnn.pad_sequence(ys, batch_first=True, padding_value=-100)

    ragged = [torch.arange(1 + n % 4) for n in range(40)]
    counts = class_counts(DataLoader(Pairs(targets=ragged), batch_size=7, collate_fn=pad))
    assert torch.equal(counts, torch.from_numpy(np.bincount(torch.cat(ragged).numpy())))


def test_multi_hot_targets_count_positives_per_label():
    hot = (torch.rand(40, 5) < 0.3).float()
    hot[:, 4] = 0.0
    for data in (hot, TensorDataset(X, hot), Pairs(targets=hot), DataLoader(Pairs(targets=hot), batch_size=7)):
        assert torch.equal(class_counts(data), hot.double().sum(0))
    assert torch.equal(class_counts(hot.bool()), hot.sum(0).long())
    assert torch.equal(class_counts(hot.long(), multilabel=True), hot.sum(0).long())
    missing = hot.clone()
    missing[3] = -1.0
    assert torch.equal(class_counts(missing, ignore_index=-1), hot.double().sum(0) - hot[3].double())


def test_soft_targets_add_up():
    soft = torch.rand(40, 3, 2, 2, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(class_counts(soft), soft.sum((0, 2, 3)), rtol=1e-14, atol=0)


def test_zero_counts_are_kept():
    assert class_counts([0, 2, 2], num_classes=5).tolist() == [1, 0, 2, 0, 0]
    assert class_counts([2, 0, 2]).tolist() == [1, 0, 2]
    assert class_counts([-100, 1], num_classes=2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([0, 3], {"num_classes": 3}, ValueError, r"classes must be in \[0, 3\), got 3"),
        ([0, -1], {}, ValueError, "got -1; is it the ignore_index"),
        ([-100, -100], {}, ValueError, r"found no label to count \(ignore_index=-100\)"),
        (torch.tensor([0.5, 1.0]), {}, TypeError, "labels must be classes, got fractions"),
        (torch.tensor([[0.5, 3.0]]), {}, ValueError, r"must be in \[0, 1\], got 0.5..3; pass multilabel=False"),
        (torch.tensor([[0, 1, 1], [0, 0, 1]]), {}, ValueError, "multilabel=True or multilabel=False"),
        (torch.tensor([0, 1]), {"multilabel": True}, ValueError, r"must be \(N, L\), got shape \(2,\)"),
        (torch.ones(2, 3), {"num_classes": 4}, ValueError, "num_classes=4, but targets have 3 labels"),
        ([0, 2**40], {}, ValueError, r"classes must be in \[0, 16777216\)"),
        (torch.tensor([1j]), {}, TypeError, "real numbers"),
        ([(1.0, "cat")], {}, TypeError, "labels must be numbers, got str"),
        (5, {}, TypeError, "must be labels, a dataset or a DataLoader, got int"),
        (DataLoader(Pairs(lambda x, y: {"a": x})), {}, TypeError, r"batch of type dict with keys \['a'\]; name them"),
        (DataLoader(Pairs(lambda x, y: {"a": x})), {"labels": "b"}, TypeError, r"labels='b' is found neither.*'a'"),
        (
            DataLoader(Pairs(lambda x, y: x)),
            {},
            TypeError,
            "cannot tell where the labels are in a batch of type Tensor",
        ),
        (DataLoader(Once()), {}, ValueError, "Once can be read only once"),
        ([0], {"num_classes": 0}, ValueError, "num_classes must be >= 1, got 0"),
    ],
)
def test_errors_say_what_is_wrong(data, options, error, message):
    with pytest.raises(error, match=message):
        class_counts(data, **options)


def random_state():
    python, (_, keys, *rest) = random.getstate(), np.random.get_state()  # noqa: NPY002
    return python, keys.tolist(), rest, torch.get_rng_state().tolist()


def test_counting_leaves_the_random_state_alone():
    generator = torch.Generator().manual_seed(3)
    data = DataLoader(Pairs(), batch_size=7, shuffle=True, generator=generator)
    before, own = random_state(), generator.get_state()
    class_counts(data)
    assert random_state() == before
    assert torch.equal(generator.get_state(), own)
    torch.rand(())
    assert random_state() != before


# the callback


def balanced(**options):
    return Objective(CrossEntropy(), InverseFrequency(**options))


@pytest.mark.parametrize("package", BOTH)
def test_counts_reach_everything_that_waits(tmp_path, package):
    loss = Objective(CrossEntropy(logits=LogitAdjustment()), InverseFrequency() * InverseFrequency([1, 2, 3]))
    model, statistics = module(loss, package=package), FitStatistics()
    data = loader()
    trainer(tmp_path, statistics, package=package, max_epochs=1).fit(model, data)
    expected = np.bincount(data.dataset.tensors[1], minlength=3).tolist()
    assert statistics.counts.tolist() == expected
    assert loss.weighting.get_submodule("operands.0").counts().tolist() == expected
    assert loss.weighting.get_submodule("operands.1").counts().tolist() == [1, 2, 3]
    assert loss.criterion.logits.counts().tolist() == expected


@pytest.mark.parametrize("package", BOTH)
@pytest.mark.parametrize("last", [True, False])
def test_counts_are_there_before_the_learning_rate_finder_and_the_sanity_check(tmp_path, last, package):
    finder = import_module(f"{package}.callbacks").LearningRateFinder(
        num_training_steps=5, update_attr=False, early_stop_threshold=None
    )
    callbacks = [finder, WeightingCallback(), FitStatistics()]
    model = module(FocalLoss(weight="balanced"), package=package)
    run = trainer(tmp_path, callbacks if last else callbacks[::-1], package=package, max_epochs=1)
    run.fit(model, loader(batch_size=10), loader(batch_size=10))
    assert len(finder.optimal_lr.results["loss"]) == 3  # one epoch


def test_without_it_the_sanity_check_fails_and_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"counts are not known yet; .*FitStatistics\(\)"):
        trainer(tmp_path).fit(module(FocalLoss(weight="balanced")), loader(), loader())


def test_a_loss_made_in_setup_or_configure_model_is_found(tmp_path):
    for hook in ("setup", "configure_model"):
        model = module(None)
        model.loss = None
        setattr(model, hook, lambda stage=None, model=model: setattr(model, "loss", balanced()))
        finder = LearningRateFinder(num_training_steps=3, update_attr=False)
        trainer(tmp_path, [finder, FitStatistics()], max_epochs=1).fit(model, loader())
        assert model.loss.weighting.counts().sum() == 30


def test_data_of_a_datamodule_and_of_the_module(tmp_path):
    class Data(LightningDataModule):
        def setup(self, stage):
            self.data = TensorDataset(*samples())

        def train_dataloader(self):
            return DataLoader(self.data, batch_size=6)

    model = module(balanced())
    trainer(tmp_path, FitStatistics(), max_epochs=1).fit(model, datamodule=Data())
    assert model.loss.weighting.counts().sum() == 30

    own = module(balanced())
    own.setup = lambda stage: setattr(own, "data", loader())
    own.train_dataloader = lambda: own.data
    trainer(tmp_path, FitStatistics(), max_epochs=1).fit(own)
    assert own.loss.weighting.counts().sum() == 30


def test_training_is_the_same_with_and_without_counting(tmp_path):
    def run(callbacks, **given):
        model = module(balanced(**given))
        torch.manual_seed(11)
        random.seed(11)
        np.random.seed(11)  # noqa: NPY002
        data = DataLoader(Pairs(), batch_size=7, shuffle=True)
        model.net = torch.nn.Linear(4, 4, dtype=torch.float64)
        trainer(tmp_path, callbacks, max_epochs=2).fit(model, data)
        return model.net.weight

    assert torch.equal(run([FitStatistics()]), run([], counts=TRUE))


def test_a_random_split_is_the_one_that_is_trained_on(tmp_path):
    model, trained = module(balanced()), []
    step = model.training_step
    model.training_step = lambda batch: (trained.append(batch[1]), step(batch))[1]

    def train_dataloader():
        part, _ = torch.utils.data.random_split(TensorDataset(*samples()), [20, 10])
        return DataLoader(part, batch_size=5)

    model.train_dataloader = train_dataloader
    trainer(tmp_path, FitStatistics(num_classes=3), max_epochs=1).fit(model)
    assert torch.equal(model.loss.weighting.counts(), torch.bincount(torch.cat(trained), minlength=3).double())


def test_the_same_data_is_counted_once(tmp_path):
    data, statistics = Pairs(), FitStatistics()
    batches = DataLoader(data, batch_size=10)
    model = module(balanced(), classes=4)
    run = trainer(tmp_path, statistics, max_epochs=1)
    run.fit(model, batches)
    assert data.reads == 80
    run.fit_loop.max_epochs = 2
    run.fit(model, batches)
    assert data.reads == 120
    other = Pairs(targets=Y[:20])
    run.fit_loop.max_epochs = 3
    run.fit(model, DataLoader(other, batch_size=10))
    assert other.reads == 40
    assert statistics.counts.sum() == 20


def test_nothing_is_read_where_nothing_waits(tmp_path):
    data = Pairs()
    trainer(tmp_path, FitStatistics(), max_epochs=1).fit(module(balanced(counts=TRUE), classes=4), DataLoader(data))
    assert data.reads == 40


def test_resuming_keeps_the_counts_of_the_checkpoint(tmp_path):
    model, statistics = module(balanced()), FitStatistics()
    run = trainer(tmp_path, statistics, max_epochs=1)
    run.fit(model, loader())
    path = tmp_path / "saved.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert torch.equal(saved["callbacks"][statistics.state_key]["counts"], statistics.counts)

    again, fresh, data = module(balanced()), FitStatistics(), Pairs(targets=Y.clamp_max(2))
    trainer(tmp_path, fresh, max_epochs=2).fit(again, DataLoader(data), ckpt_path=path, weights_only=True)
    assert data.reads == 40
    assert again.loss.weighting.counts().tolist() == fresh.counts.tolist() == statistics.counts.tolist()


def test_num_classes_comes_from_the_weighting(tmp_path):
    model = module(balanced(num_classes=6), classes=6)
    trainer(tmp_path, FitStatistics(), max_epochs=1).fit(model, loader())
    assert model.loss.weighting.counts().tolist()[3:] == [0, 0, 0]


def test_two_heads_have_a_callback_each(tmp_path):
    class TwoHeads(Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, i):
            return {"x": X[i], "fine": Y[i], "coarse": Y[i] // 2}

    model = module(torch.nn.ModuleDict({"fine": balanced(), "coarse": balanced()}), classes=4)

    def training_step(batch):
        logits = model.net(batch["x"])
        return model.loss["fine"](logits, batch["fine"]) + model.loss["coarse"](logits[:, :2], batch["coarse"])

    model.training_step = training_step
    callbacks = [FitStatistics(name, module=f"loss.{name}") for name in ("fine", "coarse")]
    trainer(tmp_path, callbacks, max_epochs=1).fit(model, DataLoader(TwoHeads(), batch_size=6))
    assert model.loss["fine"].weighting.counts().tolist() == np.bincount(Y[:30], minlength=4).tolist()
    assert model.loss["coarse"].weighting.counts().tolist() == np.bincount(Y[:30] // 2, minlength=2).tolist()
    with pytest.raises(ValueError, match="module must name a submodule of Classifier, got 'absent'"):
        trainer(tmp_path, FitStatistics(module="absent")).fit(module(balanced()), loader())


def test_multi_label_training(tmp_path):
    hot = (torch.rand(30, 3) < 0.4).double()
    model = module(Objective(BinaryCrossEntropy(), InverseFrequency()))
    trainer(tmp_path, FitStatistics(), max_epochs=1).fit(model, DataLoader(TensorDataset(X[:30], hot), batch_size=6))
    assert torch.equal(model.loss.weighting.counts(), hot.sum(0))


def test_it_travels_to_other_processes(tmp_path):
    statistics = FitStatistics()
    trainer(tmp_path, statistics, max_epochs=1).fit(module(balanced()), loader())
    for borrowed in ("log", "log_dict"):  # Lightning lends these methods of the module
        delattr(statistics, borrowed)
    copy = pickle.loads(pickle.dumps(statistics))
    assert torch.equal(copy.counts, statistics.counts)
