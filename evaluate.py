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
from pathlib import Path

from firstwords import atomic
from firstwords.args import build_parser, run_main
from firstwords.errors import BadData, BadFlag


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
    from firstwords import evaluation

    subject = evaluation.open_subject(args.model_dir, args.device)
    rows = {name: getattr(args, name) for name in ("text", "seq_len", "stride")}
    val = evaluation.open_data(subject, args.data_dir, **rows)
    figures: dict = {"checkpoint": subject.name, "step": subject.manifest.get("step"), "data": val.name}
    if evaluation.asks_questions(args.questions, subject.manifest):
        figures |= evaluation.measure_answers(subject, args.out_dir, seed=args.seed, say=remark)
    figures |= evaluation.measure_loss(subject, val, args.batch_size)
    if val.asked is not None:
        figures["health"] = evaluation.measure_health(subject, val.asked)
    if args.baselines:
        figures["baselines"] = evaluation.measure_baselines(val, subject.tokenizer)
    if args.out_dir is not None:
        atomic.write_text(args.out_dir / "evaluation.json", atomic.format_json(figures))
    print_figures(figures)


def remark(line: str) -> None:
    """Say on stderr what is being done."""
    print(line, file=sys.stderr, flush=True)


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


def run_tasks(args) -> None:
    """Run lm-eval's tasks on the checkpoint folder as it is; write `evaluation_tasks.json` and print.

    Raises:
        BadFlag: when lm-eval is missing, or does not know a task.
        MissingInput: when the data of a task cannot be had.
    """
    from firstwords import tasks
    from firstwords.evaluation import open_subject

    tasks.check_harness()
    subject = open_subject(args.model_dir, args.device)
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
