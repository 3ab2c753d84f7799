"""Sizes of a language model's batches rounded up, so that few different ones occur.

A device replays a recorded call in a fraction of the time that it takes to launch it anew, but only
at the sizes it was recorded for. T tokens, S sequences, P pages of the longest and R rows are
therefore padded: T to itself up to 16, then to powers of two and one and a half times those, beyond
a chunk to whole chunks; the others to powers of two.

Invariant: a padded token writes nothing (its slot, -1, is in no cache) and no row that is wanted
reads it; results are cut back by whoever asked for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

#: Up to here every number of tokens is a size of its own.
EXACT_TOKENS = 16
#: From here on tokens are rounded up to a multiple of this.
CHUNK_TOKENS = 512


def padded_tokens(count: int) -> int:
    """Return the number of tokens that a batch of `count` is padded to."""
    if count <= EXACT_TOKENS:
        return count
    if count > CHUNK_TOKENS:
        return -(-count // CHUNK_TOKENS) * CHUNK_TOKENS
    power = padded_count(count)
    return power * 3 // 4 if count <= power * 3 // 4 else power


def padded_count(count: int) -> int:
    """Return the next power of two, or zero for zero."""
    return 1 << (count - 1).bit_length() if count else 0


def padded_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of a batch after padding; those that are no batch's stay."""
    found = dict(sizes)
    found["T"] = padded_tokens(sizes["T"])
    for name in ("S", "P", "R"):
        found[name] = padded_count(sizes[name])
    return found


def pad_batch(arrays: Sequence[np.ndarray], sizes: Mapping[str, int]) -> list[np.ndarray]:
    """Return a batch (see `sequences.PARAMETERS`) padded to `sizes`."""
    tokens, positions, sequence, slots, pages, rows = arrays
    wide = np.zeros((sizes["S"], sizes["P"]), pages.dtype)
    wide[: pages.shape[0], : pages.shape[1]] = pages
    return [
        *(_longer(array, sizes["T"], 0) for array in (tokens, positions, sequence)),
        _longer(slots, sizes["T"], -1),
        wide,
        _longer(rows, sizes["R"], 0),
    ]


def _longer(array: np.ndarray, length: int, fill: int) -> np.ndarray:
    made = np.full(length, fill, array.dtype)
    made[: len(array)] = array
    return made
