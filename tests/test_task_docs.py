"""What the multi-task page says: its table is the catalogue's, its remarks on other libraries are true."""

import math
from pathlib import Path

import pytest
import torch

from reweigh import DWA, FAMO, GeometricMean, MultiTaskLoss, weighting

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "multitask.md"


def table():
    lines = ["| method | where from | moves | asks for |", "|---|---|---|---|"]
    for name in weighting.available():
        record = weighting.registry.record(name)
        if record.acts_on != "task":
            continue
        cls, made = weighting.registry.get(name), weighting.create(name, **record.examples[0])
        asks = [] if made.detached else ["your optimizer"]
        asks += ["validation losses"] if "validation" in made.feeds else []
        asks += ["losses after the step"] if "after" in made.feeds else []
        asks += ["`shared=`, a backward pass per task"] if "gradient_norm" in made.needs else []
        moves = "with the batch" if made.update_on == "never" else f"per {made.update_on}"
        if name in ("fixed", "ramp", "staged", "temperature_mixing"):
            moves = "by plan"
        lines.append(f"| `{cls.__name__}` | {record.venue} | {moves} | {', '.join(asks)} |")
    return "\n".join(lines)


def test_the_page_has_the_catalogue():
    assert table() in PAGE.read_text(encoding="utf-8"), f"put this into {PAGE.name}:\n{table()}"


def test_the_product_form_of_the_geometric_mean_is_zero_where_ours_is_not():
    values = torch.full((20,), 1e-3)
    assert values.prod() ** (1 / 20) == 0
    loss = MultiTaskLoss([f"t{k}" for k in range(20)], GeometricMean())
    assert math.isclose(loss(values).item(), 1e-3, rel_tol=1e-5)


@pytest.mark.peers
def test_what_torchjd_does():
    scalarization = pytest.importorskip("torchjd.scalarization")
    theirs = scalarization.DWA()
    with pytest.raises((AttributeError, TypeError)):
        theirs({"seg": torch.tensor(1.0)})
    assert not scalarization.DWA().state_dict()
    assert theirs(torch.tensor([1.0, torch.nan])).isnan()
    moments = [key for key in scalarization.FAMO(2).state_dict() if "exp_avg" in key or "moment" in key]
    assert not moments
    ours = MultiTaskLoss(["a", "b"], FAMO() * DWA())
    assert any("moments" in key for key in ours.state_dict())
