"""Every registered method: a naive reference that it equals, the docstring template, the rules for arguments."""

import importlib.util
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from reweigh import losses, weighting
from reweigh.losses import Objective
from reweigh.losses.conformance import CRITERION_FOR, example_meta
from reweigh.weighting.conformance import TERMS, ready, terms_for, train

REFERENCES = Path(__file__).parent / "references"
HEADINGS = [
    "Weights:",
    "State and cadence:",
    "Use when:",
    "Avoid when:",
    "Deviations:",
    "Args:",
    "Shapes:",
    "Example:",
    "References:",
]
# arguments about what the object holds, which its twin is given as an input
HELD = {
    "circle_classification": {"num_classes", "embedding_dim", "proxies"},
    "group_dro": {
        "num_groups",
        "step_size",
        "adjustment",
        "group_counts",
        "normalize_losses",
        "absent",
        "smoothing",
        "balance",
        "cadence",
        "gather",
    },
    "adawac": {"num_samples", "lr", "device", "storage"},
    "aldr": {"num_samples", "device", "storage"},
    "alim": {"num_samples", "num_classes", "noise_rate", "start", "device", "storage"},
}
METHODS = [(registry, name) for registry in (weighting.registry, losses.registry) for name in registry.available()]
IDS = [f"{registry.kind}-{name}" for registry, name in METHODS]
# what this library brings, without installed plugins
OURS = [(registry, name) for registry, name in METHODS if registry.get(name).__module__.split(".")[0] == "reweigh"]
OUR_IDS = [f"{registry.kind}-{name}" for registry, name in OURS]
CITATION = re.compile(
    r'(?P<authors>\w[^"]+), "(?P<title>[^"]+)", (?P<venue>\w.+?),? (?P<year>(19|20)\d{2})( \([^)]+\))?\.(?= |$)'
)


