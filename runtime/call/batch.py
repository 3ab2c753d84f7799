"""What a language model's function takes: tokens of any number of sequences, and their pages.

Shapes: T tokens of all sequences together, S sequences, P pages of the longest, R rows whose
logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import DiluError

#: Tokens of prompts that are run at once.
PREFILL_TOKENS = 512
#: The parameters of a language model's function, in order: what `batch` returns.
PARAMETERS = ("tokens", "positions", "sequence", "slots", "pages", "rows")


def check_batch(
    arrays: Sequence[np.ndarray], *, vocabulary: int, page_size: int, cache_pages: int
) -> None:
    """Raise DiluError where arguments made by hand point outside; native code trusts them."""
    tokens, positions, sequence, slots, pages, rows = arrays
    limits = (vocabulary, pages.shape[1] * page_size, len(pages), cache_pages * page_size)
    limits += (cache_pages, len(tokens))
    given = (tokens, positions, sequence, slots, pages, rows)
    for name, array, limit in zip(PARAMETERS, given, limits, strict=True):
        if array.size and not 0 <= array.min() <= array.max() < limit:
            wrong = array[(array < 0) | (array >= limit)].flat[0]
            raise DiluError(
                f"{name} holds {wrong}, which is outside of 0 to {limit - 1}",
                hint=f"there are {cache_pages} cache pages of {page_size} places; "
                "`generate` and `language.logits` keep the books themselves",
            )


def pages_for(tokens: int, page_size: int) -> int:
    """Return how many pages hold this many tokens."""
    return -(-tokens // page_size)
