"""Just Train Twice and learning from failure in a Trainer, against loops written by hand."""

import itertools
from importlib import import_module
from pathlib import Path

import pytest
import torch
from lightning_kit import QUIET, EpochOrder, network, samples, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from ranks import run_lightning
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SubsetRandomSampler, default_collate

from reweigh.lightning_callbacks import JustTrainTwice, LearningFromFailure, WeightingCallback
from reweigh.losses import CrossEntropy, GCELoss, Objective
from reweigh.weighting import AdaWAC, Constant, InverseClassLoss, Linear, RelativeDifficulty, SampleWeight

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]
BOTH = ["pytorch_lightning", "lightning.pytorch"]
SIZE = 30


class Indexed(Dataset):
    """The kit's samples with their places."""

    def __init__(self, size=SIZE):
        self.x, self.y = samples(size)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, place):
        return self.x[place], self.y[place], place


def data(**options):
    return DataLoader(Indexed(), **{"batch_size": 6, **options})


def plain():
    return Objective(CrossEntropy(), SampleWeight(SIZE), "weighted_mean")


def mean():
    """The one reduction that several processes compute as one does, by DDP's average of gradients."""
    return Objective(CrossEntropy(), SampleWeight(SIZE))


def rich():
    """With state of other kinds, which the second stage begins without."""
    schedule = Constant(Linear(0.5, 1.0, duration=7, by="step"))
    return Objective(CrossEntropy(), SampleWeight(SIZE) * InverseClassLoss(3, smoothing=0.3) * schedule, "mean")


def optimizers(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))]


