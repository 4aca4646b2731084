"""The proxy between clients, a prefill and a decode server, by vLLM's convention.

Prefill answers one token and `kv_transfer_params`, which say where the KV cache of the prompt is.
They go to decode as they are.

With --overlap both are asked at once, from the second request on, and told one name: decode comes
for the prompt while prefill computes it. Who prefill is, its first answer has said.
"""

# No `from __future__ import annotations`: typer reads the types when it runs.

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

import typer
from aiohttp import ClientError, ClientResponseError, ClientSession, ClientTimeout, web

#: what a prefill server is asked to answer with
ASK_FOR_TRANSFER: dict[str, object] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
#: of what prefill answers, what the next prompt has others of
_OF_THE_PROMPT = ("remote_lease", "remote_block_ids", "remote_request_id", "remote_proof")
_TIMEOUT = ClientTimeout(total=600)


def prefill_request(request: dict[str, Any], **more: object) -> dict[str, Any]:
    """The first half of `request`: one token, in one piece."""
    first = {key: value for key, value in request.items() if key != "stream_options"}
    return first | {
        "max_tokens": 1,
        "min_tokens": 1,
        "stream": False,
        "kv_transfer_params": ASK_FOR_TRANSFER | more,
    }


class Proxy:
    """Answers /v1/completions."""

    def __init__(self, prefill_url: str, decode_url: str, *, overlaps: bool) -> None:
        self._prefill_url = prefill_url
        self._decode_url = decode_url
        self._overlaps = overlaps
        #: what prefill's last answer has said of prefill itself
        self._known: dict[str, object] = {}
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
        await request.read()  # once, for both
        try:
            if self._overlaps and self._known:
                return await self._ask_both(request)
            return await self._decode(request, await self._prefill(request))
        except ClientResponseError as error:
            return web.Response(status=error.status, text=error.message)
        except ClientError as error:
            raise web.HTTPBadGateway(text=f"a server does not answer: {error}") from error

    async def _ask_both(self, request: web.Request) -> web.StreamResponse:
        name = uuid.uuid4().hex
        prefill = asyncio.create_task(self._prefill(request, transfer_id=name))
        decode = asyncio.create_task(self._decode(request, self._known | {"transfer_id": name}))
        # decode would wait in vain for a prompt that prefill has refused, or died of
        await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_EXCEPTION)
        if prefill.done() and prefill.exception():
            decode.cancel()
            self._known = {}
            await prefill
        return await decode

    async def _prefill(self, request: web.Request, **more: object) -> dict[str, object]:
        """What decode is to be told. Raises ClientError."""
        body = prefill_request(await request.json(), **more)
        async with self._session.post(
            self._prefill_url, json=body, headers=_headers(request)
        ) as answer:
            if answer.status != web.HTTPOk.status_code:
                raise ClientResponseError(
                    answer.request_info, (), status=answer.status, message=await answer.text()
                )
            parameters: dict[str, object] = (await answer.json())["kv_transfer_params"]
        self._known = {k: value for k, value in parameters.items() if k not in _OF_THE_PROMPT}
        return parameters

    async def _decode(
        self, request: web.Request, parameters: dict[str, object]
    ) -> web.StreamResponse:
        body = await request.json() | {"kv_transfer_params": parameters}
        async with self._session.post(
            self._decode_url, json=body, headers=_headers(request)
        ) as decoded:
            answer = web.StreamResponse(status=decoded.status)
            answer.content_type = decoded.content_type
            await answer.prepare(request)
            async for chunk in decoded.content.iter_any():
                await answer.write(chunk)
            return answer


def _headers(request: web.Request) -> dict[str, str]:
    """The same name in both servers' logs."""
    if "id" not in request:
        request["id"] = request.headers.get("X-Request-Id", uuid.uuid4().hex)
    return {"X-Request-Id": request["id"]}


def main(
    prefill: Annotated[str, typer.Option(help="http://HOST:PORT/v1/completions of prefill.")],
    decode: Annotated[str, typer.Option(help="The same of decode.")],
    port: Annotated[int, typer.Option(min=1, max=65535)],
    host: str = "127.0.0.1",
    overlap: Annotated[bool, typer.Option(help="Ask both at once.")] = False,
) -> None:
    """Send each completion to prefill first, and then to decode."""
    proxy = Proxy(prefill, decode, overlaps=overlap)
    web.run_app(proxy.application(), host=host, port=port, print=None)


if __name__ == "__main__":
    typer.run(main)
