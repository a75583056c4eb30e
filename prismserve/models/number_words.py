"""Numbers as English words, as prompts that were trained on them spell them."""

from __future__ import annotations

from typing import Final

_SMALL: Final = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS: Final = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_HUNDRED, _THOUSAND, _MILLION = 100, 1_000, 1_000_000


def number_words(number: int) -> str:
    """The cardinal, in the British way: ``one thousand, two hundred and thirty-four``.

    Args:
        number: below a million.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= number < _MILLION:
        message = f"{number} is not between 0 and {_MILLION - 1}"
        raise ValueError(message)
    if number < len(_SMALL):
        return _SMALL[number]
    if number < _HUNDRED:
        tens, ones = divmod(number, 10)
        return f"{_TENS[tens]}-{_SMALL[ones]}" if ones else _TENS[tens]
    unit, name = (_THOUSAND, "thousand") if number >= _THOUSAND else (_HUNDRED, "hundred")
    count, rest = divmod(number, unit)
    words = f"{number_words(count)} {name}"
    if not rest:
        return words
    return f"{words}{', ' if rest >= _HUNDRED else ' and '}{number_words(rest)}"
