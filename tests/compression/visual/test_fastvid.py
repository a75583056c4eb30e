from __future__ import annotations

import pytest

from tests.compression.visual.slow import best, close, combined, cosine, dpc_knn, mean_of, rows, run, video


def slow(features, keep, scenes, similarity, context, every):
    x, frames = rows(features.projected), features.frames
    patches = len(x) // frames
    frame = [x[t * patches : (t + 1) * patches] for t in range(frames)]
    means = [mean_of(tokens) for tokens in frame]
    alike = [cosine(means[t], means[t + 1]) for t in range(frames - 1)]
    cut = {t for t in range(frames - 1) if alike[t] < similarity} | set(best([-a for a in alike], scenes - 1))
    shares = [(t + 1) * keep // frames - t * keep // frames for t in range(frames)]
    out, rest = {}, []
    for t in range(frames):
        salient = best([-cosine(token, means[t]) for token in frame[t]], shares[t] - int(shares[t] * context))
        out |= {t * patches + p: {t * patches + p: 1.0} for p in salient}
        rest.append([t * patches + p for p in range(patches) if p not in salient])
    first = 0
    for last in range(frames):
        if last < frames - 1 and last not in cut:
            continue
        scene, wanted = range(first, last + 1), sum(int(shares[t] * context) for t in range(first, last + 1))
        first = last + 1
        keys = [t for t in scene if (last - t) % every == 0]
        anchors = []
        for place, t in enumerate(keys):
            share = (place + 1) * wanted // len(keys) - place * wanted // len(keys)
            assert share <= len(rest[t]), "the case is too small for this"
            if share:
                anchors += [rest[t][c] for c in dpc_knn([x[i] for i in rest[t]], share, 4)[0]]
        members = {anchor: [] for anchor in anchors}
        for token in (i for t in scene for i in rest[t] if i not in members and anchors):
            members[max(anchors, key=lambda a: cosine(x[token], x[a]))].append(token)
        for anchor, others in members.items():
            w = max(0.6, 1 / (len(others) + 1))
            out[anchor] = {anchor: w, **{i: (1 - w) / len(others) for i in others}}
    tokens = rows(features.tokens)
    return sorted(out), [combined(out[place], tokens) for place in sorted(out)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("frames", "keep", "scenes", "similarity"), [(1, 6, 8, 0.9), (5, 20, 2, 0.5), (9, 36, 3, 0.2)])
def test_equals_scenes_salience_and_anchors_told_one_by_one(frames, keep, scenes, similarity, seed):
    features = video(frames, 12, seed=seed)
    tokens, indices = run("fastvid", features, keep=keep, scenes=scenes, similarity=similarity)
    expected, values = slow(features, keep, scenes, similarity, 0.4, 4)
    assert indices.tolist() == expected
    assert close(tokens, values)


def test_a_large_budget_makes_more_frames_hold_anchors():
    features = video(8, 10)
    tokens, indices = run("fastvid", features, keep=76, scenes=1, similarity=-1.0)
    assert len(indices) == 76
    assert tokens.isfinite().all()


def test_without_context_it_keeps_salient_tokens_as_they_are():
    features = video(4, 10)
    tokens, indices = run("fastvid", features, keep=12, context=0.0)
    assert [int((indices // 10 == frame).sum()) for frame in range(4)] == [3, 3, 3, 3]
    assert (tokens == features.tokens[indices]).all()
