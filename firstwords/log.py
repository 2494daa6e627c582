"""What a run says -> the line of it in `train.log`, TensorBoard's file, and a bar or the line on screen.

    log = RunLog(Path("runs/chat"), EventWriter(Path("runs/chat/runs"), first_step=0))
    log.say("going on from runs/chat/checkpoint-400")

Invariant: nothing ends a run because nobody reads what it says, no full disk and no closed terminal.
"""

import sys
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback

from firstwords import atomic
from firstwords.args import print_line
from firstwords.pace import format_seconds
from firstwords.schema import mask_control


class EventWriter:
    """TensorBoard's file, by the four methods of a `SummaryWriter` that a run uses.

    What its disk does not take is left out: a disk that is full ends no run that can still save. The next
    figure begins another file.

    Args:
        folder: `runs` of the run.
        first_step: events of later steps, written by a life that was killed, are purged.
    """

    def __init__(self, folder: Path, first_step: int):
        # Here, so that `--report_to none` and benchmarks run where TensorBoard is not installed.
        from torch.utils.tensorboard import SummaryWriter

        # From 0 too: of a life that was killed before its first checkpoint, every step is written again.
        purge_step = first_step + 1 if first_step else 0
        self._folder, self._writer = folder, SummaryWriter(str(folder), purge_step=purge_step)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one number."""
        self._try(lambda writer: writer.add_scalar(tag, value, step))

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Write one text."""
        self._try(lambda writer: writer.add_text(tag, text, step))

    def flush(self) -> None:
        """Bring what was written to the file."""
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        """Close the file."""
        self._try(lambda writer: writer.close())

    def _try(self, do) -> None:
        try:
            do(self._writer)
        except OSError:
            with suppress(OSError):
                self._writer = type(self._writer)(str(self._folder))


class RunLog(TrainerCallback):
    """Write the run's lines: `train.log`, the figures to a writer, and a bar or the lines on screen.

    Args:
        run_dir: the run.
        writer: takes numbers and texts: a `monitor.Writers`, or one of those in it.
    """

    def __init__(self, run_dir: Path, writer):
        self.writer = writer
        self._file = open(  # noqa: SIM115
            run_dir / "train.log", "a", buffering=1, encoding="utf-8", opener=atomic.open_no_link
        )
        self._bar = None

    def say(self, line: str) -> None:
        """Write a line to train.log and to the screen, above the bar.

        A disk that is full, or a screen that is gone, ends no run.
        """
        line = mask_control(line)
        with suppress(OSError):
            self._file.write(line + "\n")
        if self._bar is None:
            print_line(line, sys.stdout)
        else:
            self._on_bar(lambda bar: bar.write(line))

    def _on_bar(self, do) -> None:
        try:
            do(self._bar)
        except OSError:  # the terminal has been closed
            self._bar.disable, self._bar = True, None

    def close(self) -> None:
        """Close the files."""
        self.writer.close()
        with suppress(OSError):
            self._file.close()

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar, on a terminal."""
        if sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        if self._bar is not None:
            self._bar.total = state.max_steps
            self._on_bar(lambda bar: bar.update(state.global_step - bar.n))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write one line and the scalars."""
        group = "eval" if "eval_loss" in logs else "train"
        for name, value in logs.items():
            self.writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, state.global_step)
        self.writer.flush()
        self.say(format_line(state.global_step, state.max_steps, logs))
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix_str(format_live(logs))

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar; the log stays open for the last words."""
        if self._bar is not None:
            self._on_bar(lambda bar: bar.close())
            self._bar = None


def format_line(step: int, max_steps: int, logs: dict[str, float]) -> str:
    """Return one line of train.log."""
    head = f"step {step}/{max_steps}"
    if "eval_loss" in logs:
        return (
            f"{head}  val loss {logs['eval_loss']:.4f}  ppl {logs['eval_perplexity']:.4g}"
            f"  bpb {logs['eval_bits_per_byte']:.4f}  acc {logs['eval_accuracy']:.4f}"
        )
    hardware = ""
    if "share_of_matmul" in logs:
        hardware = f"  matmul {logs['share_of_matmul']:.0%}  mem {logs['peak_memory_gb']:.2f}G"
    return (
        f"{head}  loss {logs['loss']:.4f}  ppl {logs['perplexity']:.4g}  bpb {logs['bits_per_byte']:.4f}"
        f"  lr {logs['learning_rate']:.2e}  grad {logs['grad_norm']:.3f}"
        f"  tok/s {logs['tokens_per_second']:,.0f}{hardware}  tokens {logs['tokens_seen']:,}"
        f"  epoch {logs['epoch']:.2f}  left {format_seconds(logs['seconds_left'])}"
    )


def format_live(logs: dict[str, float]) -> str:
    """Return what stands behind the bar on a terminal, where the line above has scrolled away."""
    return (
        f"loss {logs['loss']:.4f} bpb {logs['bits_per_byte']:.4f} tok/s {logs['tokens_per_second']:,.0f}"
        f" matmul {logs['share_of_matmul']:.0%} mem {logs['peak_memory_gb']:.2f}G"
        f" left {format_seconds(logs['seconds_left'])}"
    )
