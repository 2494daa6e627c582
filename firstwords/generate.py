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
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

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
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100; 1 is off"),
            ("max_new_tokens", most is None or most >= 1, "1 or more"),
        ]
        for name, holds, allowed in checks:
            if not holds:
                raise BadFlag(f"--{name}: is {getattr(self, name)}; give a number {allowed}")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Choice:
    """A token of a reply, and what might have stood in its place.

    Attributes:
        token_id, probability: of the token, and how probable the model held it.
        others: the likeliest other ids with their probabilities, the likeliest first.
    """

    token_id: int
    probability: float
    others: list[tuple[int, float]]


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
) -> Iterator[list[tuple[int, int]]]:
    """Decode several prompts together, a step at a time; a stream that ends leaves at once.

    Args:
        model: in eval mode, on its device.
        prompts: B lists of ids, none empty; they may differ in length.
        stop_ids: an id of these ends its stream.
        banned_ids: ids that are never generated: the surplus of the padded vocabulary, control ids.
        sampling: the same for all streams.
        limits: the most new ids of each stream, or None; `sampling.max_new_tokens` and the model's
            `n_positions` limit them too.

    Yields:
        for each step the `(place in prompts, id)` of every stream that is still going on.

    Raises:
        BadData: when a prompt is longer than `n_positions`.
        Diverged: when logits are NaN or infinite.
    """
    decoder = Decoder(model)
    stop_ids = set(stop_ids)
    banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=model.device)
    streams = [
        Stream(model, prompt, sampling, limit)
        for prompt, limit in zip(prompts, limits or [None] * len(prompts), strict=True)
    ]
    rows = [row for row, stream in enumerate(streams) if stream.room > 0]
    if not rows:
        return
    logits = decoder.join([prompts[row] for row in rows])
    while True:
        picked = draw(logits, [streams[row] for row in rows], banned)
        yield list(zip(rows, picked, strict=True))
        kept = [place for place, row in enumerate(rows) if not streams[row].ends(stop_ids)]
        if not kept:
            return
        order = fill_gaps(kept)
        rows = [rows[place] for place in order]
        decoder.keep(order)
        logits = decoder.step([picked[place] for place in order])


class Stream:
    """One reply on its way: what it may still become, and what it is so far.

    Args:
        model, prompt, sampling, limit: as in `stream_batch`, for this stream.

    Attributes:
        reply: the ids that were drawn.
        room: the most ids that the reply may have.

    Raises:
        BadData: when the prompt is longer than `n_positions`.
    """

    def __init__(
        self, model: GPT2LMHeadModel, prompt: list[int], sampling: Sampling, limit: int | None = None
    ):
        self.prompt = prompt
        self.room = _find_room(model, prompt, sampling, limit)
        self.reply: list[int] = []
        self.chance = random.Random(sampling.seed)
        # What is left of the sampling decides which streams are drawn together.
        self.sampling = replace(sampling, seed=None, max_new_tokens=None)

    def ends(self, stop_ids: set[int]) -> bool:
        """Tell whether the newest id is the last one."""
        return self.reply[-1] in stop_ids or len(self.reply) >= self.room


@torch.inference_mode()
def draw(logits: Tensor, streams: Sequence[Stream], banned: Tensor) -> list[int]:
    """Draw the next id of each stream, as its own `Sampling` says, and put it behind its reply.

    Args:
        logits: (B, V) float32, as `Decoder` gives them; overwritten.
        streams: B, in the order of the rows.
        banned: ids that are never drawn.

    Raises:
        Diverged: when logits are NaN or infinite; nothing is drawn.
    """
    logits.index_fill_(1, banned, -math.inf)
    _check_finite(logits)
    alike: dict[Sampling, list[int]] = {}
    for row, stream in enumerate(streams):
        alike.setdefault(stream.sampling, []).append(row)
    for sampling, rows in alike.items():
        part = logits if len(rows) == len(streams) else logits[rows]
        _penalise(part, [streams[row].reply for row in rows], sampling.repetition_penalty)
        picked = sample(part, sampling, [streams[row].chance.random() for row in rows])
        for row, token_id in zip(rows, picked.tolist(), strict=True):
            streams[row].reply.append(token_id)
    return [stream.reply[-1] for stream in streams]