def reference(name):
    path = REFERENCES / f"{name}.py"
    assert path.exists(), f"{name} has no naive reference: write tests/references/{name}.py"
    spec = importlib.util.spec_from_file_location(f"reference_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def advice(registry, name):
    """The two sections of the class's docstring, each as one line."""
    doc = inspect.cleandoc(registry.get(name).__doc__)
    return tuple(
        " ".join(re.search(rf"^{title}:\n((?: +.+\n)+)", doc, re.M)[1].split()) for title in ("Use when", "Avoid when")
    )


@pytest.mark.parametrize("name", weighting.available())
def test_weighting_equals_its_reference(name):
    record = weighting.registry.record(name)
    for example in record.examples:
        made = ready(weighting.create(name, **example))
        batches = [terms_for(made, TERMS[record.acts_on])(seed) for seed in range(5)]
        found = train(made, batches)
        rows = [
            [
                {
                    "loss": terms.loss[i].tolist(),
                    "p": None if terms.log_pt is None else terms.log_pt[i].exp().item(),
                    "target": None if terms.target is None else terms.target[i].item(),
                    "score": None if terms.score is None else terms.score[i].item(),
                    "group": None if terms.group is None else terms.group[i].item(),
                    "index": None if terms.index is None else terms.index[i].item(),
                    "category": 0 if terms.category is None else terms.category[i].tolist(),
                    **{name: value[i].tolist() for name, value in (terms.extras or {}).items()},
                }
                for i in range(len(terms.loss))
            ]
            for terms in batches
        ]
        wanted = torch.tensor(reference(name).weights(rows, **example), dtype=torch.float64)
        torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", losses.available())
def test_objective_equals_its_reference(name):
    for example in losses.registry.record(name).examples:
        objective = losses.create(name, **example)
        for seed in range(3):
            inputs = objective.example_inputs(seed=seed)
            meta = example_meta(objective)
            naive = reference(name)
            more = {key: meta[key].tolist() for key in getattr(naive, "META", ())}  # what its formula reads of the call
            wanted = naive.loss(*(value.tolist() for value in inputs), **more, **example)
            torch.testing.assert_close(objective(*inputs, **meta).item(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("registry", "name"), METHODS, ids=IDS)
def test_docstring_follows_the_template(registry, name):
    text = inspect.getdoc(registry.get(name))
    at = [text.find(f"\n{heading}\n") for heading in HEADINGS]
    assert -1 not in at, f"missing: {[h for h, i in zip(HEADINGS, at, strict=True) if i < 0]}"
    assert at == sorted(at)
    assert ".. math::" in text
    assert text.splitlines()[0].endswith(".")
    for parameter in list(inspect.signature(registry.get(name).__init__).parameters)[1:]:
        assert re.search(rf"^\s+{parameter}: ", text, re.M), f"{parameter} is not documented"


@pytest.mark.parametrize(("registry", "name"), METHODS, ids=IDS)
def test_arguments_follow_the_house_rules(registry, name):
    parameters = list(inspect.signature(registry.get(name).__init__).parameters.values())[1:]
    for place, parameter in enumerate(parameters):
        assert parameter.annotation is not inspect.Parameter.empty, f"{parameter.name} has no annotation"
        # two where they are a pair: gamma_neg and gamma_pos, alpha and beta, num_classes and embedding_dim
        assert place <= 1 or parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{parameter.name} is not keyword-only"


@pytest.mark.parametrize(("registry", "name"), METHODS, ids=IDS)
def test_neutral_arguments_leave_the_loss_alone(registry, name):
    """After five steps of learning, too."""
    record = registry.record(name)
    if record.neutral is None:
        text = inspect.getdoc(registry.get(name))
        assert "No argument is neutral" in text, f"{name} names no neutral arguments and does not say so"
        return
    built = registry.create(name, **record.neutral)
    if registry is weighting.registry:
        built = Objective(CRITERION_FOR[record.acts_on](), built)
    bare = Objective(built.criterion)
    for seed in range(5):
        inputs = built.example_inputs(seed=seed)
        meta = example_meta(built)
        given = {name: meta[name] for name in ("group", "index") if name in meta}
        torch.testing.assert_close(built(*inputs, **meta), bare(*inputs, **given), rtol=1e-10, atol=0)
        built.update("step")


@pytest.mark.parametrize(("registry", "name"), METHODS, ids=IDS)
def test_record_names_its_defaults(registry, name):
    record, signature = registry.record(name), inspect.signature(registry.get(name).__init__)
    assert record.paper
    assert record.venue
    for parameter, (value, source) in record.defaults.items():
        assert eval(value) == signature.parameters[parameter].default
        assert source


@pytest.mark.parametrize(("registry", "name"), OURS, ids=OUR_IDS)
def test_record_says_when_to_use_it_and_when_not(registry, name):
    for text in advice(registry, name):
        assert re.fullmatch(r"[A-Z].*\.", text), f"not a sentence: {text!r}"
        assert len(text) <= 240, f"{len(text)} characters: {text!r}"


def test_no_two_methods_have_the_same_advice():
    texts = [text for registry, name in OURS for text in advice(registry, name)]
    assert not [text for text, times in Counter(texts).items() if times > 1]


@pytest.mark.parametrize(("registry", "name"), OURS, ids=OUR_IDS)
def test_references_can_be_cited(registry, name):
    """Each is authors, title, venue and year, and the record's paper is one of them."""
    record, text = registry.record(name), inspect.getdoc(registry.get(name)).split("\nReferences:\n")[1]
    if record.paper == "none" and '"' not in text:
        return
    text = " ".join(text.split())
    assert not CITATION.sub("", text).strip(), f"not a citation: {CITATION.sub('', text)}"
    found = list(CITATION.finditer(text))
    for citation in found:
        for author in citation["authors"].split(", "):
            assert re.fullmatch(r"(\w\.(-\w\.)? )+\w[^.]*", author), f"no initials, or no name: {author!r}"
    if record.paper != "none":
        paper = re.sub(r" \([^)]*\)$", "", record.paper)
        assert paper in [citation["title"] for citation in found]


def test_same_names_mean_the_same_everywhere():
    """gamma, weight, ignore_index ... carry one annotation across the catalogue."""
    seen: dict[str, set[str]] = {}
    for name in losses.available():
        for parameter in inspect.signature(losses.registry.get(name).__init__).parameters.values():
            seen.setdefault(parameter.name, set()).add(str(parameter.annotation))
    for shared in ("gamma", "weight", "ignore_index", "label_smoothing", "reduction"):
        assert len(seen.get(shared, {0})) == 1, f"{shared}: {seen[shared]}"


@pytest.mark.parametrize("name", losses.available())
def test_functional_twin_has_the_same_arguments(name):
    """After its inputs: the same names, order and defaults, so that either form can be read from the other."""
    cls = losses.registry.get(name)
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z][a-z]+", cls.__name__)
    twin = getattr(losses.functional, "_".join(words).lower(), None) or getattr(losses.functional, f"{name}_loss")
    given = list(inspect.signature(twin).parameters.values())
    wanted = list(inspect.signature(cls.__init__).parameters.values())[1:]
    names = [parameter.name for parameter in given]
    kept = [parameter for parameter in wanted if parameter.name not in HELD.get(name, set())]
    own = [given[names.index(parameter.name)] for parameter in kept]
    assert [parameter.name for parameter in own] == [parameter.name for parameter in given if parameter in own]
    assert {p.name: p.default for p in own if p.name != "counts"} == {
        p.name: p.default for p in kept if p.name != "counts"
    }
    assert given[-1].kind is inspect.Parameter.VAR_KEYWORD
