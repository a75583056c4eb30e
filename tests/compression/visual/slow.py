"""Methods told again in plain Python, one token at a time, and how to compare with them."""

from __future__ import annotations

import math

from prismserve.compression.apply import apply_visual
from prismserve.compression.loader import normalise, visual_method


def run(name, features, **params):
    return apply_visual(features, normalise(visual_method(name), params, "compression.visual"))


def cosine(a, b):
    if a == b:
        return 1.0
    norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


def rows(tensor):
    return tensor.double().tolist()


def attention(features):
    heads = rows(features.cls_attention)
    return [sum(head[i] for head in heads) / len(heads) for i in range(len(features.tokens))]


def best(scores, count):
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def largest_determinant(kernel, count):
    """Greedy: at every step the determinant of every extension is computed anew."""
    chosen = []
    for _ in range(count):
        rest = [i for i in range(len(kernel)) if i not in chosen]
        chosen.append(
            max(rest, key=lambda i: (determinant([[kernel[a][b] for b in [*chosen, i]] for a in [*chosen, i]]), -i))
        )
    return sorted(chosen)


def determinant(matrix):
    matrix, value = [list(row) for row in matrix], 1.0
    for i in range(len(matrix)):
        pivot = max(range(i, len(matrix)), key=lambda r: abs(matrix[r][i]))
        if matrix[pivot][i] == 0.0:
            return 0.0
        if pivot != i:
            matrix[i], matrix[pivot], value = matrix[pivot], matrix[i], -value
        value *= matrix[i][i]
        for r in range(i + 1, len(matrix)):
            factor = matrix[r][i] / matrix[i][i]
            matrix[r] = [a - factor * b for a, b in zip(matrix[r], matrix[i], strict=True)]
    return value


def mean_of(vectors, weights=None):
    weights = weights or [1.0] * len(vectors)
    total = sum(weights)
    return [sum(w * v[c] for w, v in zip(weights, vectors, strict=True)) / total for c in range(len(vectors[0]))]
