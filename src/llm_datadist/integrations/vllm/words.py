"""Words of a worker that others read and write with plain pulls and pushes."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from llm_datadist import BlocksCacheKey, CacheDesc, DataType

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from llm_datadist.cache import Cache
    from llm_datadist.cache_manager import CacheManager

#: so many words are moved by one transfer
_WORDS_PER_PAGE = 6144


class Words:
    """Our own, as a blocks cache of 8-byte blocks, and the way to those of others. Thread-safe."""

    def __init__(
        self, manager: CacheManager, cluster_id: int, model_id: int, num_words: int
    ) -> None:
        self._manager, self._model_id = manager, model_id
        self.own = np.zeros(num_words, np.uint64)
        _register(manager, self.own, BlocksCacheKey(cluster_id, model_id))
        self._pages: deque[_Page] = deque()

    def read(self, cluster_id: int, words: Sequence[int]) -> npt.NDArray[np.uint64]:
        """Those of another, by their numbers. Raises LLMException as `pull_blocks` does."""
        found = np.empty(len(words), np.uint64)
        with self._page() as page:
            for some in _pages(len(words)):
                numbers = list(words[some])
                self._manager.pull_blocks(
                    BlocksCacheKey(cluster_id, self._model_id),
                    page.cache,
                    numbers,
                    list(range(len(numbers))),
                    tensor_num_per_layer=1,
                )
                found[some] = page.words[: len(numbers)]
        return found

    def write(self, cluster_id: int, words: Sequence[int], values: Sequence[int]) -> None:
        """Into those of another. Raises LLMException as `push_blocks` does."""
        with self._page() as page:
            for some in _pages(len(words)):
                numbers = list(words[some])
                page.words[: len(numbers)] = values[some]
                self._manager.push_blocks(
                    BlocksCacheKey(cluster_id, self._model_id),
                    page.cache,
                    list(range(len(numbers))),
                    numbers,
                    tensor_num_per_layer=1,
                )

    @contextmanager
    def _page(self) -> Iterator[_Page]:
        """One that no other thread has: nobody waits here for a peer that hangs."""
        try:
            page = self._pages.pop()
        except IndexError:
            page = _Page(self._manager)
        try:
            yield page
        finally:
            self._pages.append(page)


class _Page:
    """Words of our own, for what is read from others, and what is written there.

    In a cache of their own: no lease that is made up leads to them.
    """

    def __init__(self, manager: CacheManager) -> None:
        self.words = np.zeros(_WORDS_PER_PAGE, np.uint64)
        self.cache = _register(manager, self.words)


def _pages(num_words: int) -> Iterator[slice]:
    for begin in range(0, num_words, _WORDS_PER_PAGE):
        yield slice(begin, begin + _WORDS_PER_PAGE)


def _register(
    manager: CacheManager, words: npt.NDArray[np.uint64], key: BlocksCacheKey | None = None
) -> Cache:
    desc = CacheDesc(1, [len(words), 1], DataType.DT_UINT64)
    return manager.register_blocks_cache(desc, [words.ctypes.data], key)
