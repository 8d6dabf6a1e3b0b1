"""The exponent on negatives moves after each batch by the probability gap that is left to close."""


def weights(batches, *, gamma_neg=4.0, gamma_pos=1.0, target_gap=0.0, step_size=0.01, max_gamma_neg=10.0, detach=True):
    met = []
    for batch in batches:
        met.append([(1.0 - row["p"]) ** (gamma_pos if row["target"] == 1.0 else gamma_neg) for row in batch])
        sides = [[row["p"] for row in batch if row["target"] == side] for side in (1.0, 0.0)]
        if sides[0] and sides[1]:
            gap = sum(sides[0]) / len(sides[0]) - sum(sides[1]) / len(sides[1])
            gamma_neg = min(max(gamma_neg + step_size * (target_gap - gap), 0.0), max_gamma_neg)
    return met
