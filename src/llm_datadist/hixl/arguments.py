"""Arguments of the interface, checked and made into values of ours."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Final

import numpy as np

from llm_datadist.checks import INT32_MAX, INT64_MAX, UINT64_MAX, check_list, check_type
from llm_datadist.core.by_address import ByAddress
from llm_datadist.core.messages import MAX_NOTICE
from llm_datadist.errors import invalid
from llm_datadist.hixl.memory import Range
from llm_datadist.hixl.names import EngineName
from llm_datadist.hixl.types import MemDesc, MemType, NotifyDesc, TransferOp, TransferOpDesc, as_int
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.core.ranges import Ranges
    from llm_datadist.core.segments import U64

_PLACEMENTS: Final = {MemType.MEM_DEVICE: Placement.DEVICE, MemType.MEM_HOST: Placement.HOST}
_FIELDS: Final = ("local_addr", "remote_addr", "len")


def parse_timeout_s(timeout_in_millis: object) -> float:
    """Raises TypeError, LLMException."""
    millis = as_int("timeout_in_millis", timeout_in_millis)
    if not 0 < millis <= INT32_MAX:
        raise invalid(f"timeout_in_millis must be in [1, {INT32_MAX}], got {millis}")
    return millis / 1000


def parse_remote(remote_engine: object) -> EngineName:
    """Raises TypeError, LLMException."""
    return EngineName.parse(check_type("remote_engine", remote_engine, str), "remote_engine")


def parse_server(remote_engine: object) -> EngineName:
    """As `parse_remote`, of an engine that can be called."""
    name = parse_remote(remote_engine)
    name.endpoint  # noqa: B018  # raises where there is none
    return name


def parse_range(mem_desc: object, mem_type: object) -> Range:
    """Raises TypeError, LLMException."""
    desc, kind = (
        check_type("mem_desc", mem_desc, MemDesc),
        check_type("mem_type", mem_type, MemType),
    )
    addr, nbytes = as_int("addr", desc.addr), as_int("len", desc.len)
    is_local_only = check_type("local_only", desc.local_only, bool)
    if addr <= 0 or not 0 < nbytes <= INT64_MAX or addr + nbytes > UINT64_MAX:
        raise invalid(f"no memory of {nbytes} bytes can lie at address {addr:#x}")
    return Range(addr, nbytes, _PLACEMENTS[kind], is_local_only)


def parse_pieces(op: object, op_descs: object, memory: Ranges) -> ByAddress:
    """What a transfer moves, as columns. Raises TypeError, LLMException."""
    is_write = check_type("op", op, TransferOp) is TransferOp.WRITE
    descs = check_list("op_descs", op_descs, TransferOpDesc)
    ours, theirs, nbytes = (_column(descs, field) for field in _FIELDS)
    for addrs in (ours, theirs):
        if (nbytes > np.uint64(UINT64_MAX) - addrs).any():
            index = int(np.argmax(nbytes > np.uint64(UINT64_MAX) - addrs))
            raise invalid(f"op_descs[{index}] reaches beyond the address space: {descs[index]}")
    return ByAddress.of(is_write=is_write, ours=ours, theirs=theirs, nbytes=nbytes, memory=memory)


def parse_notice(notify: object) -> tuple[str, str]:
    """Raises TypeError, LLMException."""
    desc = check_type("notify", notify, NotifyDesc)
    texts = check_type("name", desc.name, str), check_type("notify_msg", desc.notify_msg, str)
    for text in texts:
        if len(text) > MAX_NOTICE:
            raise invalid(f"a text of {len(text)} characters: a notice has at most {MAX_NOTICE}")
        if any("\ud800" <= each <= "\udfff" for each in text):
            raise invalid("a notice has half of a character (a lone surrogate)")
    return texts


def _column(descs: Sequence[TransferOpDesc], field: str) -> U64:
    """One field of all of them: no object is made for each."""
    values: list[int] = list(map(attrgetter(field), descs))
    if set(map(type, values)) - {int}:  # assigned to behind the constructor's check
        values = [as_int(field, value) for value in values]
    if values and not (min(values) >= 0 and max(values) <= UINT64_MAX):
        index = next(i for i, value in enumerate(values) if not 0 <= value <= UINT64_MAX)
        raise invalid(f"op_descs[{index}].{field} is no number of 64 bits: {values[index]}")
    return np.array(values, dtype=np.uint64)
