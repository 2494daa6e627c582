"""A checkpoint and data -> its figures: loss, what counting alone would score, marks, health.

    subject = open_subject("runs/chat", "cpu")
    data = open_data(subject, Path("data/chat"), seq_len=256)
    measure_loss(subject, data, batch_size=16)["bits_per_byte"]       ->  1.43

Invariant: what is measured is said by the files alone: the data are those that the manifest names, unless
others are asked for, and the rows are as long as those of the training.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from firstwords import atomic, baselines, checkpoint, health, pydocs, tokenstore
from firstwords.baselines import Targets, cut_targets, read_targets
from firstwords.dataset import TokenWindows, open_val
from firstwords.errors import BadData, BadFlag, Mismatch, MissingInput
from firstwords.loss import evaluate_loss
from firstwords.model import GPT2LMHeadModel, find_device
from firstwords.schema import RowError, format_row
from firstwords.score import answer_questions, score_answers
from firstwords.session import ChatSession
from firstwords.sources import read_texts
from firstwords.tokenizer import Tokenizer, has_other_tokenizer, load_tokenizer

# First questions of the val set that are asked for `health`.
NUM_ASKED = 128


@dataclass(frozen=True)
class Subject:
    """The model that is measured, with what is known about it."""

    name: str
    folder: Path
    model: GPT2LMHeadModel
    tokenizer: Tokenizer
    manifest: dict

    @property
    def can_chat(self) -> bool:
        """It has a row for every control token; a plain GPT-2 has none but `<|endoftext|>`."""
        return len(self.tokenizer) <= self.model.config.vocab_size

    @property
    def context(self) -> int:
        """Tokens of the longest row that it was trained on."""
        return checkpoint.find_context(self.manifest, self.model.config)

    @property
    def seq_len(self) -> int:
        """Tokens of a row in its training, else all that its positions hold."""
        positions = self.model.config.n_positions
        return min(int(self.manifest.get("flags", {}).get("seq_len", positions)), positions)


def open_subject(model_dir: str, device: str) -> Subject:
    """Load the checkpoint.

    Args:
        model_dir: run, checkpoint or model folder, or hub:<id>.
        device: as in `--device`.

    Raises:
        MissingInput, Damaged: when it is not there, or not whole.
        Mismatch: when tokenizer and weights do not belong together.
    """
    device = find_device(device)
    if model_dir.startswith("hub:"):
        name = model_dir
        folder = checkpoint.download_model(name.removeprefix("hub:"), flag="--model_dir")
    else:
        folder = checkpoint.find_checkpoint(Path(model_dir))
        name = folder.name
    tokenizer, model = load_tokenizer(folder), checkpoint.load_model(folder)
    if len(tokenizer.vocabulary) + 1 > model.config.vocab_size:
        raise Mismatch(
            f"{folder}: the model has {model.config.vocab_size} ids, its tokenizer "
            f"{len(tokenizer.vocabulary) + 1}; name a folder whose files belong together"
        )
    return Subject(name, folder, model.to(device), tokenizer, checkpoint.read_manifest(folder))


@dataclass(frozen=True)
class Data:
    """What is measured on: rows of the val split or of a text; and the train split, to be counted.

    Attributes:
        rows: a data set of `dataset`.
        read_train, read_val: give what `baselines` counts; of a text there is no train split.
        asked: the conversations whose first questions are asked, or None.
    """

    name: str
    rows: Dataset
    read_train: Callable[[], Targets | None]
    read_val: Callable[[], Targets]
    asked: Path | None = None


def open_data(
    subject: Subject,
    data_dir: Path | None = None,
    *,
    text: str | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
) -> Data:
    """Open the text, the named data, or what the model was trained on.

    Args:
        subject: the model that is measured.
        data_dir: prepared data, when not those of its training.
        text: a text in their place.
        seq_len: tokens in a row, when not as many as in its training.
        stride: of text: tokens from row to row, fewer than `seq_len`.

    Raises:
        BadFlag: for rows that are longer than the model's context.
        MissingInput: when the data are not there.
        Mismatch: when another tokenizer made them.
        BadData: when they are broken or empty.
    """
    seq_len, positions = seq_len or subject.seq_len, subject.model.config.n_positions
    if seq_len > positions:
        raise BadFlag(f"--seq_len {seq_len}: the model's context is {positions}; give that or less")
    if stride is not None and stride >= seq_len:
        raise BadFlag(f"--stride {stride}: would leave tokens out of rows of {seq_len}; give less")
    if text:
        return open_text(subject, text, seq_len, stride)
    data_dir = data_dir or subject.manifest.get("data_dir")
    if data_dir is None or not Path(data_dir).is_dir():
        raise MissingInput(
            f"--data_dir {data_dir}: is not there; name the folder of the val set, or a --text"
        )
    data_dir = Path(data_dir)
    check_tokenizer(data_dir, subject.tokenizer)
    if tokenstore.is_store(data_dir):
        return open_store(subject, data_dir, seq_len, stride)
    if stride is not None:
        raise BadFlag(f"--stride {stride}: {data_dir} holds conversations, which stay whole; leave it out")
    return open_chats(subject, data_dir, seq_len)


def open_text(subject: Subject, text: str, seq_len: int, stride: int | None) -> Data:
    """Encode a text; every token of it is predicted, the first after `<|endoftext|>`."""
    tokens = encode_text(text, subject.tokenizer)
    rows = TokenWindows(tokens, subject.tokenizer, seq_len, stride=stride)
    return Data(text, rows, lambda: None, lambda: cut_targets(tokens, subject.tokenizer))


def encode_text(dataset: str, tokenizer: Tokenizer) -> np.ndarray:
    """Return (N,) int32 ids of all documents, `<|endoftext|>` before each.

    Raises:
        MissingInput: when it is not there.
        BadData: naming the place that is no text, or holds what the tokenizer cannot hold; or for no text.
    """
    ids = array("i")
    for document in read_texts(dataset, split_docs="file"):
        if isinstance(document.pieces, RowError):
            raise BadData(f"{document.file}:{document.line}: {document.pieces}; mend it")
        ids.append(tokenizer.endoftext_id)
        for piece in document.pieces:
            try:
                ids.extend(tokenizer.encode(piece))
            except BadData as error:
                raise BadData(f"--text {dataset}: {str(error).removeprefix('text: ')}") from None
    if len(ids) < 2:
        raise BadData(f"--text {dataset}: holds no text; name another")
    return np.frombuffer(ids, dtype=np.int32)


def open_store(subject: Subject, data_dir: Path, seq_len: int, stride: int | None) -> Data:
    """Open the val split of a token store."""
    tokens = tokenstore.open_store(data_dir, "val").tokens
    rows = TokenWindows(tokens, subject.tokenizer, seq_len, stride=stride)
    check_vocabulary(data_dir, int(tokens.max()), subject.model)
    return Data(str(data_dir), rows, *read_both(data_dir, subject.tokenizer, assistant_only=False))


def open_chats(subject: Subject, data_dir: Path, seq_len: int) -> Data:
    """Open the val split of conversations, learned as the model was told to learn them."""
    tokenizer, flags = subject.tokenizer, subject.manifest.get("flags", {})
    only = flags.get("assistant_only_loss", "True") == "True"
    overlong = flags.get("overlong", "drop")
    rows = open_val(data_dir, tokenizer, seq_len, assistant_only=only, overlong=overlong)
    check_vocabulary(data_dir, int(rows.chats.ids.max()), subject.model)
    asked = data_dir / "val.jsonl"
    both = read_both(data_dir, tokenizer, assistant_only=only)
    return Data(str(data_dir), rows, *both, asked if only and asked.is_file() else None)


def read_both(
    data_dir: Path, tokenizer: Tokenizer, *, assistant_only: bool
) -> tuple[Callable[[], Targets], Callable[[], Targets]]:
    """Return what reads the labels of train and of val, when somebody wants to count them."""
    train, val = (
        partial(read_targets, data_dir, split, tokenizer, assistant_only=assistant_only)
        for split in ("train", "val")
    )
    return train, val


def check_tokenizer(data_dir: Path, tokenizer: Tokenizer) -> None:
    """Raise `Mismatch` when the data say that another tokenizer made them."""
    if has_other_tokenizer(data_dir, tokenizer):
        raise Mismatch(f"--data_dir {data_dir}: made by another tokenizer; prepare it with the model's")


def check_vocabulary(data_dir: Path, highest: int, model: GPT2LMHeadModel) -> None:
    """Raise `Mismatch` when the data hold a token for which the model has no row."""
    if highest >= model.config.vocab_size:
        raise Mismatch(
            f"--data_dir {data_dir}: holds token {highest}, but the model has {model.config.vocab_size}; "
            "measure it on a --text, or train it on conversations first"
        )


def asks_questions(wish: str, manifest: dict) -> bool:
    """Tell whether the questions of pydocs are asked."""
    if wish != "auto":
        return wish == "pydocs"
    return checkpoint.is_chat(manifest) and any("pydocs" in source for source in manifest.get("sources", []))


def measure_answers(subject: Subject, out_dir: Path | None, *, seed: int, say: Callable[[str], None]) -> dict:
    """Ask all held-out questions through `ChatSession`; write every reply, return the shares.

    Args:
        subject: the model that is asked.
        out_dir: where the replies go; None for nowhere.
        seed: draws the questions.
        say: takes a line that says how many there are.

    Raises:
        Mismatch: when the model cannot chat.
    """
    if not subject.can_chat:
        raise Mismatch(f"{subject.name}: has no control tokens and cannot be asked; pass --questions none")

    def open_session() -> ChatSession:
        return ChatSession(subject.model, subject.tokenizer, context=subject.context)

    held_out = pydocs.build_held_out()
    say(f"asking {len(held_out.questions):,} questions and more")
    answers = answer_questions(open_session, held_out, seed=seed)
    if out_dir is not None:
        lines = "".join(format_row(answer.row()) for answer in answers)
        atomic.write_text(out_dir / "evaluation_replies.jsonl", lines)
    return score_answers(answers)


def measure_health(subject: Subject, asked: Path) -> dict:
    """Return how many of the replies to the val set's questions end, repeat, and are exact."""
    checks = health.read_checks(asked, NUM_ASKED)
    return health.measure_health(subject.model, subject.tokenizer, checks, context=subject.context)


def measure_loss(subject: Subject, data: Data, batch_size: int) -> dict:
    """Return loss, perplexity, bits per byte and accuracy over all rows, weighted by tokens."""
    loss = evaluate_loss(subject.model, data.rows, subject.tokenizer, batch_size=batch_size)
    return {
        "val_loss": loss.mean,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
        "accuracy": loss.accuracy,
        "val_tokens": loss.tokens,
        "val_bytes": loss.num_bytes,
        "loss_by_position": {str(first): part.mean for first, part in loss.by_position.items()},
        "loss_by_turn": {str(turn): part.mean for turn, part in loss.by_turn.items()},
    }


def measure_baselines(data: Data, tokenizer: Tokenizer) -> dict:
    """Return what counting the train split, and a compressor, score on the same labels."""
    found = baselines.measure_baselines(data.read_train(), data.read_val(), tokenizer)
    return {name: baseline.describe() for name, baseline in found.items()}
