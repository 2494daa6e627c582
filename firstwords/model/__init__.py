"""A GPT-2 configuration -> `GPT2LMHeadModel` with the loss of the next labelled token.

    model = build_model(Path("configs/models/small_test.json"), tokenizer, seed=0)
    model(input_ids=ids, labels=labels).loss           # ids, labels: (B, T) int64

The weights and the saved folder are plain Hugging Face GPT-2. Invariant: the loss is the cross-entropy of
token t+1 given tokens up to t, over the labels that are not -100; nobody else shifts anything.
"""

import json
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, GPT2Config
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from firstwords.errors import BadFlag, MissingInput, suggest
from firstwords.model import attention
from firstwords.model.cross_entropy import IGNORED, find_learned, sum_learned
from firstwords.model.gelu import Gelu
from firstwords.tokenizer import Tokenizer

# What a model configuration of ours may say. Everything else (sizes of the vocabulary, special ids, kernel
# names, code to load) is decided elsewhere or not at all.
CONFIG_KEYS = (
    "n_layer",
    "n_head",
    "n_embd",
    "n_inner",
    "n_positions",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
)


# The name stays, so that `architectures` in config.json names the class that everybody has.
class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    """Hugging Face's model with cheaper ways to its loss; without `labels` nothing differs.

    Attributes:
        attention: how packed rows are attended to, what `--attention` takes.
    """

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.attention = "auto"
        config._attn_implementation = attention.NAME
        if config.activation_function == "gelu_pytorch_tanh":
            for block in self.transformer.h:
                block.mlp.act = Gelu()

    def forward(
        self,
        input_ids=None,
        labels=None,
        num_items_in_batch=None,
        documents=None,
        learned=None,
        **kwargs,
    ):
        """Return the loss alone when there are labels, else what the parent returns.

        Only positions that are followed by a label go through the head, a piece at a time.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, unshifted; -100 where nothing is learned.
            num_items_in_batch: labels in the whole optimizer step, over all micro-batches and processes;
                the loss is the sum divided by it. Without it, the mean over this batch.
            documents, learned: what `find_documents` and `find_learned` return. Given by who laid the rows,
                they cost no wait for the GPU; else they are found here.
            kwargs: `position_ids` (B, T) that restart with each conversation of a packed row. No
                `attention_mask`: with it, or with a cache, Hugging Face would let packed
                conversations see each other.
        """
        if labels is None:
            return super().forward(input_ids=input_ids, **kwargs)
        hidden = self.compute_hidden(input_ids, documents=documents, **kwargs)
        learned = find_learned(labels) if learned is None else learned
        compiled = torch.compiler.is_compiling()
        total = sum_learned(hidden, self.lm_head.weight, labels, learned, compiled=compiled)
        count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithCrossAttentions(loss=total / count)

    def compute_hidden(self, input_ids, position_ids=None, documents=None, **kwargs) -> torch.Tensor:
        """Return what the head sees, (B, T, d); arguments as of `forward`."""
        if "attention_mask" not in kwargs:
            if documents is None and position_ids is not None:
                documents = attention.find_documents(position_ids)
            kwargs |= self._describe_rows(documents, input_ids)
        kwargs["use_cache"] = False
        return self.transformer(input_ids, position_ids=position_ids, **kwargs).last_hidden_state

    def _describe_rows(self, documents: torch.Tensor | None, input_ids: torch.Tensor) -> dict:
        device = input_ids.device
        if documents is None:
            return {"attention_mask": attention.lay_documents(None, device)}
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.dtype
        dropout = self.config.attn_pdrop if self.training else 0.0
        way = attention.choose_way(self.attention, device.type, dtype, dropout)
        if way == "dense":
            return {"attention_mask": attention.mask_documents(documents, input_ids.shape)}
        return {"attention_mask": attention.lay_documents(documents, device), "packed_by": way}


def read_config(path: Path) -> dict:
    """Read a model configuration: a JSON object with keys of `GPT2Config`.

    Raises:
        MissingInput: when the file is not there.
        BadFlag: for broken JSON, an unknown key, or a shape that does not work out.
    """
    if not path.is_file():
        near = suggest(path.name, [p.name for p in path.parent.glob("*.json")])
        raise MissingInput(f"--cfg {path}: is not there; {near}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadFlag(f"--cfg {path}: broken JSON ({error}); mend it") from None
    if not isinstance(config, dict):
        raise BadFlag(f"--cfg {path}: is {config!r:.40}; give one JSON object")
    for key in config:
        if key not in CONFIG_KEYS:
            raise BadFlag(f"--cfg {path}: unknown key {key!r}; {suggest(key, list(CONFIG_KEYS))}")
    shape = {**_DEFAULT_SHAPE, **config}
    for key in _DEFAULT_SHAPE:
        if not isinstance(shape[key], int) or shape[key] < 1:
            raise BadFlag(f"--cfg {path}: {key} is {shape[key]!r}; give a whole number above 0")
    if shape["n_embd"] % shape["n_head"]:
        raise BadFlag(
            f"--cfg {path}: n_embd {shape['n_embd']} is no multiple of n_head {shape['n_head']}; "
            "change one of them"
        )
    return config


_DEFAULT_SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}


