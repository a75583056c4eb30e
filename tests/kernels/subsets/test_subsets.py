from __future__ import annotations

import pytest
import torch

from prismserve.kernels.dispatch import use_native_on, without_native
from prismserve.kernels.subsets import (
    Fading,
    closest,
    determinant_folded,
    drop_alike,
    farthest_first,
    fold_alike,
    fold_nearest,
    largest_determinant,
    merge_alike,
    merge_rows,
)

needs_native = pytest.mark.skipif(not use_native_on(torch.device("cpu")), reason="no C++ compiler on this machine")

SHAPES = [(1, 5), (2, 8), (9, 3), (50, 20), (196, 160), (131, 67)]


def features(count, width, *, clusters=0):
    generator = torch.Generator().manual_seed(count * 1000 + width)
    rows = torch.randn(count, width, generator=generator)
    if clusters:
        centres = torch.randn(clusters, width, generator=generator)
        rows = centres[torch.randint(0, clusters, (count,), generator=generator)] + 0.3 * rows
    return rows


def budgets(count):
    return sorted({1, max(1, count // 16), max(1, count // 3), count - 1 or 1})


def both(function):
    native = function()
    with without_native():
        plain = function()
    return native, plain


def assert_same(native, plain):
    for one, other in zip(native, plain, strict=True):
        assert one.dtype is torch.int64
        assert one.tolist() == other.tolist()


@needs_native
@pytest.mark.parametrize("clusters", [0, 7])
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_native_kernels_choose_what_plain_pytorch_chooses(count, width, clusters):
    rows = features(count, width, clusters=clusters)
    quality = torch.rand(count, generator=torch.Generator().manual_seed(1))
    places = torch.stack((torch.zeros(count), torch.arange(count) // 14, torch.arange(count) % 14), 1).float()
    some = torch.arange(0, count, 2)
    for picks in budgets(count):
        # Beyond the rank nothing but rounding would be left to choose by.
        if picks <= width:
            for given in ((None, None), (quality, None), (quality, Fading(places, 0.5, 3.0))):
                assert_same(*both(lambda picks=picks, given=given: [largest_determinant(rows, picks, *given)]))
        assert_same(*both(lambda picks=picks: [farthest_first(rows, picks)]))
        assert_same(*both(lambda picks=picks: merge_alike(rows, picks, 8)))
        kept = min(picks, len(some)) - 1
        assert_same(*both(lambda kept=kept: [drop_alike(rows, some, kept, 3)]))


@needs_native
@pytest.mark.parametrize("candidates", [1023, 1024, 1025])
def test_dropping_among_many_rows_is_the_same_with_and_without_all_pairs_held(candidates):
    rows = features(1100, 6, clusters=40)
    among = torch.arange(1100)[:candidates] + torch.arange(candidates) // 512
    assert_same(*both(lambda: [drop_alike(rows, among, candidates // 2, 64)]))


@needs_native
def test_rows_that_lie_apart_in_memory_are_read_where_they_are():
    wide = features(40, 64)
    rows, copied = wide[:, 8:40], wide[:, 8:40].contiguous()
    assert torch.equal(largest_determinant(rows, 9), largest_determinant(copied, 9))
    assert torch.equal(farthest_first(rows, 9), farthest_first(copied, 9))
    assert torch.equal(farthest_first(wide.T, 9), farthest_first(wide.T.contiguous(), 9))
    assert torch.equal(merge_alike(rows, 9, 8)[1], merge_alike(copied, 9, 8)[1])
    some = torch.arange(30)
    assert torch.equal(drop_alike(rows, some, 9, 8), drop_alike(copied, some, 9, 8))
    assert some.tolist() == list(range(30))


@pytest.mark.parametrize("native", [True, False])
def test_what_lies_in_the_span_of_the_chosen_comes_last_and_in_order(native):
    if native and not use_native_on(torch.device("cpu")):
        pytest.skip("no C++ compiler on this machine")
    rows = torch.eye(4, 6)[[0, 0, 1, 1, 2, 3, 0]].contiguous()
    rows[4] = 0.0

    def chosen():
        return largest_determinant(rows, 7).tolist()

    if native:
        assert chosen() == [0, 2, 5, 1, 3, 4, 6]
    else:
        with without_native():
            assert chosen() == [0, 2, 5, 1, 3, 4, 6]


@pytest.mark.parametrize("native", [True, False])
def test_rows_without_direction_are_far_from_all_and_equals_go_to_the_first(native):
    if native and not use_native_on(torch.device("cpu")):
        pytest.skip("no C++ compiler on this machine")

    def chosen():
        rows = torch.zeros(6, 4)
        return (
            farthest_first(rows, 4).tolist(),
            merge_alike(rows, 3, 2)[0].tolist(),
            drop_alike(rows, torch.arange(6), 3, 2).tolist(),
        )

    if native:
        assert chosen() == ([0, 1, 2, 3], [3, 4, 5], [3, 4, 5])
    else:
        with without_native():
            assert chosen() == ([0, 1, 2, 3], [3, 4, 5], [3, 4, 5])


@needs_native
@pytest.mark.parametrize("clusters", [0, 7])
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_native_kernels_find_what_is_most_alike(count, width, clusters):
    rows = features(count, width, clusters=clusters)
    partners = torch.arange(count)[:: max(1, count // 9)]
    others = torch.arange(count)[1::2]
    assert_same(*both(lambda: [closest(rows, others, partners)]))
    for centres, own, share in ((partners, 0.7, 0.3), (partners[::2], 1.0, 1.0)):
        native, plain = both(
            lambda centres=centres, own=own, share=share: fold_alike(rows, partners, centres, own, share)
        )
        assert torch.allclose(native, plain, atol=1e-6)
        assert torch.equal(native != 0, plain != 0)
    scores = torch.rand(count, generator=torch.Generator().manual_seed(3))
    for nearest in {0, (count - 1) // 3, count - 1}:
        for mean in (False, True):
            native, plain = both(
                lambda nearest=nearest, mean=mean: fold_nearest(rows, partners, scores, nearest, mean=mean)
            )
            assert torch.allclose(native, plain, atol=1e-6)
            assert torch.equal(native != 0, plain != 0)
            assert (native != 0).sum(1).tolist() == [nearest + 1] * len(partners)


@needs_native
@pytest.mark.parametrize("clusters", [0, 7])
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_choosing_and_folding_together_is_choosing_and_then_folding(count, width, clusters):
    rows = features(count, width, clusters=clusters)
    quality = torch.rand(count, generator=torch.Generator().manual_seed(1))
    places = torch.stack((torch.zeros(count), torch.arange(count) // 14, torch.arange(count) % 14), 1).float()
    for picks in {*budgets(count), count}:
        for given in ((None, None), (quality, None), (quality, Fading(places, 0.5, 3.0))):
            kept, weights = determinant_folded(rows, picks, *given, 0.7, 0.3)
            apart = largest_determinant(rows, picks, *given).sort().values
            assert torch.equal(kept, apart)
            assert torch.equal(weights, fold_alike(rows, apart, apart, 0.7, 0.3)), "bit for bit"
            if picks <= width:
                with without_native():
                    kept, plain = determinant_folded(rows, picks, *given, 0.7, 0.3)
                assert torch.equal(kept, apart)
                assert torch.allclose(weights, plain, atol=1e-6)
                assert torch.equal(weights != 0, plain != 0)


@needs_native
def test_features_that_are_not_numbers_still_give_rows_there_are():
    rows = features(20, 12)
    for broken in (slice(0, 20), slice(3, 9)):
        rows[broken] = torch.nan
        kept, weights = determinant_folded(rows, 15, None, None, 0.7, 0.3)
        for chosen in (kept, farthest_first(rows, 15), largest_determinant(rows, 15)):
            assert chosen.shape == (15,)
            assert bool(((chosen >= 0) & (chosen < 20)).all())
        assert weights.shape == (15, 20)
        rows = features(20, 12)


TWINS = [0, 1, 0, 2, 1, 3, 0, 2, 4, 4, 1]
"""Rows 4, 10 repeat row 1, and so on; row 4 of the base is zero."""


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("picks", "kept"), [(1, [0]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 5]), (11, list(range(11)))])
def test_twins_fold_into_the_first_of_their_like_and_rows_without_direction_into_the_first(picks, kept, native):
    if native and not use_native_on(torch.device("cpu")):
        pytest.skip("no C++ compiler on this machine")
    base = torch.eye(5, 9)
    base[4] = 0.0
    rows = base[TWINS].contiguous()

    def folded():
        return determinant_folded(rows, picks, None, None, 0.5, 0.5)

    if native:
        found, weights = folded()
    else:
        with without_native():
            found, weights = folded()
    assert found.tolist() == kept
    members = {one: [] for one in kept}
    for i in set(range(len(TWINS))) - set(kept):
        members[next((one for one in kept if TWINS[one] == TWINS[i] != 4), kept[0])].append(i)
    expected = torch.zeros(picks, len(TWINS))
    for place, one in enumerate(kept):
        expected[place, one] = 0.5 if members[one] else 1.0
        for i in members[one]:
            expected[place, i] = 0.5 / len(members[one])
    assert torch.allclose(weights, expected)


@needs_native
@pytest.mark.parametrize("nearer", [2, 0, 1])
def test_centres_closer_than_rounding_are_told_apart_as_by_folding_alone(nearer):
    """Many centres nearly as like a row as the best: the choice's own cosines cannot say which is nearest."""
    generator = torch.Generator().manual_seed(nearer)
    common = torch.randn(1, 96, generator=generator)
    rows = common + 1e-3 * torch.randn(60, 96, generator=generator)
    rows[nearer::3] = rows[nearer]
    kept, weights = determinant_folded(rows, 20, None, None, 0.7, 0.3)
    assert torch.equal(weights, fold_alike(rows, kept, kept, 0.7, 0.3))


@pytest.mark.parametrize("native", [True, False])
def test_equally_alike_goes_to_the_first_and_no_row_is_like_itself(native):
    if native and not use_native_on(torch.device("cpu")):
        pytest.skip("no C++ compiler on this machine")
    rows = torch.eye(3, 4)[[0, 1, 0, 1, 2, 0]].contiguous()

    def found():
        taken = fold_nearest(rows, torch.tensor([0, 4]), torch.ones(6), 3, mean=False)
        return closest(rows, torch.tensor([4, 5, 3]), torch.tensor([2, 1, 0])), taken

    if native:
        owner, alike = found()
    else:
        with without_native():
            owner, alike = found()
    assert owner.tolist() == [0, 0, 1]
    assert [row.nonzero()[:, 0].tolist() for row in alike] == [[0, 1, 2, 5], [0, 1, 2, 4]]


@needs_native
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_merging_leaves_out_what_counts_nothing(count, width):
    rows, generator = features(count, width), torch.Generator().manual_seed(width)
    weights = torch.rand(count // 2 + 1, count, generator=generator)
    weights *= torch.rand(weights.shape, generator=generator) < 0.2
    weights[0] = 0.0
    native, plain = both(lambda: merge_rows(weights, rows))
    assert torch.allclose(native, plain, atol=1e-5)
    assert torch.equal(merge_rows(torch.eye(count), rows), rows), "one row alone is left as it is, bit for bit"
    assert torch.equal(
        merge_rows(weights[:, ::2], rows[::2]), merge_rows(weights[:, ::2].contiguous(), rows[::2].clone())
    )