@torch.inference_mode()
def rank_ids(
    model: GPT2LMHeadModel,
    prompt: list[int],
    ids: list[int],
    *,
    banned_ids: Iterable[int] = (),
    num_others: int = 2,
) -> list[Choice]:
    """Return how probable the model holds each of `ids` behind the prompt and the ids before it.

    The probabilities are the model's own: at temperature 1, no filter, no penalty.

    Args:
        model, prompt, banned_ids: as in `stream_batch`; prompt and ids fit into `n_positions`.
        ids: of a reply.
        num_others: how many of the likeliest other ids are named.
    """
    if not ids:
        return []
    input_ids = torch.tensor([[*prompt, *ids[:-1]]], device=model.device)  # (1, T)
    logits = model(input_ids=input_ids, logits_to_keep=len(ids)).logits[0].float()  # (R, V)
    logits[:, sorted(banned_ids)] = -math.inf
    probabilities = logits.softmax(-1)
    best = probabilities.topk(min(num_others + 1, logits.shape[-1]))
    rows = zip(ids, probabilities, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Choice(
            token_id,
            row[token_id].item(),
            [pair for pair in zip(others, values, strict=True) if pair[0] != token_id][:num_others],
        )
        for token_id, row, others, values in rows
    ]


def _find_room(model: GPT2LMHeadModel, prompt: list[int], sampling: Sampling, limit) -> int:
    assert prompt, "a prompt needs at least one id"
    positions = model.config.n_positions
    if len(prompt) > positions:
        raise BadData(
            f"prompt: is {len(prompt)} tokens long, the model has {positions} positions; shorten it"
        )
    limits = [positions - len(prompt), sampling.max_new_tokens, limit]
    return min(number for number in limits if number is not None)


def fill_gaps(kept: list[int]) -> list[int]:
    """Arrange the places `kept` so that few streams move: [0, 2, 3, 5] -> [0, 5, 2, 3]."""
    movers = [place for place in kept if place >= len(kept)]
    stayers = set(kept)
    return [place if place in stayers else movers.pop() for place in range(len(kept))]