def module(loss, *, package="pytorch_lightning", dropout=0.0):
    class Classifier(import_module(package).LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Dropout(dropout), network())
            self.loss = loss
            self.seen = []

        def training_step(self, batch):
            x, y, index = batch
            self.seen.append(index.tolist())
            return self.loss(self.net(x), y, index=index)

        def find_errors(self, batch):
            x, y, index = batch
            return index, self.net(x).argmax(1) != y

        def configure_optimizers(self):
            return optimizers(self)

    return Classifier()


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def train(model, epochs, batches):
    """A stage by hand."""
    (optimizer,), (scheduler,) = optimizers(model)
    model.train()
    step = 0
    for epoch in range(epochs):
        for batch in batches:
            model.training_step(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.loss.update("step", index=step)
            step += 1
        model.loss.update("epoch", index=epoch)
        scheduler.step()


def weights_of(model):
    (table,) = [part for part in model.modules() if isinstance(part, SampleWeight)]
    return table


@torch.no_grad()
def errors_of(model):
    x, y = samples(SIZE)
    return (model.eval().net(x).argmax(1) != y).nonzero().flatten()


def by_hand(loss, first, second, upweight):
    """The paper's two models, one after the other."""
    model = module(loss())
    train(model, first, data())
    errors = errors_of(model)
    model = module(loss())
    weights_of(model).set(errors, upweight)
    train(model, second, data())
    return model, errors


@pytest.mark.parametrize("package", BOTH)
@pytest.mark.parametrize("loss", [plain, rich])
def test_one_fit_is_both_stages_bit_for_bit(tmp_path, package, loss):
    model, callback = module(loss(), package=package), JustTrainTwice(2, upweight=5.0)
    trainer(tmp_path, [callback, WeightingCallback()], package=package, max_epochs=5).fit(model, data())
    wanted, errors = by_hand(loss, 2, 3, 5.0)
    assert 0 < len(errors) < SIZE
    assert callback.stage == 2
    assert callback.num_errors == len(errors)
    assert_same(states(model), states(wanted))


def test_the_order_of_callbacks_does_not_matter(tmp_path):
    found = []
    for callbacks in ([JustTrainTwice(1), WeightingCallback()], [WeightingCallback(), JustTrainTwice(1)]):
        model = module(rich())
        trainer(tmp_path, callbacks, max_epochs=3).fit(model, data())
        found.append(states(model))
    assert_same(*found)


def test_the_second_stage_has_begun_when_its_first_epoch_does(tmp_path):
    """What the module does at an epoch's start, it does with the parameters of the stage."""
    model, callback, seen = module(plain()), JustTrainTwice(1), []
    model.on_train_epoch_start = lambda: seen.append((callback.stage, model.net[1].weight.detach().clone()))
    trainer(tmp_path, callback, max_epochs=3).fit(model, data())
    assert [stage for stage, _ in seen] == [1, 2, 2]
    first, again, later = (weight for _, weight in seen)
    assert torch.equal(first, again)
    assert not torch.equal(again, later)


def test_a_factor_of_one_is_training_without_it(tmp_path):
    twice, once = module(plain()), module(plain())
    trainer(tmp_path, JustTrainTwice(2, upweight=1.0), max_epochs=5).fit(twice, data())
    trainer(tmp_path, max_epochs=3).fit(once, data())
    assert_same(states(twice), states(once))


def test_weights_that_were_there_are_multiplied(tmp_path):
    first = torch.linspace(0.5, 2.0, SIZE, dtype=torch.float64)
    model = module(Objective(CrossEntropy(), SampleWeight(SIZE, weights=first), "weighted_mean"))
    trainer(tmp_path, JustTrainTwice(1, upweight=4.0), max_epochs=2).fit(model, data())
    ratio = weights_of(model).table.rows.flatten() / first.float()
    assert set(ratio.tolist()) == {1.0, 4.0}


def test_looking_for_errors_changes_no_random_number(tmp_path):
    """Shuffles and dropout are those of a run without the callback."""
    seen = []
    for callbacks in ([], [JustTrainTwice(1)]):
        torch.manual_seed(3)
        model = module(plain(), dropout=0.3)
        torch.manual_seed(4)
        trainer(tmp_path, callbacks, max_epochs=3).fit(model, data(shuffle=True))
        seen.append((model.seen, torch.rand(1).item()))
    assert seen[0] == seen[1]


# resuming


def checkpoints(folder, **options):
    return ModelCheckpoint(dirpath=folder, filename="{epoch}-{step}", save_top_k=-1, **options)


@pytest.mark.parametrize(
    "when",
    [{"every_n_epochs": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}, {"every_n_train_steps": 5}],
    ids=str,
)
def test_a_run_resumed_in_either_stage_gives_the_same_bits(tmp_path, when):
    def options():
        return {"max_epochs": 4, "enable_checkpointing": True}

    def fresh():
        return DataLoader(Indexed(), batch_size=6, sampler=EpochOrder(SIZE))

    saving = checkpoints(tmp_path, **when)
    whole = module(rich())
    trainer(tmp_path, [JustTrainTwice(2), WeightingCallback(), saving], **options()).fit(whole, fresh())
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))
    stages = [torch.load(file, weights_only=False)["callbacks"]["JustTrainTwice"]["stage"] for file in files]
    assert {1, 2} == set(stages)
    for file in files[:-1]:
        torch.manual_seed(99)
        resumed, callback = module(rich()), JustTrainTwice(2)
        with torch.no_grad():
            for parameter in resumed.parameters():
                parameter.add_(1.0)  # a fresh process begins with other parameters
        again = trainer(tmp_path, [callback, WeightingCallback()], **options())
        again.fit(resumed, fresh(), ckpt_path=file)
        assert callback.stage == 2, file
        assert_same(states(resumed), states(whole))


def test_a_run_resumed_in_the_middle_of_an_epoch_begins_again_with_the_same(tmp_path):
    """Lightning reads other batches then; with a factor of 1 nothing of the first stage reaches the second."""
    saving = checkpoints(tmp_path, every_n_train_steps=3)
    callbacks = [JustTrainTwice(2, upweight=1.0), WeightingCallback()]
    whole = module(rich())
    trainer(tmp_path, [*callbacks, saving], max_epochs=4, enable_checkpointing=True).fit(whole, data())
    files = [tmp_path / name for name in ("epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt", "epoch=1-step=9.ckpt")]
    for file in files:
        resumed = module(rich())
        callbacks = [JustTrainTwice(2, upweight=1.0), WeightingCallback()]
        trainer(tmp_path, callbacks, max_epochs=4).fit(resumed, data(), ckpt_path=file)
        assert_same(states(resumed), states(whole))


