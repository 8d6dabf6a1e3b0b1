"""The Hugging Face page runs, resumes exactly, divides once under accumulation, and its files hold everything."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from reweigh import weighting
from reweigh.losses import MultiTaskLoss
from reweigh.weighting.conformance import TASKS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "multitask-huggingface.md"
NOISE = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]
pytestmark = NOISE


@pytest.fixture(scope="module")
def page():
    """The page's script, run, as a module."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 6
    module = types.ModuleType("huggingface_page")
    sys.modules[module.__name__] = module
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def agree(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value.nan_to_num(-1.0), other[name].nan_to_num(-1.0)), name


def test_the_page_trains(page):
    history = page.whole.state.log_history
    losses = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert len(losses) == 6
    assert losses[-1] < 0.5 * losses[0]
    assert all(f"weight/{name}" in row for row in history if "eval_loss" in row for name in page.LABELS)
    balancer = page.whole.model.loss.weighting
    assert [balancer.completed(event) for event in ("step", "epoch", "validation")] == [36, 6, 6]
    weights = torch.stack(list(page.whole.model.loss.weights.values()))
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights.std() > 0.01  # they have moved


def test_resuming_gives_the_same_bits(page):
    agree(state(page.resumed.model), state(page.whole.model))


def test_resuming_without_the_state_would_not(page, tmp_path):
    """The comparison above can fail: a model whose weighting starts fresh ends elsewhere."""
    run = page.trainer(tmp_path, page.tiny_model())
    found = run._load_from_checkpoint

    def forgetful(*args, **kwargs):
        found(*args, **kwargs)
        for part in run.model.loss.modules():
            if isinstance(part, weighting.Weighting):
                part.reset()

    run._load_from_checkpoint = forgetful
    run.train(resume_from_checkpoint=str(page.middle))
    assert not torch.equal(run.model.topic.weight, page.whole.model.topic.weight)


def test_pretrained_files_bring_everything_back(page, tmp_path):
    """Every entry and dtype, and what is not saved: both go on alike."""
    page.whole.model.save_pretrained(tmp_path)
    twins = [page.ThreeTasks.from_pretrained(tmp_path), page.ThreeTasks.from_pretrained(page.folder / "final")]
    before = state(page.whole.model)
    for twin in twins:
        agree(state(twin), before)
        assert twin.loss.tasks == page.whole.model.loss.tasks
        whole = page.ThreeTasks(page.whole.model.config)
        whole.load_state_dict(before)
        for step in range(8):
            seen = {name: torch.tensor(1.0 / (1 + step * k)) for k, name in enumerate(page.LABELS)}
            for loss in (twin.loss, whole.loss):
                loss.observe_validation(seen)
                loss.update("validation")
        agree(state(twin.loss), state(whole.loss))
        for name, weight in whole.loss.weights.items():
            assert torch.equal(twin.loss.weights[name], weight)


def test_pretrained_in_low_precision_keeps_the_statistics(page, tmp_path):
    page.whole.model.save_pretrained(tmp_path)
    low = page.ThreeTasks.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low.topic.weight.dtype == torch.bfloat16
    agree(state(low.loss), state(page.whole.model.loss))


def test_clean_files_load_with_a_fresh_weighting(page):
    fresh = page.ThreeTasks.from_pretrained(page.folder / "clean")
    assert torch.equal(fresh.topic.weight, page.whole.model.topic.weight)
    weights = list(fresh.loss.weights.values())
    assert all(weight == pytest.approx(1 / 3) for weight in weights)
    fresh.loss.observe_validation({name: torch.tensor(1.0) for name in page.LABELS})
    fresh.loss.update("validation")
    assert fresh.loss.weighting.completed("validation") == 1


def after_one_step(page, model, folder, micro):
    """Parameters after one optimizer step of the Trainer, by plain gradient descent."""
    run = page.trainer(
        folder,
        model,
        max_steps=1,
        gradient_accumulation_steps=micro,
        max_grad_norm=0.0,
        eval_strategy="no",
        save_strategy="no",
        optim="sgd",
        learning_rate=0.1,
    )
    batches = list(run.get_train_dataloader())[:micro]
    run.get_train_dataloader = lambda: Batches(batches)
    run.train()
    return run.model, batches


