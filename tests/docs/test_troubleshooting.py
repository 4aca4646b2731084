"""The messages on the page are those of the library: found in its source, most of them provoked.

On the page as in the source's templates here, `…` stands for what differs from case to case.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import pytest
from messages import TROUBLESHOOTING, quoted, templates
from provocations import PROVOCATIONS, Scene

from llm_datadist.testing.timing import eventually

if TYPE_CHECKING:
    from llm_datadist.testing.cluster import Node, NodeProcess

#: what needs two hosts, users or releases, comes by chance, or is shown by the tests of faults
NOT_PROVOKED = [
    # in tests/integrations, with what only they need
    "readers would be told to dial …, and this worker, which listens on …, cannot be reached "
    "there: …",
    "advertised_host is …, which nobody can dial",
    "… is not supported: …; only decoders that keep keys and values of all tokens, alike in every "
    "layer, are",
    "cannot accept a connection: …",
    "turned away … connections that are no link's: …",
    "cluster … speaks protocol …, its peer …: install the same release of llm-datadist on both",
    "no connection to … within … s",
    "… bytes come through, … did not within … s: the network drops large frames, or is very slow "
    "(compare the MTU of both ends, and of what is between)",
    "… is spoken there: it is the port of something else",
    "the hand-shake was not done within … s…",
    "not all members appeared within … s: …",
    "cluster … is not linking by such a rank table now",
    "Nobody can call this member by the rank table: …",
    "cluster … cannot be met on this host by its rank table: …",
    "cluster … is linked by a rank table to process … of user …, as cluster …, "
    "without link security; this process is user …'s",
    "the link to cluster … uses …, because … is not available: …",
    "the peer is in another PID namespace: let the containers share one (--pid)",
    "the peer is in another network namespace: let the containers share one (--network)",
    "run both processes as the same user (here …, the peer …)",
    "lower kernel.yama.ptrace_scope to 1, or grant CAP_SYS_PTRACE",
    "kernel.yama.ptrace_scope is 3, which stays so until the next boot",
    "kernel.yama.ptrace_scope is 1, and the peer's process has not said, or says no more, that "
    "others may read it",
    "in a container, allow it (--cap-add SYS_PTRACE, or a seccomp profile that does)",
    "the peer is on another host",
    "the peer's cache … was freed or changed during the transfer: it must keep it until the "
    "transfer has ended",
    "process … of the peer is gone",
    "the peer is gone: …",
    "what arrived of the peer's cache … is not what its owner has: the checksums differ "
    "(verify_transfers)",
    "cache … is still used by a transfer after … s",
    # shown by the tests of what they are about: packages, ranks, threads, views, transformers, vLLM
    "verify_transfers needs xxhash: pip install xxhash",
    "tracing needs opentelemetry-api: pip install opentelemetry-api",
    "the path nixl needs NIXL: pip install --no-deps nixl-cu12, beside torch and numpy",
    "the rank table cannot be used: …",
    "the system gives this process no more threads (…): raise its limit on processes (ulimit -u, "
    "a container's pids limit)",
    "switching roles is off: set LLMConfig.enable_switch_role",
    "there is no rank-table link with comm_id …",
    "two peers have the cluster id …: that at …, which is used from here on, and one …",
    "cache … is being unregistered",
    "… moves nothing: the cache has … tensor(s), which is no whole layer; set "
    "tensor_num_per_layer to 1",
    "llm_datadist.integrations.transformers needs …: pip install torch 'transformers>=5,<6'",
    "this PagedCache was released: its blocks may hold another request by now; make a new one "
    "(KVPool.new_cache)",
    "no cache is published here as … of cluster …: it was released before, or by another pool",
    "KV cache of … is on …: this connector moves CPU memory only",
    "the producer has freed the blocks: the lease had ended",
    "… was not read within its lease: blocks freed",
    "kv_connector_extra_config: LLMConfig has no …",
    "it takes … of memory, … are free: …",
    "--vs …: it is not installed (…)",
    "--plot needs matplotlib: pip install matplotlib",
    "--… before … says nothing to it: write it behind …",
    "the cluster must have the same link security, and a version that can be asked",
]


def test_each_message_is_provoked_or_said_not_to_be() -> None:
    assert sorted([*PROVOCATIONS, *NOT_PROVOKED]) == sorted(quoted(TROUBLESHOOTING))


@pytest.mark.parametrize("message", quoted(TROUBLESHOOTING))
def test_a_message_is_in_the_source(message: str) -> None:
    assert any(message in template for template in templates())


def test_no_message_has_a_package_installed_that_no_index_has_yet() -> None:
    commands = [template for template in templates() if "pip install" in template]
    assert len(commands) > 5
    assert not [text for text in commands if re.search(r"pip install[^:]*llm.datadist", text)]


@pytest.mark.parametrize("message", PROVOCATIONS)
def test_a_message_comes_when_it_is_provoked(
    message: str, node: Node, peer: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    with caplog.at_level(logging.INFO, "LLM_DATADIST"):
        try:
            PROVOCATIONS[message](Scene(node, peer))
        except Exception as error:  # whichever: its words are what is asked for
            said.append(str(error))
        pattern = re.escape(message).replace("…", ".+")
        assert eventually(
            lambda: re.search(pattern, "\n".join([*said, *caplog.messages])) is not None
        )