def test_a_checkpoint_of_the_second_stage_no_longer_holds_the_beginning(tmp_path):
    saving = checkpoints(tmp_path, every_n_epochs=1)
    callbacks = [JustTrainTwice(1), saving]
    trainer(tmp_path, callbacks, max_epochs=3, enable_checkpointing=True).fit(module(plain()), data())
    kept = {}
    for file in tmp_path.glob("*.ckpt"):
        saved = torch.load(file, weights_only=True)  # plain numbers and tensors
        kept[saved["epoch"]] = saved["callbacks"]["JustTrainTwice"]["initial"]
    assert sorted(kept) == [0, 1, 2]
    assert kept[1] is kept[2] is None
    assert not any("rows" in name for name in kept[0]["module"])  # tables of samples are not held twice


def test_a_checkpoint_from_elsewhere_is_refused(tmp_path):
    saving = checkpoints(tmp_path, every_n_epochs=1)
    trainer(tmp_path, [saving], max_epochs=1, enable_checkpointing=True).fit(module(plain()), data())
    (file,) = tmp_path.glob("*.ckpt")
    with pytest.raises(ValueError, match="from a checkpoint that holds nothing of this callback"):
        trainer(tmp_path, JustTrainTwice(2), max_epochs=3).fit(module(plain()), data(), ckpt_path=file)


def test_a_second_trainer_begins_anew(tmp_path):
    model, callback = module(plain()), JustTrainTwice(1)
    for _ in range(2):
        trainer(tmp_path, callback, max_epochs=2).fit(model, data())
        assert callback.stage == 2


# where errors are looked for


class Watching:
    """What the module is asked, and in which state."""

    def __init__(self, wrong):
        self.wrong = wrong
        self.indices, self.states = [], set()

    def __call__(self, lightning, batch):
        index = batch[2]
        self.indices.append(index.tolist())
        self.states.add((lightning.trainer.validating, lightning.training, torch.is_grad_enabled()))
        return index, torch.isin(index, torch.as_tensor(self.wrong))

    def visited(self):
        return list(itertools.chain(*self.indices))


def watched(loss, wrong):
    model = module(loss)
    watching = Watching(wrong)
    model.find_errors = lambda batch: watching(model, batch)
    return model, watching


def run_watched(tmp_path, batches, wrong=(1, 4), **options):
    model, watching = watched(plain(), wrong)
    run = trainer(tmp_path, JustTrainTwice(1, upweight=4.0, **options), max_epochs=2)
    run.fit(model, batches)
    assert model.training
    assert run.training is False
    return watching, {i for i, weight in enumerate(weights_of(model).table.rows.flatten().tolist()) if weight != 1.0}


def test_the_model_is_asked_in_evaluation_mode_and_in_order(tmp_path):
    watching, marked = run_watched(tmp_path, data(shuffle=True, drop_last=True, batch_size=7))
    assert watching.states == {(True, False, False)}
    assert watching.visited() == list(range(SIZE))
    assert [len(batch) for batch in watching.indices] == [7, 7, 7, 7, 2]
    assert marked == {1, 4}


def test_a_subset_sampler_is_respected(tmp_path):
    part = [8, 2, 5, 4, 20, 3]
    watching, marked = run_watched(tmp_path, data(sampler=SubsetRandomSampler(part), batch_size=3))
    assert watching.visited() == sorted(part)
    assert marked == {4}


def test_a_batch_sampler_gives_its_size(tmp_path):
    batches = BatchSampler(EpochOrder(SIZE), 9, drop_last=True)
    watching, marked = run_watched(tmp_path, DataLoader(Indexed(), batch_sampler=batches))
    assert [len(batch) for batch in watching.indices] == [9, 9, 9, 3]
    assert marked == {1, 4}


