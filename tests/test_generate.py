"""Decoding: the cache, the batch and the filters give what the plain forward and a pencil give."""

import itertools
import math
import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from firstwords.errors import BadData, BadFlag, Diverged
from firstwords.generate import (
    Decoder,
    Sampling,
    Stream,
    _multiply,
    draw,
    filter_logits,
    generate_batch,
    sample,
    stream_batch,
    stream_ids,
)

VOCAB, POSITIONS = 97, 64


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu_pytorch_tanh"},
        {"scale_attn_weights": False, "n_inner": 48, "tie_word_embeddings": False},
    ],
    ids=["gpt2", "scaled", "unscaled"],
)
def model(request):
    return build_model(**request.param)


def build_model(positions=POSITIONS, **options):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=positions,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.3,  # weights large enough that each token before matters
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    return GPT2LMHeadModel(config).eval()


def draw_prompts(count, seed, longest=POSITIONS - 1):
    chance = random.Random(seed)
    lengths = [chance.randint(1, longest) for _ in range(count)]
    return [[chance.randrange(VOCAB) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def decode_uncached(model, prompt, steps):
    """The plain way: the whole sequence through the model for each id; returns ids and logits."""
    ids, logits = list(prompt), []
    for _ in range(steps):
        output = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits.append(output)
        ids.append(int(output.argmax()))
    return ids[len(prompt) :], logits


@pytest.fixture
def seen(monkeypatch):
    """Return the list that the logits (B, V) of each step go to."""
    logits, score = [], Decoder._score

    def record(decoder, hidden):
        logits.append(score(decoder, hidden))
        return logits[-1].clone()

    monkeypatch.setattr(Decoder, "_score", record)
    return logits


def test_stream_equals_the_uncached_forward(model, seen):
    for prompt in draw_prompts(4, seed=1):
        steps = POSITIONS - len(prompt)
        ids, logits = decode_uncached(model, prompt, steps)
        seen.clear()
        assert list(stream_ids(model, prompt, stop_ids=())) == ids
        for cached, plain in zip(seen, logits, strict=True):
            torch.testing.assert_close(cached[0], plain, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_one_row_in_parts_is_the_whole_product(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(1, 1, 24)
    for matrix in (Conv1D(12, 24), torch.nn.Linear(24, 12, bias=False)):
        torch.nn.init.normal_(next(matrix.parameters()))
        torch.testing.assert_close(_multiply(matrix, x), matrix(x))
        torch.testing.assert_close(_multiply(matrix, x[0]), matrix(x[0]))


def test_batch_of_unequal_prompts_equals_the_uncached_forward(model, seen):
    prompts = draw_prompts(8, seed=2, longest=40)
    generate_batch(model, prompts, stop_ids=(), limits=[20] * 8)
    by_length = sorted(prompts, key=len)
    for row, prompt in enumerate(by_length):
        _, logits = decode_uncached(model, prompt, 20)
        for batched, plain in zip(seen, logits, strict=True):
            torch.testing.assert_close(batched[row], plain, atol=1e-4, rtol=1e-5)


def test_greedy_ids_are_those_of_transformers_to_the_end_of_the_context():
    model = build_model(positions=200)
    model.generation_config.eos_token_id = None
    for prompt in ([5], [int(i) for i in range(90)]):
        theirs = model.generate(torch.tensor([prompt]), max_length=200, do_sample=False)[0].tolist()
        assert len(set(theirs)) > 10, "a reply that repeats one id shows little"
        assert prompt + list(stream_ids(model, prompt, stop_ids=())) == theirs


def test_rows_join_and_leave_between_steps(model):
    prompts = draw_prompts(40, seed=9, longest=30)
    alone = [list(stream_ids(model, prompt, stop_ids=(), limit=12)) for prompt in prompts]
    replies, chance, decoder = [[] for _ in prompts], random.Random(0), Decoder(model)
    waiting, rows, logits, widest = list(range(40)), [], None, 0
    while waiting or rows:
        if waiting and chance.random() < 0.5:
            come = [waiting.pop() for _ in range(min(len(waiting), chance.randint(1, 4)))]
            joined = decoder.join([prompts[place] for place in come])
            rows, logits = rows + come, joined if logits is None else torch.cat([logits, joined])
        if not rows:
            continue
        widest = max(widest, len(rows))
        for place, token_id in zip(rows, logits.argmax(-1).tolist(), strict=True):
            replies[place].append(token_id)
        kept = [row for row, place in enumerate(rows) if len(replies[place]) < 12]
        chance.shuffle(kept)
        rows = [rows[row] for row in kept]
        decoder.keep(kept)
        assert decoder.lengths == [len(prompts[place]) + len(replies[place]) - 1 for place in rows]
        logits = decoder.step([replies[place][-1] for place in rows]) if rows else None
    assert replies == alone
    assert widest > 8


def test_batch_equals_stream_for_many_prompts(model):
    prompts = draw_prompts(50, seed=3)
    limits = [random.Random(place).choice([None, 1, 5, 30]) for place in range(len(prompts))]
    stop_ids, banned_ids = set(range(0, VOCAB, 12)), range(90, VOCAB)
    rules = {"stop_ids": stop_ids, "banned_ids": banned_ids}
    one_by_one = [
        list(stream_ids(model, prompt, limit=limit, **rules))
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    for batch_size in (7, 200):
        batched = generate_batch(model, prompts, limits=limits, batch_size=batch_size, **rules)
        assert batched == one_by_one
    ends = [reply[-1] in stop_ids for reply in one_by_one]
    assert 0 < sum(ends) < len(ends), "the prompts must try both ways to end"


def test_long_replies_outgrow_the_buffer_after_padding_fell_away():
    model, prompts = build_model(positions=150), draw_prompts(4, seed=8, longest=9)
    prompts.append([7] * 50)
    rules = {"stop_ids": (), "banned_ids": range(5)}
    limits = [90, 70, 85, 72, 3]  # the longest prompt leaves first
    singly = [
        list(stream_ids(model, prompt, limit=limit, **rules))
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    assert generate_batch(model, prompts, limits=limits, **rules) == singly


def test_sampled_replies_do_not_depend_on_the_batch():
    model, prompts = build_model(), draw_prompts(12, seed=4, longest=30)
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=7, repetition_penalty=1.3)
    rules = {"stop_ids": {3, 4, 5}, "sampling": sampling}
    batched = generate_batch(model, prompts, **rules, batch_size=5)
    assert batched == [list(stream_ids(model, prompt, **rules)) for prompt in prompts]
    assert batched == generate_batch(model, prompts[::-1], **rules)[::-1]
    other = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=8, repetition_penalty=1.3)
    assert batched != generate_batch(model, prompts, stop_ids={3, 4, 5}, sampling=other)


def test_seed_none_draws_anew():
    model, sampling = build_model(), Sampling(temperature=1.0, max_new_tokens=40)
    replies = generate_batch(model, [[1, 2, 3]] * 2, stop_ids=(), sampling=sampling)
    assert replies[0] != replies[1]


def test_stop_id_is_the_last_and_ends_its_stream_alone():
    model = build_model()
    prompts = draw_prompts(30, seed=5, longest=20)
    steps = list(stream_batch(model, prompts, stop_ids=set(range(10)), limits=[15] * 30))
    replies = {place: [] for place in range(30)}
    for place, token_id in itertools.chain.from_iterable(steps):
        replies[place].append(token_id)
    for reply in replies.values():
        assert all(token_id >= 10 for token_id in reply[:-1])
        assert reply[-1] < 10 or len(reply) == 15
    assert len({len(step) for step in steps}) > 3, "the batch must have shrunk more than once"


def test_banned_ids_are_never_generated():
    model = build_model()
    free = set(itertools.chain.from_iterable(decode_everything(model, ())))
    banned = sorted(free)[::2]
    for sampling in (Sampling(), Sampling(temperature=1.5, seed=1)):
        said = set(itertools.chain.from_iterable(decode_everything(model, banned, sampling)))
        assert said
        assert not said & set(banned)


def decode_everything(model, banned_ids, sampling=None):
    return generate_batch(
        model,
        draw_prompts(20, seed=6, longest=20),
        stop_ids=(),
        banned_ids=banned_ids,
        sampling=sampling or Sampling(),
    )


def test_never_runs_past_the_positions():
    model = build_model()
    for length, room in ((POSITIONS - 3, 3), (POSITIONS - 1, 1), (POSITIONS, 0)):
        assert len(list(stream_ids(model, [1] * length, stop_ids=()))) == room
        mixed = generate_batch(model, [[1] * length, [2] * 5], stop_ids=())
        assert list(map(len, mixed)) == [room, POSITIONS - 5]
    with pytest.raises(BadData, match="is 65 tokens long, the model has 64"):
        next(stream_ids(model, [1] * (POSITIONS + 1), stop_ids=()))


def test_limits_are_the_least_of_three():
    model = build_model()
    sampling = Sampling(max_new_tokens=4)
    lengths = [
        len(list(stream_ids(model, [1], stop_ids=(), sampling=chosen, limit=limit)))
        for chosen, limit in ((sampling, None), (sampling, 3), (sampling, 9), (Sampling(), 0))
    ]
    assert lengths == [4, 3, 4, 0]
    assert generate_batch(model, [], stop_ids=()) == []


def test_nan_and_infinite_logits_are_an_error():
    for spoilt in (math.nan, math.inf):
        model = build_model()
        with torch.no_grad():
            model.transformer.ln_f.bias.fill_(spoilt)
        with pytest.raises(Diverged, match="NaN or infinite"):
            next(stream_ids(model, [1, 2], stop_ids=()))
        with pytest.raises(Diverged, match="NaN or infinite"):
            generate_batch(model, [[1, 2], [3]], stop_ids=(), sampling=Sampling(temperature=1))


def test_training_mode_is_refused():
    with pytest.raises(AssertionError, match="eval"):
        next(stream_ids(build_model().train(), [1], stop_ids=()))


def test_the_caller_is_not_left_in_inference_mode():
    stream = stream_ids(build_model(), [1], stop_ids=())
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert not torch.is_inference_mode_enabled()


# Probabilities that are exact in binary: 1/2, 1/4, 1/8, 1/16, 1/16.
SHARES = [0.125, 0.5, 0.0625, 0.25, 0.0625]


def kept_by(**filters):
    logits = torch.tensor([SHARES]).log()
    return filter_logits(logits, Sampling(temperature=1, **filters)).isfinite()[0].tolist()


def test_filters_by_hand():
    keep = {1: [False, True, False, False, False], 2: [False, True, False, True, False]}
    three = [True, True, False, True, False]
    every = [True] * 5
    assert kept_by() == every
    assert [kept_by(top_k=k) for k in (1, 2, 3, 5, 9)] == [keep[1], keep[2], three, every, every]
    assert kept_by(top_p=0.4) == keep[1]
    assert kept_by(top_p=0.5) == keep[1], "a half is reached by the first alone"
    assert kept_by(top_p=0.51) == keep[2]
    assert kept_by(top_p=0.875) == three
    for top_p in (1e-9, 5e-324):
        assert kept_by(top_p=top_p) == keep[1], "the likeliest always stays"
    assert kept_by(min_p=0.5) == keep[2], "0.25 is half of 0.5"
    assert kept_by(min_p=0.26) == keep[2]
    assert kept_by(min_p=0.24) == three
    assert kept_by(min_p=1) == keep[1]
    assert kept_by(top_k=3, top_p=0.6) == keep[2], "2/3.5 = 0.571 does not reach 0.6"
    assert kept_by(top_k=2, top_p=0.6) == keep[1], "after top_k the first has 2/3"


def test_filters_treat_each_row_by_itself():
    logits = torch.tensor([SHARES, SHARES[::-1]]).log()
    kept = filter_logits(logits, Sampling(temperature=1, top_p=0.6, min_p=0.1)).isfinite()
    assert kept[0].tolist() == kept[1].tolist()[::-1] == kept_by(top_p=0.6, min_p=0.1)


def test_draws_fall_by_the_shares():
    rows = 1600
    draws = [row / rows for row in range(rows)]
    logits = torch.tensor([SHARES]).log()
    for temperature in (1.0, 0.5):
        sampling = Sampling(temperature=temperature)
        ids = sample(logits.repeat(rows, 1), sampling, draws)
        raised = [share ** (1 / temperature) for share in SHARES]
        expected = [rows * share / sum(raised) for share in raised]
        counts = torch.bincount(ids, minlength=5).tolist()
        assert counts == pytest.approx(expected, abs=1.01)


def test_the_ends_of_the_draw_pick_ids_with_a_share():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]] * 2)
    picked = sample(logits, Sampling(temperature=1), [0.0, 1 - 2**-53])
    assert picked.tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-6])
