"""How often a sequence has said what: what penalties are computed from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """The different tokens of a prompt and its output, and how often each is in the output."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._index = {token: i for i, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.array(list(self._index), np.int64)
        self._counts = np.zeros(len(self._index), np.float32)
        self._num_read = len(prompt_ids)

    def read(self, token_ids: Sequence[int]) -> None:
        """Count what has come since the last time. `token_ids`: the prompt, then the output."""
        for token in token_ids[self._num_read :]:
            i = self._index.setdefault(token, len(self._index))
            if i == len(self._ids):  # twice the room, so that growing costs little on the whole
                self._ids = np.append(self._ids, np.zeros(i + 1, np.int64))
                self._counts = np.append(self._counts, np.zeros(i + 1, np.float32))
            self._ids[i] = token
            self._counts[i] += 1
        self._num_read = len(token_ids)

    @property
    def ids(self) -> NDArray[np.int64]:
        """(different tokens,)"""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """(different tokens,); 0 for those of the prompt alone."""
        return self._counts[: len(self._index)]
