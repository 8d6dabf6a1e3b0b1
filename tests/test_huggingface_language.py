"""Objectives in Hugging Face's trainers: loss function, trainer class, columns, fused models, events, resume."""

import copy
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from ranks import run_lightning
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reweigh.losses import CausalLM, LinearCausalLM, Objective, PowerLawDecayLoss
from reweigh.losses.huggingface import (
    STATE,
    WithColumns,
    as_compute_loss_func,
    columns_of,
    fuse,
    fused,
    reweighed,
    unfuse,
)
from reweigh.weighting import TLDR, Focal, InverseClassLoss, PowerLawDecay, ReferenceExcess, Spans, Weighting

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:(transformers|trl|accelerate|torch).*"),
    pytest.mark.filterwarnings("ignore:Cannot (locate|pickle)"),  # dill, of a dataset's types
]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "finetuning-huggingface.md"
VOCABULARY, LENGTH = 30, 12
COUNTS = [1000.0 / (v + 1) for v in range(VOCABULARY)]
BY = PowerLawDecay(COUNTS, alpha=0.25) * TLDR()


def gpt2(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **drop, **options))


def llama(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, **options))


MODELS = {"gpt2": gpt2, "llama": llama, "llama, tied": lambda: llama(tie_word_embeddings=True)}


def rows(number=32, seed=0):
    """Rows of different length, prompts without labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        size = int(torch.randint(6, LENGTH + 1, (1,), generator=generator))
        ids = torch.randint(VOCABULARY, (size,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def collate(batch):
    longest = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": 0, "labels": -100}
    found = {k: torch.tensor([r[k] + [v] * (longest - len(r[k])) for r in batch]) for k, v in fill.items()}
    lengths = torch.tensor([[len(row["input_ids"])] for row in batch])
    found["attention_mask"] = (torch.arange(longest) < lengths).long()
    return found


def arguments(folder, **options):
    transformers = pytest.importorskip("transformers")
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 1,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**settings, **options})


def plain_steps(model, objective, data, steps=2, batch=8, rate=0.1, columns=()):
    """Parameters after steps of plain gradient descent on whole batches."""
    model.train()
    for step in range(steps):
        part = WithColumns(collate, columns)(data[step * batch : (step + 1) * batch])
        labels, extra = part.pop("labels"), {name: part.pop(name) for name in columns}
        loss = objective(model(**part).logits, labels, **extra)
        model.zero_grad()
        loss.backward()
        objective.update("step", index=step)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
    return model


def same(model, other, tol=1e-5):
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=tol, atol=tol, msg=lambda text, n=name: f"{n}: {text}")


class InOrder:
    """The Trainer's loader without shuffling."""

    def _get_train_sampler(self, *args, **kwargs):
        return None


def ordered(kind):
    return type(f"Ordered{kind.__name__}", (InOrder, kind), {})


# the loss function


def test_the_function_reads_every_kind_of_output():
    compute = as_compute_loss_func(Objective(CausalLM(), BY))
    logits, labels = torch.randn(2, 5, VOCABULARY), torch.randint(VOCABULARY, (2, 5))
    wanted = Objective(CausalLM(), BY)(logits, labels)
    output = type("Output", (), {"logits": logits})()
    for outputs in ({"logits": logits}, output, (logits, None)):
        assert compute(outputs, labels) == wanted
    assert compute({"logits": logits}, labels, num_items_in_batch=torch.tensor(16)) == pytest.approx(
        wanted.item() * 8 / 16
    )


