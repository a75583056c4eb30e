from __future__ import annotations

import pytest

from prismserve.models.number_words import number_words


@pytest.mark.parametrize(
    ("number", "words"),
    # As the package num2words spells them, which the models' prompts were written with.
    [
        (0, "zero"),
        (5, "five"),
        (13, "thirteen"),
        (20, "twenty"),
        (64, "sixty-four"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (768, "seven hundred and sixty-eight"),
        (1000, "one thousand"),
        (1001, "one thousand and one"),
        (1100, "one thousand, one hundred"),
        (12_345, "twelve thousand, three hundred and forty-five"),
        (999_999, "nine hundred and ninety-nine thousand, nine hundred and ninety-nine"),
    ],
)
def test_numbers_are_spelled_in_the_british_way(number, words):
    assert number_words(number) == words


@pytest.mark.parametrize("number", [-1, 1_000_000])
def test_numbers_beyond_are_refused(number):
    with pytest.raises(ValueError, match="is not between 0 and 999999"):
        number_words(number)
