"""A producer's worker tells how far prompts are computed, layer by layer, as it computes them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llm_datadist.integrations.vllm.records import Sealed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm_datadist.integrations.vllm.handover import Lease
    from llm_datadist.integrations.vllm.records import Records
    from llm_datadist.integrations.vllm.step import Announcement, Chunk, Step


@dataclass
class _Prompt:
    announced: Announcement
    #: None as long as all records are others'
    place: int | None
    #: by group
    blocks: list[list[int]] = field(default_factory=list)
    sealed: Sealed = field(default_factory=Sealed)


class Sealing:
    """Keeps one record for each prompt that was announced, until its lease ends.

    Called by the engine's thread alone. What a prompt had in the prefix cache is sealed with its
    first chunk: vLLM may schedule it in the step that computes it, for another request.
    """

    def __init__(self, records: Records, num_records: int, layers: Sequence[str]) -> None:
        """`layers` in the order in which a model computes them, or they are told of later."""
        self._records, self._layers = records, layers
        self._prompts: dict[Lease, _Prompt] = {}
        self._free = deque(range(num_records))
        #: what the step computes, and of which layers it has done so
        self._chunks: list[tuple[_Prompt, int]] = []
        self._saved: set[str] = set()
        self._num_saved = 0

    def begin(self, step: Step) -> None:
        """The step's chunks are computed next."""
        for announced in step.announcements:
            self._prompts[announced.lease] = prompt = _Prompt(announced, None)
            if self._free:
                self._place(prompt)
        known = [(self._prompts.get(chunk.lease), chunk) for chunk in step.chunks]
        self._chunks = [(self._with_blocks(p, chunk), chunk.stop) for p, chunk in known if p]
        self._saved, self._num_saved = set(), 0

    def layer_saved(self, layer: str) -> None:
        """That layer is computed of all chunks. Any order will do; it is told in the model's."""
        if not self._chunks:
            return
        self._saved.add(layer)
        before = self._num_saved
        while self._num_saved < len(self._layers) and self._layers[self._num_saved] in self._saved:
            self._num_saved += 1
        if self._num_saved > before:
            for prompt, stop in self._chunks:
                self._seal(prompt, Sealed(prompt.sealed.tokens, stop, self._num_saved))

    def all_saved(self) -> None:
        """All layers are."""
        for prompt, stop in self._chunks:
            self._seal(prompt, Sealed(stop, stop))
        self._chunks = []

    def end(self, lease: Lease) -> None:
        """Comes before the blocks are given to anyone else."""
        prompt = self._prompts.pop(lease, None)
        if prompt is None:
            return
        self._chunks = [chunk for chunk in self._chunks if chunk[0] is not prompt]
        if prompt.place is not None:
            self._records.clear(prompt.place)
            self._free.append(prompt.place)
        for waiting in self._prompts.values():
            if waiting.place is None and self._free:
                self._place(waiting)

    def _place(self, prompt: _Prompt) -> None:
        prompt.place = place = self._free.popleft()
        self._records.write(place, prompt.announced)
        for group, blocks in enumerate(prompt.blocks):
            self._records.write_blocks(place, group, 0, blocks)
        self._records.write_sealed(place, prompt.sealed)

    def _with_blocks(self, prompt: _Prompt, chunk: Chunk) -> _Prompt:
        if not prompt.blocks:
            prompt.blocks = [[] for _ in chunk.more_blocks]
        for group, (blocks, more) in enumerate(zip(prompt.blocks, chunk.more_blocks, strict=False)):
            if prompt.place is not None:
                self._records.write_blocks(prompt.place, group, len(blocks), more)
            blocks += more
        return prompt

    def _seal(self, prompt: _Prompt, sealed: Sealed) -> None:
        prompt.sealed = sealed
        if prompt.place is not None:
            self._records.write_sealed(prompt.place, sealed)