def test_the_lowest_temperatures_take_the_likeliest(temperature):
    logits = torch.tensor([[2.0, -math.inf, 3.0, 1.0]])
    assert sample(logits, Sampling(temperature=temperature), [0.999]).tolist() == [2]


@pytest.mark.parametrize("temperature", [1e6, 1e39, 1.7e308])
def test_the_highest_temperatures_draw_evenly_from_what_is_allowed(temperature):
    logits = torch.tensor([[2.0, -math.inf, 3.0, -5.0]] * 3)
    picked = sample(logits, Sampling(temperature=temperature), [0.1, 0.5, 0.9])
    assert picked.tolist() == [0, 2, 3]


def test_temperature_zero_is_argmax_whatever_the_filters():
    logits = torch.tensor([[0.0, 3.0, 2.0], [5.0, 1.0, 4.0]])
    greedy = Sampling(top_k=2, top_p=0.1, min_p=0.5, seed=3)
    assert sample(logits, greedy, [0.99, 0.99]).tolist() == [1, 0]


class ConstantHead(torch.nn.Module):
    """Gives the same logits at every step, whatever was read."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, hidden):
        return self.logits.repeat(len(hidden), 1)


def build_constant(logits):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(logits), n_embd=8, n_layer=1, n_head=1)).eval()
    model.lm_head = ConstantHead(logits)
    return model


def test_repetition_penalty_by_hand():
    model = build_constant([4.0, 3.0, -1.0, 2.1])
    rules = {"stop_ids": (), "limit": 6, "sampling": Sampling(repetition_penalty=2.0)}
    # 4 -> 2 once said; then 3 -> 1.5; then 2.1 -> 1.05; then 2, the greatest, for good.
    assert list(stream_ids(model, [0, 1, 3], **rules)) == [0, 1, 3, 0, 0, 0]
    # A negative logit is multiplied: -1 -> -2, so that -1.5 comes next.
    model = build_constant([-1.0, -1.5])
    assert list(stream_ids(model, [0], **rules))[:3] == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.009),
        ("repetition_penalty", 101),
        ("repetition_penalty", math.nan),
        ("max_new_tokens", 0),
    ],
)
def test_bad_sampling_is_a_bad_flag(name, value):
    with pytest.raises(BadFlag, match=f"--{name}: is {value}"):
        Sampling(**{name: value})


def test_streams_that_are_drawn_differently_share_a_batch():
    model, prompt, nothing = build_model(), [1, 2, 3], torch.tensor([], dtype=torch.long)
    ways = [
        Sampling(seed=1),
        Sampling(temperature=1.5, seed=1),
        Sampling(temperature=1.5, seed=2),
        Sampling(repetition_penalty=3.0),
        Sampling(temperature=2.0, top_k=5, seed=1),
    ]
    alone = [list(stream_ids(model, prompt, stop_ids=(), sampling=way, limit=12)) for way in ways]
    assert len(set(map(tuple, alone))) == len(ways), "replies that are alike show little"
    streams, decoder = [Stream(model, prompt, way, 12) for way in ways], Decoder(model)
    logits = decoder.join([prompt] * len(ways))
    for _ in range(12):
        logits = decoder.step(draw(logits, streams, nothing))
    assert [stream.reply for stream in streams] == alone
