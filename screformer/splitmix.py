"""SplitMix64: pseudo-random numbers as a pure function of a few integers.

Used for every random choice that must not depend on the number of ranks or that recomputation must repeat:
hashes, dropout, hidden genes and sampled cells.

Axes: n cells, l token slots.

Source: Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import torch

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: its multiples are distinct and evenly spread."""
_OTHER = 0xD1B54A32D192ED03
_OFFSET = 0x632BE59BD9B4E019
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


def mix(*numbers: int) -> int:
    """One number in [0, 2^63) that depends on all the given numbers."""
    state = 0
    for number in numbers:
        state = _finalise((state + (number + 1) * GOLDEN) % 2**64)
    return state >> 1


def derive_seed(seed: int, stream: int) -> int:
    """An independent seed in [0, 2^63) for each use (`stream`) of one seed."""
    return _finalise((seed * GOLDEN + stream * _OTHER + _OFFSET) % 2**64) >> 1


def uniform24(joinids_n: torch.Tensor, token_ids_nl: torch.Tensor, *numbers: int) -> torch.Tensor:
    """Integers in [0, 2^24) for each slot, int64 (n, l), that depend only on cell, gene and `numbers`."""
    state = joinids_n.unsqueeze(1) * _signed(GOLDEN) + token_ids_nl * _signed(_OTHER) + mix(*numbers)
    for shift, factor in _ROUNDS:
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    return _shifted(state ^ _shifted(state, _LAST_SHIFT), 40)


def _finalise(state: int) -> int:
    for shift, factor in _ROUNDS:
        state = (state ^ (state >> shift)) * factor % 2**64
    return state ^ (state >> _LAST_SHIFT)


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift as if int64 were unsigned."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
