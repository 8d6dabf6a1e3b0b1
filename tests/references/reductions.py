"""Every denominator as a loop over samples and terms: lists in, a float out. Shares nothing with the library.

``loss[i][t]``, ``weight[i][t]``, ``valid[i][t]`` (0 or 1), ``times[i][t]`` (how many terms one stands for) and
``norm[i][t]`` (what it adds to a denominator).
"""


def every(loss):
    for i, row in enumerate(loss):
        for t in range(len(row)):
            yield i, t


def total(loss, weight, valid, times):
    return sum(valid[i][t] * times[i][t] * weight[i][t] * loss[i][t] for i, t in every(loss))


def ratio(above, below):
    return above / below if below > 0 else 0.0


def mean(loss, weight, valid, times, norm):
    return ratio(total(loss, weight, valid, times), sum(valid[i][t] * times[i][t] * norm[i][t] for i, t in every(loss)))


def weighted_mean(loss, weight, valid, times, norm):
    below = sum(valid[i][t] * times[i][t] * norm[i][t] * weight[i][t] for i, t in every(loss))
    return ratio(total(loss, weight, valid, times), below)


def batch_mean(loss, weight, valid, times, norm):
    """Samples with a valid term, each counted as often as its most frequent term."""
    below = sum(max([valid[i][t] * times[i][t] for t in range(len(row))], default=0.0) for i, row in enumerate(loss))
    return ratio(total(loss, weight, valid, times), below)


def sequence_mean(loss, weight, valid, times, norm, copies):
    """``copies[i]``: how many sequences sequence i stands for; ``times`` counts terms within it."""
    above = below = 0.0
    for i, row in enumerate(loss):
        terms = range(len(row))
        mass = sum(valid[i][t] * times[i][t] * norm[i][t] for t in terms)
        if mass > 0:
            above += copies[i] * sum(valid[i][t] * times[i][t] * weight[i][t] * loss[i][t] for t in terms) / mass
            below += copies[i]
    return ratio(above, below)


def group_mean(loss, weight, valid, times, norm, group):
    """Mean over the groups that have a valid term of their own means."""
    means = []
    for g in sorted(set(group)):
        mine = [(i, t) for i, t in every(loss) if group[i] == g]
        mass = sum(valid[i][t] * times[i][t] * norm[i][t] for i, t in mine)
        if mass > 0:
            means.append(sum(valid[i][t] * times[i][t] * weight[i][t] * loss[i][t] for i, t in mine) / mass)
    return ratio(sum(means), len(means))
