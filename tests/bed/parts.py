"""What the bed runs: each part in machines of its own, so that one can be run alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Part:
    """Tests, `inside/NAME.py`, and the machine that they need."""

    name: str
    #: for the table
    about: str
    modules: tuple[str, ...] = ()
    #: a second machine on the same network answers as the first one's peer
    is_pair: bool = False
    memory_mib: int = 2560
    #: emulated, on two busy cores
    limit_s: float = 1200.0


_RDMA: Final = ("rdma_rxe", "ib_uverbs", "rdma_ucm")
#: the ciphers' modules as well: the kernel would have them loaded from a place where they are not
_TLS: Final = ("tls", "gcm", "ctr", "ghash_generic", "aesni_intel")
PARTS: Final = (
    Part("yama", "who may read whom, under each ptrace_scope"),
    Part(
        "rdma",
        "NIXL over RDMA, which the kernel does without a card",
        (*_RDMA, "veth"),
        memory_mib=6144,
        limit_s=3600.0,
    ),
    Part(
        "netem",
        "slow networks between two hosts",
        ("veth", "sch_netem"),
        memory_mib=4096,
        limit_s=3600.0,
    ),
    Part("pair", "two machines as two hosts", (*_RDMA, "virtio_net"), is_pair=True),
    Part("doctor", "what doctor says of RDMA devices", (*_RDMA, "veth")),
    Part("ktls", "links under TLS that the kernel seals", (*_TLS, "veth"), limit_s=3600.0),
    Part("ktls_border", "where the kernel takes a connection over from TLS", _TLS),
)
