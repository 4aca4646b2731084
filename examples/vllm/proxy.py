"""The proxy between clients, a prefill and a decode server, by vLLM's convention.

Prefill answers one token and `kv_transfer_params`, which say where the KV cache of the prompt is.
They go to decode as they are.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

import typer
from aiohttp import ClientError, ClientSession, ClientTimeout, web

#: what a prefill server is asked to answer with
ASK_FOR_TRANSFER: dict[str, object] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_TIMEOUT = ClientTimeout(total=600)


def prefill_request(request: dict[str, Any]) -> dict[str, Any]:
    """The first half of `request`: one token, in one piece."""
    first = {key: value for key, value in request.items() if key != "stream_options"}
    return first | {
        "max_tokens": 1,
        "min_tokens": 1,
        "stream": False,
        "kv_transfer_params": ASK_FOR_TRANSFER,
    }


class Proxy:
    """Answers /v1/completions."""

    def __init__(self, prefill_url: str, decode_url: str) -> None:
        self._prefill_url = prefill_url
        self._decode_url = decode_url
        self._session: ClientSession

    def application(self) -> web.Application:
        """What aiohttp runs."""
        application = web.Application(client_max_size=64 << 20)
        application.add_routes(
            [
                web.post("/v1/completions", self._complete),
                web.get("/health", self._health),
            ]
        )
        application.cleanup_ctx.append(self._open_session)
        return application

    async def _open_session(self, _: web.Application) -> AsyncIterator[None]:
        async with ClientSession(timeout=_TIMEOUT) as self._session:
            yield

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        # the same name in both servers' logs
        headers = {"X-Request-Id": request.headers.get("X-Request-Id", uuid.uuid4().hex)}
        url = self._prefill_url
        try:
            async with self._session.post(
                url, json=prefill_request(body), headers=headers
            ) as prefilled:
                if prefilled.status != web.HTTPOk.status_code:
                    return web.Response(status=prefilled.status, body=await prefilled.read())
                parameters = (await prefilled.json())["kv_transfer_params"]
            url = self._decode_url
            async with self._session.post(
                url, json=body | {"kv_transfer_params": parameters}, headers=headers
            ) as decoded:
                answer = web.StreamResponse(status=decoded.status)
                answer.content_type = decoded.content_type
                await answer.prepare(request)
                async for chunk in decoded.content.iter_any():
                    await answer.write(chunk)
                return answer
        except ClientError as error:
            raise web.HTTPBadGateway(text=f"{url} does not answer: {error}") from error


def main(
    prefill: Annotated[str, typer.Option(help="http://HOST:PORT/v1/completions of prefill.")],
    decode: Annotated[str, typer.Option(help="The same of decode.")],
    port: Annotated[int, typer.Option(min=1, max=65535)],
    host: str = "127.0.0.1",
) -> None:
    """Send each completion to prefill first, and then to decode."""
    web.run_app(Proxy(prefill, decode).application(), host=host, port=port, print=None)


if __name__ == "__main__":
    typer.run(main)