def test_the_function_refuses_what_it_cannot_do():
    logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
    with pytest.raises(TypeError, match="objective must be an Objective"):
        as_compute_loss_func(torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="scalar reduction"):
        as_compute_loss_func(Objective(CausalLM(), None, "none"))
    with pytest.raises(ValueError, match="labels must be in the batch"):
        as_compute_loss_func(Objective(CausalLM()))({"logits": logits}, None)
    with pytest.raises(TypeError, match="must hold logits"):
        as_compute_loss_func(Objective(CausalLM()))({"loss": logits}, labels)
    weighted = as_compute_loss_func(PowerLawDecayLoss([4, 3, 2, 1]))
    assert weighted({"logits": logits}, labels).isfinite()
    with pytest.raises(ValueError, match="denominator of reduction 'mean' alone, got reduction 'weighted_mean'"):
        weighted({"logits": logits}, labels, num_items_in_batch=2)
    for criterion, why in ((CausalLM(weight=[1.0, 2.0, 3.0, 4.0]), "class weights"), (CausalLM(ignore_index=0), "=0")):
        with pytest.raises(ValueError, match=why):
            as_compute_loss_func(Objective(criterion))({"logits": logits}, labels, num_items_in_batch=2)
    with pytest.raises(TypeError, match="must take logits"):
        as_compute_loss_func(Objective(LinearCausalLM()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("micro", [1, 4])
def test_accumulation_in_the_trainer(name, micro, tmp_path):
    transformers = pytest.importorskip("transformers")
    objective, data = Objective(CausalLM(), BY), rows()
    run = ordered(transformers.Trainer)(
        model=MODELS[name](),
        args=arguments(tmp_path, per_device_train_batch_size=8 // micro, gradient_accumulation_steps=micro),
        train_dataset=data,
        eval_dataset=data[:6],
        data_collator=collate,
        compute_loss_func=as_compute_loss_func(objective),
    )
    run.train()
    same(run.model, plain_steps(MODELS[name](), Objective(CausalLM(), BY), data))
    assert math.isfinite(run.evaluate()["eval_loss"])


# the trainer class


@pytest.mark.parametrize("criterion", [CausalLM, LinearCausalLM])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_accumulation_in_the_trainer_class(name, micro, criterion, tmp_path):
    """On logits and on hidden states, where the chunks are a few rows."""
    transformers = pytest.importorskip("transformers")
    options = {} if criterion is CausalLM else {"impl": "chunked", "chunk_rows": 16}
    data = rows()
    run = ordered(reweighed(transformers.Trainer))(
        model=MODELS[name](),
        args=arguments(tmp_path, per_device_train_batch_size=8 // micro, gradient_accumulation_steps=micro),
        train_dataset=data,
        eval_dataset=data[:6],
        data_collator=collate,
        objective=Objective(criterion(**options), copy.deepcopy(BY)),
    )
    run.train()
    same(run.model, plain_steps(MODELS[name](), Objective(CausalLM(), BY), data))
    batch = collate(data[:6])
    with torch.no_grad():
        wanted = Objective(CausalLM(), BY)(
            run.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits, batch["labels"]
        )
    assert run.evaluate()["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("criterion", [CausalLM, LinearCausalLM])
@pytest.mark.parametrize("micro", [1, 4])
def test_accumulation_in_trls_trainer(micro, criterion, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{v}": v for v in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0"
    )
    data = [
        {"input_ids": row["input_ids"], "labels": row["input_ids"], "sample_weight": float(place % 3)}
        for place, row in enumerate(rows())
    ]

    def table(rows, name):  # named, because not every pickler can hash its types
        return datasets.Dataset(datasets.table.InMemoryTable.from_pylist(rows), fingerprint=name)

    settings = arguments(tmp_path).to_dict()
    kept = ("output_dir", "max_steps", "learning_rate", "lr_scheduler_type", "optim", "max_grad_norm", "save_strategy")
    args = trl.SFTConfig(
        **{name: settings[name] for name in (*kept, "report_to", "use_cpu", "disable_tqdm", "seed")},
        per_device_train_batch_size=8 // micro,
        gradient_accumulation_steps=micro,
        gradient_checkpointing=False,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )

    def trainer(**options):
        return ordered(reweighed(trl.SFTTrainer))(
            model=llama(),
            args=args,
            train_dataset=table(data, "train"),
            eval_dataset=table(data[:6], "eval"),
            processing_class=tokenizer,
            objective=Objective(criterion(), copy.deepcopy(BY)),
            **options,
        )

    run = trainer()
    with pytest.raises(ValueError, match="the collator leaves out"):
        run.train()
    run = trainer(data_collator=WithColumns(run.data_collator, ["sample_weight"]))
    run.train()
    same(run.model, plain_steps(llama(), Objective(CausalLM(), BY), data, columns=["sample_weight"]))
    assert math.isfinite(run.evaluate()["eval_loss"])


@pytest.mark.parametrize("criterion", [CausalLM, LinearCausalLM])
@pytest.mark.parametrize(
    ("options", "reduction"),
    [({}, "weighted_mean"), ({}, "sequence_mean"), ({}, "batch_mean"), ({}, "sum"), ({"weight": COUNTS}, "mean")],
)
def test_every_denominator_is_that_of_the_whole_step(criterion, options, reduction, tmp_path):
    """Gradients are divided after the last micro-batch, and what is logged is the loss of all of them."""
    transformers = pytest.importorskip("transformers")
    by, data = PowerLawDecay(COUNTS, alpha=0.25), rows()
    run = ordered(reweighed(transformers.Trainer))(
        model=gpt2(),
        args=arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, logging_steps=1),
        train_dataset=data,
        data_collator=collate,
        objective=Objective(criterion(**options), by, reduction),
    )
    run.train()
    objective = Objective(CausalLM(**options), by, reduction)
    same(run.model, plain_steps(gpt2(), objective, data))
    first = collate(data[:8])
    labels = first.pop("labels")
    logged = next(row["loss"] for row in run.state.log_history if "loss" in row)
    assert float(logged) == pytest.approx(objective(gpt2()(**first).logits, labels).item(), rel=1e-4)


def test_what_has_no_such_denominator_is_a_mean_over_calls(tmp_path):
    transformers = pytest.importorskip("transformers")
    data = rows()
    for place, row in enumerate(data):
        row["group"] = place % 3
    run = ordered(reweighed(transformers.Trainer))(
        model=gpt2(),
        args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2),
        train_dataset=data,
        data_collator=WithColumns(collate, ["group"]),
        objective=Objective(CausalLM(), None, "group_mean"),
    )
    run.train()
    model, objective = gpt2(), Objective(CausalLM(), None, "group_mean")
    model.train()
    for part in (data[:4], data[4:8]):
        batch = WithColumns(collate, ["group"])(part)
        labels, group = batch.pop("labels"), batch.pop("group")
        (objective(model(**batch).logits, labels, group=group) / 2).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    same(run.model, model)


# columns


@pytest.mark.parametrize("criterion", [CausalLM, LinearCausalLM])
@pytest.mark.parametrize("micro", [1, 4])
def test_columns_reach_the_objective(criterion, micro, tmp_path):
    """A weight of 0 is a row dropped, 2 a row doubled, denominators too; spans and reference losses per token."""
    transformers = pytest.importorskip("transformers")
    data = rows(8)
    for place, row in enumerate(data):
        row["sample_weight"] = float(place % 3)
        row["span"] = [0, 0, *[1] * (len(row["labels"]) - 2)]
        row["reference_loss"] = [0.1 * v for v in row["input_ids"]]
    by = Spans([0.0, 1.0])
    if micro == 1:
        by = by * ReferenceExcess(None, temperature=2.0)  # compares the terms of a call
    names = sorted(columns_of(Objective(CausalLM(), by)) & data[0].keys())
    assert names == (["reference_loss", "sample_weight", "span"] if micro == 1 else ["sample_weight", "span"])
    run = ordered(reweighed(transformers.Trainer))(
        model=gpt2(),
        args=arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=8 // micro,
            gradient_accumulation_steps=micro,
            remove_unused_columns=True,
        ),
        train_dataset=data,
        data_collator=WithColumns(collate, names),
        objective=Objective(criterion(), by),
    )
    run.train()
    copies = [row for row in data for _ in range(int(row["sample_weight"]))]
    batch = WithColumns(collate, [name for name in names if name != "sample_weight"])(copies)
    model, labels = gpt2(), batch.pop("labels")
    columns = {name: batch.pop(name) for name in names if name != "sample_weight"}
    for name in data[0].keys() - {"input_ids"}:
        batch.pop(name, None)
    Objective(CausalLM(), by)(model(**batch).logits, labels, **columns).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    same(run.model, model)


def test_columns_are_padded_where_the_labels_are():
    def left(batch):
        return {k: v.flip(1) for k, v in collate([{k: r[k][::-1] for k in r} for r in batch]).items()}

    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "w": [7.0, 8.0, 9.0]}]
    data.append({"input_ids": [4, 5], "labels": [4, 5], "w": [5.0, 6.0]})
    right = WithColumns(collate, ["w"], padding={"w": -1})(data)
    assert right["w"].tolist() == [[7.0, 8.0, 9.0], [5.0, 6.0, -1.0]]
    assert WithColumns(left, ["w"])(data)["w"].tolist() == [[7.0, 8.0, 9.0], [0.0, 5.0, 6.0]]
    with pytest.raises(ValueError, match="every sample must have the column 'v'"):
        WithColumns(collate, ["v"])(data)
    joined = [{"labels": [1, 2], "w": [0.5, 1.0], "v": 3}, {"labels": [4], "w": [2.0], "v": 4}]
    flat = WithColumns(lambda rows: {"labels": torch.tensor([[1, 2, 4]])}, ["w", "v"])(joined)
    assert flat["w"].tolist() == [[0.5, 1.0, 2.0]]
    assert flat["v"].tolist() == [[3, 3, 4]]
    with pytest.raises(ValueError, match="must keep samples whole"):
        WithColumns(lambda rows: {"labels": torch.ones(2, 2)}, ["w"])(data)
    data[1]["w"] = [5.0]
    with pytest.raises(ValueError, match=r"as long as the sample \(2\)"):
        WithColumns(collate, ["w"])(data)


