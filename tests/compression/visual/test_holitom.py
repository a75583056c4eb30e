from __future__ import annotations

import itertools

import pytest
import torch

from prismserve.compression.visual.holitom import divide
from tests.compression.visual.slow import close, combined, cosine, dpc_knn, rows, run, video


def divisions(frames):
    """Every way to cut frames into stretches."""
    for cuts in itertools.product((False, True), repeat=frames - 1):
        ends = [t for t, cut in enumerate(cuts) if cut] + [frames - 1]
        yield list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))


def saving(stretches, still):
    return sum(
        (e - s) * sum(all(still[t][p] for t in range(s, e)) for p in range(len(still[s])))
        for s, e in stretches
        if e > s
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [1, 3, 99])
def test_no_division_into_stretches_saves_more(seed, window):
    still = torch.rand(6, 5, generator=torch.Generator().manual_seed(seed)) < 0.7
    allowed = [way for way in divisions(7) if max(e - s + 1 for s, e in way) <= window]
    found = divide(still, window)
    assert found in allowed
    assert saving(found, still.tolist()) == max(saving(way, still.tolist()) for way in allowed)


def slow(features, kept, similarity, own, neighbours):
    x, patches = rows(features.projected), features.grid[0] * features.grid[1]
    frames = features.frames
    alike = [[cosine(x[t * patches + p], x[(t + 1) * patches + p]) for p in range(patches)] for t in range(frames - 1)]
    still = [[value > similarity for value in row] for row in alike]
    most = max(saving(way, still) for way in divisions(frames))
    # Of equals, that without stretches which save nothing.
    stretches = max((way for way in divisions(frames) if saving(way, still) == most), key=len)
    static = {
        (s, e, p): min(alike[t][p] for t in range(s, e))
        for s, e in stretches
        for p in range(patches)
        if e > s and all(still[t][p] for t in range(s, e))
    }
    while frames * patches - sum(e - s for s, e, _ in static) < kept:
        del static[min(static, key=static.get)]
    groups = []
    for s, e in stretches:
        merged = [p for p in range(patches) if (s, e, p) in static]
        groups.append([{t * patches + p: 1 / (e - s + 1) for t in range(s, e + 1)} for p in merged])
        groups += [[{t * patches + p: 1.0} for p in range(patches) if p not in merged] for t in range(s, e + 1)]
    sizes, out, seen = [len(group) for group in groups], {}, 0
    for group, size in zip(groups, sizes, strict=True):
        share = (seen + size) * kept // sum(sizes) - seen * kept // sum(sizes)
        seen += size
        if not share:
            continue
        chosen, owner = dpc_knn([combined(weights, x) for weights in group], share, neighbours)
        for number, centre in enumerate(chosen):
            others = [i for i in range(size) if owner[i] == number and i != centre]
            parts = [(centre, own if others else 1.0), *((i, (1 - own) / len(others)) for i in others)]
            out[min(group[centre])] = {token: w * part for i, part in parts for token, w in group[i].items()}
    tokens = rows(features.tokens)
    return sorted(out), [combined(out[place], tokens) for place in sorted(out)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("frames", "patches", "keep"), [(1, 12, 5), (5, 6, 7), (6, 5, 13), (4, 6, 20)])
def test_equals_the_best_division_and_clusters_told_one_by_one(frames, patches, keep, seed):
    features = video(frames, patches, seed=seed)
    tokens, indices = run("holitom", features, keep=keep, similarity=0.7, own=0.6, neighbours=3)
    expected, values = slow(features, keep, 0.7, 0.6, 3)
    assert indices.tolist() == expected
    assert close(tokens, values)


def test_what_stands_still_is_merged_over_time_into_its_first_frame():
    features = video(1, 4, seed=5)
    still = type(features)(
        tokens=features.tokens.repeat(5, 1),
        grid=(2, 2),
        seed=b"12345678",
        frames=5,
        projected=features.projected.repeat(5, 1),
    )
    tokens, indices = run("holitom", still, keep=4)
    assert indices.tolist() == [0, 1, 2, 3]
    assert torch.allclose(tokens, features.tokens, atol=1e-6)
