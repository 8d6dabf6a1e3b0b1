"""Objectives by name, for the command line: what the library registers, and compositions that people ask for."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from reweigh import losses
from reweigh.losses import BalancedSoftmax, BinaryCrossEntropy, CausalLM, CrossEntropy, FocalLoss, Objective
from reweigh.weighting import EffectiveNumber, InverseFrequency


def _cross_entropy(**options: Any) -> Objective:
    return Objective(CrossEntropy(**options))


def _binary_cross_entropy(**options: Any) -> Objective:
    return Objective(BinaryCrossEntropy(**options))


def _causal_lm(**options: Any) -> Objective:
    return Objective(CausalLM(**options))


def _inverse_frequency(**options: Any) -> Objective:
    return Objective(CrossEntropy(), InverseFrequency(**options), "weighted_mean")


def _sqrt_inverse_frequency(**options: Any) -> Objective:
    return _inverse_frequency(power=0.5, **options)


def _class_balanced(**options: Any) -> Objective:
    return Objective(CrossEntropy(), EffectiveNumber(**options), "weighted_mean")


def _class_balanced_focal(*, gamma: float = 2.0, **options: Any) -> Objective:
    return FocalLoss(gamma, alpha=EffectiveNumber(**options))


def _balanced_softmax(**options: Any) -> Objective:
    return Objective(CrossEntropy(logits=BalancedSoftmax(**options)))


RECIPES: Mapping[str, tuple[Callable[..., Objective], str]] = {
    "cross_entropy": (_cross_entropy, "Plain training: every sample counts the same."),
    "binary_cross_entropy": (_binary_cross_entropy, "Plain training: every label counts the same."),
    "causal_lm": (_causal_lm, "Plain training: every token counts the same."),
    "inverse_frequency": (_inverse_frequency, "Each sample counts in inverse proportion to its class's size."),
    "sqrt_inverse_frequency": (_sqrt_inverse_frequency, "The same with the square root of the size."),
    "class_balanced": (_class_balanced, "Weights by the inverse effective number of samples."),
    "class_balanced_focal": (_class_balanced_focal, "Class-balanced weights times the focal factor."),
    "balanced_softmax": (_balanced_softmax, "Adds the log class sizes to the logits during training."),
}
"""Compositions, beside what ``reweigh.losses.available()`` lists. Class sizes come from the training data."""


def names() -> list[str]:
    """Everything that :func:`named` knows."""
    return sorted({*RECIPES, *losses.available()})


def named(text: str) -> tuple[Callable[[], Objective], str]:
    """What makes an objective, and a sentence about it, from ``"focal"`` or ``"focal(gamma=1.5)"``.

    Raises:
        ValueError: If there is no such name, or what stands in parentheses is not ``name=literal, ...``.

    Example:
        >>> make, about = named("focal(gamma=1.5)")
        >>> make()
        FocalLoss(1.5)
    """
    name, options = _parsed(text)
    if name in RECIPES:
        make, about = RECIPES[name]
        return lambda: make(**options), about
    if name not in losses.available():
        near = get_close_matches(name, names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names())}"
        raise ValueError(f"unknown objective {name!r}; {hint}")
    about = (losses.registry.get(name).__doc__ or name).strip().splitlines()[0]
    return lambda: losses.create(name, **options), about


def split(text: str) -> list[str]:
    """Objectives of a list with commas, which may stand in parentheses too."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found if part.strip()]


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            return tree.func.id, {str(word.arg): ast.literal_eval(word.value) for word in tree.keywords if word.arg}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"an objective must read like focal or focal(gamma=1.5), got {text!r}")