# packed rows


def flat(batch):
    """One row of all sequences behind each other, whose labels are all there."""
    found = {name: torch.tensor([[v for row in batch for v in row[name]]]) for name in ("input_ids", "labels")}
    return {**found, "position_ids": torch.tensor([[v for row in batch for v in range(len(row["labels"]))]])}


@pytest.mark.parametrize("criterion", [CausalLM, LinearCausalLM])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
def test_packed_sequences_are_kept_apart(criterion, reduction, tmp_path):
    """As in padded rows: without what is predicted across a boundary, which no label of -100 keeps away."""
    transformers = pytest.importorskip("transformers")
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows()]
    run = ordered(reweighed(transformers.Trainer))(
        model=llama(attn_implementation="eager"),
        args=arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4),
        train_dataset=data,
        data_collator=flat,
        objective=Objective(criterion(), copy.deepcopy(BY), reduction),
    )
    run.train()
    same(run.model, plain_steps(llama(), Objective(CausalLM(), BY, reduction), data))


# fused models


@pytest.mark.parametrize("name", MODELS)
def test_fused_equals_unfused(name):
    """Loss and all gradients; no logits in training, the usual ones in evaluation, nothing new without labels."""
    model, batch = MODELS[name](), collate(rows(5))
    labels = batch.pop("labels")
    wanted = Objective(CausalLM(), BY)(model(**batch).logits, labels)
    wanted.backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(**batch).logits
    fuse(model, Objective(LinearCausalLM(impl="chunked", chunk_rows=7), BY)).train()
    output = model(**batch, labels=labels)
    output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.loss, wanted, rtol=1e-5, atol=0)
    for key, parameter in model.named_parameters():
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[key], rtol=0, atol=1e-5 * max(scale, 1e-3), msg=key)
    torch.testing.assert_close(model(**batch).logits, logits)
    evaluated = model.eval()(**batch, labels=labels)
    torch.testing.assert_close(evaluated.logits, logits)
    kept = model(**batch, labels=labels, logits_to_keep=2)
    torch.testing.assert_close(kept.logits, logits[:, -2:])
    assert kept.loss == evaluated.loss
    ids, mask = batch["input_ids"], batch["attention_mask"]
    loss, again = model(ids, attention_mask=mask, labels=labels, return_dict=False)[:2]
    assert loss == evaluated.loss
    assert again.shape == logits.shape
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert twin(**batch, labels=labels).loss != output.loss  # its own weights, not those it was copied from
    unfuse(model)
    assert model(**batch, labels=labels).loss != output.loss
    with fused(model, Objective(LinearCausalLM(), BY), evaluate_logits=False):
        assert model(**batch, labels=labels).logits is None
    assert model(**batch, labels=labels).logits is not None
    assert not {"forward", "_reweigh_fused", "accepts_loss_kwargs"} & model.__dict__.keys()


