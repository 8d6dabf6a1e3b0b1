"""A small transformer on the help texts that come with Python: the composed objective beside plain cross-entropy.

Run it with ``pytest -m slow tests/test_language_model.py``; it prints the curve of both.
"""

import copy
import re
from collections import Counter
from pydoc_data.topics import topics

import pytest
import torch
from torch import nn

from reweigh.losses import Accumulator, CausalLM, Objective
from reweigh.weighting import TLDR, PowerLawDecay, token_counts

WORDS, CONTEXT, BATCH, STEPS, EVERY, RARE = 800, 48, 16, 600, 150, 20
EOS, UNKNOWN = 0, 1


class Transformer(nn.Module):
    def __init__(self, vocabulary, width=64, layers=2):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        return self.head(self.blocks(hidden, mask=causal, is_causal=True))


def text():
    """Training and held-out token ids, cut into contexts; every fifth topic is held out."""
    pages = [re.findall(r"\w+|[^\w\s]", topics[name].lower()) for name in sorted(topics)]
    train, held = [page for i, page in enumerate(pages) if i % 5], pages[::5]
    common = Counter(word for page in train for word in page).most_common(WORDS - 2)
    number = {word: i + 2 for i, (word, _) in enumerate(common)}
    streams = [
        torch.tensor([i for page in part for i in (*(number.get(word, UNKNOWN) for word in page), EOS)])
        for part in (train, held)
    ]
    return [stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT) for stream in streams]


@torch.no_grad()
def judge(net, held, rare):
    """Plain cross-entropy per token, and how often a rare target is the most likely one."""
    accumulate, hits, seen = Accumulator(Objective(CausalLM())), 0, 0
    for ids in held.split(64):
        logits = net(ids)
        accumulate(logits, ids)
        asked = rare[ids[:, 1:]]
        hits += int((logits[:, :-1].argmax(-1) == ids[:, 1:])[asked].sum())
        seen += int(asked.sum())
    return accumulate.finish().item(), hits / seen


def train(net, objective, data, held, rare):
    optimizer, generator = torch.optim.AdamW(net.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    curve = {0: judge(net, held, rare)}
    for step in range(1, STEPS + 1):
        ids = data[torch.randint(len(data), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        loss = objective(net(ids), ids)
        loss.backward()
        optimizer.step()
        objective.update("step")
        assert loss.isfinite()
        if step % EVERY == 0:
            curve[step] = judge(net, held, rare)
    return curve


@pytest.mark.slow
def test_the_composed_objective_learns_a_language(capsys):
    data, held = text()
    counts = token_counts(data, WORDS)
    assert torch.equal(counts, torch.bincount(data.reshape(-1), minlength=WORDS))
    rare = counts <= RARE
    share = (counts + 1.0) / (counts + 1.0).sum()
    unigram = -share.log()[held[:, 1:]].mean().item()

    weighting = (PowerLawDecay(counts, alpha=0.25) * TLDR()).clip(max=5.0).normalize()
    objectives = {"cross-entropy": Objective(CausalLM()), "composed": Objective(CausalLM(), weighting)}
    start = Transformer(WORDS)
    curves, nets = {}, {}
    for name, objective in objectives.items():
        nets[name] = copy.deepcopy(start)
        curves[name] = train(nets[name], objective, data, held, rare)

    targets = held[:, 1:]
    with capsys.disabled():
        print(f"\n{data.numel()} training tokens, {targets.numel()} held-out targets, {WORDS} words")
        print(f"rare: at most {RARE} times in training, {rare[targets].float().mean():.1%} of held-out targets")
        print(f"held-out cross-entropy of the training text's unigrams: {unigram:.3f}")
        print(f"{'step':>5}  {'held-out cross-entropy':>24}  {'rare-token accuracy':>24}")
        print(f"{'':>5}  {'plain':>12}{'composed':>12}  {'plain':>12}{'composed':>12}")
        for step in curves["composed"]:
            (plain, plain_hits), (composed, hits) = curves["cross-entropy"][step], curves["composed"][step]
            print(f"{step:>5}  {plain:>12.3f}{composed:>12.3f}  {plain_hits:>12.2%}{hits:>12.2%}")

    for name, curve in curves.items():
        assert curve[STEPS][0] < unigram - 0.5 < curve[0][0], name
        assert all(torch.tensor(values).isfinite().all() for values in curve.values())
    assert curves["composed"][0] == curves["cross-entropy"][0]
    ids = held[:BATCH]
    with torch.no_grad():
        logits = nets["composed"](ids)
        weights = objectives["composed"].weights(logits, ids)[:, 1:]
        relative = objectives["composed"].weights(logits, ids)[:, 1:][rare[ids[:, 1:]]].mean()
    assert weights.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert relative > 1.0  # rare tokens are both seldom seen and seldom known
