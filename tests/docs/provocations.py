"""What makes the library say what the troubleshooting page explains, message by message.

A scene is a node in this process and one in another, neither of which is started.
"""

from __future__ import annotations

import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from certificates import Authority
from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
)
from llm_datadist.testing.cluster import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from certificates import Files
    from llm_datadist.cache import Cache
    from llm_datadist.testing.cluster import NodeProcess

SECRET = '{"secret": "0123456789abcdef"}'
ANOTHER = '{"secret": "fedcba9876543210"}'
POOL = '{"memory_size": 1048576}'
OURS = CacheDesc(2, [8, 64], DataType.DT_INT8)
KEY = BlocksCacheKey(1)

PROVOCATIONS: dict[str, Callable[[Scene], object]] = {}


class Scene(NamedTuple):
    """Cluster 2 here, cluster 1 there."""

    node: Node
    peer: NodeProcess

    def start(self, **settings: object) -> None:
        self.node.start(LLMRole.DECODER, 2, **settings)

    def start_peer(self, **settings: object) -> int:
        return self.peer.call(
            Node.start, LLMRole.PROMPT, 1, listen_ip_info="127.0.0.1:0", **settings
        )

    def link(self, **settings: object) -> int:
        port = self.start_peer(**settings)
        self.start(**settings)
        self.node.link(port, 1)
        return port

    def link_differently(self, theirs: dict[str, object], ours: dict[str, object]) -> None:
        port = self.start_peer(**theirs)
        self.start(**ours)
        self.node.link(port, 1)

    def pull(self, cache: Cache | None = None, src: int = 0, dst: int = 0) -> None:
        cache = cache or self.node.blocks_cache()
        self.node.manager.pull_blocks(KEY, cache, [src], [dst])


def provokes(message: str) -> Callable[[Callable[[Scene], object]], None]:
    def file(provoke: Callable[[Scene], object]) -> None:
        PROVOCATIONS[message] = provoke

    return file


def add_blocks(node: Node, num_tensors: int = 2, nbytes: int = 64, accessible: bool = True) -> None:
    node.blocks_cache(num_tensors, 8, nbytes, key=KEY, remote_accessible=accessible)


def add_rows(node: Node, nbytes: int = 256) -> None:
    node.rows_cache(row_nbytes=nbytes)


# -- it does not start --


