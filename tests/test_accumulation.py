"""Accumulated micro-batches, and two gloo processes, give the losses and gradients of the full batch."""

import copy
import pickle
import warnings
from importlib import import_module

import pytest
import torch
from lightning_kit import QUIET, trainer
from ranks import run_ranks
from references import language_worker as worker
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from reweigh.losses import Accumulator, CausalLM, CrossEntropy, FocalLoss, FromLoss, Objective, PowerLawDecayLoss
from reweigh.losses.reductions import Mean
from reweigh.weighting import TLDR, Focal, PowerLawDecay, Weighting

COUNTS = worker.COUNTS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(worker.__file__, 2, tmp_path_factory.mktemp("ranks"), "accumulation")


def agree(found, expected, tol=1e-12):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=tol, atol=tol, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [kind for kind in worker.OBJECTIVES if kind != "sum"])
def test_micro_batches_are_one_batch(kind, pieces):
    agree(worker.train(kind, "even", pieces=pieces), worker.train(kind, "even", plain=True))


def test_a_sum_is_divided_by_nothing():
    plain = worker.train("sum", "even", plain=True)
    agree(worker.train("sum", "even", pieces=4), plain)


@pytest.mark.parametrize("run", worker.RUNS, ids=lambda run: "-".join(map(str, run)))
def test_two_ranks_are_one_process(ranks, run):
    alone = worker.train(run[0], run[1], plain=True)
    for rank in ranks:
        agree(rank[str(run)], alone)


def test_the_comparison_can_fail():
    """The mean of the means of micro-batches is another number."""
    tokens, labels = next(worker.batches("even"))
    net, loss = worker.model(), worker.OBJECTIVES["power law, weighted mean"]()
    means = [loss(net(x), y) for x, y in zip(tokens.split(2), labels.split(2), strict=True)]
    assert abs(sum(means).item() / 4 - loss(net(tokens), labels).item()) > 1e-3


def test_an_evaluation_is_exact_over_ranks(ranks):
    alone = worker.evaluate()
    tokens, labels = (torch.cat(parts) for parts in zip(*worker.batches("even"), strict=True))
    whole = worker.OBJECTIVES["power law, weighted mean"]()(worker.model()(tokens), labels)
    torch.testing.assert_close(alone, whole.detach(), rtol=1e-12, atol=0)
    for rank in ranks:
        torch.testing.assert_close(rank["evaluation"], alone, rtol=1e-12, atol=0)


def test_nothing_to_count_gives_zero_gradients():
    result = worker.train("power law, weighted mean", "nothing", pieces=4)
    assert (result["loss"] == 0).all()
    assert (result["grad"] == 0).all()


def test_masks_and_sample_weights_go_through():
    logits, labels = CausalLM().example_inputs(8)
    meta = {
        "sample_weight": torch.rand(8, dtype=torch.float64),
        "mask": torch.rand(8, 3, generator=torch.Generator().manual_seed(1)) < 0.7,
    }
    loss = PowerLawDecayLoss([50, 20, 6, 1])
    whole = logits.clone().requires_grad_()
    value = loss(whole, labels, **meta)
    value.backward()
    acc, parts = Accumulator(loss), logits.clone().requires_grad_()
    for rows in torch.arange(8).split(3):
        acc(parts[rows], labels[rows], **{name: given[rows] for name, given in meta.items()}).backward()
    torch.testing.assert_close(acc.finish([parts]), value.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-15)


def test_each_step_starts_anew():
    acc, logits, labels = Accumulator(FocalLoss(2.0)), torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        acc(logits, labels).backward()
        first = acc.finish([logits])
        with pytest.raises(ValueError, match="finish must come after a call of the accumulator"):
            acc.finish([logits])
    acc(logits[:1], labels[:1])
    acc.reset()
    acc(logits, labels)
    assert torch.equal(acc.finish(), first)


def test_parameters_without_a_gradient_stay_without():
    used, unused = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2))
    acc = Accumulator(Objective(CrossEntropy()))
    acc(used, torch.tensor([0, 1])).backward()
    acc.finish([used, unused])
    assert unused.grad is None
    torch.testing.assert_close(used.grad, (used.softmax(1) - torch.eye(2, 3)).detach() / 2)