class Batches(list):
    """A list of batches that the Trainer takes for a loader."""

    batch_size = 8


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_divides_once(page, tmp_path, micro):
    trained, batches = after_one_step(page, page.tiny_model(), tmp_path, micro)
    model = page.tiny_model().train()
    sum(model(**batch)["loss"] / micro for batch in batches).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    for (name, one), other in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_without_the_flag_the_trainer_does_not_divide(page, tmp_path):
    """What the page warns of: keyword arguments and a column called labels."""

    class Trap(page.ThreeTasks):
        def forward(self, input_ids, labels=None, topic=None, tags=None, score=None, **kwargs):
            return super().forward(input_ids, topic=topic, tags=labels, score=score)

    class Safe(Trap):
        accepts_loss_kwargs = False

    def build(kind):
        torch.manual_seed(0)
        return kind(page.tiny_model().config)

    def rows(model):
        found = [{("labels" if key == "tags" else key): v for key, v in row.items()} for row in page.made_up(96, 1)]
        run = page.trainer(
            tmp_path,
            model,
            max_steps=1,
            gradient_accumulation_steps=4,
            max_grad_norm=0.0,
            eval_strategy="no",
            save_strategy="no",
            optim="sgd",
            learning_rate=0.01,
            label_names=["topic", "labels", "score"],
        )
        run.train_dataset = found
        before = model.topic.weight.detach().clone()
        run.train()
        return model.topic.weight.detach() - before

    Trap.accepts_loss_kwargs = True
    moved, right = rows(build(Trap)), rows(build(Safe))
    torch.testing.assert_close(moved, 4 * right, rtol=1e-3, atol=1e-6)


# safetensors


def task_methods():
    for name in weighting.available():
        record = weighting.registry.record(name)
        if record.acts_on == "task":
            yield from ((name, place) for place in range(len(record.examples)))


@pytest.mark.parametrize(("name", "place"), list(task_methods()), ids=str)
def test_every_task_weighting_fits_into_safetensors(name, place, tmp_path):
    """Tensors only, none sharing memory with another; what comes back is what went in."""
    files = pytest.importorskip("safetensors.torch")

    def built():
        tasks = [f"task{k}" for k in range(TASKS)]
        record = weighting.registry.record(name)
        return nn.ModuleDict({"loss": MultiTaskLoss(tasks, weighting.create(name, **record.examples[place]))})

    model = built()
    loss = model["loss"]
    for step in range(3):
        losses = {task: torch.tensor(1.0 + k + step) for k, task in enumerate(loss.tasks)}
        if "gradient_norm" not in loss.weighting.needs:
            loss(losses)
            loss.observe_after(losses)
            loss.observe_validation(losses)
        for event in ("step", "validation", "epoch"):
            loss.update(event)
    files.save_model(model, str(tmp_path / "model.safetensors"))
    files.save_file(model.state_dict(), str(tmp_path / "file.safetensors"))
    fresh = built()
    fresh.load_state_dict(files.load_file(str(tmp_path / "file.safetensors")))
    agree(state(fresh), state(model))
    other = built()
    files.load_model(other, str(tmp_path / "model.safetensors"))
    agree(state(other), state(model))


def test_torchjds_memory_fits_into_safetensors(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    scalarization = pytest.importorskip("torchjd.scalarization")
    from reweigh.losses import from_torchjd

    def built():
        return nn.ModuleDict({"loss": MultiTaskLoss(["a", "b"], from_torchjd(scalarization.FAMO(2)))})

    model = built()
    for _ in range(3):
        model["loss"]({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
        model["loss"].observe_after({"a": torch.tensor(0.5), "b": torch.tensor(2.0)})
        model["loss"].update("step")
    files.save_file(model.state_dict(), str(tmp_path / "file.safetensors"))
    fresh = built()
    fresh.load_state_dict(files.load_file(str(tmp_path / "file.safetensors")))
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    weights, again = (part["loss"].effective_weights(losses) for part in (model, fresh))
    assert weights == again
    assert weights != built()["loss"].effective_weights(losses)
