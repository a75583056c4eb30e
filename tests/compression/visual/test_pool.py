from __future__ import annotations

import pytest
import torch

from prismserve.compression.visual.pool import cells
from tests.compression.visual.slow import run


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (9, 1), (3, 5), (14, 14), (24, 24)])
def test_cells_cover_the_grid_once_at_every_budget(rows, columns):
    for count in range(1, rows * columns + 1):
        taken = torch.zeros(rows, columns)
        found = cells(rows, columns, count)
        for top, bottom, left, right in found:
            assert top < bottom
            assert left < right
            taken[top:bottom, left:right] += 1
        assert len(found) == count
        assert (taken == 1).all()


def test_a_quarter_of_an_even_grid_is_the_mean_of_two_by_two(make_features):
    features = make_features(16, grid=(4, 4))
    tokens, indices = run("pool", features, keep=4)
    assert indices.tolist() == [0, 2, 8, 10]
    torch.testing.assert_close(tokens[3], features.tokens[[10, 11, 14, 15]].mean(0))
