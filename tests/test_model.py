"""The model: its configuration, its loss without the shortcut, and a vocabulary that grows."""

import copy
import json

import pytest
import torch
import transformers
from tiny import BYTES, SHAPE, write_config
from torch.nn import functional

from firstwords.errors import BadFlag, MissingInput
from firstwords.model import (
    IGNORED,
    GPT2LMHeadModel,
    build_model,
    cross_entropy,
    find_learned,
    grow_vocabulary,
    read_config,
    set_generation,
)
from firstwords.model.attention import find_documents
from firstwords.model.cross_entropy import sum_cross_entropy
from firstwords.tokenizer import BYTE_LEVEL, Tokenizer

# 20 words more than bytes, so that the control tokens do not fit the 256 rows of a plain model of bytes.
WORDS = Tokenizer(BYTE_LEVEL, BYTES.vocabulary + [bytes([97, second]) for second in range(97, 117)])


@pytest.fixture
def model(tmp_path):
    """A model that is far from uniform, so that a wrong position would be seen."""
    return build_model(write_config(tmp_path / "c.json", initializer_range=0.3), BYTES, seed=1)


@pytest.fixture
def batch():
    """Three rows of 12 ids; in the second one half is learned, in the third one token."""
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, 0] = IGNORED
    labels[1, :6] = IGNORED
    labels[2, :11] = IGNORED
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"n_layers": 2}', "unknown key 'n_layers'; did you mean 'n_layer'"),
        ('{"vocab_size": 50257}', "unknown key 'vocab_size'"),
        ('{"auto_map": {}}', "unknown key 'auto_map'"),
        ('{"n_embd": 30, "n_head": 4}', "n_embd 30 is no multiple of n_head 4"),
        ('{"n_layer": 0}', "n_layer is 0; give a whole number above 0"),
        ('{"n_positions": 2.5}', "n_positions is 2.5"),
        ('{"n_head": "4"}', "n_head is '4'"),
        ('{"n_layer": 2', "broken JSON"),
        ("[1]", r"is \[1\]; give one JSON object"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path, text, why):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(BadFlag, match=f"^--cfg {path}: {why}"):
        read_config(path)


@pytest.mark.parametrize(
    "wrong", [{"activation_function": "gleu"}, {"resid_pdrop": 1.5}, {"embd_pdrop": "x"}, {"n_inner": -1}]
)
def test_values_of_which_no_model_can_be_made_are_refused(tmp_path, wrong):
    path = write_config(tmp_path / "c.json", **wrong)
    with pytest.raises(BadFlag, match=f"^--cfg {path}: gives no model ") as error:
        build_model(path, BYTES, seed=0)
    assert "\n" not in str(error.value)


def test_a_config_that_is_not_there_names_the_nearest(tmp_path):
    write_config(tmp_path / "small.json")
    with pytest.raises(MissingInput, match="did you mean 'small.json'"):
        read_config(tmp_path / "smal.json")


@pytest.mark.parametrize("name", ["small_test", "baseline_124m", "baseline_355m"])
def test_the_configs_of_the_repository_hold_no_vocabulary_and_1024_positions(request, name):
    config = read_config(request.config.rootpath / "configs" / "models" / f"{name}.json")
    assert config["n_positions"] == 1024
    assert "vocab_size" not in config


def test_a_built_model_has_the_data_s_vocabulary_padded_and_its_special_ids(model):
    assert BYTES.vocab_size_padded == 384
    assert model.get_input_embeddings().weight.shape == (384, SHAPE["n_embd"])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    config, generation = model.config, model.generation_config
    assert (config.vocab_size, config.n_positions) == (384, 128)
    assert (config.bos_token_id, config.eos_token_id) == (BYTES.endoftext_id, BYTES.end_id)
    assert generation.eos_token_id == [BYTES.end_id, BYTES.endoftext_id]
    assert (generation.pad_token_id, config.pad_token_id) == (BYTES.pad_id, BYTES.pad_id)
    assert config._attn_implementation == "firstwords"