def find_inner(config: GPT2Config) -> int:
    """Return the inner width of a block: what the configuration says, else GPT-2's four times the width."""
    return config.n_inner or 4 * config.n_embd


def build_model(path: Path, tokenizer: Tokenizer, *, seed: int) -> GPT2LMHeadModel:
    """Build a model with random weights, the same for the same seed.

    Args:
        path: the configuration, see `read_config`.
        tokenizer: gives the rows of the embedding and the special ids.
        seed: of the weights.

    Raises:
        MissingInput, BadFlag: as `read_config`, and for values of which no model can be made.
    """
    config = build_config(path, tokenizer)
    torch.manual_seed(seed)
    try:
        model = GPT2LMHeadModel(config)
    except (ValueError, KeyError, RuntimeError) as error:
        raise _no_model(path, error) from None
    set_generation(model, tokenizer)
    return model


def build_config(path: Path, tokenizer: Tokenizer) -> GPT2Config:
    """Return the configuration of a model of which no weight is made; errors as of `build_model`."""
    try:
        return GPT2Config(
            **read_config(path),
            vocab_size=tokenizer.vocab_size_padded,
            bos_token_id=tokenizer.endoftext_id,
            eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.pad_id,
        )
    except (StrictDataclassError, ValueError, KeyError, RuntimeError) as error:
        raise _no_model(path, error) from None


def _no_model(path: Path, error: Exception) -> BadFlag:
    return BadFlag(f"--cfg {path}: gives no model ({' '.join(str(error).split())}); mend it")


def set_generation(model: GPT2LMHeadModel, tokenizer: Tokenizer) -> None:
    """Tell `generate` and `pipeline` where a reply ends, and how far a call goes that does not say."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.endoftext_id,
        eos_token_id=[tokenizer.end_id, tokenizer.endoftext_id],
        pad_token_id=tokenizer.pad_id,
        max_new_tokens=256,
    )


def grow_vocabulary(model: GPT2LMHeadModel, tokenizer: Tokenizer, *, seed: int) -> None:
    """Add the rows that a plain GPT-2 lacks for the control tokens; the old rows stay as they are.

    New rows are drawn like the old ones, around their mean and along the directions in which they differ
    (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"), at half the distance.
    Rows like fresh weights will not do: all logits of GPT-2 lie far below zero, where such a row's would
    lie, so that a new token would be likelier than all words together. Hugging Face's own resizing gives
    all of them nearly the same vector, from which the role tokens part only slowly.
    """
    old = model.config.vocab_size
    if old >= tokenizer.vocab_size_padded:
        return
    model.resize_token_embeddings(tokenizer.vocab_size_padded, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    with torch.no_grad():
        for table in tables[:1] if tables[0] is tables[1] else tables:
            mean = table[:old].mean(0)
            # Sums of the old rows' differences from the mean, by lot, have their covariance.
            lots = torch.randn(len(table) - old, old, generator=generator) / old**0.5
            table[old:] = mean + lots @ (table[:old] - mean) / 2


def quiet_transformers() -> None:
    """Leave the screen to the script: no bar per file, no advice that does not hold for packed rows."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


_ADVICE = {
    "cuda": "nvidia-smi says whether the driver sees one, and torch must be a build for CUDA "
    "(pytorch.org); or use --device cpu",
    "mps": "it takes a Mac with Apple's chip; use --device cpu",
}


def find_device(name: str) -> str:
    """Return `cpu`, `cuda` or `mps`; `auto` takes the first GPU that is there, else the CPU.

    Raises:
        BadFlag: for a device that this machine has not.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in there if there[device])
    if not there.get(name):
        raise BadFlag(f"--device {name}: torch {torch.__version__} finds none here; {_ADVICE[name]}")
    return name


def explain_device(device: str) -> str:
    """Return what a run on this device says behind its name: which GPU it is, or why it is none."""
    if device == "cuda":
        return f" ({torch.cuda.get_device_name()})"
    if device == "mps":
        return " (Apple's GPU)"
    return " (no GPU found)" if find_device("auto") == "cpu" else " (a GPU is left alone)"


def has_bf16(device: str) -> bool:
    """Tell whether bfloat16 is computed in hardware: on a CPU, by avx512_bf16 or AMX."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