class Decoder:
    """A model that reads many streams, one token of each a step; streams join and leave in between.

        decoder = Decoder(model)
        logits = decoder.join([[258, 72], [258, 73, 74]])   # (2, V): what follows each prompt
        logits = decoder.step([99, 100])                    # (2, V): after one more id a row
        decoder.keep([1])                                   # row 0 ends; row 1 is row 0 from now on
        logits = decoder.join([[258, 75]])                  # (1, V): a row more, in the middle of it all

    Each stream is a row; the caller keeps its own list of streams in the order of the rows. Rows share no
    position: each begins at column 0 of the cache and a mask hides what lies behind its end. So a prompt
    needs no padding on its left, and what a row gives does not depend on the others, but for the
    rounding of batched products (`generate`'s invariant; int8 weights, whose inputs are scaled for all
    rows together, add to it).

    The forward is GPT-2's, over the modules of the model itself: the weights are not copied, and a module
    that was replaced (`quantize`) is used. Against `transformers`' it leaves out what decoding never needs
    (hooks, masks of ones, cache objects).

    Args:
        model: in eval mode, on its device; `n_positions` is the longest row.

    Attributes:
        lengths: tokens that each row has read.
    """

    def __init__(self, model: GPT2LMHeadModel):
        assert not model.training, "dropout is on: call model.eval() before decoding"
        self.model = model
        self.lengths: list[int] = []
        size = model.config.n_embd // model.config.n_head
        shape = (model.config.n_layer, 2, 0, model.config.n_head, 0, size)
        self._cache = torch.zeros(shape, dtype=model.dtype, device=model.device)

    @torch.inference_mode()
    def join(self, prompts: Sequence[list[int]]) -> Tensor:
        """Read n prompts, none empty, as new rows behind the others.

        Returns:
            the float32 logits (n, V) of what follows each.
        """
        first, width = len(self.lengths), max(map(len, prompts))
        self._reserve(first + len(prompts), width)
        # Behind a shorter prompt stands id 0: causal attention keeps it from being seen, and the steps
        # write over it.
        padded = [prompt + [0] * (width - len(prompt)) for prompt in prompts]
        ids = torch.tensor(padded, device=self.model.device)  # (n, T)

        def attend(layer: int, projected: Tensor, scale: float) -> Tensor:
            query, key, value = projected.permute(2, 0, 3, 1, 4)  # (n, H, T, D) each
            self._cache[layer, 0, first:, :, :width][: len(prompts)] = key
            self._cache[layer, 1, first:, :, :width][: len(prompts)] = value
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

        hidden = self._read(ids, torch.arange(width, device=ids.device), attend)
        lengths = [len(prompt) for prompt in prompts]
        self.lengths += lengths
        last = torch.tensor(lengths, device=ids.device) - 1
        return self._score(hidden[torch.arange(len(prompts), device=ids.device), last])

    @torch.inference_mode()
    def step(self, ids: Sequence[int]) -> Tensor:
        """Read one id a row, for all B rows.

        Returns:
            the float32 logits (B, V) of what follows each.
        """
        rows, width = len(self.lengths), max(self.lengths) + 1
        self._reserve(rows, width)
        ends = torch.tensor(self.lengths, device=self.model.device)  # (B,)
        places, mask = torch.arange(rows, device=ends.device), None
        if min(self.lengths) + 1 < width:
            mask = torch.arange(width, device=ends.device) <= ends[:, None, None, None]  # (B, 1, 1, width)

        def attend(layer: int, projected: Tensor, scale: float) -> Tensor:
            query, key_value = projected[:, 0, :1].transpose(1, 2), projected[:, 0, 1:]
            cache = self._cache[layer]
            if mask is None:
                cache[:, :rows, :, width - 1] = key_value.transpose(0, 1)  # (2, B, H, D)
            else:
                cache[:, places, :, ends] = key_value  # (B, 2, H, D)
            key, value = cache[:, :rows, :, :width]
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

        new = torch.tensor(ids, device=ends.device)[:, None]
        hidden = self._read(new, ends[:, None], attend)
        self.lengths = [length + 1 for length in self.lengths]
        return self._score(hidden[:, 0])

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> None:
        """Keep these rows in this order, which they are numbered by from now on; the others leave.

        Least is moved when the last rows fill the gaps: [0, 3, 2] rather than [0, 2, 3].
        """
        moved = [place for place, row in enumerate(rows) if place != row]
        if moved:
            self._cache[:, :, moved] = self._cache[:, :, [rows[place] for place in moved]]
        self.lengths = [self.lengths[row] for row in rows]

    def _reserve(self, rows: int, columns: int) -> None:
        """Make room in the cache (n_layer, 2, rows, n_head, columns, head size): keys, values."""
        old_rows, old_columns = self._cache.shape[2], self._cache.shape[4]
        if rows <= old_rows and columns <= old_columns:
            return
        shape = list(self._cache.shape)
        shape[2] = max(rows, old_rows)
        if columns > old_columns:
            shape[4] = min(columns + max(64, columns // 2), self.model.config.n_positions)
        old, self._cache = self._cache, self._cache.new_zeros(shape)
        self._cache[:, :, :old_rows, :, :old_columns] = old

    def _read(self, ids: Tensor, positions: Tensor, attend) -> Tensor:
        """Return the last hidden states (n, T, n_embd) of ids (n, T)."""
        body = self.model.transformer
        heads = (*ids.shape, 3, self.model.config.n_head, -1)
        hidden = body.wte(ids) + body.wpe(positions)
        for layer, block in enumerate(body.h):
            attention = block.attn
            projected = _multiply(attention.c_attn, block.ln_1(hidden)).view(heads)
            seen = attend(layer, projected, attention.scaling)  # (n, H, T, D)
            hidden = hidden + _multiply(attention.c_proj, seen.transpose(1, 2).flatten(2))
            inner = block.mlp.act(_multiply(block.mlp.c_fc, block.ln_2(hidden)))
            hidden = hidden + _multiply(block.mlp.c_proj, inner)
        return body.ln_f(hidden)

    def _score(self, hidden: Tensor) -> Tensor:
        return _multiply(self.model.lm_head, hidden).float()


def _multiply(matrix: nn.Module, x: Tensor) -> Tensor:
    """Return `matrix(x)`; one row on a CPU by as many parts of the weights as there are threads.

    MKL reads the weights for one row with one thread, or with two that wait for one another. In parts
    it reads as fast as a sum does: the best step of the 124M shape in
    fp32 took 24 ms in one run and 35 without it in another (2 threads).
    """
    kind = type(matrix)
    if x.numel() != x.shape[-1] or kind not in (Conv1D, nn.Linear):
        return matrix(x)
    weight, bias = matrix.weight, matrix.bias
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return matrix(x)
    parts = math.gcd(torch.get_num_threads(), weight.shape[0])
    if kind is Conv1D:  # (in, out): each part has some of the inputs
        product = torch.bmm(x.reshape(parts, 1, -1), weight.view(parts, -1, weight.shape[1])).sum(0)
    else:  # (out, in): each part has some of the outputs
        rows = weight.view(parts, -1, weight.shape[1]).transpose(1, 2)
        product = torch.bmm(x.reshape(1, 1, -1).expand(parts, -1, -1), rows)
    product = product.view(*x.shape[:-1], -1)
    return product if bias is None else product + bias


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
    # With the largest at 0 and the divisor well inside float32, no temperature makes infinity or NaN.
    logits.sub_(logits.amax(-1, keepdim=True)).div_(min(max(sampling.temperature, 1e-30), 1e30))
    probabilities = filter_logits(logits, sampling).softmax(-1)
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
        before[:, 0] = -math.inf  # a top_p of 1e-50 is 0 in float32
        dropped = torch.zeros_like(before, dtype=torch.bool)
        dropped.scatter_(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -math.inf)
    if sampling.min_p > 0:
        floor = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < floor, -math.inf)
    return logits
