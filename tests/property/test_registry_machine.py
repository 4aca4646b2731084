"""core.registry and core.generations against a naive model, under random calls. Spec 6.1-6.7."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llm_datadist.core.generations import STALE, Generations
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.registry import Entry, KeyName, Registry
from llm_datadist.errors import LLMException, LLMStatusCode
from llm_datadist.types import Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

ROWS = 3
TENSORS = 3
NO_ID = 2**64 - 1

#: few, so that they are often named again
row_keys = st.builds(KeyName, st.integers(0, 1), st.integers(0, 1), st.booleans())
block_keys = st.builds(KeyName, st.just(NO_ID), st.integers(0, 1))
row_kinds = st.sampled_from([CacheKind.CONTINUOUS, CacheKind.MIX])
row_key_lists = st.lists(st.none() | row_keys, max_size=ROWS)
pulled_tensors = st.none() | st.builds(range, st.integers(0, 2), st.integers(1, TENSORS))


def word_at(addr: int) -> int:
    """What a peer reads there."""
    return ctypes.c_uint64.from_address(addr).value


@dataclass
class Model:
    """What should be known of a cache."""

    entry: Entry
    generation: int
    is_blocks: bool
    is_owned: bool
    is_held_by_id: bool = True
    #: key -> its row, and the tensors that pulls have not taken yet
    keys: dict[KeyName, tuple[int, set[int]]] = field(default_factory=dict)

    def bind(self, name: KeyName, row: int) -> None:
        self.keys[name] = (row, set(range(TENSORS)))


class RegistryMachine(RuleBasedStateMachine):
    """The registry is right when it does what a list of models does."""

    peers_keep_tables = True

    @initialize(seed=st.integers(0, 2**64 - 1), first_id=st.integers(0, 3))
    def start(self, seed: int, first_id: int) -> None:
        self.registry = Registry(
            Generations(seed), first_id, peers_keep_tables=self.peers_keep_tables
        )
        self.next_id = first_id
        self.live: dict[int, Model] = {}
        self.gone: list[Entry] = []
        self.generations: set[int] = set()
        #: what peers may still remember, though it no longer holds: (word address, generation)
        self.over: list[tuple[int, int]] = []

    # -- the model --

    def draw_id(self, data: st.DataObject) -> int:
        """The id of a live cache, most of the time."""
        return data.draw(st.sampled_from([*self.live, *self.live, *self.live, -1, self.next_id]))

    def holder_of(self, name: KeyName) -> Model | None:
        return next((model for model in self.live.values() if name in model.keys), None)

    def added(self, entry: Entry, *, is_owned: bool) -> Model:
        assert entry.cache_id == self.next_id
        self.next_id += 1
        self.note_new(entry.generation)
        is_blocks = entry.layout.geometry.kind is CacheKind.BLOCKS
        model = Model(entry, entry.generation, is_blocks, is_owned)
        self.live[entry.cache_id] = model
        return model

    def note_new(self, generation: int) -> None:
        assert generation != STALE
        assert generation not in self.generations
        self.generations.add(generation)

    def note_renewed(self, model: Model) -> None:
        self.over.append((model.entry.word_addr, model.generation))
        model.generation = model.entry.generation
        self.note_new(model.generation)

    def note_gone(self, model: Model) -> None:
        entry = model.entry
        del self.live[entry.cache_id]
        assert word_at(entry.word_addr) == STALE
        self.over.append((entry.word_addr, model.generation))
        self.gone.append(entry)

    def key_goes(self, model: Model, name: KeyName, freed: Entry | None) -> None:
        """An allocated cache loses a key; it is freed with the last thing that holds it."""
        del model.keys[name]
        if not model.keys and not model.is_held_by_id:
            assert freed is model.entry
            self.note_gone(model)
            return
        assert freed is None
        if self.peers_keep_tables:  # others ask each time
            self.note_renewed(model)

    # -- what may be called --

    def register(self, kind: CacheKind, names: Sequence[KeyName | None]) -> Model:
        entry = self.registry.register(
            make_layout(kind), Placement.HOST, names, is_remote_accessible=True
        )
        return self.added(entry, is_owned=False)

    @rule(kind=row_kinds, names=row_key_lists)
    def register_rows(self, kind: CacheKind, names: list[KeyName | None]) -> None:
        bound = {name for model in self.live.values() for name in model.keys}
        model = self.register(kind, names)
        for row, name in enumerate(names):
            if name is not None and name not in bound | set(model.keys):
                model.bind(name, row)

    @rule(names=st.lists(block_keys, max_size=1))
    def register_blocks(self, names: list[KeyName]) -> None:
        holders = [(name, self.holder_of(name)) for name in names]
        model = self.register(CacheKind.BLOCKS, names)
        for name, former in holders:
            if former is not None:  # peers that know the former cache by this key must ask again
                del former.keys[name]
                self.note_renewed(former)
            model.bind(name, 0)

    @rule(
        kind_and_names=st.tuples(row_kinds, st.lists(st.none() | row_keys, max_size=ROWS + 1))
        | st.tuples(st.just(CacheKind.BLOCKS), st.lists(block_keys, max_size=1))
    )
    def allocate(self, kind_and_names: tuple[CacheKind, list[KeyName | None]]) -> None:
        kind, names = kind_and_names
        is_bound = any(name and self.holder_of(name) for name in names)
        if is_bound or len(names) > ROWS:
            with pytest.raises(LLMException) as caught:
                self.registry.allocate(make_layout(kind), Placement.HOST, names)
            assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
            return
        entry = self.registry.allocate(make_layout(kind), Placement.HOST, names)
        model = self.added(entry, is_owned=True)
        for row, name in enumerate(names):
            if name is not None:  # of a key given twice the last counts
                model.bind(name, row)

    @rule(data=st.data())
    def unregister(self, data: st.DataObject) -> None:
        cache_id = self.draw_id(data)
        entry = self.registry.unregister(cache_id)
        model = self.live.get(cache_id)
        assert entry is (model and model.entry)
        if model is not None:
            self.note_gone(model)

    @rule(data=st.data())
    def deallocate(self, data: st.DataObject) -> None:
        cache_id = self.draw_id(data)
        freed = self.registry.deallocate(cache_id)
        model = self.live.get(cache_id)
        if model is None or not model.is_owned:
            assert freed is None
        elif model.keys and not model.is_blocks:
            assert freed is None
            model.is_held_by_id = False
        else:
            assert freed is model.entry
            self.note_gone(model)

    @rule(name=row_keys | block_keys)
    def remove_key(self, name: KeyName) -> None:
        freed = self.registry.remove_key(name)
        model = self.holder_of(name)
        if model is None or not model.is_owned:
            assert freed is None
        else:
            self.key_goes(model, name, freed)

    @rule(data=st.data(), row=st.integers(0, ROWS), tensors=pulled_tensors)
    def use_up(self, data: st.DataObject, row: int, tensors: range | None) -> None:
        cache_id = self.draw_id(data)
        freed = self.registry.use_up(cache_id, row, tensors)
        model = self.live.get(cache_id)
        if model is None or not model.is_owned or model.is_blocks:
            assert freed is None
            return
        for name, (at, left) in list(model.keys.items()):
            if at == row and not name.is_prefix:
                left -= set(range(TENSORS) if tensors is None else tensors)
                if not left:
                    self.key_goes(model, name, freed)
                    return
        assert freed is None

    @rule(data=st.data())
    def find_by_id(self, data: st.DataObject) -> None:
        cache_id = self.draw_id(data)
        if cache_id in self.live:
            assert self.registry.find(cache_id) is self.live[cache_id].entry
        else:
            with pytest.raises(LLMException) as caught:
                self.registry.find(cache_id)
            assert caught.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST

    @rule(name=row_keys | block_keys)
    def find_by_key(self, name: KeyName) -> None:
        model = self.holder_of(name)
        if model is not None:
            assert self.registry.find_key(name) == (model.entry, model.keys[name][0])
        else:
            with pytest.raises(LLMException) as caught:
                self.registry.find_key(name)
            assert caught.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST

    # -- what always holds --

    @invariant()
    def every_live_word_holds_the_generation_that_the_cache_has(self) -> None:
        for model in self.live.values():
            assert word_at(model.entry.word_addr) == model.entry.generation == model.generation

    @invariant()
    def no_word_holds_a_generation_that_a_peer_may_remember_but_that_is_over(self) -> None:
        assert all(word_at(addr) != generation for addr, generation in self.over)

    @invariant()
    def no_two_live_caches_share_a_word(self) -> None:
        assert len({model.entry.word_addr for model in self.live.values()}) == len(self.live)

    @invariant()
    def a_cache_that_is_gone_has_no_generation(self) -> None:
        assert all(entry.generation == STALE for entry in self.gone)

    @invariant()
    def exactly_the_live_caches_are_listed(self) -> None:
        assert len(self.registry) == len(self.live)
        assert [entry.cache_id for entry in self.registry.entries()] == list(self.live)

    @invariant()
    def every_cache_lists_its_keys_with_their_rows(self) -> None:
        for model in self.live.values():
            assert model.entry.keys == {name: row for name, (row, _) in model.keys.items()}


class AskingPeersMachine(RegistryMachine):
    """The same, with peers that ask anew each time."""

    peers_keep_tables = False


def make_layout(kind: CacheKind) -> Layout:
    return Layout.at(Geometry(kind, TENSORS, ROWS, 8), [0x1000 * i for i in range(1, TENSORS + 1)])


TestRegistryMachine = pytest.mark.shows(
    "tables.ids", "keys.first_registered_wins", "keys.blocks_overwrite", "keys.layered", "O17"
)(RegistryMachine.TestCase)
TestAskingPeersMachine = AskingPeersMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestAskingPeersMachine.settings = TestRegistryMachine.settings

seeds = st.integers(0, 2**70)


@settings(max_examples=50, deadline=None)
@given(seed=seeds, steps=st.lists(st.sampled_from(["open", "renew", "close"]), max_size=40))
def test_a_word_never_holds_a_generation_that_any_word_held_before(
    seed: int, steps: list[str]
) -> None:
    generations = Generations(seed)
    held: list[int] = []
    opened: list[int] = []
    for step in steps:
        if step == "open":
            addr, generation = generations.open()
            opened.append(addr)
            assert word_at(addr) == generation
            held.append(generation)
        elif opened and step == "renew":
            held.append(generations.renew(opened[0]))
            assert word_at(opened[0]) == held[-1]
        elif opened:
            generations.close(opened[-1])
            assert word_at(opened.pop()) == STALE
    assert STALE not in held
    assert len(set(held)) == len(held)


@settings(max_examples=50, deadline=None)
@given(seeds, seeds, st.integers(1, 20))
def test_a_process_with_another_random_seed_repeats_no_generation(
    first: int, second: int, count: int
) -> None:
    distance = (first - second) % 2**62
    assume(count <= distance <= 2**62 - count)  # two random seeds lie closer once in 10^17 restarts
    former, restarted = Generations(first), Generations(second)
    held = {former.open()[1] for _ in range(count)}
    assert held.isdisjoint(restarted.open()[1] for _ in range(count))
