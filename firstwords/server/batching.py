"""Prompts of many clients -> their replies, id by id, decoded together in one thread.

    batcher = Batcher(model, stop_ids={260}, banned_ids=())
    async for token_id in batcher.stream([258, 72, 105, 260, 259], Sampling()): ...

Between two steps streams join and leave, so that nobody waits for somebody else's reply to end. Invariant:
a stream that its reader has left is decoded for one step more at most.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

import torch
from transformers import GPT2LMHeadModel

from firstwords.generate import Decoder, Sampling, Stream, draw, fill_gaps

# Tokens of new prompts that are read between two steps: while they are, the others wait.
JOIN_TOKENS = 1024


class Closing(Exception):
    """The server ends; no reply is begun or finished any more."""


class Job:
    """A stream and who gets its ids.

    Args:
        stream: the reply on its way.
        deliver: called from the decoding thread with each id, at the end with None, or with an error.
    """

    def __init__(self, stream: Stream, deliver: Callable[[int | Exception | None], None]):
        self.stream = stream
        self.deliver = deliver
        self.done = False


class Batcher:
    """Decodes for many clients at once.

    Args:
        model: in eval mode, on its device.
        stop_ids, banned_ids: as in `generate.stream_batch`.
        max_streams: decoded together; more wait for a place. The cache of one takes
            2 * n_layer * n_embd numbers a token.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        *,
        stop_ids: Iterable[int],
        banned_ids: Iterable[int],
        max_streams: int = 16,
    ):
        self.model = model
        self.max_streams = max_streams
        self._stop_ids = set(stop_ids)
        self._banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=model.device)
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Streams that are being decoded, and streams that wait."""
        return len(self._running), len(self._waiting)

    async def stream(
        self, prompt: list[int], sampling: Sampling, limit: int | None = None
    ) -> AsyncIterator[int]:
        """Yield the reply's ids, a stop id too; closing the iterator frees its place at once.

        The ids wait for a slow reader; nobody else does.

        Raises:
            Closing: when the server ends.
            Diverged: when the model gives NaN.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue()
        stream = Stream(self.model, prompt, sampling, limit)
        job = Job(stream, lambda event: loop.call_soon_threadsafe(arrived.put_nowait, event))
        self._submit(job)
        try:
            while (event := await arrived.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            job.done = True

    def close(self) -> None:
        """End all streams with `Closing`, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _submit(self, job: Job) -> None:
        with self._changed:
            if self._closed:
                raise Closing
            self._waiting.append(job)
            self._changed.notify()

    def _run(self) -> None:
        while not self._closed:
            try:
                self._decode()
            except Exception as error:  # whatever it is, those who wait must hear of it
                self._fail(error)
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
        self._fail(Closing())

    def _decode(self) -> None:
        """Decode until nobody is left; the cache goes with the decoder."""
        decoder = Decoder(self.model)
        while not self._closed:
            kept = [place for place, job in enumerate(self._running) if not job.done]
            order = fill_gaps(kept)
            decoder.keep(order)
            self._running = [self._running[place] for place in order]
            if self._running:
                self._draw(decoder.step([job.stream.reply[-1] for job in self._running]), self._running)
            if new := self._admit():
                self._running += new
                self._draw(decoder.join([job.stream.prompt for job in new]), new)
            if not self._running:
                return

    def _admit(self) -> list[Job]:
        """Take from those who wait as many as have a place and are read in a bearable time."""
        new: list[Job] = []
        width = 0
        with self._changed:
            while self._waiting and len(self._running) + len(new) < self.max_streams:
                width = max(width, len(self._waiting[0].stream.prompt))
                if new and width * (len(new) + 1) > JOIN_TOKENS:
                    break
                job = self._waiting.popleft()
                if not job.done:
                    new.append(job)
        return new

    def _draw(self, logits: torch.Tensor, jobs: list[Job]) -> None:
        for job, token_id in zip(jobs, draw(logits, [job.stream for job in jobs], self._banned), strict=True):
            if job.done:
                continue
            job.deliver(token_id)
            if job.stream.ends(self._stop_ids):
                job.done = True
                job.deliver(None)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            jobs = [*self._running, *(self._waiting if self._closed else ())]
            self._running = []
            if self._closed:
                self._waiting.clear()
        for job in jobs:
            if not job.done:
                job.done = True
                job.deliver(error)