def test_a_batch_sampler_that_is_a_list(tmp_path):
    batches = [[0, 4], [1, 2, 3]]
    watching, marked = run_watched(tmp_path, DataLoader(Indexed(), batch_sampler=batches))
    assert sorted(watching.visited()) == list(range(SIZE))
    assert marked == {1, 4}


class Stream(IterableDataset):
    def __iter__(self):
        whole = Indexed()
        return (whole[i] for i in range(0, SIZE, 2))


def test_a_stream_is_read_as_it_is(tmp_path):
    watching, marked = run_watched(tmp_path, DataLoader(Stream(), batch_size=4))
    assert watching.visited() == list(range(0, SIZE, 2))
    assert marked == {4}


class Batched(Indexed):
    """Takes a list of places and gives a batch."""

    def __getitem__(self, places):
        return self.x[places], self.y[places], torch.as_tensor(places)


def test_a_loader_that_does_not_batch_is_read_as_it_is(tmp_path):
    sampler = BatchSampler(range(SIZE), 8, drop_last=False)
    watching, marked = run_watched(tmp_path, DataLoader(Batched(), sampler=sampler, batch_size=None))
    assert [len(batch) for batch in watching.indices] == [8, 8, 8, 6]
    assert marked == {1, 4}


def test_a_loader_of_ones_own_and_several_of_them(tmp_path):
    watching, marked = run_watched(
        tmp_path,
        data(),
        dataloader={"a": data(sampler=SubsetRandomSampler([1, 2])), "b": data(sampler=SubsetRandomSampler([4, 2]))},
    )
    assert watching.visited() == [1, 2, 2, 4]
    assert marked == {1, 4}


# a module that is not asked


def unasked(package="pytorch_lightning", forward=lambda self, x: self.net(x)):
    """Without find_errors, with a forward."""
    model = module(plain(), package=package)
    model.find_errors = None
    type(model).forward = forward
    return model


@pytest.mark.parametrize("package", BOTH)
def test_logits_and_targets_say_what_find_errors_would(tmp_path, package):
    default, asked = unasked(package), module(plain(), package=package)
    for model in (default, asked):
        callback = JustTrainTwice(2, upweight=5.0)
        trainer(tmp_path, callback, package=package, max_epochs=4).fit(model, data())
        assert callback.num_errors > 0
    assert_same(states(default), states(asked))


@pytest.mark.parametrize(
    ("forward", "change", "message"),
    [
        (lambda self, x: self.net(x)[:, 0], None, r"forward must return logits \(6, C\) .* got torch.float64 \(6,\)"),
        (lambda self, x: self.net(x)[:, :1], None, r"with C >= 2, got torch.float64 \(6, 1\)"),
        (lambda self, x: self.net(x)[:2], None, r"got torch.float64 \(2, 3\)"),
        (lambda self, x: {"logits": self.net(x)}, None, "got dict"),
        (lambda self, x: self.net(x), lambda x, y, i: (x, y), r"a batch must be \(inputs, target, index\).* got \(tor"),
        (lambda self, x: self.net(x), lambda x, y, i: {"x": x, "y": y, "i": i}, "got dict"),
        (lambda self, x: self.net(x), lambda x, y, i: (x, y.double(), i), r"class indices \(n,\)"),
        (lambda self, x: self.net(x), lambda x, y, i: (x, y, i[:2]), r"positions in the data set \(n,\)"),
    ],
)
def test_batches_and_logits_of_other_kinds_are_refused(tmp_path, forward, change, message):
    model = unasked(forward=forward)
    if change is not None:
        looking = data(collate_fn=lambda rows: change(*default_collate(rows)))
    with pytest.raises(TypeError, match=f"without Classifier.find_errors .*{message}"):
        trainer(tmp_path, JustTrainTwice(1, dataloader=None if change is None else looking)).fit(model, data())