class Largest(TorchDispatchMode):
    """Number of entries of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel())
        return made


def test_no_tensor_of_the_logits_size_is_made():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=500, **sizes)).train()
    ids = torch.randint(500, (4, 32))

    def largest():
        with Largest() as seen:
            model(input_ids=ids, labels=ids).loss.backward()
        return seen.size

    logits = ids.numel() * 500
    assert largest() >= logits
    with fused(model, Objective(LinearCausalLM(impl="chunked", chunk_rows=8), TLDR())):
        assert largest() < logits / 8


def test_a_head_with_a_bias_is_fused():
    """Of GPT-J, whose head has one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32
    )
    model, batch = transformers.GPTJForCausalLM(config).eval(), collate(rows(5))
    torch.nn.init.normal_(model.lm_head.bias)
    labels = batch.pop("labels")
    wanted = Objective(CausalLM(), BY)(model(**batch).logits, labels)
    fuse(model, Objective(LinearCausalLM(impl="chunked"), BY))
    torch.testing.assert_close(model(**batch, labels=labels).loss, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("micro", [1, 4])
def test_a_fused_model_in_the_plain_trainer(micro, tmp_path):
    transformers = pytest.importorskip("transformers")
    data = rows()
    run = ordered(transformers.Trainer)(
        model=fuse(llama(), Objective(LinearCausalLM(), BY)),
        args=arguments(tmp_path, per_device_train_batch_size=8 // micro, gradient_accumulation_steps=micro),
        train_dataset=data,
        eval_dataset=data[:6],
        data_collator=collate,
    )
    run.train()
    same(run.model, plain_steps(llama(), Objective(CausalLM(), BY), data))
    assert math.isfinite(run.evaluate()["eval_loss"])


def test_under_somebodys_wrapper():
    """Mixed precision and others wrap a model's forward: unfusing makes it the model's own below them."""
    model, ids = llama(), torch.arange(6).unsqueeze(0)
    plain = model(input_ids=ids, labels=ids).loss
    fuse(model, Objective(LinearCausalLM(), BY))
    weighted, inner = model(input_ids=ids, labels=ids).loss, model.forward
    assert weighted != plain
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    unfuse(model)
    assert model(input_ids=ids, labels=ids).loss == plain
    with fused(model, Objective(LinearCausalLM(), BY)):
        assert model(input_ids=ids, labels=ids).loss == weighted
    assert model(input_ids=ids, labels=ids).loss == plain


def test_a_softcap_must_be_the_models():
    """Gemma's: the criterion has to have it, and the message tells which."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05, **sizes
    )
    model, batch = transformers.Gemma2ForCausalLM(config), collate(rows(5))
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match=r"final_logit_softcapping=0\.05, got softcap=None"):
        fuse(model, Objective(LinearCausalLM()))
    wanted = Objective(CausalLM(), BY)(model(**batch).logits, labels)
    fuse(model, Objective(LinearCausalLM(softcap=0.05, impl="chunked"), BY)).train()
    torch.testing.assert_close(model(**batch, labels=labels).loss, wanted, rtol=1e-5, atol=0)


def test_fusing_refuses_what_it_cannot_do():
    model = gpt2()
    with pytest.raises(TypeError, match="criterion LinearCausalLM, got CausalLM"):
        fuse(model, Objective(CausalLM()))
    with pytest.raises(TypeError, match="must have output embeddings"):
        fuse(model.transformer, Objective(LinearCausalLM()))
    with pytest.raises(TypeError, match="must have output embeddings"):
        fuse(torch.nn.Linear(2, 2), Objective(LinearCausalLM()))
    fuse(model, Objective(LinearCausalLM(), BY, "weighted_mean"))
    with pytest.raises(ValueError, match="fused already"):
        fuse(model, Objective(LinearCausalLM()))
    ids = torch.arange(6).unsqueeze(0)
    with pytest.raises(ValueError, match="reduction 'mean' alone, got reduction 'weighted_mean'"):
        model(input_ids=ids, labels=ids, num_items_in_batch=5)
    with pytest.raises(ValueError, match="must not be shifted"):
        model(input_ids=ids, labels=ids, shift_labels=ids)
    unfuse(model)
    fuse(model, Objective(LinearCausalLM()))
    with pytest.raises(ValueError, match="neither sample_weight nor mask"):
        model(input_ids=ids, labels=ids, num_items_in_batch=5, sample_weight=torch.ones(1))
    unfuse(model)
    model.lm_head.base_layer = model.lm_head.weight
    with pytest.raises(ValueError, match="no adapter"):
        fuse(model, Objective(LinearCausalLM()))
    del model.lm_head.base_layer
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="auxiliary loss"):
        fuse(model, Objective(LinearCausalLM()))
    del model.config.output_router_logits
    with pytest.raises(ValueError, match="not fused"):
        unfuse(model)


# events, state, learned weights


class Learned(Weighting):
    """exp(a log p), a learned."""

    needs = frozenset({"log_pt"})
    detached = False
    scope = "local"

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.5))

    def weigh(self, terms):
        return torch.exp(self.a * terms.log_pt)


@pytest.mark.parametrize("criterion", [CausalLM, LinearCausalLM])
def test_resuming_is_going_on(criterion, tmp_path):
    """Running class losses and a learned weight: interrupted after two of four steps, the same parameters."""
    transformers = pytest.importorskip("transformers")
    data = rows()

    def run(folder, **options):
        objective = Objective(criterion(), InverseClassLoss(VOCABULARY) * Learned())
        return reweighed(transformers.Trainer)(
            model=gpt2(),
            args=arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", **options),
            train_dataset=data,
            data_collator=collate,
            objective=objective,
        )

    whole = run(tmp_path / "whole")
    whole.train()
    learned = whole.objective.weighting.parts()
    assert learned[1].a != 0.5
    assert learned[0].completed("step") == 4
    middle = tmp_path / "whole" / "checkpoint-2"
    assert (middle / STATE).exists()
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(middle))
    same(resumed.model, whole.model, tol=1e-7)
    for one, other in zip(resumed.objective.state_dict().values(), whole.objective.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    saved = torch.load(middle / STATE, weights_only=True)
    assert saved.keys() == whole.objective.state_dict().keys()
    (middle / STATE).unlink()
    with pytest.raises(FileNotFoundError, match=STATE):
        run(tmp_path / "again").train(resume_from_checkpoint=str(middle))


@pytest.mark.parametrize("name", ["learned", "weighted_mean"])
def test_two_processes_are_one(name, tmp_path):
    """Two ranks with two micro-batches each: parameters, running losses and the learned weight of one process."""
    pytest.importorskip("transformers")
    import huggingface_worker

    whole = huggingface_worker.train(name, tmp_path / "one", per_device_train_batch_size=8)
    ranks = run_lightning(Path(huggingface_worker.__file__), tmp_path, name)
    for rank in ranks:
        for part, values in whole.items():
            assert rank[part].keys() == values.keys()
            for key, value in values.items():
                torch.testing.assert_close(
                    rank[part][key], value, rtol=1e-5, atol=1e-6, msg=lambda text, k=key: f"{k}: {text}"
                )
    assert all(torch.equal(value, ranks[1]["own"][key]) for key, value in ranks[0]["own"].items())


class OfValidation(Weighting):
    """Half the last validation's mean loss, the same for every token."""

    update_on = "validation"
    feeds = frozenset({"validation"})
    detached = True

    def __init__(self):
        super().__init__()
        self.add_state("last", torch.ones((), dtype=torch.float64))
        self.add_pending("seen", 2, on="validation")

    def weigh(self, terms):
        return torch.full_like(terms.loss, 0.5) * self.last.to(terms.loss.dtype)

    def observe_validation(self, terms):
        counts = terms.counts().double()
        self.accumulate("seen", torch.stack([(counts * terms.loss).sum(), counts.sum()]))

    def commit(self, sums):
        total, number = sums["seen"]
        self.last.copy_(total / number)


def test_the_callback_alone(tmp_path):
    """Events, validation losses, the best checkpoint's state; a resume from the output folder."""
    transformers = pytest.importorskip("transformers")
    from reweigh.losses.huggingface import WeightingTrainerCallback

    data = rows()

    def run(objective, **options):
        return transformers.Trainer(
            model=gpt2(),
            args=arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, eval_steps=2, **options),
            train_dataset=data,
            eval_dataset=data[:8],
            data_collator=collate,
            compute_loss_func=as_compute_loss_func(objective),
            callbacks=[WeightingTrainerCallback(objective)],
        )

    whole = Objective(CausalLM(), OfValidation() * InverseClassLoss(VOCABULARY))
    one = run(whole, eval_strategy="steps", load_best_model_at_end=True)
    one.train()
    validation = whole.weighting.parts()[0]
    assert validation.last != 1.0
    best = torch.load(Path(one.state.best_model_checkpoint) / STATE, weights_only=True)
    assert all(torch.equal(value, best[name]) for name, value in whole.state_dict().items())
    learned = {name: value.clone() for name, value in whole.state_dict().items()}
    one.evaluate()  # by hand, outside training: no event
    assert all(torch.equal(value, learned[name]) for name, value in whole.state_dict().items())

    other = Objective(CausalLM(), OfValidation() * InverseClassLoss(VOCABULARY))
    two = run(other, eval_strategy="steps")
    two.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [part.completed("step") for part in other.weighting.parts()] == [4, 4]
    assert [part.completed("epoch") for part in other.weighting.parts()] == [1, 1]

    # saved at the epoch's last step, before it ended: made up for when training goes on
    last = Objective(CausalLM(), OfValidation() * InverseClassLoss(VOCABULARY))
    last.load_state_dict(torch.load(tmp_path / "checkpoint-4" / STATE, weights_only=True))
    assert last.weighting.parts()[0].completed("epoch") == 0
    state = types.SimpleNamespace(global_step=4, epoch=1.0)
    WeightingTrainerCallback(last).on_train_begin(two.args, state, None, model=two.model)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(last.state_dict()[name], value, rtol=1e-6, atol=1e-9)


def test_what_nobody_trains_is_told(tmp_path):
    transformers = pytest.importorskip("transformers")
    from reweigh.losses.huggingface import WeightingTrainerCallback

    objective = Objective(CausalLM(), Learned())
    run = transformers.Trainer(
        model=gpt2(),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=rows(),
        data_collator=collate,
        compute_loss_func=as_compute_loss_func(objective),
        callbacks=[WeightingTrainerCallback(objective)],
    )
    with pytest.warns(UserWarning, match="the optimizer does not have"):
        run.train()
    assert objective.weighting.a == 0.5


def test_the_page_trains_and_tells_both_sides(capsys):
    """Rare words are found more often, and the perplexity that it costs is printed beside it."""
    pytest.importorskip("transformers")
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 4
    page = types.ModuleType("finetuning_page")
    sys.modules[page.__name__] = page
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), page.__dict__)
    finally:
        del sys.modules[page.__name__]
    plain, weighted = page.judged.values()
    assert weighted["rare-word accuracy"] > plain["rare-word accuracy"] + 0.01
    assert plain["perplexity"] < weighted["perplexity"] < page.WORDS / 4
    assert capsys.readouterr().out.count("perplexity") >= 2


