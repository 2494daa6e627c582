"""Prompt ids -> reply ids, one at a time: the one place that decodes.

    list(stream_ids(model, [258, 72, 105, 260, 259], stop_ids={260}))   ->  [72, 101, 121, 260]

What was read is kept as keys and values, so that each step reads one token a stream.
Invariant: the reply to a prompt depends on the prompt and the `Sampling` alone, not on the other
streams of its batch (but for the rounding of batched products: two ids whose logits agree to 1e-6
or so may change places).
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from firstwords.errors import BadData, BadFlag, Diverged


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next id is drawn from the logits; the default is greedy.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest id, where only the penalty matters.
        top_p: keep the fewest likeliest ids that together reach this probability (Holtzman et al.
            2020); 1 keeps all.
        top_k: keep the k likeliest ids; 0 keeps all.
        min_p: keep ids with at least this share of the likeliest one's probability; 0 keeps all.
        repetition_penalty: above 1 makes ids that this reply already holds less likely (Keskar et
            al. 2019). The prompt does not count: an answer has to name what was asked about.
        seed: equal seeds give equal replies to equal prompts; None draws anew each time.
        max_new_tokens: the longest reply in tokens, its stop id counted; None: as far as fits.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self):
        most = self.max_new_tokens
        checks = [
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 is off"),
            ("max_new_tokens", most is None or most >= 1, "1 or more"),
        ]
        for name, holds, allowed in checks:
            if not holds:
                raise BadFlag(f"--{name}: is {getattr(self, name)}; give a number {allowed}")


GREEDY = Sampling()


def stream_ids(
    model: GPT2LMHeadModel,
    input_ids: list[int],
    *,
    stop_ids: Iterable[int],
    banned_ids: Iterable[int] = (),
    sampling: Sampling = GREEDY,
    limit: int | None = None,
) -> Iterator[int]:
    """Yield the reply to one prompt, id by id; a stop id is yielded too and ends it.

    Args: as `stream_batch`, for one prompt of L ids.

    Raises: as `stream_batch`, at the first id.
    """
    steps = stream_batch(
        model,
        [input_ids],
        stop_ids=stop_ids,
        banned_ids=banned_ids,
        sampling=sampling,
        limits=[limit],
    )
    for ((_, token_id),) in steps:
        yield token_id


def generate_batch(
    model: GPT2LMHeadModel,
    prompts: Sequence[list[int]],
    *,
    stop_ids: Iterable[int],
    banned_ids: Iterable[int] = (),
    sampling: Sampling = GREEDY,
    limits: Sequence[int | None] | None = None,
    pad_id: int = 0,
    batch_size: int = 128,
) -> list[list[int]]:
    """Return the replies to many prompts, each as `stream_ids` gives it.

    Prompts of like length are decoded together, so that little is padded.

    Args:
        batch_size: streams at once. The cache of one takes 2 * n_layer * n_embd numbers a token.

    The others and the errors: as `stream_batch`.
    """
    replies: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        steps = stream_batch(
            model,
            [prompts[row] for row in rows],
            stop_ids=stop_ids,
            banned_ids=banned_ids,
            sampling=sampling,
            limits=None if limits is None else [limits[row] for row in rows],
            pad_id=pad_id,
        )
        for step in steps:
            for place, token_id in step:
                replies[rows[place]].append(token_id)
    return replies


@torch.inference_mode()
def stream_batch(
    model: GPT2LMHeadModel,
    prompts: Sequence[list[int]],
    *,
    stop_ids: Iterable[int],
    banned_ids: Iterable[int] = (),
    sampling: Sampling = GREEDY,
    limits: Sequence[int | None] | None = None,
    pad_id: int = 0,
) -> Iterator[list[tuple[int, int]]]:
    """Decode several prompts together, a step at a time; a stream that ends leaves at once.

    Args:
        model: in eval mode, with an attention that honours masks (`sdpa` or `eager`).
        prompts: B lists of ids, none empty; they may differ in length.
        stop_ids: an id of these ends its stream.
        banned_ids: ids that are never generated: the surplus of the padded vocabulary, control ids.
        sampling: the same for all streams.
        limits: the most new ids of each stream, or None; `sampling.max_new_tokens` and the model's
            `n_positions` limit them too.
        pad_id: stands left of the shorter prompts, where nothing attends to it.

    Yields:
        for each step the `(place in prompts, id)` of every stream that is still going on.

    Raises:
        BadData: when a prompt is longer than `n_positions`.
        Diverged: when logits are NaN or infinite.
    """
    assert not model.training, "dropout is on: call model.eval() before decoding"
    assert model.config._attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS, "masks are ignored"
    stop_ids = set(stop_ids)
    banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=model.device)
    rooms = [
        _find_room(model, prompt, sampling, limit)
        for prompt, limit in zip(prompts, limits or [None] * len(prompts), strict=True)
    ]
    replies: list[list[int]] = [[] for _ in prompts]
    generators = [random.Random(sampling.seed) for _ in prompts]
    rows = [row for row, room in enumerate(rooms) if room > 0]
    streams = _Streams(model, [prompts[row] for row in rows], pad_id)
    while rows:
        logits = streams.read()
        logits.index_fill_(1, banned, -math.inf)
        _penalise(logits, [replies[row] for row in rows], sampling.repetition_penalty)
        _check_finite(logits)
        draws = [generators[row].random() for row in rows]
        picked = sample(logits, sampling, draws).tolist()
        for row, token_id in zip(rows, picked, strict=True):
            replies[row].append(token_id)
        yield list(zip(rows, picked, strict=True))
        kept = [
            place
            for place, row in enumerate(rows)
            if picked[place] not in stop_ids and len(replies[row]) < rooms[row]
        ]
        order = _fill_gaps(kept)
        rows = [rows[place] for place in order]
        streams.feed([picked[place] for place in order], order)


def _find_room(model: GPT2LMHeadModel, prompt: list[int], sampling: Sampling, limit) -> int:
    assert prompt, "a prompt needs at least one id"
    positions = model.config.n_positions
    if len(prompt) > positions:
        raise BadData(
            f"prompt: is {len(prompt)} tokens long, the model has {positions} positions; shorten it"
        )
    limits = [positions - len(prompt), sampling.max_new_tokens, limit]
    return min(number for number in limits if number is not None)


def _fill_gaps(kept: list[int]) -> list[int]:
    """Arrange the places `kept` so that few streams move: [0, 2, 3, 5] -> [0, 5, 2, 3]."""
    movers = [place for place in kept if place >= len(kept)]
    stayers = set(kept)
    return [place if place in stayers else movers.pop() for place in range(len(kept))]


class _RoomyLayer(DynamicLayer):
    """The keys and values of one layer, as a view into a buffer with room to the right.

    A step writes one column; a stream that ends has its row overwritten by another's; padding that
    nobody needs any more falls out of the view. The stock layer joins old and new by `torch.cat`:
    at 64 streams of `small_test` that was four fifths of the time.
    """

    def __init__(self):
        super().__init__()
        self.buffer: Tensor | None = None  # (2, B, n_head, columns, head size): keys, values
        self.start = self.end = 0  # the columns in use

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Append keys and values (B, n_head, new columns, head size); return all of them."""
        self.is_initialized = True
        rows, _, new, _ = key_states.shape
        if self.buffer is None or self.end + new > self.buffer.shape[3]:
            self._grow(key_states)
        end = self.end + new
        self.buffer[0, :rows, :, self.end : end] = key_states
        self.buffer[1, :rows, :, self.end : end] = value_states
        self.end = end
        self.keys, self.values = self.buffer[:, :rows, :, self.start : end]
        return self.keys, self.values

    def _grow(self, key_states: Tensor) -> None:
        rows, heads, new, size = key_states.shape
        old, used = self.buffer, self.end - self.start
        room = max(64, (used + new) // 2)
        self.buffer = key_states.new_empty(2, rows, heads, used + new + room, size)
        if old is not None:
            self.buffer[:, :, :, :used] = old[:, :rows, :, self.start : self.end]
        self.start, self.end = 0, used

    def keep(self, order: list[int], cut: int) -> None:
        """Keep the streams at the places `order`, and drop `cut` columns on the left."""
        self.start += cut
        used = self.buffer[:, :, :, self.start : self.end]
        moved = [place for place, source in enumerate(order) if source != place]
        if moved:
            used[:, moved] = used[:, [order[place] for place in moved]]
        self.keys, self.values = used[:, : len(order)]


class _Streams:
    """What the model has read of B prompts, left-padded to one width.

    Every stream stands at the same column; `pads` columns left of each prompt are hidden by the
    mask, and positions are counted from the prompt's first token.
    """

    def __init__(self, model: GPT2LMHeadModel, prompts: list[list[int]], pad_id: int):
        self.model = model
        self.width = max(map(len, prompts), default=0)
        self.pads = [self.width - len(prompt) for prompt in prompts]
        self.cache = Cache(layers=[_RoomyLayer() for _ in range(model.config.n_layer)])
        rows = [[pad_id] * pad + prompt for pad, prompt in zip(self.pads, prompts, strict=True)]
        self.next_ids = torch.tensor(rows, dtype=torch.long, device=model.device)  # (B, width)

    def read(self) -> Tensor:
        """Read `next_ids` and return the float32 logits of what follows, of shape (B, V)."""
        mask, positions = self._build_mask()
        output = self.model(
            input_ids=self.next_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _build_mask(self) -> tuple[Tensor | None, Tensor | None]:
        # Without padding both are None: the model then counts the positions itself, and attention
        # takes its fast causal path. A cache object keeps None from being read as packed rows.
        if not any(self.pads):
            return None, None
        pads = torch.tensor(self.pads, device=self.next_ids.device).unsqueeze(1)  # (B, 1)
        columns = torch.arange(self.width, device=pads.device)
        positions = (columns - pads).clamp(min=0)  # (B, width)
        return columns >= pads, positions[:, -self.next_ids.shape[1] :]

    def feed(self, picked: list[int], order: list[int]) -> None:
        """Keep the streams at the places `order`, and make `picked` what they read next."""
        self.next_ids = torch.tensor(picked, device=self.next_ids.device).unsqueeze(1)  # (B, 1)
        if 0 < len(order) < len(self.pads):
            pads = [self.pads[place] for place in order]
            cut = min(pads)  # columns that no remaining stream looks at
            for layer in self.cache.layers:
                layer.keep(order, cut)
            self.pads = [pad - cut for pad in pads]
            self.width -= cut
        self.width += 1


def _penalise(logits: Tensor, replies: list[list[int]], penalty: float) -> None:
    if penalty == 1:
        return
    for row, reply in zip(logits, replies, strict=True):
        said = torch.tensor(sorted(set(reply)), dtype=torch.long, device=row.device)
        scores = row[said]
        row[said] = torch.where(scores > 0, scores / penalty, scores * penalty)


def _check_finite(logits: Tensor) -> None:
    # The largest logit is NaN when any is; -inf is what banned ids have.
    if not logits.amax(-1).isfinite().all():
        raise Diverged(
            "model: its logits are NaN or infinite, the weights are spoilt; take another checkpoint"
        )


def sample(logits: Tensor, sampling: Sampling, draws: Sequence[float]) -> Tensor:
    """Pick one id a row.

    Args:
        logits: (B, V) float32; ids at -inf are never picked. Overwritten.
        sampling: temperature and filters; the penalty is not applied here.
        draws: B numbers in [0, 1), what chance decides. At the same number the same place of the
            cumulated distribution is picked, on any device and beside any neighbours.

    Returns:
        ids of shape (B,).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits.div_(sampling.temperature), sampling).softmax(-1)
    cumulated = probabilities.cumsum(-1)
    # The largest float32 below 1 keeps the threshold below the total, whatever is rounded.
    draws = torch.tensor(draws, dtype=torch.float32, device=logits.device).clamp(max=1 - 2**-24)
    threshold = draws * cumulated[:, -1]
    return torch.searchsorted(cumulated, threshold.unsqueeze(1), right=True).squeeze(1)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Set the logits (B, V) of the ids that top_k, top_p and min_p drop to -inf, in that order.

    Each filter sees the distribution that the one before left. The likeliest id always stays.
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        weakest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -math.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of the likelier ids
        dropped = torch.zeros_like(before, dtype=torch.bool)
        dropped.scatter_(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -math.inf)
    if sampling.min_p > 0:
        floor = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < floor, -math.inf)
    return logits
