from __future__ import annotations

import pytest
import torch

from prismserve.compression.visual.chatunivi import free_places
from tests.compression.visual.slow import close, combined, dpc_knn, mean_of, rows, run, video


def coarser(clusters, count, neighbours, x):
    """Clusters are dicts of weights by token."""
    _, owner = dpc_knn([combined(weights, x) for weights in clusters], count, neighbours)
    out = []
    for number in range(count):
        inside = [clusters[i] for i in range(len(clusters)) if owner[i] == number]
        merged = {}
        for weights in inside:
            for token, weight in weights.items():
                merged[token] = merged.get(token, 0.0) + weight / len(inside)
        out.append(merged)
    return out


def slow(features, keep, event_frames, neighbours, coarse):
    x, frames = rows(features.tokens), features.frames
    patches = len(x) // frames
    events = max(1, frames // event_frames)
    _, owner = dpc_knn([mean_of(x[t * patches : (t + 1) * patches]) for t in range(frames)], events, neighbours)
    out = {}
    for event in range(events):
        share = (event + 1) * keep // events - event * keep // events
        inside = [t for t in range(frames) if owner[t] == event]
        assert share <= len(inside) * patches, "the case is too small for this"
        scales = (share - share // 7 - 2 * share // 7, 2 * share // 7, share // 7)
        seen = [[], [], []]
        for t in inside:
            clusters = [{t * patches + p: 1.0} for p in range(patches)]
            for scale, wanted in enumerate(scales):
                if wanted:
                    clusters = coarser(clusters, min(wanted, len(clusters)), coarse if scale else neighbours, x)
                    seen[scale] += clusters
        for scale, wanted in enumerate(scales):
            for cluster in coarser(seen[scale], wanted, coarse if scale else neighbours, x) if wanted else ():
                own = [token for token in sorted(cluster) if token not in out]
                free = [t * patches + p for t in inside for p in range(patches) if t * patches + p not in out]
                near = [t * patches + p for t in inside for p in range(patches)]
                first = near.index(min(cluster))
                out[own[0] if own else min(free, key=lambda i: (abs(near.index(i) - first), i))] = cluster
    return sorted(out), [combined(out[place], x) for place in sorted(out)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("frames", "patches", "keep", "event_frames"), [(1, 20, 14, 16), (4, 8, 14, 16), (6, 6, 15, 3), (5, 4, 2, 16)]
)
def test_equals_events_and_three_scales_of_clusters_told_one_by_one(frames, patches, keep, event_frames, seed):
    features = video(frames, patches, seed=seed)
    tokens, indices = run("chatunivi", features, keep=keep, event_frames=event_frames)
    expected, values = slow(features, keep, event_frames, 5, 3)
    assert indices.tolist() == expected
    assert close(tokens, values)


def test_an_image_has_the_three_scales_of_the_paper():
    tokens, indices = run("chatunivi", video(1, 196, grid=(14, 14)), keep=112)
    assert len(tokens) == len(indices) == 64 + 32 + 16


def test_a_cluster_without_free_tokens_stands_at_the_nearest_free_place():
    weights = torch.tensor([[0.0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]])
    assert free_places(weights, torch.zeros(5, dtype=torch.bool)).tolist() == [1, 0, 2]
