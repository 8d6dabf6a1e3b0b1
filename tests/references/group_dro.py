"""Exponentiated gradient on plain q, group by group, with batch means."""

import math

from references.focal import softmax_focal

META = ("group",)


def members(row, groups, by):
    if by == "membership":
        return row["membership"]
    return [1.0 if row[by] == g else 0.0 for g in range(groups)]


def means(rows, groups, by):
    out = []
    for g in range(groups):
        size = sum(members(row, groups, by)[g] for row in rows)
        out.append(sum(members(row, groups, by)[g] * row["loss"] for row in rows) / size if size else None)
    return out


def spread(rows, q, groups, by, balance, group_counts):
    if balance == "counts":
        share = [n / sum(group_counts) for n in group_counts]
    else:
        share = [sum(members(row, groups, by)[g] for row in rows) / len(rows) for g in range(groups)]
    return [sum(m * q[g] / share[g] for g, m in enumerate(members(row, groups, by)) if m) for row in rows]


def weights(
    batches,
    *,
    num_groups,
    step_size=0.01,
    adjustment=0.0,
    group_counts=None,
    normalize_losses=False,
    absent="keep",
    by="group",
    balance="batch",
):
    q, out = [1.0 / num_groups] * num_groups, []
    strength = [adjustment] * num_groups if isinstance(adjustment, float) else adjustment
    for rows in batches:
        out.append(spread(rows, q, num_groups, by, balance, group_counts))
        losses = means(rows, num_groups, by)
        moving = [g for g in range(num_groups) if losses[g] is not None or absent == "decay"]
        adjusted = {
            g: (losses[g] or 0.0) + (strength[g] / math.sqrt(group_counts[g]) if group_counts else 0.0) for g in moving
        }
        if normalize_losses:
            total = sum(adjusted.values())
            adjusted = {g: value / total for g, value in adjusted.items()}
        before = sum(q[g] for g in moving)
        for g in moving:
            q[g] *= math.exp(step_size * adjusted[g])
        after = sum(q[g] for g in moving)
        for g in moving:
            q[g] *= before / after
    return out


def loss(logits, labels, *, group, num_groups, step_size=0.01, adjustment=0.0, group_counts=None, weight=None):
    """The first forward: q is uniform; torch's class weight divides by its own sum over the batch."""
    n = len(logits)
    terms = [softmax_focal(row, label, 0.0, weight=weight) for row, label in zip(logits, labels, strict=True)]
    size = [sum(g == k for g in group) for k in range(num_groups)]
    above = sum(term * n / (num_groups * size[g]) for term, g in zip(terms, group, strict=True))
    return above / (n if weight is None else sum(weight[label] for label in labels))