# what is refused, and warned about


@pytest.mark.parametrize("argument", [{"epochs": 0}, {"epochs": 1, "upweight": 0.0}, {"epochs": 1, "upweight": -1.0}])
def test_bad_numbers(argument):
    with pytest.raises(ValueError, match="JustTrainTwice: "):
        JustTrainTwice(**argument)


def test_a_module_must_find_errors(tmp_path):
    model = module(plain())
    model.find_errors = None
    with pytest.raises(
        TypeError, match=r"define find_errors\(self, batch\) in Classifier.* or forward\(self, inputs\)"
    ):
        trainer(tmp_path, JustTrainTwice(1)).fit(model, data())
    assert model.seen == []


def test_the_weights_must_be_found(tmp_path):
    with pytest.raises(ValueError, match=r"Classifier must hold one SampleWeight .* got none"):
        trainer(tmp_path, JustTrainTwice(1)).fit(module(Objective(CrossEntropy())), data())
    two = Objective(CrossEntropy(), SampleWeight(SIZE) * SampleWeight(SIZE))
    with pytest.raises(ValueError, match=r"got loss.weighting.operands.0, loss.weighting.operands.1; with several"):
        trainer(tmp_path, JustTrainTwice(1)).fit(module(two), data())
    with pytest.raises(ValueError, match="a SampleWeight named 'elsewhere'"):
        trainer(tmp_path, JustTrainTwice(1, weighting="elsewhere")).fit(module(two), data())
    model = module(two)
    trainer(tmp_path, JustTrainTwice(1, weighting="loss.weighting.operands.1"), max_epochs=2).fit(model, data())
    untouched, marked = (part.table.rows for part in model.modules() if isinstance(part, SampleWeight))
    assert (untouched == 1).all()
    assert (marked != 1).any()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda batch: batch[2], r"must return a pair of tensors, .* got torch.int64 \(6,\)"),
        (lambda batch: (batch[2], batch[1]), r"a bool for each .* got \(torch.int64 \(6,\), torch.int64 \(6,\)\)"),
        (lambda batch: (batch[2], batch[2][:2] > 0), r"got \(torch.int64 \(6,\), torch.bool \(2,\)\)"),
        (lambda batch: (batch[0][:, 0], batch[1] > 0), r"integers \(n,\) and bools \(n,\)"),
        (lambda batch: (batch[2] + 100, batch[1] >= 0), r"SampleWeight: index must be in \[0, 30\)"),
    ],
)
def test_wrong_answers(tmp_path, answer, message):
    model = module(plain())
    model.find_errors = answer
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(tmp_path, JustTrainTwice(1), max_epochs=2).fit(model, data())


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_training_that_cannot_get_to_the_second_stage_is_refused(tmp_path, epochs):
    model = module(plain())
    with pytest.raises(ValueError, match=f"epochs must be less than .* got epochs={epochs} and max_epochs=2"):
        trainer(tmp_path, JustTrainTwice(epochs), max_epochs=2).fit(model, data())
    assert model.seen == []  # before anything was trained


@pytest.mark.parametrize("limit", [{"max_epochs": -1, "max_steps": 7}, {"max_epochs": 9, "max_steps": 7}], ids=str)
def test_a_training_that_never_gets_to_the_second_stage_says_so(tmp_path, limit):
    with pytest.warns(UserWarning, match="ended at step 7, before the second stage, which begins after 2 epochs"):
        trainer(tmp_path, JustTrainTwice(2), **limit).fit(module(plain()), data())


def test_a_training_that_has_no_last_epoch_has_two_stages(tmp_path):
    callback = JustTrainTwice(1)
    trainer(tmp_path, callback, max_epochs=-1, max_steps=7).fit(module(plain()), data())
    assert callback.stage == 2


def test_a_trial_run_of_one_batch_is_no_mistake(tmp_path):
    callback = JustTrainTwice(2)
    trainer(tmp_path, callback, fast_dev_run=True).fit(module(plain()), data())
    assert callback.stage == 1


