"""Who may ask, how much and how long: what stands between the port and the API.

A server on this machine is within reach of every web page that its user opens: by a post to
http://127.0.0.1, or by a name that is made to point there (DNS rebinding). So a server on a loopback
address answers to its own names alone, and no request of a page of another origin gets through. From other
machines nothing is answered without the key. Invariant: no body is read beyond the limit, and none before
all that its headers say is in order.
"""

import asyncio
import hmac
import json
from dataclasses import dataclass
from urllib.parse import urlsplit

from firstwords.server.protocol import ApiError

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server bears.

    Attributes:
        body: bytes of a request.
        turns: messages of a request.
        requests: that are being answered, or wait for their turn; one more gets 429.
        body_seconds: in which a body has to arrive.
        seconds: after which an answer is broken off, also one that its reader does not read.
    """

    body: int = 1_000_000
    turns: int = 1_000
    requests: int = 64
    body_seconds: float = 20
    seconds: float = 600


class Guard:
    """ASGI middleware that lets through what it should, with its body read, and ends it with its client.

    Args:
        app: what answers.
        limits: see there.
        key: without which nothing but the page and `/health` is answered; None asks for none.
        loopback: the port can be reached from this machine alone.
    """

    def __init__(self, app, limits: Limits, *, key: str | None, loopback: bool):
        self.app = app
        self.limits = limits
        self.loopback = loopback
        self._key = None if key is None else key.encode()
        self._busy = 0

    async def __call__(self, scope, receive, send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _Sender(send)
        counted = False
        try:
            headers = _read_headers(scope)
            self._check(scope, headers)
            counted = self._count(scope)
            body = await self._read_body(receive)
            await self._answer(scope, body, receive, send)
        except ApiError as error:
            await send.refuse(error)
        except _Gone:
            pass
        finally:
            self._busy -= counted

    def _check(self, scope, headers: dict[str, str]) -> None:
        _check_origin(headers, self.loopback)
        if scope["path"].startswith("/v1/"):
            self._check_key(headers)
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "Content-Type: must be application/json; set it")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.limits.body:
            raise self._refuse_body()

    def _check_key(self, headers: dict[str, str]) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            text = "Authorization: is not 'Bearer' with this server's key; give the key"
            raise ApiError(401, text, code="invalid_api_key")

    def _count(self, scope) -> bool:
        if scope["method"] != "POST":
            return False
        if self._busy >= self.limits.requests:
            text = f"server: {self._busy} requests are being answered, the most that it takes; try again"
            raise ApiError(429, text, code="rate_limit_exceeded", retry_after=1)
        self._busy += 1
        return True

    def _refuse_body(self) -> ApiError:
        text = f"body: is longer than {self.limits.body:,} bytes; send less"
        return ApiError(413, text, code="request_too_large")

    async def _read_body(self, receive) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limits.body:
                        raise self._refuse_body()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            text = f"body: did not arrive within {self.limits.body_seconds:g} seconds; send it again"
            raise ApiError(408, text) from None

    async def _answer(self, scope, body: bytes, receive, send: "_Sender") -> None:
        """Run the app until it has answered, its client goes, or the time is over."""
        work = asyncio.create_task(self.app(scope, _replay(body), send))
        gone = asyncio.create_task(_wait_until_gone(receive))
        try:
            done, _ = await asyncio.wait(
                {work, gone}, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})
        if work in done:
            work.result()
        elif not done:
            raise ApiError(504, f"server: no answer within {self.limits.seconds:g} seconds; ask for less")


class _Gone(Exception):
    """The client has left."""


class _Sender:
    """Sends an answer with our headers, and knows whether it has begun."""

    def __init__(self, send):
        self._send = send
        self._begun = False

    async def __call__(self, message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            known = {name for name, _ in message["headers"]}
            ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            more = [(name, value) for name, value in ours if name not in known]
            message = {**message, "headers": [*message["headers"], *more]}
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Send the error; where an answer has begun, its connection is broken off instead."""
        if self._begun:
            return
        body = json.dumps(error.body).encode("ascii")
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": error.status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})


def _read_headers(scope) -> dict[str, str]:
    """Return the headers by name; one that decides something may stand there once."""
    pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
    names = [name for name, _ in pairs]
    for name in ("host", "origin", "authorization", "content-length", "content-type"):
        if names.count(name) > 1:
            raise ApiError(400, f"{name}: stands there more than once; send it once")
    return dict(pairs)


def _check_origin(headers: dict[str, str], loopback: bool) -> None:
    """Refuse requests by a name that is not ours, and those of pages of another origin.

    Raises:
        ApiError: 403.
    """
    host = headers.get("host", "")
    if loopback and _find_name(host) not in LOOPBACK:
        text = f"Host: {host[:80]!r} is no name of this server; use 127.0.0.1, or start it with --host"
        raise ApiError(403, text)
    origin = headers.get("origin")
    if origin is not None and _find_netloc(origin) != host.lower():
        raise ApiError(403, f"Origin: {origin[:80]!r} is another page than this server's; open this one's")
    site, mode = headers.get("sec-fetch-site"), headers.get("sec-fetch-mode")
    if site in ("cross-site", "same-site") and mode != "navigate":
        raise ApiError(403, "Sec-Fetch-Site: the request is of another page than this server's")


def _find_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _find_netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _replay(body: bytes):
    """Return a `receive` that gives the body once, and nothing after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        return await asyncio.Future()

    return receive


async def _wait_until_gone(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
