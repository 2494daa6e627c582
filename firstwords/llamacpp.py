"""A GPT-2 -> what llama.cpp and Ollama read: one GGUF file, and a Modelfile.

    write_gguf(Path("chat-f16.gguf"), model, tokenizer, "f16", name="chat")

The names of keys and tensors are GGUF's for the architecture `gpt2`. Invariant: the file holds the rows
of the embedding that have a token, so that llama.cpp cannot say an id of the padded vocabulary; and the
ids that it makes of a text are ours.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from firstwords.errors import BadFlag, Mismatch
from firstwords.model import find_inner
from firstwords.template import OLLAMA_TEMPLATE, PLAIN_CHAT_TEMPLATE
from firstwords.tokenizer import CHARACTERS, CONTROL_TOKENS, Tokenizer

DTYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
Q8_0_BLOCK = 32  # numbers of a row that share a scale


def check_exportable(config: GPT2Config, tokenizer: Tokenizer, dtype: str) -> None:
    """Refuse what llama.cpp's GPT-2 cannot be.

    Raises:
        Mismatch: for a tokenizer of characters, another activation, or scaled attention.
        BadFlag: for rows that cannot be quantised.
    """
    if tokenizer.kind == CHARACTERS:
        raise Mismatch(
            "--format gguf: llama.cpp has no tokenizer of characters, which this model has; use --format hf, "
            "or train on data prepared with --tokenizer bpe:4096"
        )
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise Mismatch(
            f"--format gguf: the activation is {config.activation_function!r}, llama.cpp's GPT-2 has "
            "'gelu_new' alone; use --format hf"
        )
    if config.scale_attn_by_inverse_layer_idx:
        raise Mismatch("--format gguf: llama.cpp does not scale attention by the layer; use --format hf")
    if dtype == "q8_0" and config.n_embd % Q8_0_BLOCK:
        raise BadFlag(f"--dtype q8_0: n_embd is {config.n_embd}, no multiple of {Q8_0_BLOCK}; use f16")


def write_gguf(path: Path, model: GPT2LMHeadModel, tokenizer: Tokenizer, dtype: str, *, name: str) -> None:
    """Write one GGUF file.

    Args:
        path: of the file.
        model: its weights in float32.
        tokenizer: a byte-level BPE.
        dtype: of the matrices, a key of `DTYPES`; vectors and positions stay float32.
        name: of the model, for people.

    Raises:
        Mismatch, BadFlag: as `check_exportable`; and when a weight is beyond float16.
    """
    check_exportable(model.config, tokenizer, dtype)
    kind, file_type = DTYPES[dtype]
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(name)
    writer.add_file_type(file_type)
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, model.config)
    _add_tokenizer(writer, tokenizer)
    for tensor, weight in _rename_tensors(model, len(tokenizer)):
        is_matrix = weight.ndim == 2 and tensor != "position_embd.weight"
        stored = kind if is_matrix else gguf.GGMLQuantizationType.F32
        with np.errstate(over="ignore"):  # what is beyond float16 is refused below
            data = gguf.quants.quantize(weight, stored)
        if stored == gguf.GGMLQuantizationType.F16 and not np.isfinite(data).all():
            raise Mismatch(f"--dtype f16: {tensor} holds a weight beyond 65,504; use f32")
        writer.add_tensor(tensor, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: GPT2Config) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(find_inner(config))
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    tokens, merges = tokenizer.spell()
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(CONTROL_TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *CONTROL_TOKENS])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.endoftext_id)
    writer.add_eos_token_id(tokenizer.end_id)
    writer.add_eot_token_id(tokenizer.end_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(PLAIN_CHAT_TEMPLATE)


def _rename_tensors(model: GPT2LMHeadModel, num_tokens: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield GGUF's names with arrays (outputs, inputs); Hugging Face's Conv1D has (inputs, outputs)."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is no output matrix
        array = _to_array(weight)
        if name in ("transformer.wte.weight", "lm_head.weight"):
            array = array[:num_tokens]
        elif name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            array = np.ascontiguousarray(array.T)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), array


def _to_array(weight: Tensor) -> np.ndarray:
    return weight.detach().float().cpu().numpy()


def format_modelfile(gguf_name: str, context: int) -> str:
    """Return Ollama's Modelfile for a GGUF file beside it.

    Args:
        gguf_name: of the file.
        context: tokens of the longest row that was trained.
    """
    stops = "".join(f'PARAMETER stop "{token}"\n' for token in CONTROL_TOKENS)
    return (
        f"FROM ./{gguf_name}\n"
        f'TEMPLATE """{OLLAMA_TEMPLATE}"""\n'
        f"{stops}"
        f"PARAMETER num_ctx {context}\n"
        "PARAMETER temperature 0\n"
    )
