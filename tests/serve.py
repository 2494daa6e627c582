"""What the tests of the server share: a tiny model behind a real port, and one that says what it is told."""

import threading
from contextlib import contextmanager

import uvicorn
from tiny import BYTES, build_babbler

from firstwords.server.api import build_app
from firstwords.server.serving import name_address, open_port
from firstwords.session import ChatSession


def build_session(context=200, **options):
    """Return a session of a model that babbles, something else for each prompt."""
    model = build_babbler(n_positions=max(context, 256))
    return ChatSession(model, BYTES, context=context, **options)


class Told:
    """Stands in a `Batcher`'s place and says `reply(question)`; `gate`, when given, lets each id through."""

    load = (0, 0)

    def __init__(self, reply, gate=None):
        self.reply, self.gate = reply, gate
        self.questions, self.prompts, self.samplings, self.left = [], [], [], threading.Event()

    async def stream(self, prompt, sampling, limit=None):
        """Yield the ids of the reply, as `Batcher.stream` does."""
        self.prompts.append(BYTES.decode(prompt))
        self.samplings.append(sampling)
        text = self.prompts[-1].rpartition("<|user|>")[2]
        self.questions.append(text.removesuffix("<|assistant|>").removesuffix("<|end|>"))
        try:
            for token_id in BYTES.encode(self.reply(self.questions[-1])):
                if self.gate is not None:
                    await self.gate(self)
                yield token_id
            yield BYTES.end_id
        except GeneratorExit:
            self.left.set()
            raise

    def close(self):
        """Nothing runs."""


class Bare:
    """An app that stands at the port without its guard."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


@contextmanager
def serve(session=None, *, build=build_app, batcher=None, **options):
    """Serve on a free port from a thread; yields the address."""
    app = build(session or build_session(), **{"name": "tiny", **options})
    api = app.app.state.api
    if batcher is not None:
        api.batcher.close()
        api.batcher = batcher
    with open_port("127.0.0.1", 0) as port:
        config = uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
        thread.start()
        try:
            yield name_address(port)
        finally:
            api.batcher.close()
            server.should_exit = True
            thread.join()
