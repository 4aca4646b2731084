"""Registering: memory of the caller's becomes a cache. Spec 6.4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.core.geometry import Geometry, Layout
from llm_datadist.memory.host import unmapped
from llm_datadist.observe.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.registry import Entry, KeyName
    from llm_datadist.engine.engine import Engine
    from llm_datadist.types import Placement


def register(
    engine: Engine,
    geometry: Geometry,
    addrs: Sequence[int],
    placement: Placement,
    keys: Sequence[KeyName | None] = (),
    *,
    is_remote_accessible: bool,
    held: Sequence[object | None] = (),
) -> Entry:
    """Files a cache over memory that stays the caller's. Raises LLMException(LLM_PARAM_INVALID).

    The memory is not touched: what is not mapped is warned about, and fails when it is transferred.
    `held` keeps it until the cache is unregistered, one object per tensor or none.
    """
    layout = Layout.at(geometry, addrs)
    # What is kept is there, and to look takes milliseconds in a process that has torch.
    keepers = held or [None] * len(addrs)
    loose = [addr for addr, keeper in zip(addrs, keepers, strict=True) if keeper is None]
    strays = unmapped(loose, geometry.tensor_nbytes) if loose else []
    if strays:
        get_logger().warning(
            "register: no memory is mapped at %d of %d addresses, the first is %#x (+%d bytes); "
            "transfers that use it will fail",
            len(strays), len(addrs), strays[0], geometry.tensor_nbytes,
        )  # fmt: skip
    return engine.catalog.register(
        layout, placement, keys, is_remote_accessible=is_remote_accessible, held=held
    )
