"""The routes: `/v1/chat/completions`, `/v1/models`, `/health`, and the page's files.

    app = build_app(load_session("runs/chat"), name="chat")

Each request is a conversation of its own: the client keeps the history and sends it whole, as OpenAI's do.
"""

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from firstwords.errors import BadData, FirstwordsError
from firstwords.server import page
from firstwords.server.batching import Batcher, Closing
from firstwords.server.guard import Guard, Limits
from firstwords.server.protocol import Answer, ApiError, ChatRequest, ReplyText, format_event
from firstwords.session import ChatSession, Plan


def build_app(
    session: ChatSession,
    *,
    name: str,
    key: str | None = None,
    loopback: bool = True,
    web: bool = False,
    max_streams: int = 16,
    limits: Limits | None = None,
) -> Guard:
    """Return the ASGI app of one model.

    Args:
        session: lends its model, context, system message and sampling, and stays as it is.
        name: of the model, for clients.
        key, loopback: as `Guard`.
        web: serve the page too.
        max_streams: as `Batcher`.
        limits: as `Guard`.
    """
    limits = limits or Limits()
    api = Api(session, name, limits, max_streams)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=api.live)
    app.state.api = api
    app.post("/v1/chat/completions", response_model=None)(api.complete)
    app.get("/v1/models")(api.list_models)
    app.get("/v1/models/{name:path}")(api.describe_model)
    app.get("/health")(api.tell_health)
    if web:
        app.include_router(page.router)
    for kind in (ApiError, FirstwordsError, Closing, RequestValidationError, HTTPException, Exception):
        app.exception_handler(kind)(answer_error)
    return Guard(app, limits, key=key, loopback=loopback)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that can be answered."""

    body: ChatRequest
    session: ChatSession
    plan: Plan


class Api:
    """The endpoints, over one model."""

    def __init__(self, session: ChatSession, name: str, limits: Limits, max_streams: int):
        self.session = session
        self.name = name
        self.limits = limits
        self.batcher = Batcher(
            session.model,
            stop_ids=session.stop_ids,
            banned_ids=session.banned_ids,
            max_streams=max_streams,
        )

    @asynccontextmanager
    async def live(self, app: FastAPI) -> AsyncIterator[None]:
        """Stop decoding when the server ends."""
        yield
        self.batcher.close()

    async def complete(self, body: ChatRequest) -> Response:
        """Answer a conversation, whole or as a stream."""
        asked = await asyncio.to_thread(self._prepare, body)
        answer = Answer(self.name, asked.plan, asked.session.context)
        text = ReplyText(self.session.tokenizer, body.stops)
        if body.stream:
            return _Events(self._stream(asked, answer, text), media_type="text/event-stream")
        async with aclosing(self._decode(asked, text)) as pieces:
            reply = "".join([piece async for piece in pieces])
        return JSONResponse(answer.whole(reply, len(text.ids), self._find_reason(text)))

    def _prepare(self, body: ChatRequest) -> _Asked:
        """Check the request and encode its prompt."""
        if body.model != self.name:
            raise self._refuse_model(body.model)
        body.check(self.limits.turns)
        *turns, question = body.parse_messages()
        own = copy.copy(self.session)
        own.sampling = body.build_sampling(self.session.sampling)
        try:
            if turns and turns[0].role == "system":
                own.set_system(turns.pop(0).content)
            own.messages = [*own.messages, *turns]
            plan = own.plan(question.content)
        except BadData as error:
            raise _refuse_length(str(error)) from None
        if plan.evicted and body.truncation != "auto":
            raise _refuse_length(
                f"messages: do not fit into the context of {own.context} tokens, of which {own.reserve} are "
                f"kept for the reply, but for the newest; send fewer, or truncation: 'auto'"
            )
        return _Asked(body, own, plan)

    async def _decode(self, asked: _Asked, text: ReplyText) -> AsyncIterator[str]:
        ids = self.batcher.stream(asked.plan.prompt, asked.session.sampling, asked.plan.limit)
        async with aclosing(ids):
            async for token_id in ids:
                if piece := text.push(token_id):
                    yield piece
                if text.stopped:
                    return
        if piece := text.finish():
            yield piece

    async def _stream(self, asked: _Asked, answer: Answer, text: ReplyText) -> AsyncIterator[bytes]:
        yield answer.chunk({"role": "assistant", "content": ""})
        try:
            async with aclosing(self._decode(asked, text)) as pieces:
                async for piece in pieces:
                    yield answer.chunk({"content": piece})
        except (FirstwordsError, Closing) as error:
            yield format_event(_describe(error).body)
            return
        yield answer.chunk({}, self._find_reason(text))
        if asked.body.stream_options and asked.body.stream_options.include_usage:
            yield answer.usage_chunk(len(text.ids))
        yield b"data: [DONE]\n\n"

    def _find_reason(self, text: ReplyText) -> str:
        ended = text.stopped or text.ids[-1] in self.session.stop_ids
        return "stop" if ended else "length"

    def list_models(self) -> dict:
        """Tell the one model there is."""
        return {"object": "list", "data": [self.describe_model(self.name)]}

    def describe_model(self, name: str) -> dict:
        """Tell what is known of a model, its context in tokens too."""
        if name != self.name:
            raise self._refuse_model(name)
        step = self.session.manifest.get("step")
        size = {"context": self.session.context, "parameters": self.session.model.num_parameters()}
        return {"id": name, "object": "model", "created": 0, "owned_by": "firstwords", "step": step, **size}

    def tell_health(self) -> dict:
        """Tell that the server lives, and what it has to do."""
        running, waiting = self.batcher.load
        return {"status": "ok", "model": self.name, "running": running, "waiting": waiting}

    def _refuse_model(self, name: str) -> ApiError:
        text = f"model: {name[:80]!r} is not here; this server has {self.name!r}"
        return ApiError(404, text, param="model", code="model_not_found")


class _Events(StreamingResponse):
    """A stream whose reply ends with it, also when its client goes while a chunk is being sent."""

    async def __call__(self, scope, receive, send) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


def _refuse_length(text: str) -> ApiError:
    return ApiError(400, text, param="messages", code="context_length_exceeded")


def _describe(error: Exception) -> ApiError:
    """Return any error as one in OpenAI's form."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Closing):
        return ApiError(503, "server: is ending; ask again when it is back", retry_after=5)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return ApiError(400, "body: is no JSON; send a JSON object")
        place = ".".join(str(part) for part in first["loc"][1:])
        text = f"{place or 'body'}: {first['msg'][:200]}; see OpenAI's reference of chat completions"
        return ApiError(400, text, param=place or None)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"request: {error.detail}; see /v1/models for what there is")
    if isinstance(error, FirstwordsError):
        return ApiError(400 if isinstance(error, BadData) else 500, str(error))
    return ApiError(500, f"server: failed with {type(error).__name__}; its log has more")


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Answer in OpenAI's form."""
    error = _describe(error)
    return JSONResponse(error.body, error.status, headers=error.headers)