def test_a_first_stage_without_errors_says_so(tmp_path):
    model, _ = watched(plain(), [])
    with pytest.warns(UserWarning, match="gets every training sample right after 1 epochs"):
        trainer(tmp_path, JustTrainTwice(1), max_epochs=2).fit(model, data())


def test_tables_of_other_weightings_begin_anew(tmp_path):
    """Numbers per sample are not kept for the second stage, they are forgotten."""
    model = module(plain())
    model.other = AdaWAC(4)
    model.other.logit.write(torch.tensor([2]), torch.ones(1, 1))
    trainer(tmp_path, JustTrainTwice(1), max_epochs=2).fit(model, data())
    assert (model.other.logit.rows == 0).all()


# two processes


WORKER = Path(__file__).parent / "lightning_two_stage_worker.py"


def test_two_processes_are_one(tmp_path):
    found = run_lightning(WORKER, tmp_path, "own")
    for rank in found:
        assert len(rank["visited"]) == SIZE // 2
        assert rank["errors"] == found[0]["errors"]
    one = module(mean())
    trainer(tmp_path, JustTrainTwice(2, upweight=5.0), max_epochs=4).fit(one, data())
    for rank in found:
        assert torch.equal(rank["state"]["loss.weighting.table.rows"], weights_of(one).table.rows)
        for name, value in states(one).items():
            torch.testing.assert_close(rank["state"][name], value, rtol=1e-12, atol=1e-12)
        assert_same(rank["state"], found[0]["state"])


@pytest.mark.parametrize("sampler", [pytest.param("shuffled", marks=pytest.mark.slow), "subset"])
def test_samplers_that_lightning_wraps_for_ranks_say_what_is_training_data(tmp_path, sampler):
    """Each sample that training draws from is visited once by one rank, and no other."""
    found = run_lightning(WORKER, tmp_path, sampler)
    wanted = range(0, 20, 2) if sampler == "subset" else range(SIZE)
    assert sorted(i for rank in found for i in rank["visited"]) == list(wanted)
    rows = [rank["state"]["loss.weighting.table.rows"].flatten() for rank in found]
    marked = [i for i, weight in enumerate(rows[0].tolist()) if weight != 1.0]
    assert set(marked) <= set(wanted)
    assert len(marked) == found[0]["errors"] == found[1]["errors"] > 0
    assert torch.equal(*rows)


# learning from failure