def test_the_same_seed_gives_the_same_weights(tmp_path):
    path = write_config(tmp_path / "c.json")
    first, again, other = (build_model(path, BYTES, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_without_labels_it_is_the_parent(model, batch):
    ids = batch["input_ids"]
    ours = model.eval()(input_ids=ids, use_cache=True)
    theirs = transformers.GPT2LMHeadModel.forward(model, input_ids=ids)
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.past_key_values is not None


def test_the_loss_is_divided_by_what_the_caller_counted(model, batch):
    whole = model(**batch)
    learned = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert learned == 11 + 6 + 1
    halves = [
        model(**{name: rows[half] for name, rows in batch.items()}, num_items_in_batch=learned).loss.item()
        for half in (slice(0, 1), slice(1, 3))
    ]
    assert sum(halves) == pytest.approx(whole.loss.item(), rel=1e-6)


def test_no_label_at_all_is_a_loss_of_0_and_a_gradient_of_0(model, batch):
    batch["labels"][:] = IGNORED
    loss = model(**batch, num_items_in_batch=7).loss
    loss.backward()
    assert loss.item() == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients)


def check_gradients(loss_of, model, batch):
    """The gradients are those of the cross-entropy over the logits of every position."""
    logits = transformers.GPT2LMHeadModel.forward(model, input_ids=batch["input_ids"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    full = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    expected = torch.autograd.grad(full, list(model.parameters()))
    found = torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_skipping_the_head_where_nothing_is_learned_keeps_the_gradients(model, batch):
    check_gradients(lambda model, batch: model(**batch).loss, model, batch)
    with pytest.raises(AssertionError):
        check_gradients(lambda model, batch: model(**batch, num_items_in_batch=19).loss, model, batch)


def check_fused(hidden, head, targets, **options):
    """Sum and gradients are those of torch's own cross-entropy over all logits at once."""
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
    found = sum_cross_entropy(*leaves, targets, **options)
    logits = leaves[0] @ leaves[1].T
    expected = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(3 * total, leaves) for total in (found, expected))
    for mine, stock in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-5)


@pytest.fixture
def scored():
    """200 hidden states, a head of 300 words, targets of which every seventh is missing."""
    draw = torch.Generator().manual_seed(3)
    targets = torch.randint(0, 300, (200,), generator=draw)
    targets[::7] = IGNORED
    return torch.randn(200, 16, generator=draw), torch.randn(300, 16, generator=draw), targets


@pytest.mark.parametrize("at_once", [1 << 25, 64 * 300, 130 * 300])
def test_the_loss_in_pieces_is_the_loss_at_once(scored, monkeypatch, at_once):
    monkeypatch.setitem(cross_entropy._AT_ONCE, "cpu", at_once)
    check_fused(*scored)
    hidden, head, targets = scored
    monkeypatch.setattr(cross_entropy, "_compile_score", lambda: cross_entropy.score_fused)
    check_fused(hidden, head, targets, compiled=True)


def test_a_gradient_of_unlabelled_rows_is_seen(scored, monkeypatch):
    def learn_all(logits, targets):
        return score_piece(logits, targets.clamp(min=0))

    score_piece = cross_entropy.score_piece
    monkeypatch.setattr(cross_entropy, "score_piece", learn_all)
    with pytest.raises(AssertionError):
        check_fused(*scored)


def test_a_token_that_the_model_rules_out_costs_a_finite_loss():
    hidden, head = torch.tensor([[1.0, 0.0]]), torch.tensor([[300.0, 0.0], [-300.0, 0.0]])
    check_fused(hidden, head, torch.tensor([1]))


def test_under_autocast_the_logits_are_bfloat16_and_the_sum_is_not(scored):
    hidden, head, targets = (tensor.clone() for tensor in scored)
    leaves = [tensor.requires_grad_() for tensor in (hidden, head)]
    with torch.autocast("cpu", torch.bfloat16):
        found = sum_cross_entropy(*leaves, targets)
        logits = leaves[0] @ leaves[1].T
        expected = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    assert (found.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(total, leaves) for total in (found, expected))
    for mine, stock in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, stock, rtol=0.05, atol=0.05)


def test_learned_places_are_filled_with_one_that_has_no_label():
    labels = torch.full((2, 50), IGNORED)
    labels[0, 3] = labels[1, 0] = labels[1, 49] = 5  # the label at 1, 0 follows nothing
    found = find_learned(labels)
    assert found[:2].tolist() == [2, 98]
    assert found.shape == (64,)
    assert set(found[2:].tolist()) == {49}
    assert find_learned(torch.full((1, 9), IGNORED)).tolist() == [8] * 64


