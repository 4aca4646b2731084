"""What vLLM's scheduler says of a step, as far as the connector needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.core.sched.output import SchedulerOutput

    Blocks = tuple[list[int], ...]


def chunks_of(output: SchedulerOutput) -> Iterator[tuple[str, Blocks, int]]:
    """Of each request in the step its new blocks, and how many of its tokens are computed then."""
    for new in output.scheduled_new_reqs:
        computed = new.num_computed_tokens + output.num_scheduled_tokens[new.req_id]
        yield new.req_id, new.block_ids, computed
    cached = output.scheduled_cached_reqs
    known = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
    for request_id, blocks, num_computed in known:
        yield (
            request_id,
            blocks or (),
            num_computed + output.num_scheduled_tokens[request_id],
        )