def failing(package="pytorch_lightning"):
    class Debiased(LearningFromFailure, import_module(package).LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.biased = network(), network()
            with torch.no_grad():
                self.biased.weight.mul_(-0.5)
            self.loss = Objective(CrossEntropy(), RelativeDifficulty(SIZE, 3))
            self.biased_loss = GCELoss(q=0.7)

        def training_step(self, batch):
            x, y, index = batch
            return self.failure_loss(self.net(x), self.biased(x), y, index=index)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Debiased()


def learned_from_failure(epochs):
    """The paper's training in plain torch; first visits and class maxima as the weighting's deviations say."""
    model = failing()
    nets = [model.biased, model.net]
    optimizer = torch.optim.SGD([p for net in nets for p in net.parameters()], lr=0.1, momentum=0.9)
    x, y = samples(SIZE)
    running = [[None] * SIZE, [None] * SIZE]
    largest = [[0.0] * 3, [0.0] * 3]
    for _ in range(epochs):
        for start in range(0, SIZE, 6):
            batch = range(start, start + 6)
            logits = [net(x[batch.start : batch.stop]) for net in nets]
            label = y[batch.start : batch.stop]
            losses = [cross_entropy(out, label, reduction="none") for out in logits]
            shares = []
            for kept, top, loss in zip(running, largest, losses, strict=True):
                for i, value in zip(batch, loss.tolist(), strict=True):
                    kept[i] = value if kept[i] is None else 0.7 * kept[i] + 0.3 * value
                shares.append([kept[i] / max(kept[i], top[y[i]]) for i in batch])
                for i in batch:
                    top[y[i]] = max(top[y[i]], kept[i])
            weights = torch.tensor([b / (b + d) for b, d in zip(*shares, strict=True)], dtype=torch.float64)
            p = logits[0].softmax(1).gather(1, label[:, None]).squeeze(1)
            ((1 - p**0.7) / 0.7).mean().backward()
            (weights * losses[1]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for kept, top in zip(running, largest, strict=True):
            for k in range(3):
                top[k] = max(kept[i] for i in range(SIZE) if y[i] == k)
    return model


@pytest.mark.parametrize("package", BOTH)
def test_a_mixin_learns_from_failure_as_a_plain_loop_does(tmp_path, package):
    model = failing(package)
    trainer(tmp_path, WeightingCallback(), package=package, max_epochs=3).fit(model, data())
    wanted = learned_from_failure(3)
    for part in ("net", "biased"):
        for found, value in zip(getattr(model, part).parameters(), getattr(wanted, part).parameters(), strict=True):
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-7)  # the table's precision


def test_the_two_networks_do_not_touch():
    x, y = samples(SIZE)
    index = torch.arange(SIZE)
    model = failing().train()
    model.failure_loss(model.net(x), model.biased(x), y, index=index).backward()
    alone = failing().train()
    alone.biased_loss(alone.biased(x), y).backward()
    assert torch.equal(model.biased.weight.grad, alone.biased.weight.grad)
    weights = model.loss.weights(
        model.net(x),
        y,
        index=index,
        biased_loss=torch.nn.functional.cross_entropy(model.biased(x), y, reduction="none"),
    )
    (weights * torch.nn.functional.cross_entropy(alone.net(x), y, reduction="none")).mean().backward()
    torch.testing.assert_close(model.net.weight.grad, alone.net.weight.grad, rtol=1e-12, atol=1e-14)


def test_masks_and_sample_weights_are_for_both_networks():
    x, y = samples(8)
    index = torch.arange(8)
    keep = torch.tensor([True] * 5 + [False] * 3)
    model = failing().train()
    masked = model.failure_loss(model.net(x), model.biased(x), y, index=index, mask=keep)
    weighted = model.failure_loss(model.net(x), model.biased(x), y, index=index, sample_weight=keep.double())
    shorter = model.failure_loss(model.net(x[:5]), model.biased(x[:5]), y[:5], index=index[:5])
    torch.testing.assert_close(masked, shorter, rtol=1e-12, atol=0)
    torch.testing.assert_close(weighted, shorter, rtol=1e-12, atol=0)


def test_a_resumed_run_learns_from_the_same_failures(tmp_path):
    saving = checkpoints(tmp_path, every_n_epochs=1)
    whole = failing()
    trainer(tmp_path, [WeightingCallback(), saving], max_epochs=3, enable_checkpointing=True).fit(whole, data())
    for file in sorted(tmp_path.glob("*.ckpt"))[:-1]:
        resumed = failing()
        trainer(tmp_path, WeightingCallback(), max_epochs=3).fit(resumed, data(), ckpt_path=file)
        assert_same(states(resumed), states(whole))


def test_both_losses_are_logged(tmp_path):
    model = failing()
    run = trainer(tmp_path, WeightingCallback(), max_epochs=1, log_every_n_steps=1)
    run.fit(model, data())
    assert {"reweigh/debiased_loss", "reweigh/biased_loss"} <= set(run.callback_metrics)


def test_the_mixin_says_what_is_missing():
    model = failing()
    model.loss = Objective(CrossEntropy())
    inputs = (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"Debiased: self.loss must be an Objective with RelativeDifficulty"):
        model.failure_loss(*inputs, index=torch.tensor([0, 1]))
    model = failing()
    model.biased_loss = torch.nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match=r"Debiased: self.biased_loss must be an Objective, such as GCELoss\(\)"):
        model.failure_loss(*inputs, index=torch.tensor([0, 1]))