def test_counts_come_with_the_callback(tmp_path):
    transformers = pytest.importorskip("transformers")
    from reweigh.losses.huggingface import WeightingTrainerCallback

    objective = Objective(CausalLM(), PowerLawDecay(num_classes=VOCABULARY))
    run = transformers.Trainer(
        model=gpt2(),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=rows(),
        data_collator=collate,
        compute_loss_func=as_compute_loss_func(objective),
        callbacks=[WeightingTrainerCallback(objective, class_counts=COUNTS)],
    )
    run.train()
    torch.testing.assert_close(objective.weighting.table(), PowerLawDecay(COUNTS).table())


def test_the_trainer_class_refuses_what_it_cannot_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(TypeError, match=r"derive from transformers\.Trainer"):
        reweighed(torch.nn.Module)
    kind = reweighed(transformers.Trainer)
    with pytest.raises(TypeError, match="objective must be an Objective"):
        kind(model=gpt2(), args=arguments(tmp_path), objective=Focal())
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        kind(model=gpt2(), args=arguments(tmp_path, label_smoothing_factor=0.1), objective=Objective(CausalLM()))
    fused_by = fuse(gpt2(), Objective(LinearCausalLM()))
    with pytest.raises(ValueError, match="fused with the trainer's objective"):
        kind(model=fused_by, args=arguments(tmp_path), objective=Objective(LinearCausalLM()))
    run = kind(
        model=gpt2(),
        args=arguments(tmp_path),
        train_dataset=[{"input_ids": [1, 2, 3]}] * 8,
        objective=Objective(CausalLM()),
    )
    with pytest.raises(ValueError, match="labels must be in the batch"):
        run.train()
