#!/usr/bin/env python
"""Measure a checkpoint: loss, perplexity, bits per byte, and whether its answers are true.

  python evaluate.py --model_dir runs/chat

Writes evaluation.json and evaluation_replies.jsonl into the folder and prints the figures. The questions
are those that `pydocs` held out from training; a model of other data gets the losses alone.
"""

import sys
from pathlib import Path

from firstwords import atomic
from firstwords.args import build_parser, run_main
from firstwords.errors import BadFlag, Mismatch, MissingInput
from firstwords.schema import format_row


def main(argv: list[str]) -> None:
    """Parse the flags, measure, write and print."""
    args = parse_args(argv)
    from firstwords.model import find_device, quiet_transformers
    from firstwords.session import load_session

    quiet_transformers()
    session = load_session(args.model_dir, device=find_device(args.device))
    losses = measure_loss(session, args)
    figures: dict = {"checkpoint": session.folder.name, "step": session.manifest.get("step")}
    if asks_questions(args.questions, session.manifest):
        figures |= measure_answers(session, args.model_dir, args.seed)
    figures |= losses
    atomic.write_text(args.model_dir / "evaluation.json", atomic.format_json(figures))
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}}  {value:.4f}" if isinstance(value, float) else f"{name:{width}}  {value}")


def parse_args(argv: list[str]):
    """Return the flags.

    Raises:
        BadFlag: for a value that cannot be.
    """
    parser = build_parser(__doc__)
    parser.add_argument("--model_dir", type=Path, required=True, help="run, checkpoint or model folder")
    parser.add_argument("--data_dir", type=Path, help="data for the loss; default: what it trained on")
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default auto"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="rows at a time (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="draws the questions (default 0)")
    parser.add_argument(
        "--questions",
        choices=["auto", "pydocs", "none"],
        default="auto",
        help="auto: asked when the model was trained on pydocs (default auto)",
    )
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise BadFlag(f"--batch_size: is {args.batch_size}; give 1 or more")
    return args


def asks_questions(wish: str, manifest: dict) -> bool:
    """Tell whether the questions of pydocs are asked."""
    if wish != "auto":
        return wish == "pydocs"
    is_chat = manifest.get("flags", {}).get("assistant_only_loss") == "True"
    return is_chat and any("pydocs" in source for source in manifest.get("sources", []))


def measure_answers(session, model_dir: Path, seed: int) -> dict:
    """Ask all held-out questions through `ChatSession`; write every reply, return the shares."""
    from firstwords.pydocs import build_held_out
    from firstwords.score import answer_questions, score_answers
    from firstwords.session import ChatSession

    def open_session() -> ChatSession:
        return ChatSession(session.model, session.tokenizer, context=session.context)

    held_out = build_held_out()
    print(f"asking {len(held_out.questions):,} questions and more", file=sys.stderr, flush=True)
    answers = answer_questions(open_session, held_out, seed=seed)
    lines = "".join(format_row(answer.row()) for answer in answers)
    atomic.write_text(model_dir / "evaluation_replies.jsonl", lines)
    return score_answers(answers)


def check_tokenizer(data_dir: Path, tokenizer) -> None:
    """Raise `Mismatch` when the data say that another tokenizer made them."""
    from firstwords.tokenizer import load_tokenizer

    if (data_dir / "tokenizer.json").is_file() and load_tokenizer(data_dir).hash != tokenizer.hash:
        raise Mismatch(f"--data_dir {data_dir}: made by another tokenizer; prepare it with the model's")


def measure_loss(session, args) -> dict:
    """Return loss, perplexity and bits per byte over the whole val set, weighted by tokens.

    Raises:
        MissingInput: when the data are not there.
        Mismatch: when another tokenizer made them.
    """
    from firstwords import tokenstore
    from firstwords.dataset import open_val
    from firstwords.score import evaluate_loss

    data_dir = args.data_dir or session.manifest.get("data_dir")
    if data_dir is None or not Path(data_dir).is_dir():
        raise MissingInput(f"--data_dir {data_dir}: is not there; name the folder of the val set")
    data_dir, flags = Path(data_dir), session.manifest.get("flags", {})
    check_tokenizer(data_dir, session.tokenizer)
    has_assistant = not tokenstore.is_store(data_dir)
    val_set = open_val(
        data_dir,
        session.tokenizer,
        int(flags.get("seq_len", session.context)),
        assistant_only=has_assistant and flags.get("assistant_only_loss", "True") == "True",
        overlong=flags.get("overlong", "drop"),
    )
    loss = evaluate_loss(session.model, val_set, session.tokenizer, batch_size=args.batch_size)
    return {
        "val_loss": loss.mean,
        "perplexity": loss.perplexity,
        "bits_per_byte": loss.bits_per_byte,
        "val_tokens": loss.tokens,
        "val_bytes": loss.num_bytes,
    }


if __name__ == "__main__":
    run_main(main)
