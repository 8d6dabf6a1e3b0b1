"""One of two ranks that train with Hugging Face's Trainer: ``huggingface_worker.py NAME FOLDER``."""

import gc
import os
import sys
import warnings
from pathlib import Path

import test_huggingface_language as kit
import torch
import transformers

from reweigh.losses import CausalLM, LinearCausalLM, Objective
from reweigh.losses.huggingface import reweighed
from reweigh.weighting import InverseClassLoss, PowerLawDecay


def objective(name):
    if name == "learned":
        return Objective(LinearCausalLM(), InverseClassLoss(kit.VOCABULARY) * kit.Learned())
    return Objective(CausalLM(), PowerLawDecay(kit.COUNTS, alpha=0.25), "weighted_mean")


def train(name, folder, **options):
    """Parameters, the objective's state, and what it learns, after three steps."""
    run = kit.ordered(reweighed(transformers.Trainer))(
        model=kit.gpt2(),
        args=kit.arguments(folder, max_steps=3, **options),
        train_dataset=kit.rows(),
        data_collator=kit.collate,
        objective=objective(name),
    )
    run.train()
    return {"model": {k: v.detach() for k, v in run.model.named_parameters()}, "own": run.objective.state_dict()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ["RANK"] = os.environ["LOCAL_RANK"]
    torch.set_num_threads(1)
    where = Path(sys.argv[2])
    found = train(sys.argv[1], where, per_device_train_batch_size=2, gradient_accumulation_steps=2, ddp_backend="gloo")
    torch.save(found, where / f"rank{os.environ['RANK']}.pt")
    gc.collect()  # what DDP holds in cycles must not outlive its group
    torch.distributed.destroy_process_group()
