"""COCO's compressed strings: run lengths as numbers of 5 bits a letter, the later ones as differences.

A number is written as groups of 5 bits, lowest first, each as the letter with code 48 + bits, + 32 where more follow.
The highest bit of the last group is the sign. From the fourth run on, what is written is the difference to the run two
before (which is of the same kind).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

_FIRST, _BITS, _MORE, _SIGN = 48, 5, 32, 16
_LONGEST = 7  # letters of a number: 34 bits and a sign, more than the pixels of any picture


def parsed(text: str | bytes) -> Int[np.ndarray, " R"]:
    """Return the run lengths of a string; negative ones where the string makes no sense are the caller's to refuse.

    >>> parsed("322N0")
    array([3, 2, 2, 0, 2])

    Raises:
        ValueError: a letter is none of the code, a number is too long, or the string ends inside of one.
    """
    raw = text.encode("latin-1") if isinstance(text, str) else text  # fails with a ValueError too
    letters = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - _FIRST
    if not len(letters):
        return letters
    if letters.min() < 0 or letters.max() >= 2 * _MORE:
        raise ValueError(f"a compressed region has the letter {chr(raw[_strange(letters)])!r}, wanted '0' to 'o'")
    last = (letters & _MORE) == 0
    if not last[-1]:
        raise ValueError("a compressed region ends inside of a number: is it cut short?")
    stops = np.flatnonzero(last) + 1
    lengths = np.diff(stops, prepend=0)
    if lengths.max() > _LONGEST:
        raise ValueError(f"a compressed region has a number of {lengths.max()} letters, wanted {_LONGEST} at most")
    place = np.arange(len(letters)) - np.repeat(stops - lengths, lengths)
    values = np.add.reduceat((letters & (_MORE - 1)) << (_BITS * place), stops - lengths)
    negative = (letters[stops - 1] & _SIGN) != 0
    values -= negative.astype(np.int64) << (_BITS * lengths)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def compressed(counts: Int[np.ndarray, " R"]) -> str:
    """Return run lengths as a string.

    >>> compressed(np.array([3, 2, 2, 0, 2]))
    '322N0'
    """
    written = counts.copy()
    written[3:] -= counts[1:-2]
    if not len(written):
        return ""
    # Letters that each number takes: the fewest whose bits, the sign among them, hold it.
    most = max(int(written.max()), -1 - int(written.min()))
    which = np.arange(most.bit_length() // _BITS + 1)
    rest = written[:, None] >> (_BITS * which)
    lengths = ((rest >= _SIGN) | (rest < -_SIGN)).sum(axis=1, keepdims=True) + 1
    letters = (rest & (_MORE - 1)) + np.where(which < lengths - 1, _MORE + _FIRST, _FIRST)
    return letters[which < lengths].astype(np.uint8).tobytes().decode("ascii")


def _strange(letters: Int[np.ndarray, " N"]) -> int:
    return int(np.flatnonzero((letters < 0) | (letters >= 2 * _MORE))[0])
