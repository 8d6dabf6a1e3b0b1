"""The logit of every sample, kept in single precision, in visits; weights from two exponentials."""

import math
import struct

META = ("index",)


def single(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def weights(batches, *, num_samples, lr=1.0):
    table, out = [0.0] * num_samples, []
    for rows in batches:
        found = []
        for row in rows:
            first, second = row["loss"]
            logit = table[row["index"]] + lr * (first - second)
            # the authors' two weights, each times its own exponential, rescaled to add up to 1
            up, down = math.exp(0.5 * logit), math.exp(-0.5 * logit)
            found.append([up / (up + down), down / (up + down)])
            table[row["index"]] = single(table[row["index"]] + single(lr * (first - second)))
        out.append(found)
    return out


def loss(supervised, consistency, *, index, num_samples, lr=1.0):
    pairs = list(zip(supervised, consistency, strict=True))
    rows = [{"loss": pair, "index": i} for pair, i in zip(pairs, index, strict=True)]
    (found,) = weights([rows], num_samples=num_samples, lr=lr)
    return sum(a * x + b * y for (a, b), (x, y) in zip(found, pairs, strict=True)) / len(pairs)
