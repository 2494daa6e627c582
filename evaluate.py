#!/usr/bin/env python
"""Measure a checkpoint: loss, perplexity, bits per byte, and whether its answers are true.

  python evaluate.py --model_dir runs/chat
  python evaluate.py --model_dir hub:gpt2 --text book.txt --stride 512
  python evaluate.py --model_dir runs/base --tasks hellaswag,piqa
  python evaluate.py --model_dir runs/chat --report
  python evaluate.py --model_dir runs/chat --timeline "Who are you?"
  python evaluate.py --compare runs/chat runs/other

Writes evaluation.json and evaluation_replies.jsonl into the folder and prints the figures, beside what
counting tokens and a compressor score on the same data. The questions are those that `pydocs` held out from
training; a model of other data gets the losses alone.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from firstwords import atomic
from firstwords.args import build_parser, run_main
from firstwords.errors import BadData, BadFlag, Mismatch, MissingInput
from firstwords.schema import RowError, format_row

# First questions of the val set that are asked for `health`.
NUM_ASKED = 128


def main(argv: list[str]) -> None:
    """Parse the flags, measure, write and print."""
    args = parse_args(argv)
    from firstwords.model import quiet_transformers

    quiet_transformers()
    if args.compare:
        compare(args)
    elif args.report:
        report(args)
    elif args.timeline is not None:
        show_timeline(args)
    elif args.tasks:
        run_tasks(args)
    else:
        measure(args)


def measure(args) -> None:
    """Measure loss, baselines and answers; write and print them."""
    subject = open_subject(args)
    val = open_data(args, subject)
    figures: dict = {"checkpoint": subject.name, "step": subject.manifest.get("step"), "data": val.name}
    if asks_questions(args.questions, subject.manifest):
        figures |= measure_answers(subject, args.out_dir, args.seed)
    figures |= measure_loss(subject, val, args.batch_size)
    if val.asked is not None:
        figures["health"] = measure_health(subject, val.asked)
    if args.baselines:
        figures["baselines"] = measure_baselines(val, subject.tokenizer)
    if args.out_dir is not None:
        atomic.write_text(args.out_dir / "evaluation.json", atomic.format_json(figures))
    print_figures(figures)


def parse_args(argv: list[str]):
    """Return the flags.

    Raises:
        BadFlag: for a value that cannot be.
    """
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("--model_dir", help="run, checkpoint or model folder, or hub:<id>")
    add("--data_dir", type=Path, help="prepared data for the loss; default: what it trained on")
    add("--text", help="a text to measure in place of prepared data: .txt, .jsonl, .parquet or .csv")
    add("--out_dir", type=Path, help="where the figures go; default --model_dir, of hub:<id> nowhere")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default auto")
    add("--batch_size", type=int, default=16, help="rows at a time (default 16)")
    add("--seq_len", type=int, help="tokens in a row; default: as it was trained, else its context")
    add("--stride", type=int, help="of text: tokens from row to row; default --seq_len less one")
    add("--tasks", help="run lm-eval instead: hellaswag,arc_easy,piqa,lambada_openai,blimp,core")
    add("--task_dir", type=Path, help="folder with yaml files of further tasks for lm-eval")
    add("--limit", type=int, help="items of each task; default all")
    add("--report", action="store_true", help="write report.html and report.md of a run from its files")
    add("--timeline", metavar="PROMPT", help="put one prompt through every kept checkpoint of a run")
    add("--compare", nargs=2, type=Path, metavar="RUN", help="lay two runs side by side")
    add("--no_baselines", action="store_false", dest="baselines", help="the model's figures alone")
    add("--seed", type=int, default=0, help="draws the questions (default 0)")
    add(
        "--questions",
        choices=["auto", "pydocs", "none"],
        default="auto",
        help="auto: asked when the model was trained on pydocs (default auto)",
    )
    args = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("seq_len", 2), ("stride", 1), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise BadFlag(f"--{name}: is {value}; give {least} or more")
    chosen = [name for name in ("report", "timeline", "compare", "tasks") if getattr(args, name)]
    if len(chosen) > 1:
        raise BadFlag(f"--{chosen[0]}: stands by itself; leave --{chosen[1]} to another call")
    if (args.model_dir is None) == (args.compare is None):
        raise BadFlag("--model_dir: give the model that is measured, or two runs with --compare")
    if args.text and args.data_dir:
        raise BadFlag("--text: give either a text or --data_dir")
    if args.out_dir is None and args.model_dir and not args.model_dir.startswith("hub:"):
        args.out_dir = Path(args.model_dir)
    return args


@dataclass(frozen=True)
class Subject:
    """The model that is measured, with what is known about it."""

    name: str
    folder: Path
    model: object
    tokenizer: object
    manifest: dict

    @property
    def can_chat(self) -> bool:
        """It has a row for every control token; a plain GPT-2 has none but `<|endoftext|>`."""
        return len(self.tokenizer) <= self.model.config.vocab_size

    @property
    def context(self) -> int:
        """Tokens of the longest row that it was trained on."""
        from firstwords.checkpoint import find_context

        return find_context(self.manifest, self.model.config)


def open_subject(args) -> Subject:
    """Load the checkpoint.

    Raises:
        MissingInput, Damaged: when it is not there, or not whole.
        Mismatch: when tokenizer and weights do not belong together.
    """
    from firstwords import checkpoint
    from firstwords.model import find_device
    from firstwords.tokenizer import load_tokenizer

    device = find_device(args.device)
    if args.model_dir.startswith("hub:"):
        name = args.model_dir
        folder = checkpoint.download_model(name.removeprefix("hub:"), flag="--model_dir")
    else:
        folder = checkpoint.find_checkpoint(Path(args.model_dir))
        name = folder.name
    tokenizer, model = load_tokenizer(folder), checkpoint.load_model(folder)
    if len(tokenizer.vocabulary) + 1 > model.config.vocab_size:
        raise Mismatch(
            f"{folder}: the model has {model.config.vocab_size} ids, its tokenizer "
            f"{len(tokenizer.vocabulary) + 1}; name a folder whose files belong together"
        )
    return Subject(name, folder, model.to(device), tokenizer, checkpoint.read_manifest(folder))


def run_tasks(args) -> None:
    """Run lm-eval's tasks on the checkpoint folder as it is; write `evaluation_tasks.json` and print.

    Raises:
        BadFlag: when lm-eval is missing, or does not know a task.
        MissingInput: when the data of a task cannot be had.
    """
    from firstwords import tasks

    tasks.check_harness()
    subject = open_subject(args)
    harness = tasks.open_harness(args.task_dir)
    found = tasks.run_tasks(
        subject.model,
        subject.tokenizer,
        tasks.choose_tasks(args.tasks, harness),
        harness,
        context=min(subject.context, subject.model.config.n_positions),
        batch_size=args.batch_size,
        limit=args.limit,
    )
    figures = {"checkpoint": subject.name, "step": subject.manifest.get("step"), **found}
    if args.out_dir is not None:
        atomic.write_text(args.out_dir / "evaluation_tasks.json", atomic.format_json(figures))
    for task, scores in found["results"].items():
        shares = {name.partition(",")[0]: x for name, x in scores.items() if isinstance(x, float)}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in shares.items() if "stderr" not in name)
        print(f"{task:30}  {shown}")


def report(args) -> None:
    """Write `report.html` and `report.md` into the run.

    Raises:
        MissingInput: when there is no run.
        BadData: after the report was written, when a file of the run is broken.
    """
    from firstwords.report import write_report

    folder = Path(args.model_dir)
    broken = write_report(folder)
    print(f"{folder / 'report.html'}\n{folder / 'report.md'}")
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise BadData(f"{broken[0]}{more}; the rest of the report is written")


def compare(args) -> None:
    """Print what differs between two runs, and write the page with their curves.

    Raises:
        MissingInput: when one of them is no run.
        BadData: after all was written, when a file of theirs is broken.
    """
    from firstwords.compare import compare_runs

    first, second = args.compare
    text, page, broken = compare_runs((first, second))
    path = (args.out_dir or second) / f"compare_with_{first.resolve().name}.html"
    atomic.write_text(path, page)
    print(f"{text}\n\n{path}")
    if broken:
        raise BadData(f"{broken[0]}; the rest of the comparison is written")


def show_timeline(args) -> None:
    """Put one prompt through every kept checkpoint, the oldest first; print and write `timeline.md`.

    Raises:
        MissingInput, Damaged: when there is no checkpoint, or one is not whole.
    """
    from firstwords import checkpoint, samples
    from firstwords.model import find_device
    from firstwords.tokenizer import load_tokenizer

    run, device = Path(args.model_dir), find_device(args.device)
    checkpoint.check_folder(run, "--model_dir")
    folders = checkpoint.list_checkpoints(run)[::-1] or [checkpoint.find_checkpoint(run)]
    sections = []
    for folder in folders:
        checkpoint.verify(folder)
        manifest = checkpoint.read_manifest(folder)
        model = checkpoint.load_model(folder).to(device)
        speak = samples.build_speaker(
            load_tokenizer(folder),
            context=checkpoint.find_context(manifest, model.config),
            chat=checkpoint.is_chat(manifest),
        )
        section = samples.format_section(
            manifest["step"], samples.draw_samples(model, [args.timeline], speak)
        )
        sections.append(section)
        print(section, flush=True)
    atomic.write_text(args.out_dir / "timeline.md", "".join(sections))


@dataclass(frozen=True)
class Data:
    """What is measured on: rows of the val split or of a text; and the train split, to be counted.

    Attributes:
        rows: a data set of `dataset`.
        read_train, read_val: give what `baselines` counts; of a text there is no train split.
        asked: the conversations whose first questions are asked, or None.
    """

    name: str
    rows: object
    read_train: object
    read_val: object
    asked: Path | None = None


def open_data(args, subject: Subject) -> Data:
    """Open the text, the named data, or what the model was trained on.

    Raises:
        BadFlag: for rows that are longer than the model's context.
        MissingInput: when the data are not there.
        Mismatch: when another tokenizer made them.
        BadData: when they are broken or empty.
    """
    positions = subject.model.config.n_positions
    seq_len = args.seq_len or min(int(subject.manifest.get("flags", {}).get("seq_len", positions)), positions)
    if seq_len > positions:
        raise BadFlag(f"--seq_len {seq_len}: the model's context is {positions}; give that or less")
    if args.stride is not None and args.stride >= seq_len:
        raise BadFlag(f"--stride {args.stride}: would leave tokens out of rows of {seq_len}; give less")
    if args.text:
        return open_text(args, subject, seq_len)
    data_dir = args.data_dir or subject.manifest.get("data_dir")
    if data_dir is None or not Path(data_dir).is_dir():
        raise MissingInput(
            f"--data_dir {data_dir}: is not there; name the folder of the val set, or a --text"
        )
    return open_prepared(Path(data_dir), args, subject, seq_len)


def open_text(args, subject: Subject, seq_len: int) -> Data:
    """Encode a text; every token of it is predicted, the first after `<|endoftext|>`."""
    from firstwords.baselines import cut_targets
    from firstwords.dataset import TokenWindows

    tokens = encode_text(args.text, subject.tokenizer)
    rows = TokenWindows(tokens, subject.tokenizer, seq_len, stride=args.stride)
    return Data(args.text, rows, lambda: None, lambda: cut_targets(tokens, subject.tokenizer))


def encode_text(dataset: str, tokenizer):
    """Return (N,) int32 ids of all documents, `<|endoftext|>` before each.

    Raises:
        MissingInput: when it is not there.
        BadData: naming the place that is no text, or holds what the tokenizer cannot hold; or for no text.
    """
    from array import array

    import numpy as np

    from firstwords.sources import read_texts

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


def open_prepared(data_dir: Path, args, subject: Subject, seq_len: int) -> Data:
    """Open what a prep script wrote."""
    from firstwords import tokenstore
    from firstwords.baselines import read_targets
    from firstwords.dataset import TokenWindows, open_val

    tokenizer, flags = subject.tokenizer, subject.manifest.get("flags", {})
    check_tokenizer(data_dir, tokenizer)
    is_store = tokenstore.is_store(data_dir)
    if is_store:
        tokens = tokenstore.open_store(data_dir, "val").tokens
        rows = TokenWindows(tokens, tokenizer, seq_len, stride=args.stride)
        check_vocabulary(data_dir, int(tokens.max()), subject.model)
    elif args.stride is not None:
        raise BadFlag(
            f"--stride {args.stride}: {data_dir} holds conversations, which stay whole; leave it out"
        )
    only = not is_store and flags.get("assistant_only_loss", "True") == "True"
    if not is_store:
        rows = open_val(
            data_dir, tokenizer, seq_len, assistant_only=only, overlong=flags.get("overlong", "drop")
        )
        check_vocabulary(data_dir, int(rows.chats.ids.max()), subject.model)

    def read(split: str):
        return lambda: read_targets(data_dir, split, tokenizer, assistant_only=only)

    asked = data_dir / "val.jsonl"
    return Data(str(data_dir), rows, read("train"), read("val"), asked if only and asked.is_file() else None)


def check_tokenizer(data_dir: Path, tokenizer) -> None:
    """Raise `Mismatch` when the data say that another tokenizer made them."""
    from firstwords.tokenizer import load_tokenizer

    if (data_dir / "tokenizer.json").is_file() and load_tokenizer(data_dir).hash != tokenizer.hash:
        raise Mismatch(f"--data_dir {data_dir}: made by another tokenizer; prepare it with the model's")


def check_vocabulary(data_dir: Path, highest: int, model) -> None:
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
    from firstwords.checkpoint import is_chat

    return is_chat(manifest) and any("pydocs" in source for source in manifest.get("sources", []))


def measure_answers(subject: Subject, out_dir: Path | None, seed: int) -> dict:
    """Ask all held-out questions through `ChatSession`; write every reply, return the shares.

    Raises:
        Mismatch: when the model cannot chat.
    """
    from firstwords.pydocs import build_held_out
    from firstwords.score import answer_questions, score_answers
    from firstwords.session import ChatSession

    if not subject.can_chat:
        raise Mismatch(f"{subject.name}: has no control tokens and cannot be asked; pass --questions none")

    def open_session() -> ChatSession:
        return ChatSession(subject.model, subject.tokenizer, context=subject.context)

    held_out = build_held_out()
    print(f"asking {len(held_out.questions):,} questions and more", file=sys.stderr, flush=True)
    answers = answer_questions(open_session, held_out, seed=seed)
    if out_dir is not None:
        lines = "".join(format_row(answer.row()) for answer in answers)
        atomic.write_text(out_dir / "evaluation_replies.jsonl", lines)
    return score_answers(answers)


def measure_health(subject: Subject, asked: Path) -> dict:
    """Return how many of the replies to the val set's questions end, repeat, and are exact."""
    from firstwords import health

    checks = health.read_checks(asked, NUM_ASKED)
    return health.measure_health(subject.model, subject.tokenizer, checks, context=subject.context)


