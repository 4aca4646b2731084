"""core.remote: what an owner says of its caches is what its peers understand."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist.core import messages as m
from llm_datadist.core.generations import Generations
from llm_datadist.core.geometry import CacheKind, Geometry, Layout
from llm_datadist.core.packed import pack_layers
from llm_datadist.core.registry import Entry, KeyName, Registry
from llm_datadist.core.remote import Guard, RemoteTable, describe, understand
from llm_datadist.core.remote_keys import RemoteKeys, pack_keys
from llm_datadist.kv_layout import KVLayout
from llm_datadist.types import DataType, Placement

examples = settings(max_examples=40, deadline=None)

uint64s = st.integers(0, 2**64 - 1)
keys = st.builds(KeyName, st.integers(0, 3) | uint64s, st.integers(0, 1) | uint64s, st.booleans())


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    geometry = Geometry(
        draw(st.sampled_from(CacheKind)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 2**20)),
        draw(st.integers(1, 2**40)),
    )
    count = geometry.num_tensors
    addr = st.integers(0, 2**64 - geometry.tensor_nbytes)
    return Layout.at(geometry, draw(st.lists(addr, min_size=count, max_size=count)))


@st.composite
def owned_caches(draw: st.DrawFn) -> list[Entry]:
    """The caches of a process."""
    registry = Registry(Generations(draw(uint64s)))
    for layout in draw(st.lists(layouts(), min_size=1, max_size=4)):
        geometry, placement = layout.geometry, draw(st.sampled_from(Placement))
        most = 1 if geometry.kind is CacheKind.BLOCKS else geometry.num_rows
        names = draw(st.lists(st.none() | keys, max_size=min(most, 4)))
        if draw(st.booleans()) and not any(is_bound(registry, name) for name in names):
            registry.allocate(layout, placement, names)
        else:
            is_accessible = draw(st.booleans())
            registry.register(layout, placement, names, is_remote_accessible=is_accessible)
    return list(registry.entries())


def is_bound(registry: Registry, name: KeyName | None) -> bool:
    return any(name in entry.keys for entry in registry.entries())


def sent(info: m.CacheInfo) -> m.CacheInfo:
    """What arrives at the peer."""
    message = m.decode(m.encode(m.Resolved(info, 0))[m.HEADER.size :])
    assert isinstance(message, m.Resolved)
    return message.info


@examples
@given(owned_caches())
def test_a_peer_understands_what_the_owner_describes(entries: list[Entry]) -> None:
    for entry in entries:
        cache = understand(sent(describe(entry)))
        assert cache.guard == Guard(entry.cache_id, entry.generation, entry.word_addr)
        assert cache.layout.geometry == entry.layout.geometry
        assert cache.layout.addrs.tolist() == entry.layout.addrs.tolist()
        assert cache.is_remote_accessible == entry.is_remote_accessible
        assert cache.is_owned == entry.is_owned
        keys = RemoteKeys([cache.keys])
        assert {key: keys.find(key) for key in entry.keys} == {
            key: (0, row) for key, row in entry.keys.items()
        }
        assert len(cache.keys) == m.KEY_NBYTES * len(entry.keys)


@examples
@given(owned_caches())
def test_a_peer_knows_which_pulls_use_up_a_key(entries: list[Entry]) -> None:
    for entry in entries:
        cache = understand(sent(describe(entry)))
        requests = {row for key, row in entry.keys.items() if not key.is_prefix}
        rows = {row for row in range(5) if cache.has_key_at(row)}
        assert rows == (requests if entry.is_owned else set())


@examples
@given(owned_caches(), st.lists(keys, max_size=3), st.integers(-1, 6))
def test_a_table_finds_what_its_owner_would_find(
    entries: list[Entry], others: list[KeyName], cache_id: int
) -> None:
    table = RemoteTable(understand(sent(describe(entry))) for entry in entries)
    by_id = {entry.cache_id: entry for entry in entries}
    by_key = {key: (entry, row) for entry in entries for key, row in entry.keys.items()}
    found = table.find(cache_id)
    assert (found and found.guard.cache_id) == (cache_id if cache_id in by_id else None)
    for key in [*by_key, *others]:
        named = table.find_key(key)
        expected = by_key.get(key)
        assert (named and (named[0].guard.cache_id, named[1])) == (
            expected and (expected[0].cache_id, expected[1])
        )


@pytest.mark.parametrize("model_id", [-1, 2**64])
def test_a_key_that_no_peer_can_ask_for_is_kept_to_oneself(model_id: int) -> None:
    registry = Registry(Generations(1))
    layout = Layout.at(Geometry(CacheKind.BLOCKS, 1, 1, 8), [4096])
    names = [KeyName(2**64 - 1, model_id)]
    entry = registry.register(layout, Placement.DEVICE, names, is_remote_accessible=True)
    assert not understand(sent(describe(entry))).keys


#: a description that is right
INFO = m.CacheInfo(
    cache_id=7,
    kind=CacheKind.BLOCKS,
    num_tensors=2,
    num_rows=8,
    row_nbytes=64,
    is_remote_accessible=True,
    is_owned=False,
    generation=9,
    word_addr=4096,
    addrs=(8192).to_bytes(8, "little") + (2**64 - 512).to_bytes(8, "little"),
    keys=pack_keys({KeyName(1, 2): 0}),
)


def test_the_description_that_the_following_tests_spoil_is_understood() -> None:
    assert understand(INFO).layout.addrs.tolist() == [8192, 2**64 - 512]


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param({"num_tensors": 1}, id="more addresses than tensors"),
        pytest.param({"num_tensors": 3}, id="fewer addresses than tensors"),
        pytest.param({"num_tensors": 2**64 - 1}, id="more tensors than there is memory"),
        pytest.param({"addrs": INFO.addrs[:-1]}, id="an address cut short"),
        pytest.param({"kind": len(CacheKind)}, id="no such kind"),
        pytest.param(
            {"num_rows": 2**32, "row_nbytes": 2**31, "addrs": bytes(16)}, id="2**63 bytes"
        ),
        pytest.param({"num_rows": 2**64 - 1, "row_nbytes": 2**64 - 1}, id="2**128 bytes"),
        pytest.param({"row_nbytes": 65}, id="a tensor beyond the end of the address space"),
        pytest.param({"generation": 0}, id="the generation of a cache that is gone"),
        pytest.param({"keys": INFO.keys[:-1]}, id="a key cut short"),
    ],
)
def test_a_description_that_cannot_be_true_is_a_protocol_error(lie: dict[str, int]) -> None:
    with pytest.raises(m.ProtocolError):
        understand(msgspec.structs.replace(INFO, **lie))


@examples
@given(
    st.integers(0, 5),
    st.integers(0, 3),
    st.integers(0, 3) | uint64s,
    st.integers(0, 80) | uint64s,
    st.integers(0, 3) | uint64s,
    st.binary(max_size=40),
)
def test_what_is_understood_lies_within_the_address_space(
    kind: int, num_tensors: int, num_rows: int, row_nbytes: int, generation: int, addrs: bytes
) -> None:
    info = msgspec.structs.replace(
        INFO,
        kind=kind,
        num_tensors=num_tensors,
        num_rows=num_rows,
        row_nbytes=row_nbytes,
        generation=generation,
        addrs=addrs[: 8 * num_tensors],
    )
    try:
        cache = understand(sent(info))
    except m.ProtocolError:
        return
    size = cache.layout.geometry.tensor_nbytes
    assert len(cache.layout.addrs) == cache.layout.geometry.num_tensors
    assert all(addr + size <= 2**64 for addr in cache.layout.addrs.tolist())


#: of the layout of a cache, which has half of its bytes
LAYOUT = m.LayoutInfo(pack_layers(["a", 1]), (0, 1, 1), 8, 2, 4, 2, "BND", [32, 8, 1])


def with_layout(**changes: object) -> m.CacheInfo:
    layout = msgspec.structs.replace(LAYOUT, **changes)
    return msgspec.structs.replace(INFO, layout=layout)


def test_a_layout_is_understood_as_its_owner_said_it() -> None:
    layout = KVLayout.of_tensor([8, 2, 4], [32, 8, 1], DataType.DT_INT8, "ND", num_tensors=2)
    entry = Registry(Generations(1)).register(
        Layout.at(Geometry(CacheKind.BLOCKS, 2, 8, 64), [4096, 8192]),
        Placement.DEVICE, [], is_remote_accessible=True, kv_layout=layout,
    )  # fmt: skip
    assert understand(sent(describe(entry))).kv_layout == layout
    assert understand(with_layout()).kv_layout is not None


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param({"layers": pack_layers(["a", "a"])}, id="a layer twice"),
        pytest.param({"layers": pack_layers(["a"])}, id="fewer layers than tensors"),
        pytest.param({"layers": msgspec.msgpack.encode([])}, id="no layers"),
        pytest.param(
            {"layers": msgspec.msgpack.encode([*range(m.MAX_LAYERS + 1)])}, id="too many layers"
        ),
        pytest.param({"layers": b"\xff"}, id="layers that cannot be read"),
        pytest.param({"heads": (0, 2, 1)}, id="heads that there are not"),
        pytest.param({"heads": (0, 1, 4)}, id="heads of a latent cache"),
        pytest.param({"num_blocks": 0}, id="no blocks"),
        pytest.param({"num_blocks": 17}, id="more blocks than the cache has room for"),
        pytest.param({"num_blocks": 2**64 - 1}, id="more blocks than there is memory"),
        pytest.param({"block_tokens": 2**63}, id="blocks of more tokens than there are"),
        pytest.param({"data_type": 99}, id="no such type"),
        pytest.param({"order": "BNN"}, id="an axis twice"),
        pytest.param({"order": "BN"}, id="an axis missing"),
        pytest.param({"strides": [2**64 - 1, 8, 1]}, id="a stride beyond all memory"),
        pytest.param({"strides": [4, 8, 1]}, id="blocks on top of each other"),
    ],
)
def test_a_layout_that_cannot_be_is_a_protocol_error(lie: dict[str, object]) -> None:
    with pytest.raises(m.ProtocolError):
        understand(with_layout(**lie))


@examples
@given(owned_caches())
def test_of_a_key_that_it_asks_for_a_peer_learns_what_the_whole_table_says(
    entries: list[Entry],
) -> None:
    for entry in entries:
        every = understand(sent(describe(entry)))
        for key, row in entry.keys.items():
            cache = understand(sent(describe(entry, key)))
            assert RemoteKeys([cache.keys]).find(key) == (0, row)
            assert len(cache.keys) == m.KEY_NBYTES
            assert cache.has_key_at(row) == every.has_key_at(row)


def test_the_keys_of_a_cache_are_packed_again_only_when_one_has_gone() -> None:
    registry = Registry(Generations(1))
    layout = Layout.at(Geometry(CacheKind.CONTINUOUS, 1, 3, 8), [4096])
    names = [KeyName(number, 0) for number in range(3)]
    entry = registry.allocate(layout, Placement.HOST, names)
    told = describe(entry).keys
    assert describe(entry).keys is told
    registry.remove_key(names[1])
    left = RemoteKeys([describe(entry).keys])
    assert [left.find(name) for name in names] == [(0, 0), None, (0, 2)]
