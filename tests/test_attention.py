"""Attention within packed rows: every way gives what a mask of (T, T) gives, and none makes one in vain."""

import inspect
import sys
import types

import pytest
import torch
import transformers
from tiny import BYTES, write_config
from torch.nn import functional

from firstwords.errors import BadFlag
from firstwords.model import IGNORED, attention, build_model, find_learned

POSITIONS = torch.tensor(
    [
        [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 0, 0],  # three conversations and three pads
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],  # one that fills its row
        [0, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2],  # the first is one token long
    ]
)


@pytest.fixture
def model(tmp_path):
    """A model of two layers that is far from uniform, so that a wrong position would be seen."""
    return build_model(write_config(tmp_path / "c.json", n_layer=2, initializer_range=0.3), BYTES, seed=1)


@pytest.fixture
def ids():
    return torch.randint(0, 256, POSITIONS.shape, generator=torch.Generator().manual_seed(2))


def test_documents_begin_where_positions_do_and_pads_are_one():
    found = attention.find_documents(POSITIONS)
    assert found.dtype == torch.int32
    assert found.unique().tolist() == [0, 4, 6, 9, 12, 24, 25, 28, 33, 36]
    assert len(found) % 64 == 0
    assert found[10:].eq(36).all()


def test_a_row_cut_in_the_middle_begins_a_document():
    assert attention.find_documents(torch.tensor([[7, 8, 0, 1]])).unique().tolist() == [0, 2, 4]


def list_conversations():
    """Yield the row and the places of each conversation, pads left out."""
    for row, begin, end in [
        *((0, 0, 4), (0, 4, 6), (0, 6, 9), (1, 0, 12)),
        *((2, 0, 1), (2, 1, 4), (2, 4, 9), (2, 9, 12)),
    ]:
        yield row, slice(begin, end)


def check_isolated(hidden_of, model, ids):
    """Each conversation has the hidden states, and the loss, that it has alone."""
    packed = hidden_of(model, ids, POSITIONS)
    for row, place in list_conversations():
        alone = model.transformer(ids[row, place][None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(packed[row, place], alone, rtol=0, atol=1e-5)
        losses = [
            functional.cross_entropy(model.lm_head(states[:-1]), ids[row, place][1:], reduction="sum")
            for states in (packed[row, place], alone)
        ]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def compute_by(way):
    def compute(model, ids, positions):
        model.attention = way
        return model.compute_hidden(ids, positions)

    return compute


def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Do what torch's kernel is documented to do, from its cumulated lengths, in float32 on a CPU."""
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k >= int(cu_seq_q.diff().max())
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for begin, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        if begin < end:
            scores = torch.einsum("qhd,khd->hqk", query[begin:end], key[begin:end]) * scale
            if window_size == (-1, 0):
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[begin:end]))
    return torch.cat(parts)


def use_flash(query, key, value, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False):
    """The signature of flash-attn 2."""
    window = (-1, 0) if causal else (-1, -1)
    return stand_in(query, key, value, cu_q, cu_k, max_q, max_k, scale=softmax_scale, window_size=window)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("way", ["auto", "dense", "varlen", "flash"])
def test_every_way_keeps_conversations_apart(tmp_path, ids, monkeypatch, way, inverse):
    flash = types.SimpleNamespace(flash_attn_varlen_func=use_flash)
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    shape = {"n_layer": 2, "initializer_range": 0.3, "scale_attn_by_inverse_layer_idx": inverse}
    model = build_model(write_config(tmp_path / "c.json", **shape), BYTES, seed=1)
    check_isolated(compute_by(way), model, ids)


def test_torch_s_kernel_takes_what_we_give_it():
    theirs, ours = (inspect.signature(kernel).parameters for kernel in (attention.varlen_attn, stand_in))
    assert list(theirs)[:7] == list(ours)[:7]
    assert ours.keys() <= theirs.keys()


def test_plain_position_ids_without_documents_are_seen(model, ids):
    def leak(model, ids, positions):
        return model.compute_hidden(
            ids, positions, documents=torch.tensor([0, 12, 24, 36], dtype=torch.int32)
        )

    with pytest.raises(AssertionError):
        check_isolated(leak, model, ids)