@pytest.mark.parametrize("first", ["unscale", "finish"])
def test_a_grad_scaler_may_come_before_or_after(first):
    net, expected = worker.model(), worker.model()
    tokens, labels = next(worker.batches("even"))
    loss = worker.OBJECTIVES["power law, weighted mean"]()
    value = loss(expected(tokens), labels)
    value.backward()
    acc, optimizer = Accumulator(loss), torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x, y in zip(tokens.split(2), labels.split(2), strict=True):
        scaler.scale(acc(net(x), y)).backward()
    if first == "unscale":
        scaler.unscale_(optimizer)
    found = acc.finish(net)
    if first == "finish":
        scaler.unscale_(optimizer)
    torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=0)
    for one, other in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_gradients_are_divided_beyond_their_range(dtype):
    """A denominator of 1e6 has no float16, and its inverse only three bits of one."""
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))
    parameter.grad = torch.tensor([3e4, -2e4, 1.0], dtype=dtype)
    acc = Accumulator(Objective(FromLoss(lambda x: x)))
    acc(torch.ones(1), sample_weight=torch.tensor([1e6]))
    acc.finish([parameter])
    exact = torch.tensor([3e4, -2e4, 1.0], dtype=dtype).double() / 1e6
    torch.testing.assert_close(parameter.grad, exact.to(dtype), rtol=0, atol=0)


def test_sparse_gradients():
    net, dense = nn.Embedding(6, 6, sparse=True), nn.Embedding(6, 6)
    dense.load_state_dict(net.state_dict())
    tokens, labels = next(worker.batches("even"))
    loss = worker.OBJECTIVES["power law, weighted mean"]()
    loss(dense(tokens), labels).backward()
    acc = Accumulator(loss)
    for x, y in zip(tokens.split(4), labels.split(4), strict=True):
        acc(net(x), y).backward()
    acc.finish(net)
    assert net.weight.grad.is_sparse
    torch.testing.assert_close(net.weight.grad.to_dense(), dense.weight.grad, rtol=1e-5, atol=1e-7)


def test_it_carries_its_objective():
    """Moved, saved and copied with the module that owns it; what a step has collected is not."""
    acc = Accumulator(PowerLawDecayLoss(alpha=0.5), gradients="summed")
    acc.objective.update("fit", class_counts=COUNTS)
    assert list(acc.state_dict()) == [f"objective.{name}" for name in acc.objective.state_dict()]
    again = pickle.loads(pickle.dumps(copy.deepcopy(acc)))
    logits, labels = torch.randn(2, 3, 6), torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert torch.equal(again(logits, labels), acc(logits, labels))
    assert eval(repr(acc), {"Accumulator": Accumulator, "PowerLawDecayLoss": PowerLawDecayLoss}).gradients == "summed"


class Fined(Weighting):
    detached = True

    def weigh(self, terms):
        return torch.ones_like(terms.loss)

    def penalty(self, terms, weights):
        return weights.sum()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Accumulator(nn.CrossEntropyLoss()), TypeError, "objective must be an Objective, got CrossEntropyLoss"),
        (lambda: Accumulator(FocalLoss(reduction="none")), ValueError, "add up over samples, got 'none', which is no"),
        (lambda: Accumulator(FocalLoss(reduction="group_mean")), ValueError, "got 'group_mean', which does not add up"),
        (
            lambda: Accumulator(Objective(CausalLM(), TLDR(), "weighted_mean")),
            ValueError,
            r"weights must be constants under reduction 'weighted_mean'.*got TLDR\(\)",
        ),
        (lambda: Accumulator(Objective(CrossEntropy(), 2.0 * Fined())), ValueError, r"no penalty.*got Fined\(\)"),
        (
            lambda: Accumulator(Objective(Objective(CrossEntropy()), None, Mean())),
            ValueError,
            "inner objective must leave one term per sample .*got reduction 'mean'",
        ),
        (lambda: Accumulator(FocalLoss(), gradients="mean"), ValueError, "must be one of 'averaged', 'summed'"),
        (
            lambda: Accumulator(FocalLoss())(torch.zeros(1, 2), torch.zeros(1).long(), num_items=3),
            ValueError,
            "num_items must not be given",
        ),
        (lambda: Accumulator(FocalLoss()).finish(times=0.0), ValueError, "times must be finite and > 0, got 0.0"),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=f"Accumulator: .*{message}"):
        call()


def test_nested_sequences_add_up():
    inner = Objective(CausalLM(), Focal(1.0), "sequence_mean")
    loss = Objective(inner, None, "mean")
    tokens, labels = next(worker.batches("even"))
    net, acc = worker.model(), Accumulator(loss)
    for x, y in zip(tokens.split(2), labels.split(2), strict=True):
        acc(net(x), y)
    torch.testing.assert_close(acc.finish(), loss(net(tokens), labels).detach(), rtol=1e-12, atol=0)


# Lightning divides the loss by accumulate_grad_batches, at the end of an epoch by more than there are


