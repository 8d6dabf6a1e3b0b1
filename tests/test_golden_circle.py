"""Numbers that published circle losses give: tests/golden/core_circle.json."""

import json
from pathlib import Path

import pytest
import torch

from reweigh import CircleClassificationLoss, CircleLogits, CircleLoss, CrossEntropy, Objective
from reweigh.losses import functional

F64 = torch.float64
CASES = {
    case["id"]: case
    for case in json.loads((Path(__file__).parent / "golden" / "core_circle.json").read_text())["cases"]
}


def plain(case):
    """A case whose number is to be matched."""
    expected = case["expected"]
    odd = {"want", "quirk", "dtype"} & case.keys() or expected.get("reference_nan") or "reference_error" in expected
    return not odd


PLAIN = [name for name, case in CASES.items() if plain(case)]


def computed(case, dtype=F64, **other):
    """The loss of a case and its inputs in the order of ``wrt``."""
    config, given = case["config"], case["inputs"]
    leaves = [torch.tensor(given[name], dtype=dtype, requires_grad=True) for name in case["wrt"]]
    m, gamma, labels = config["m"], config["gamma"], torch.tensor(given.get("labels", []), dtype=torch.long)
    match config["ref"]:
        case "pool":
            return functional.circle_similarity_loss(*leaves, m, gamma), leaves
        case "ce":
            return Objective(CrossEntropy(logits=CircleLogits(m, gamma)))(*leaves, labels), leaves
        case "class":
            return functional.circle_classification_loss(leaves[0], labels, leaves[1], m, gamma), leaves
        case "pml":
            return CircleLoss(m, gamma=gamma, **other)(*leaves, labels), leaves
    raise AssertionError(config["ref"])


def close(case, loss, leaves):
    torch.testing.assert_close(loss.item(), case["expected"]["loss"], rtol=1e-9, atol=1e-12)
    for name, found in zip(case["wrt"], torch.autograd.grad(loss, leaves), strict=True):
        wanted = torch.tensor(case["expected"]["grad"][name], dtype=F64)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_golden(name):
    close(CASES[name], *computed(CASES[name]))


@pytest.mark.parametrize("tile", [1, 3, 100])
@pytest.mark.parametrize("name", [name for name in PLAIN if CASES[name]["config"]["ref"] == "pml"])
def test_golden_in_tiles(name, tile):
    close(CASES[name], *computed(CASES[name], tile=tile))


def test_every_case_is_covered():
    assert {name for name in CASES if name not in PLAIN} == {"pool_optimum", "pml_f16"}
    assert len(CASES) == 15


def test_satisfied_negatives_add_one_each():
    """The quirk of every published implementation, kept by default: the pooled loss has a floor above 0."""
    case = CASES["pool_optimum"]
    close(case, *computed(case))


def test_satisfied_negatives_can_be_left_out():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=F64)
    labels = torch.tensor([0, 0, 1, 1])
    for over in ("anchor", "batch"):
        assert CircleLoss(0.25, gamma=20.0, over=over)(embeddings, labels).item() > 0.1
        assert CircleLoss(0.25, gamma=20.0, over=over, drop_satisfied=True)(embeddings, labels).item() == 0.0


def test_half_precision_is_computed_in_float32():
    """The published one loses three digits; here the value is that of the rounded inputs."""
    case = CASES["pml_f16"]
    loss, (leaf,) = computed(case, torch.float16)
    double, (exact,) = computed(case, F64)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(case["expected"]["loss"], rel=2e-3)
    assert loss.item() == pytest.approx(double.item(), rel=1e-6)
    (found,), (wanted,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(double, exact)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_the_class_level_module_is_its_function():
    case = CASES["class_m25_g64"]
    embeddings, labels = torch.tensor(case["inputs"]["emb"], dtype=F64), torch.tensor(case["inputs"]["labels"])
    proxies = torch.tensor(case["inputs"]["W"], dtype=F64)
    loss = CircleClassificationLoss(*proxies.shape, gamma=64.0, proxies=proxies)
    value = loss(embeddings.requires_grad_(), labels)
    close(case, value, [embeddings, loss.criterion.proxies])
