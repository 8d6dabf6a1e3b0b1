"""(1 - p_t) to an exponent that depends on the side."""


def weights(batches, *, gamma_neg=4.0, gamma_pos=1.0, detach=True):
    return [
        [(1.0 - row["p"]) ** (gamma_pos if row["target"] == 1.0 else gamma_neg) for row in batch] for batch in batches
    ]
