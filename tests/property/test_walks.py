"""Memory gone over bit by bit: the bytes are those of the vectors, in their order, each once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist.core.segments import iovecs
from llm_datadist.memory.local import Walk

#: some more than a system call takes
Lengths = st.lists(st.integers(0, 9), max_size=1200) | st.lists(st.integers(0, 5000), max_size=40)
Steps = st.lists(st.integers(1, 9000), max_size=8)


@settings(max_examples=40, deadline=None)
@given(Lengths, Steps)
@pytest.mark.parametrize("is_gathered", [True, False])
def test_a_walk_takes_each_byte_once_and_in_order(
    is_gathered: bool, lengths: list[int], steps: list[int]
) -> None:
    total, steps = sum(lengths), [*steps, 4096]
    here = np.random.default_rng(total).integers(0, 256, total, dtype=np.uint8)
    there = np.zeros_like(here) if not is_gathered else here.copy()
    sizes = np.array(lengths, dtype=np.uint64)
    starts = np.cumsum(sizes) - sizes + np.uint64(there.ctypes.data)
    walk, done, went = Walk(iovecs(starts, sizes)), 0, list[int]()
    while done < total:
        step = steps[len(went) % len(steps)]
        if is_gathered:
            data = walk.gather(np.empty(step, np.uint8))
            np.testing.assert_array_equal(data, here[done : done + len(data)])
            moved = len(data)
        else:
            moved = walk.scatter(here[done : done + step])
        assert 0 < moved <= step
        done += moved
        went.append(moved)
        left = walk.left()
        assert int(left[:, 1].sum()) == total - done
        assert done == total or int(left[0, 0]) == there.ctypes.data + done
    np.testing.assert_array_equal(there, here)
    assert not len(walk.gather(np.empty(1, np.uint8)))
