"""Methods told again in plain Python, one token at a time, and how to compare with them."""

from __future__ import annotations

import math

import torch

from prismserve.compression.apply import apply_visual
from prismserve.compression.base import VisualFeatures
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


def video(frames, patches, *, seed=0, width=6, grid=None, media=b"pixels\0\1"):
    """A video whose patches now and then change and otherwise nearly stand still; projected tokens are its own."""
    generator = torch.Generator().manual_seed(seed)
    shown = [torch.randn(patches, width, generator=generator)]
    for _ in range(frames - 1):
        changed = torch.rand(patches, 1, generator=generator) < 0.35
        drawn = torch.randn(patches, width, generator=generator)
        shown.append(torch.where(changed, drawn, shown[-1] + 0.1 * drawn))
    tokens = torch.cat(shown)
    projected = tokens @ torch.randn(width, width + 1, generator=generator)
    return VisualFeatures(tokens=tokens, grid=grid or (1, patches), seed=media, frames=frames, projected=projected)


def dpc_knn(points, centres, neighbours):
    """Density peaks: the centres in order of index, and for every point the number of its centre."""
    count = len(points)
    apart = [[math.dist(a, b) / math.sqrt(len(a)) for b in points] for a in points]
    density = [math.exp(-sum(d * d for d in sorted(row)[:neighbours]) / min(neighbours, count)) for row in apart]
    furthest = max(max(row) for row in apart)
    peak = []
    for i in range(count):
        denser = [j for j in range(count) if (density[j], -j) > (density[i], -i)]
        peak.append(density[i] * min((apart[i][j] for j in denser), default=furthest))
    chosen = sorted(best(peak, centres))
    owner = [
        chosen.index(i) if i in chosen else min(range(centres), key=lambda c: apart[i][chosen[c]]) for i in range(count)
    ]
    return chosen, owner


def combined(weights, vectors):
    """The sum of ``weights[i] * vectors[i]`` over a dict of weights."""
    return [sum(w * vectors[i][c] for i, w in weights.items()) for c in range(len(vectors[0]))]


def close(tokens, expected):
    return torch.allclose(tokens.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-4)