def test_what_the_batch_already_says_changes_nothing(model, batch):
    positions = torch.arange(12).remainder(5).expand(3, 12)
    found = {"learned": find_learned(batch["labels"]), "documents": find_documents(positions)}
    with torch.no_grad():
        asked = model(**batch, position_ids=positions).loss
        assert asked == model(**batch, **found, position_ids=positions).loss


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_gradients_where_few_and_where_all_are_learned(model, share):
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 256, (4, 100), generator=draw)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) > share, IGNORED)
    assert (len(find_learned(labels)) < labels.numel()) == (share < 0.5)
    check_gradients(lambda model, batch: model(**batch).loss, model, {"input_ids": ids, "labels": labels})


def test_saved_the_class_is_the_one_everybody_has(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.fixture
def plain():
    """A GPT-2 with 257 rows, as the Hub's has one for each ordinary token and <|endoftext|>."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=257, initializer_range=0.02, **SHAPE)
    return GPT2LMHeadModel(config).eval()


def test_growing_keeps_the_old_rows_and_logits(plain):
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        weights, logits = plain.lm_head.weight.clone(), plain(input_ids=ids).logits
        grow_vocabulary(plain, WORDS, seed=0)
        grown = plain(input_ids=ids).logits
    assert plain.config.vocab_size == WORDS.vocab_size_padded == 384
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert torch.equal(plain.lm_head.weight[:257], weights)
    assert torch.equal(grown[..., :257], logits)


def find_new_rows(grow, model):
    """Return the new rows less the mean of the old ones, in units of the old ones' distance from it."""
    old = model.config.vocab_size
    grow(model)
    table = model.lm_head.weight.detach()
    mean = table[:old].mean(0)
    return (table[old:] - mean) / (table[:old] - mean).norm(dim=-1).mean()


def check_new_rows(grow, model):
    """The new rows lie around the mean of the old ones, nearer than those, and apart from one another."""
    rows = find_new_rows(grow, model)
    distances = rows.norm(dim=-1)
    assert float(distances.mean()) == pytest.approx(0.5, abs=0.1)
    assert float(distances.max()) < 1
    likeness = functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert float((likeness - torch.eye(len(rows))).abs().max()) < 0.9


def shift_rows(model):
    """Move all rows by the same vector, as those of the published GPT-2 are."""
    with torch.no_grad():
        model.transformer.wte.weight += 0.2 * torch.randn(model.config.n_embd)
    return model


def test_new_rows_are_near_the_mean_and_distinct(plain):
    check_new_rows(lambda model: grow_vocabulary(model, WORDS, seed=0), shift_rows(plain))


def grow_with_fresh_rows(model):
    old = model.config.vocab_size
    model.resize_token_embeddings(384, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[old:].normal_(std=model.config.initializer_range)


@pytest.mark.parametrize(
    "grow", [lambda model: model.resize_token_embeddings(384, mean_resizing=True), grow_with_fresh_rows]
)
def test_new_rows_of_other_ways_are_not(plain, grow):
    with pytest.raises(AssertionError):
        check_new_rows(grow, shift_rows(plain))


def test_new_rows_follow_the_seed_alone(plain):
    def grow(seed):
        model = copy.deepcopy(plain)
        grow_vocabulary(model, WORDS, seed=seed)
        return model.lm_head.weight

    assert torch.equal(grow(0), grow(0))
    assert not torch.equal(grow(0), grow(1))


def test_new_rows_of_an_untied_head_are_like_the_old_ones_too():
    config = transformers.GPT2Config(vocab_size=257, tie_word_embeddings=False, **SHAPE)
    model = shift_rows(GPT2LMHeadModel(config))
    check_new_rows(lambda model: grow_vocabulary(model, WORDS, seed=0), model)
    rows = model.transformer.wte.weight.detach()
    distances = (rows - rows[:257].mean(0)).norm(dim=-1)
    assert float(distances[257:].max()) < float(distances[:257].mean())


def test_a_vocabulary_that_is_large_enough_stays(model):
    before = model.lm_head.weight
    grow_vocabulary(model, BYTES, seed=0)
    assert model.lm_head.weight is before


def test_set_generation_names_both_stop_ids(plain):
    set_generation(plain, WORDS)
    assert plain.generation_config.eos_token_id == [WORDS.end_id, WORDS.endoftext_id]
    assert plain.generation_config.pad_token_id == WORDS.pad_id
