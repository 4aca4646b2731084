"""A proxy before the engines of a directory: docs/fleet.md.

An engine that says in its label `http` where it is asked gets requests as soon as it is announced,
and none when it has left. Who fails meanwhile is done without: a request that has not been answered
yet is begun anew with others. Without any prefill, decode computes prompts itself. An answer that
is streamed cannot be begun anew when its first part is sent: its stream ends with an error. An
engine that stands still is waited for.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

import asyncio
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import typer
from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web
from choice import Engine, Prompt, for_decode, for_prefill
from proxy import prefill_request

from llm_datadist.directory import Changes, DirectoryError, Record, open_directory

#: how long others are tried for a request that nobody has begun to answer
_PATIENCE_S = 30.0
_TIMEOUT = ClientTimeout(total=None, sock_connect=2, sock_read=600)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
#: a request that so many engines answer with an error is one that makes errors
_MOST_ERRORS = 3
#: what says more of the engine than of the request: unknown here, or too much just now
_NOT_THE_CLIENTS = {401, 403, 404, 429}
#: a client's own words about where KV is would be believed
_NOT_FROM_CLIENTS = {"kv_transfer_params", "vllm_xargs"}
_NOT_FOR_PREFILL = {"max_completion_tokens", "n", "best_of"}

logger = logging.getLogger("fleet_proxy")


class Fleet:
    """The engines that are announced, by where they are asked. Belongs to the loop's thread."""

    def __init__(self, directory: str) -> None:
        self._directory = open_directory(directory)
        self._records: dict[int, Record] = {}
        self._engines: dict[str, Engine] = {}

    def follow(self) -> None:
        """Hears of changes from here on, in a thread of its own."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, args=(loop,), daemon=True).start()

    def of_role(self, role: str) -> list[Engine]:
        """Those that do what that role does."""
        return [each for each in self._engines.values() if each.roles & {role, "MIX"}]

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        watch, pause_s = self._directory.watch(), _FIRST_PAUSE_S
        while True:
            try:
                changes = watch.wait(3600.0)
            except DirectoryError as error:  # who was there is there
                logger.warning("%s", error)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                pause_s = _FIRST_PAUSE_S
                loop.call_soon_threadsafe(self._told, changes)

    def _told(self, changes: Changes) -> None:
        for record in (*changes.left, *(change.before for change in changes.changed)):
            self._records.pop(record.cluster_id, None)
        for record in (*changes.joined, *(change.now for change in changes.changed)):
            self._records[record.cluster_id] = record
            if known := self._engines.get(_url_of(record)):
                known.begin_anew()
        roles: dict[str, set[str]] = {}
        for record in self._records.values():
            if url := _url_of(record):
                roles.setdefault(url, set()).add(record.role)
        for url in roles.keys() ^ self._engines.keys():
            logger.info("%s has %s", url, "joined" if url in roles else "left")
        self._engines = {url: self._engines.get(url, Engine(url)) for url in roles}
        for url, engine in self._engines.items():
            engine.roles = roles[url]


def _url_of(record: Record) -> str:
    return record.labels.get("http", "").rstrip("/")


class EngineError(Exception):
    """An engine has answered that it could not; its answer."""

    def __init__(self, url: str, answer: web.Response) -> None:
        super().__init__(f"{url} answers {answer.status}")
        self.answer = answer


class Proxy:
    """Answers /v1/completions and /v1/chat/completions."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._session: ClientSession

    def application(self) -> web.Application:
        """What aiohttp runs."""
        application = web.Application(client_max_size=64 << 20)
        application.add_routes(
            [
                web.post("/v1/completions", self._answer),
                web.post("/v1/chat/completions", self._answer),
                web.get("/health", self._health),
            ]
        )
        application.cleanup_ctx.append(self._open)
        return application

    async def _open(self, _: web.Application) -> AsyncIterator[None]:
        self._fleet.follow()
        # without a bound of its own: engines that stand still must not keep others from being asked
        connector = TCPConnector(limit=0)
        async with ClientSession(connector=connector, timeout=_TIMEOUT) as self._session:
            yield

    async def _health(self, _: web.Request) -> web.Response:
        count = {role: len(self._fleet.of_role(role)) for role in ("PROMPT", "DECODER")}
        return web.json_response(count, status=200 if count["DECODER"] else 503)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        """Tries until somebody answers, or has begun to."""
        said = await request.json()
        if not isinstance(said, dict):
            raise web.HTTPBadRequest(text="a request is a JSON object")
        body = {name: value for name, value in said.items() if name not in _NOT_FROM_CLIENTS}
        until, pause_s, num_errors = time.monotonic() + _PATIENCE_S, _FIRST_PAUSE_S, 0
        while True:
            try:
                return await self._try(request, body)
            except EngineError as error:
                num_errors += 1
                if num_errors >= _MOST_ERRORS:
                    return error.answer
                why = str(error)
            except (ClientError, asyncio.TimeoutError, LookupError, UnicodeError) as error:
                why = repr(error)
            logger.warning("tried again: %s", why)
            if time.monotonic() > until:
                raise web.HTTPServiceUnavailable(text=f"no engine answers; the last one: {why}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _try(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Prefill and decode, by those that are best now. Raises what `_answer` catches."""
        prompt = Prompt.of(body)
        # the same name in all logs, and for each attempt another: vLLM frees blocks by it
        name = f"{request.headers.get('X-Request-Id') or uuid.uuid4().hex}-{uuid.uuid4().hex[:6]}"
        params, prefill = None, None
        prefills = [each for each in self._fleet.of_role("PROMPT") if not each.is_shunned]
        if chosen := for_prefill(prefills, prompt):  # decode computes what nobody else can
            engine, work = chosen
            prefill = engine
            first = {key: value for key, value in body.items() if key not in _NOT_FOR_PREFILL}
            with engine.working(prompt, work):
                async with self._ask(engine, request.path, name, prefill_request(first)) as said:
                    if not said.ok:
                        return await _whole(said)
                    params = (await said.json()).get("kv_transfer_params")
                    engine.knows(prompt)
        decodes = self._fleet.of_role("DECODER")
        # an engine that does both cannot read from itself
        others = [each for each in decodes if each is not prefill]
        if not (chosen := for_decode(others or decodes, prompt)):
            raise LookupError("no decode is announced")
        engine, work = chosen
        params = params if others else None
        with engine.working(prompt, work):
            body = body | {"kv_transfer_params": params} if params else body
            async with self._ask(engine, request.path, name, body) as said:
                if said.ok:
                    engine.knows(prompt)
                if said.ok and body.get("stream"):
                    return await self._pass_on(said, request)
                return await _whole(said)

    @asynccontextmanager
    async def _ask(
        self, engine: Engine, path: str, name: str, body: dict[str, Any]
    ) -> AsyncIterator[ClientResponse]:
        headers = {"X-Request-Id": name}
        async with self._session.post(engine.url + path, json=body, headers=headers) as said:
            is_error = said.status >= web.HTTPInternalServerError.status_code
            if is_error or said.status in _NOT_THE_CLIENTS:
                raise EngineError(engine.url, await _whole(said))
            yield said

    async def _pass_on(self, said: ClientResponse, request: web.Request) -> web.StreamResponse:
        """Part by part. Raises nothing any more when the first one is there."""
        first = await said.content.readany()
        answer = web.StreamResponse(status=said.status)
        answer.content_type = said.content_type
        with suppress(ConnectionResetError):  # the client has gone
            await answer.prepare(request)
            await answer.write(first)
            async for part in _rest(said):
                await answer.write(part)
        return answer


async def _whole(said: ClientResponse) -> web.Response:
    body = await said.read()
    return web.Response(status=said.status, body=body, content_type=said.content_type)


async def _rest(said: ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for part in said.content.iter_any():
            yield part
    except (ClientError, asyncio.TimeoutError) as error:
        problem = {"error": {"message": f"the engine has gone: {error!r}", "code": 502}}
        yield f"\n\ndata: {json.dumps(problem)}\n\n".encode()  # an event may have been torn


def main(
    directory: Annotated[str, typer.Option(help="folder:/shared/fleet, etcd://host:2379/fleet.")],
    port: Annotated[int, typer.Option(min=1, max=65535)],
    host: str = "127.0.0.1",
) -> None:
    """Send each request to the prefill and the decode of a fleet that are best for it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    application = Proxy(Fleet(directory)).application()
    web.run_app(application, host=host, port=port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    typer.run(main)
