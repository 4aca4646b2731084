"""Managers whose cluster is gone: every method says so, whatever it is given. Spec 3.2, 5.2."""

from __future__ import annotations

import inspect
from itertools import chain
from types import FunctionType
from typing import TYPE_CHECKING

import pytest
from linked_pair import status_of

from edges.forking import in_child
from llm_datadist import LLMDataDist, LLMException, LLMRole, LLMStatusCode
from llm_datadist.kv_cache_manager import KvCacheManager
from llm_datadist.v2.cache_manager import CacheManager
from llm_datadist.v2.llm_datadist import _shutdown_handler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.testing.cluster import Node, NodeProcess

OPTIONS = {CacheManager: {"llm.EnableCacheManager": "1"}, KvCacheManager: {}}


def methods_of(kind: type) -> list[str]:
    """All public ones, those of its bases too; what is static knows no cluster."""
    members = chain.from_iterable(vars(base).items() for base in kind.__mro__[:-1])
    return sorted(
        name
        for name, member in members
        if isinstance(member, (FunctionType, property)) and not name.startswith("_")
    )


EVERY_METHOD = [(kind, name) for kind in OPTIONS for name in methods_of(kind)]


def call_with_nothing(manager: object, name: str) -> None:
    """Arguments that no method takes: it answers before it looks at them."""
    method = getattr(manager, name)
    needed = [
        parameter
        for parameter in inspect.signature(method).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    method(*[None] * len(needed))


@pytest.fixture
def datadist() -> Iterator[LLMDataDist]:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    yield datadist
    datadist.finalize()


def manager_of(datadist: LLMDataDist, kind: type) -> object:
    datadist.init(OPTIONS[kind])
    return datadist.cache_manager if kind is CacheManager else datadist.kv_cache_manager


@pytest.mark.shows("datadist.finalized")
@pytest.mark.parametrize(("kind", "name"), EVERY_METHOD)
def test_after_finalize_every_method_of_a_manager_says_so(
    datadist: LLMDataDist, kind: type, name: str
) -> None:
    manager = manager_of(datadist, kind)
    datadist.finalize()
    for _ in range(2):
        says = rf"^this {kind.__name__}'s LLMDataDist was finalized"
        with pytest.raises(LLMException, match=says) as error:
            call_with_nothing(manager, name)
        assert status_of(error) is LLMStatusCode.LLM_ENGINE_FINALIZED
        datadist.init(OPTIONS[kind])  # another one's


def test_there_are_methods_to_ask() -> None:
    some = {"pull_blocks", "allocate_cache", "swap_blocks"}
    assert all({(kind, name) for name in some} < set(EVERY_METHOD) for kind in OPTIONS)


@pytest.mark.shows("datadist.finalized")
def test_in_a_forked_child_every_method_says_so(victim: NodeProcess) -> None:
    assert victim.call(ask_in_child) == "nothing else"


def ask_in_child(node: Node) -> str:
    node.start(LLMRole.PROMPT, 1)
    manager = node.manager
    return in_child(lambda: others_than_finalized(manager))


def others_than_finalized(manager: CacheManager) -> str:
    others = []
    for name in methods_of(CacheManager):
        try:
            call_with_nothing(manager, name)
        except Exception as error:
            status = error.status_code if isinstance(error, LLMException) else None
            if status is LLMStatusCode.LLM_ENGINE_FINALIZED:
                continue
            others.append(f"{name}: {error!r}")
        else:
            others.append(f"{name} returned")
    return "; ".join(others) or "nothing else"


@pytest.mark.shows("datadist.shutdown_handler")
def test_the_hook_at_exit_finalizes_when_it_is_called_by_its_name(datadist: LLMDataDist) -> None:
    manager = manager_of(datadist, CacheManager)
    for _ in range(2):
        _shutdown_handler()
        assert LLMDataDist.llm_engine_instance is None
        with pytest.raises(LLMException) as error:
            call_with_nothing(manager, "unregister_cache")
        assert status_of(error) is LLMStatusCode.LLM_ENGINE_FINALIZED