def measure_loss(subject: Subject, data: Data, batch_size: int) -> dict:
    """Return loss, perplexity, bits per byte and accuracy over all rows, weighted by tokens."""
    from firstwords.loss import evaluate_loss

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


def measure_baselines(data: Data, tokenizer) -> dict:
    """Return what counting the train split, and a compressor, score on the same labels."""
    from firstwords import baselines

    found = baselines.measure_baselines(data.read_train(), data.read_val(), tokenizer)
    return {name: baseline.describe() for name, baseline in found.items()}


def print_figures(figures: dict) -> None:
    """Print single figures a line, then the curves, then model and baselines as a table."""
    width = max(map(len, figures))
    for name, value in figures.items():
        if name.startswith("loss_by_") and value:
            shown = "  ".join(f"{place}: {loss:.3f}" for place, loss in value.items())
            print(f"{name:{width}}  {shown}")
        elif name == "health":
            print(f"{name:{width}}  " + "  ".join(f"{key}: {share:.4g}" for key, share in value.items()))
        elif not isinstance(value, dict):
            print(f"{name:{width}}  {value:.4f}" if isinstance(value, float) else f"{name:{width}}  {value}")
    if "baselines" in figures:
        print(f"\n{'':{width}}  {'loss':>10}  {'perplexity':>10}  bits per byte")
        model = {
            "loss": figures["val_loss"],
            **{key: figures[key] for key in ("perplexity", "bits_per_byte")},
        }
        for name, row in {**figures["baselines"], "the model": model}.items():
            cells = (f"{row[key]:10.4f}" if key in row else " " * 10 for key in ("loss", "perplexity"))
            print(f"{name:{width}}  {'  '.join(cells)}  {row['bits_per_byte']:13.4f}")


if __name__ == "__main__":
    run_main(main)