@provokes("cannot listen on … (listen_ip_info): …")
def _(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        scene.start(listen_ip_info=f"127.0.0.1:{taken.getsockname()[1]}")


@provokes('… must be "…" or "[ipv6]:port", got …')
def _(scene: Scene) -> None:
    scene.start(listen_ip_info="26000")


@provokes(
    "another LLMDataDist of this process is initialised: finalize it first "
    "(LLMDataDist.llm_engine_instance.finalize())"
)
def _(scene: Scene) -> None:
    scene.start()
    Node().start(LLMRole.PROMPT, 3)


@provokes("llm datadist is not initialized")
def _(scene: Scene) -> None:
    LLMDataDist(LLMRole.PROMPT, 1).links()


@provokes("the cache manager is off: set LLMConfig.enable_cache_manager")
def _(scene: Scene) -> object:
    scene.start(enable_cache_manager=False)
    return scene.node.manager


@provokes(
    "… devices: the cache manager has one. Several are for the v1 mode (leave "
    "enable_cache_manager out, and use kv_cache_manager) and for llm_datadist.cpp.LlmDataDist; "
    "otherwise start a process for each"
)
def _(scene: Scene) -> None:
    scene.start(device_id=[0, 1])


@provokes("cannot reserve … bytes for a memory pool: …")
def _(scene: Scene) -> None:
    scene.start(mem_pool_cfg=f'{{"memory_size": {2**50}, "page_shift": 30}}')


@provokes("…: there is no file …")
def _(scene: Scene) -> None:
    scene.start(link_security='{"ca": "/none", "certificate": "/none", "key": "/none"}')


@provokes("…: a secret has at least … bytes; take random ones")
def _(scene: Scene) -> None:
    scene.start(link_security='{"secret": "short"}')


@provokes("… is …; it must be a regular file")
def _(scene: Scene) -> None:
    scene.start(link_security='{"secret_file": "/dev/zero"}')


@contextmanager
def files_of(authority: Authority) -> Iterator[Files]:
    with TemporaryDirectory() as folder:
        yield authority.issue(Path(folder))


@provokes("…: the key … is encrypted, and nobody is asked for its pass phrase")
def _(scene: Scene) -> None:
    with files_of(Authority()) as files:
        encrypt = ["openssl", "pkey", "-aes256", "-passout", "pass:1234", "-in", str(files.key)]
        key = files.key.with_name("encrypted.pem")
        subprocess.run([*encrypt, "-out", str(key)], check=True)
        scene.start(link_security=files.option(key=key))


# -- it does not link --


@provokes("cannot connect to …: …")
def _(scene: Scene) -> None:
    scene.start()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and not listened to
        scene.node.link(bound.getsockname()[1], 1)


@provokes("… remote addresses, one is needed (append_remote_ip_info)")
def _(scene: Scene) -> None:
    scene.start()
    info = LLMClusterInfo()
    info.append_local_ip_info("127.0.0.1", 0)
    scene.node.datadist.link_clusters([info])


@provokes("local_ip_info_list is empty for …: call append_local_ip_info")
def _(scene: Scene) -> None:
    scene.start()
    scene.node.datadist.link_clusters([LLMClusterInfo()])


@provokes(
    "enable_remote_cache_accessible differs: cluster … has …, its peer …; set it alike on both"
)
def _(scene: Scene) -> None:
    scene.link_differently({"enable_remote_cache_accessible": True}, {})


@provokes("link security: …; both ends need the same")
def _(scene: Scene) -> None:
    scene.link_differently({"link_security": SECRET}, {"link_security": ANOTHER})


@provokes("the peer has …, and this end has …")
def _(scene: Scene) -> None:
    scene.link_differently({"link_security": SECRET}, {})


@provokes("each end needs a valid certificate of an authority in the other end's CA file")
def _(scene: Scene) -> None:
    with files_of(Authority()) as theirs, files_of(Authority()) as ours:
        scene.link_differently({"link_security": theirs.option()}, {"link_security": ours.option()})


@provokes("clusters … and … are linked already")
def _(scene: Scene) -> None:
    scene.node.link(scene.link(), 1)


@provokes("no path works in both directions (…)")
def _(scene: Scene) -> None:
    scene.link_differently({"transfer_path": "tcp"}, {"transfer_path": "cma"})


@provokes("cluster … did not agree to unlink; the link is kept")
def _(scene: Scene) -> None:
    port = scene.link()
    scene.peer.pause()
    try:
        scene.node.unlink(port, 1, timeout=50)
    finally:
        scene.peer.resume()


@provokes("unlink all clusters first")
def _(scene: Scene) -> None:
    scene.link()
    scene.node.datadist.switch_role(LLMRole.PROMPT)


@provokes("the port of … must be a number, got …")
def _(scene: Scene) -> None:
    scene.start(listen_ip_info="127.0.0.1:http")


@provokes("… is no IP address and no host name")
def _(scene: Scene) -> None:
    LLMClusterInfo().append_remote_ip_info("http://10.0.0.1/", 26000)


@provokes("cluster … answers at …, and not cluster …: the link has its own id")
def _(scene: Scene) -> None:
    port = scene.start_peer()
    scene.start()
    scene.node.link(port, 5)


@provokes("this …'s LLMDataDist was finalized, or initialised in the process that forked this one")
def _(scene: Scene) -> None:
    scene.start()
    manager, cache = scene.node.manager, scene.node.blocks_cache()
    scene.node.stop()
    manager.pull_blocks(KEY, cache, [0], [0])


@provokes("… was deallocated: make views of a cache before that, they keep its memory")
def _(scene: Scene) -> None:
    scene.start(mem_pool_cfg=POOL)
    cache = scene.node.manager.allocate_blocks_cache(OURS, KEY)
    scene.node.manager.deallocate_blocks_cache(cache)
    cache.numpy()


@provokes("no memory is mapped at … of … addresses, the first is")
def _(scene: Scene) -> None:
    scene.start()
    scene.node.manager.register_blocks_cache(OURS, [4096, 8192])


# -- a pull or push fails --


@provokes("cluster … is not linked to cluster …; call link_clusters first")
def _(scene: Scene) -> None:
    scene.start()
    scene.pull()


@provokes("the peer has no …: it must register or allocate one, and keep it while it is used")
def _(scene: Scene) -> None:
    scene.link()
    scene.pull()


@provokes("there is no cache … here: it was unregistered or freed, or never was")
def _(scene: Scene) -> None:
    scene.link()
    cache = scene.node.blocks_cache()
    scene.node.manager.unregister_cache(cache.cache_id)
    scene.pull(cache)


@provokes("the peer's cache … has no row …, but …")
def _(scene: Scene) -> None:
    scene.link(enable_remote_cache_accessible=True)
    scene.peer.call(add_rows)
    scene.node.manager.pull_cache(CacheKeyByIdAndIndex(1, 1, 4), scene.node.rows_cache())


@provokes("source blocks have … bytes, destination blocks …")
def _(scene: Scene) -> None:
    scene.link()
    scene.peer.call(add_blocks, nbytes=32)
    scene.pull()


@provokes("… remote tensors for … local ones: give layer ranges of equal length")
def _(scene: Scene) -> None:
    scene.link()
    scene.peer.call(add_blocks, num_tensors=3)
    scene.pull()


@provokes("block indices … to … are out of range: the … has … blocks")
def _(scene: Scene) -> None:
    scene.link()
    scene.peer.call(add_blocks)
    scene.pull(src=8)


@provokes(
    "… bytes are more than the …'s rows have behind offset …, …: "
    "make those rows as large, or size smaller"
)
def _(scene: Scene) -> None:
    scene.link()
    scene.peer.call(add_rows, nbytes=64)
    scene.node.manager.pull_cache(CacheKeyByIdAndIndex(1, 1), scene.node.rows_cache())


@provokes("… src_blocks do not pair with … dst_blocks")
def _(scene: Scene) -> None:
    scene.start()
    scene.node.manager.pull_blocks(KEY, scene.node.blocks_cache(), [0, 1], [0])


@provokes(
    "the peer's cache … is not remote accessible: its owner must register it with "
    "remote_accessible=True"
)
def _(scene: Scene) -> None:
    scene.link(enable_remote_cache_accessible=True)
    scene.peer.call(add_blocks, accessible=False)
    scene.pull()


@provokes("our cache … is not remote accessible: register it with remote_accessible=True")
def _(scene: Scene) -> None:
    scene.link(enable_remote_cache_accessible=True)
    scene.peer.call(add_blocks)
    scene.pull(scene.node.blocks_cache(remote_accessible=False))


@provokes("pushing needs enable_remote_cache_accessible on both clusters")
def _(scene: Scene) -> None:
    scene.start()
    scene.node.manager.push_blocks(KEY, scene.node.blocks_cache(), [0], [0])


@provokes("the key names this cluster itself; only a linked peer can be pulled")
def _(scene: Scene) -> None:
    scene.start()
    scene.node.manager.pull_blocks(BlocksCacheKey(2), scene.node.blocks_cache(), [0], [0])


@provokes("… timed out after … s")
def _(scene: Scene) -> None:
    scene.link(sync_kv_timeout=50)
    scene.peer.pause()
    try:
        scene.pull()
    finally:
        scene.peer.resume()


@provokes(
    "the … address … (+… bytes) is not mapped memory: was the tensor freed after it was registered?"
)
def _(scene: Scene) -> None:
    scene.link()
    scene.peer.call(add_blocks)
    scene.pull(scene.node.manager.register_blocks_cache(OURS, [4096, 8192]))


# -- memory --


@provokes("no memory pool is configured: set LLMConfig.mem_pool_cfg or host_mem_pool_cfg")
def _(scene: Scene) -> None:
    scene.start()
    scene.node.manager.remove_cache_key(CacheKey(2, 1))


@provokes("there is no pool for …: set LLMConfig.…")
def _(scene: Scene) -> None:
    scene.start()
    scene.node.manager.allocate_cache(OURS)


@provokes("no room for … bytes (…)")
def _(scene: Scene) -> None:
    scene.start(mem_pool_cfg=POOL)
    scene.node.manager.allocate_cache(CacheDesc(1, [1, 2**21], DataType.DT_INT8))


@provokes("… names cache … already; remove that key first")
def _(scene: Scene) -> None:
    scene.start(mem_pool_cfg=POOL)
    scene.node.manager.allocate_cache(OURS, [CacheKey(2, 1)])
    scene.node.manager.allocate_cache(OURS, [CacheKey(2, 1)])


@provokes("… tensors need as many addrs, got …")
def _(scene: Scene) -> None:
    scene.start()
    scene.node.manager.register_cache(OURS, [4096])


# -- in the log --


@provokes(
    "cluster … listens on … without link security: whoever reaches that address can link and read "
    "what is registered; set LLMConfig.link_security"
)
def _(scene: Scene) -> None:
    scene.start(listen_ip_info="0.0.0.0:0")


@provokes("link_security: every user of this host can read …; chmod o-r …")
def _(scene: Scene) -> None:
    with files_of(Authority()) as files:
        files.key.chmod(0o644)
        scene.start(link_security=files.option())


@provokes("what was renewed cannot be used, what was there before goes on: …")
def _(scene: Scene) -> None:
    with files_of(Authority()) as files:
        scene.start(link_security=files.option())
        files.key.write_text("")
        scene.node.link(scene.start_peer(), 1)


@provokes("refused a connection from …: …")
def _(scene: Scene) -> None:
    port = scene.node.start(LLMRole.PROMPT, 2, listen_ip_info="127.0.0.1:0", link_security=SECRET)
    scene.peer.call(Node.start, LLMRole.DECODER, 1, link_security=ANOTHER)
    scene.peer.call(Node.link, port, 2)


# -- wrong names, types and numbers --


@provokes("… has no attribute …: is … meant?")
def _(scene: Scene) -> None:
    LLMConfig().link_securty = SECRET  # type: ignore[attr-defined]


@provokes("there is no option …: is … meant?")
def _(scene: Scene) -> None:
    scene.start(ge_options={"llm_datadist.LinkSecurty": SECRET})


@provokes("… does not know … in this release: it has no effect")
def _(scene: Scene) -> None:
    LLMConfig().of_a_newer_release = 1  # type: ignore[attr-defined]


@provokes("… only supports …, got …")
def _(scene: Scene) -> None:
    BlocksCacheKey(True)


@provokes("… must be in […, …], got …")
def _(scene: Scene) -> None:
    CacheKey(-1, 1)