@pytest.mark.parametrize("way", ["auto", "dense"])
def test_gradients_are_those_of_the_mask(model, ids, way):
    learned = ids.clone()
    learned[POSITIONS == 0] = IGNORED
    model.attention = way
    ours = torch.autograd.grad(model(ids, learned, position_ids=POSITIONS).loss, list(model.parameters()))
    stock = transformers.GPT2LMHeadModel.forward(model, ids, position_ids=POSITIONS, use_cache=False).logits
    loss = functional.cross_entropy(
        stock[:, :-1].flatten(0, 1), learned[:, 1:].flatten(), ignore_index=IGNORED
    )
    for found, expected in zip(ours, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_compiled_each_shape_is_one_graph_and_the_loss_the_same(model, ids):
    """Another mask of labels, and other conversations, compile nothing anew; whole rows are one graph."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=count)
    for row in range(3):
        labels = ids.clone()
        labels[: row + 1, :5] = IGNORED
        loss = compiled(ids, labels, learned=find_learned(labels)).loss
        assert float(loss.detach()) == pytest.approx(float(model(ids, labels).loss.detach()), rel=1e-6)
        loss.backward()
    assert len(graphs) <= 2  # the layers; the division of the sum


def list_masks(monkeypatch, run):
    """Return the mask and the flag of each call of torch's attention while `run` runs."""
    calls, attend = [], functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        calls.append((attn_mask, kwargs.get("is_causal", False)))
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    run()
    return calls


def test_whole_rows_build_no_mask_and_look_nothing_up(model, ids, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a mask was looked for")

    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", refuse)
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", refuse)
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, attention.NAME, refuse)
    calls = list_masks(monkeypatch, lambda: model(ids, ids))
    assert calls == [(None, True)] * 2


def test_packed_rows_on_a_cpu_build_no_mask(model, ids, monkeypatch):
    calls = list_masks(monkeypatch, lambda: model(ids, ids, position_ids=POSITIONS))
    assert {(mask is None, causal) for mask, causal in calls} == {(True, True)}
    assert len(calls) == 2 * 9  # the pads of a row are one document


def test_dropout_is_that_of_the_model_in_training_alone(tmp_path, ids):
    model = build_model(write_config(tmp_path / "c.json", attn_pdrop=0.5), BYTES, seed=1)
    states = [model.train(mode).compute_hidden(ids, POSITIONS) for mode in (True, True, False, False)]
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[2], states[3])


def test_padding_without_labels_is_hidden_as_ever(model, ids):
    """A batch padded on the left, as `generate` takes it: ours is the parent with its own attention."""
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    ours = model(input_ids=ids, attention_mask=mask).logits
    model.config._attn_implementation = "sdpa"
    assert torch.equal(ours, model(input_ids=ids, attention_mask=mask).logits)
    assert not torch.equal(ours, model(input_ids=ids).logits)


def test_generate_says_what_it_says_by_the_stock_attention(model, ids):
    mask = torch.ones_like(ids[:1])
    mask[0, :5] = 0
    said = []
    for name in (attention.NAME, "sdpa"):
        model.config._attn_implementation = name
        said.append(model.eval().generate(ids[:1], attention_mask=mask, max_new_tokens=4, do_sample=False))
    assert torch.equal(*said)


CUDA, BF16 = "cuda", torch.bfloat16


@pytest.mark.parametrize(
    ("wish", "device", "dtype", "dropout", "capability", "way"),
    [
        ("auto", "cpu", torch.float32, 0.0, None, "each"),
        ("auto", "cpu", BF16, 0.1, None, "each"),
        ("auto", CUDA, BF16, 0.0, (8, 0), "varlen"),
        ("auto", CUDA, BF16, 0.0, (7, 5), "dense"),
        ("auto", CUDA, BF16, 0.1, (9, 0), "dense"),
        ("auto", CUDA, torch.float32, 0.0, (9, 0), "dense"),
        ("auto", "mps", torch.float32, 0.0, None, "dense"),
        ("flash", CUDA, BF16, 0.1, (9, 0), "flash"),
        ("dense", "cpu", torch.float32, 0.0, None, "dense"),
    ],
)
def test_the_way_follows_from_device_type_and_dropout(
    monkeypatch, wish, device, dtype, dropout, capability, way
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert attention.choose_way(wish, device, dtype, dropout) == way


@pytest.mark.parametrize(
    ("way", "device", "bf16", "dropout", "why"),
    [
        ("flash", "cpu", True, 0.0, "--attention flash: needs a GPU, this is cpu; leave it out"),
        ("varlen", "cuda", False, 0.0, "--attention varlen: computes in 16 bits alone; add --bf16"),
        (
            "flash",
            "cuda",
            True,
            0.0,
            "--attention flash: flash-attn is not installed; pip install flash-attn",
        ),
        ("varlen", "cuda", True, 0.1, "--attention varlen: drops nothing, but attn_pdrop is 0.1"),
    ],
)
def test_what_cannot_be_had_is_refused(monkeypatch, way, device, bf16, dropout, why):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(BadFlag, match=f"^{why}"):
        attention.check_attention(way, device, bf16, dropout)
    attention.check_attention("auto", device, bf16, dropout)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["varlen", "dense"])
def test_on_a_gpu_every_way_is_the_mask_of_float32(model, ids, way):
    expected = model.compute_hidden(ids, POSITIONS)
    model.cuda().attention = way
    with torch.autocast("cuda", torch.bfloat16):
        found = model.compute_hidden(ids.cuda(), POSITIONS.cuda())
    real = ~((POSITIONS == 0) & (POSITIONS.roll(-1, 1) == 0))  # the pads stand for nothing
    torch.testing.assert_close(found.float().cpu()[real], expected[real], rtol=0.1, atol=0.1)


@pytest.mark.gpu
def test_on_a_gpu_float32_packed_and_lone_losses_agree(model, ids):
    check_isolated(
        lambda model, *rows: model.cuda().compute_hidden(*(r.cuda() for r in rows)).cpu(), model, ids
    )
