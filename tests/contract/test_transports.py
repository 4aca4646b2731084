"""The contract of transports, on each that can be had here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llm_datadist.testing.contract import TransportContract
from llm_datadist.transport.nixl_agent import package

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_nixl = pytest.mark.skipif(
    package() is None, reason="NIXL is not installed: pip install --no-deps nixl-cu12"
)


class TestCma(TransportContract):
    path = "cma"


class TestTcp(TransportContract):
    path = "tcp"


class OverNixl(TransportContract):
    """NIXL wakes up a hundred times a second to see whether there is something to do.

    That takes 1 to 2 % of a CPU, and more where others keep its caches cold; polling takes 100 %.
    """

    path = "nixl"
    most_idle_cpu = 0.1
    #: what UCX may use
    ucx: str

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _choose_ucx_transport(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UCX_TLS", cls.ucx)
            yield


@needs_nixl
@pytest.mark.long
class TestNixlOverSharedMemory(OverNixl):
    """Alone, UCX's transports in shared memory do not notice that a peer is gone; tcp does."""

    ucx = "posix,sysv,cma,self,tcp"

    @pytest.fixture
    def is_accessible(self) -> bool:
        return False


@needs_nixl
@pytest.mark.long
class TestNixlOverTcp(OverNixl):
    ucx = "tcp,self"

    @pytest.fixture
    def is_accessible(self) -> bool:
        return True
