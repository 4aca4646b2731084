"""What peers may ask of our caches, and the answers. In any thread, without a socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.core import messages as m
from llm_datadist.core.packed import columns_of
from llm_datadist.core.registry import KeyName
from llm_datadist.core.segments import Segments, total_of
from llm_datadist.errors import LLMException, LLMStatusCode, invalid
from llm_datadist.memory.device import HOST

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeGuard

    from llm_datadist.core.combs import Pieces
    from llm_datadist.core.registry import Entry
    from llm_datadist.core.segments import U64
    from llm_datadist.owner.catalog import Catalog
    from llm_datadist.peer.peer import Peer
    from llm_datadist.transport.base import Transport
    from llm_datadist.transport.tcp import Permit

#: a peer that has not taken an answer after so long, however long it asks for, is cut off
MAX_ANSWER_S = 600.0
#: so many caches and keys are told of in the loop's thread
_FEW = 256


class Answers:
    """Answers questions that need no more than our caches. Thread-safe."""

    def __init__(
        self, cluster_id: int, catalog: Catalog, transports: Mapping[str, Transport]
    ) -> None:
        self._cluster_id = cluster_id
        self._catalog = catalog
        self._transports = transports

    def answer(self, request: m.AnyMessage) -> m.Message:
        """The answer. Raises LLMException to refuse it, ProtocolError for what is no question."""
        if isinstance(request, m.Resolve):
            name: int | KeyName = KeyName(request.key_id, request.model_id, request.is_prefix)
            if request.cache_id is not None:
                name = request.cache_id
            return m.Resolved(*self._catalog.describe(name))
        if isinstance(request, m.ListCaches):
            return self.table(request)
        if isinstance(request, m.UseUp):
            if not self._catalog.is_remote_accessible(request.cache_id):
                raise invalid(f"cache {request.cache_id} is not registered as remote accessible")
            first, count = request.first_tensor, request.num_tensors
            tensors = range(first, first + count) if count else None
            self._catalog.use_up(request.cache_id, request.row, tensors)
            return m.Done()
        raise m.ProtocolError(f"{type(request).__name__} is no request")

    def is_early(self, request: m.AnyMessage) -> bool:
        """Whether a hand-shake needs the answer: to verify a path, or to open a channel."""
        if isinstance(request, m.Read):
            return self.is_probe(request) and request.claim is None
        return isinstance(request, m.ListExports)

    def is_table(self, request: m.AnyMessage) -> TypeGuard[m.ListCaches | m.ListExports]:
        """Whether the answer tells of so much that it may be large, and take its time."""
        if isinstance(request, m.ListCaches):
            return self._catalog.num_entries > _FEW
        return isinstance(request, m.ListExports)

    def table(self, request: m.ListCaches | m.ListExports) -> m.Message:
        """All caches that peers may reach, or what channels over a path need to know of them.

        Raises LLMException(LLM_PARAM_INVALID) for a path that is not to be had.
        """
        if isinstance(request, m.ListCaches):
            return m.Caches(self._catalog.describe_all())
        transport = self._transports.get(request.path)
        if transport is None:
            raise invalid(f"cluster {self._cluster_id} does not have the path {request.path!r}")
        return m.Exports(transport.exports())

    def is_probe(self, request: m.Read) -> bool:
        """Whether it reads the nonce of a hand-shake, and no cache."""
        return request.cache_id == self._catalog.probe.cache_id

    def readable(
        self, token: object, read: m.Read | m.Digest, permit: Permit, reader: Peer | None
    ) -> tuple[Entry, U64, U64, int]:
        """The memory that a peer asks to be sent: cache, addresses, lengths, and their sum.

        All is checked.

        The reader is that peer, or nobody while its link is being made.

        The token's call uses it from here on, as long as the permit holds.
        """
        addrs, nbytes = columns_of(read.columns, 2)
        entry = self._catalog.serve(token, read.cache_id, permit, reader)
        if isinstance(read, m.Read) and read.claim is not None:
            key_id, model_id, is_prefix, row = read.claim
            key = KeyName(key_id, model_id, is_prefix)
            if entry.keys.get(key) != row:  # and no word of the caches that have it
                raise LLMException(
                    f"{key} leads elsewhere by now", LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
                )
        _check_reach(entry, read.generation, addrs, nbytes)
        total_nbytes = _check_amount(nbytes)
        if entry.space != HOST:
            raise invalid(f"cache {entry.cache_id} lies in {entry.space}: no stream sends that")
        return entry, addrs, nbytes, total_nbytes

    def writable(self, token: object, request: m.Fetch, pieces: Pieces) -> Entry:
        """The cache that a peer asks us to fill, checked, and used by the token's call."""
        cache_id, generation = request.cache_id, request.generation
        landing = pieces.landing()
        addrs, nbytes = landing.dst, landing.nbytes
        if cache_id is None:
            found = self._catalog.find_at(addrs, nbytes)
            cache_id, generation = found.cache_id, found.generation
        entry = self._catalog.use(token, cache_id)
        _check_reach(entry, generation, addrs, nbytes)
        if isinstance(pieces, Segments):  # combs have bounds of their own
            _check_amount(nbytes)
        holds = entry.layout.geometry.num_tensors * entry.layout.geometry.tensor_nbytes
        if pieces.total_nbytes > holds:
            raise invalid(f"a push of more bytes than cache {entry.cache_id} has, which is {holds}")
        return entry


def _check_reach(entry: Entry, generation: int, addrs: U64, nbytes: U64) -> None:
    """A peer may reach these bytes of this cache. Raises LLMException."""
    if entry.generation != generation:
        raise LLMException(
            f"cache {entry.cache_id} was freed or changed", LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
        )
    if not entry.is_remote_accessible:
        raise invalid(f"cache {entry.cache_id} is not registered as remote accessible")
    if not entry.layout.covers(addrs, nbytes):
        raise invalid(f"a transfer reaches beyond the tensors of cache {entry.cache_id}")


def _check_amount(nbytes: U64) -> int:
    """The sum of lengths that are within reach. Raises LLMException when it is too much."""
    total_nbytes = total_of(nbytes)
    if total_nbytes > m.MAX_REQUEST_NBYTES:
        raise invalid(f"one request asks for more than {m.MAX_REQUEST_NBYTES} bytes")
    return total_nbytes