def language_module(package, loss):
    class Model(import_module(package).LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.loss = worker.model(), loss
            self.values = []

        def training_step(self, batch):
            return self.loss(self.net(batch[0]), batch[1])

        def on_before_optimizer_step(self, optimizer):
            self.values.append(self.loss.finish(self.net, times=self.trainer.accumulate_grad_batches))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3)

    return Model()


@pytest.mark.parametrize("package", [pytest.param(p, marks=QUIET) for p in ("pytorch_lightning", "lightning.pytorch")])
def test_in_a_lightning_module(tmp_path, package):
    tokens, labels = (torch.cat(parts) for parts in zip(*worker.batches("even"), strict=True))
    model = language_module(package, Accumulator(PowerLawDecayLoss(COUNTS, alpha=0.5)))
    data = DataLoader(TensorDataset(tokens, labels), batch_size=3)  # 8 batches: windows of 3, 3 and 2
    trainer(tmp_path, package=package, max_epochs=1, accumulate_grad_batches=3, gradient_clip_val=0.05).fit(model, data)

    net, loss = worker.model(), PowerLawDecayLoss(COUNTS, alpha=0.5)
    optimizer, values = torch.optim.SGD(net.parameters(), lr=0.3), []
    for x, y in zip(tokens.split(9), labels.split(9), strict=True):
        optimizer.zero_grad()
        values.append(loss(net(x), y))
        values[-1].backward()
        assert nn.utils.clip_grad_norm_(net.parameters(), 0.05) > 0.05  # clipping takes part
        optimizer.step()
    torch.testing.assert_close(torch.stack(model.values), torch.stack(values).detach(), rtol=1e-12, atol=0)
    for one, other in zip(model.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# the denominator before the first forward


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_total_weight_is_the_denominator(shift, masked):
    loss = PowerLawDecayLoss(COUNTS, alpha=0.7, shift=shift)
    net, (tokens, labels) = worker.model(), next(worker.batches("even"))
    mask = torch.rand(8, 5, generator=torch.Generator().manual_seed(5)) < 0.6 if masked else None
    total = loss.total_weight(labels, mask)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, loss.parts(net(tokens), labels, mask=mask)[1], rtol=1e-12, atol=0)
    naive = sum(
        (COUNTS[token] + 1.0) ** -0.7
        for row, tokens in enumerate(labels.tolist())
        for at, token in enumerate(tokens)
        if token != -100 and not (shift and at == 0) and (mask is None or bool(mask[row, at]))
    )
    assert total.item() == pytest.approx(naive, rel=1e-12)
    assert loss.total_weight(labels, torch.zeros(8, dtype=torch.bool)) == 0


def test_total_weight_makes_micro_batches_exact():
    loss = PowerLawDecayLoss(COUNTS)
    net, (tokens, labels) = worker.model(), next(worker.batches("even"))
    items = sum(loss.total_weight(y) for y in labels.split(2))
    parts = [loss(net(x), y, num_items=items) for x, y in zip(tokens.split(2), labels.split(2), strict=True)]
    torch.testing.assert_close(sum(parts), loss(net(tokens), labels), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "labels must be token indices, got torch.float32"),
        ([[0]], TypeError, "labels must be token indices, got list"),
        (torch.zeros(3).long(), ValueError, r"labels must be \(B, T\), got \(3,\)"),
        (torch.tensor([[0, 6]]), ValueError, r"labels must be in \[0, 6\) or ignore_index=-100, got 6"),
        (torch.tensor([[0, -1]]), ValueError, ".*ignore_index=-100, got -1"),
    ],
)
def test_total_weight_says_what_is_wrong(labels, error, message):
    with pytest.raises(error, match=f"PowerLawDecayLoss: {message}"):
        PowerLawDecayLoss(COUNTS).total_weight(labels)
    with pytest.raises(ValueError, match="counts are not known yet"):
        PowerLawDecayLoss().total_weight(torch.tensor([[0, 1]]))


def test_total_weight_needs_its_own_parts():
    loss = PowerLawDecayLoss(COUNTS)
    loss.weighting = PowerLawDecay(COUNTS).clip(max=1.0)
    with pytest.raises(TypeError, match="total_weight needs its own criterion and weighting"):
        loss.total_weight(torch.tensor([[0, 1]]))


def test_weights_that_compare_the_terms_of_a_call_are_warned_of():
    with pytest.warns(UserWarning, match=r"Accumulator: Normalize\(.* compares the terms of a call") as found:
        Accumulator(Objective(CrossEntropy(), Focal(1.0).normalize()))
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Accumulator(Objective(CrossEntropy(), Focal(1.0)))
