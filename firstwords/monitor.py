"""A run in progress -> what one wants to see of it: rates, samples, health, forgetting, tests.

    run.add_callback(monitor.Health(log, tokenizer, checks, context))

Each of these looks at the model at every evaluation and hands numbers and texts to the log's writers, those
of `--report_to`. Invariant: looking changes nothing; neither weights nor any random
state, so that a run trains the same with and without them.
"""

import json
import resource
import sys
import time
import uuid
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

import torch
from transformers import TrainerCallback

from firstwords import atomic
from firstwords.errors import BadFlag, IOFailed, MissingInput
from firstwords.health import Check, measure_health
from firstwords.loss import evaluate_loss
from firstwords.model import find_inner
from firstwords.samples import Speak, append_section, cut_sections, draw_samples, format_section
from firstwords.schema import mask_control
from firstwords.tasks import Item, score_endings, score_items
from firstwords.tokenizer import Tokenizer

REPORTERS = ("tensorboard", "wandb", "trackio")


class AtEvaluation(TrainerCallback):
    """Look at the model after each evaluation, in eval mode, in the first process alone.

    Args:
        log: a `log.RunLog`; `say` writes a line, `writer` numbers and texts.
    """

    def __init__(self, log):
        self.log = log

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        """Look, and leave the model in the mode it was in."""
        if not state.is_world_process_zero:
            return
        was_training = model.training
        model.eval()
        try:
            self.look(model, state.global_step)
        # Looking must not end a run that can still save. Missing may be the encoder of a prompt.
        except (OSError, IOFailed, MissingInput) as error:
            self.log.say(f"  {type(self).__name__} is left out: {error}")
        self.log.writer.flush()
        model.train(was_training)

    def look(self, model, step: int) -> None:
        """Measure something."""
        raise NotImplementedError

    def write(self, group: str, figures: dict[str, float], step: int) -> None:
        """Hand figures to the writers as `group/name`."""
        for name, value in figures.items():
            self.log.writer.add_scalar(f"{group}/{name}", value, step)


class Samples(AtEvaluation):
    """What the model says to fixed prompts: in train.log, as text in TensorBoard, in `samples.md`.

    Args:
        log: where the replies go.
        prompts: one user turn each, or the beginnings of texts.
        speak: from `samples.build_speaker`.
        path: of `samples.md`; sections beyond `first_step` are of a life that was killed, and go.
        first_step: the step from which the run goes on.
    """

    def __init__(self, log, prompts: list[str], speak: Speak, path: Path, first_step: int):
        super().__init__(log)
        self.prompts, self.speak, self.path = prompts, speak, path
        cut_sections(path, first_step)

    def look(self, model, step: int) -> None:
        """Ask each prompt by itself."""
        samples = draw_samples(model, self.prompts, self.speak)
        append_section(self.path, format_section(step, samples))
        for prompt, replies in samples.items():
            shown = mask_control(shorten(prompt, 80, placeholder=" ..."))
            if "not asked" in replies:
                self.log.say(f"  {shown}  ->  not asked, {replies['not asked']}")
                continue
            self.log.say(f"  {shown}  ->  {replies['greedy']!r}")
            text = "\n\n".join(f"{kind}: {reply}" for kind, reply in replies.items())
            self.log.writer.add_text(f"samples/{shown}", text, step)


class Health(AtEvaluation):
    """Chat health on fixed prompts; see `health.measure_health`."""

    def __init__(self, log, tokenizer: Tokenizer, checks: Sequence[Check], context: int):
        super().__init__(log)
        self.tokenizer, self.checks, self.context = tokenizer, checks, context

    def look(self, model, step: int) -> None:
        """Ask all prompts at once."""
        figures = measure_health(model, self.tokenizer, self.checks, context=self.context)
        self.write("health", figures, step)
        if figures:
            self.log.say(format_health(figures))


def format_health(figures: dict[str, float]) -> str:
    """Return the line of train.log."""
    shares = ("stop_rate", "role_leak", "repeat_4gram", "empty", "exact")
    parts = [f"{name} {figures[name]:.0%}" for name in shares if name in figures]
    parts.append(f"{figures['mean_tokens']:.1f} tokens")
    return f"  health of {figures['num_prompts']} replies: {', '.join(parts)}"


class KeptText(AtEvaluation):
    """The loss on stage A's text while stage B trains: where it rises, the model forgets.

    Args:
        log, tokenizer: as above.
        rows: `dataset.TokenWindows` over the beginning of stage A's val split.
        batch_size, bf16: of the evaluation.
    """

    def __init__(self, log, tokenizer: Tokenizer, rows, *, batch_size: int, bf16: bool):
        super().__init__(log)
        self.tokenizer, self.rows, self.batch_size, self.bf16 = tokenizer, rows, batch_size, bf16

    def look(self, model, step: int) -> None:
        """Measure it as the val loss is measured."""
        loss = evaluate_loss(model, self.rows, self.tokenizer, batch_size=self.batch_size, bf16=self.bf16)
        figures = {"kept_text_loss": loss.mean, "kept_text_bits_per_byte": loss.bits_per_byte}
        self.write("eval", figures, step)
        self.log.say(f"  stage A's text: loss {loss.mean:.4f}  bpb {loss.bits_per_byte:.4f}")


class TaskScores(AtEvaluation):
    """HellaSwag at each evaluation, as build-nanogpt (Karpathy 2024) logs it."""

    def __init__(self, log, tokenizer: Tokenizer, items: Sequence[Item], *, context: int, bf16: bool):
        super().__init__(log)
        self.tokenizer, self.items, self.context, self.bf16 = tokenizer, items, context, bf16

    def look(self, model, step: int) -> None:
        """Weigh all endings."""
        outcomes = score_endings(model, self.tokenizer, self.items, context=self.context, bf16=self.bf16)
        scores = score_items(outcomes)
        self.write("eval", {f"hellaswag_{name}": value for name, value in scores.items()}, step)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self.log.say(f"  hellaswag, {len(outcomes)} items: {shown}")


# --- what the hardware does


class Hardware(TrainerCallback):
    """Add to the rates: the share of the measured matmul rate, peak memory, and energy where NVML tells.

    The share counts the multiplications that the real tokens of a step need (Chowdhery et al. 2022, appendix
    B): 6 for each weight of a block and token, 12 * T * n_embd for the attention of a layer, and 6 for each
    weight of the head and labelled token. Padding is no work done. Stands behind `Throughput`.

    Args:
        run: the trainer, whose `rates` are added to.
    """

    def __init__(self, run):
        self.run, self.peak, self.meter, self._energy = run, None, None, 0.0
        self.flops_per_step = count_flops(run)

    def on_train_begin(self, args, state, control, **kwargs):
        """Measure what a plain product reaches here, in the precision of the training."""
        self.peak = measure_matmul_rate(args.device, bf16=args.bf16)
        if args.device.type == "cuda":  # its matrices are no memory of the training
            torch.cuda.reset_peak_memory_stats(args.device)
        self.meter = open_energy_meter(args.device)
        self._energy = self.meter()

    def on_step_end(self, args, state, control, **kwargs):
        """Add to the rates when a line is due; to ask NVML takes its time."""
        if not control.should_log:
            return
        rates = self.run.rates
        steps_per_second = rates["tokens_per_second"] / self.run.meta.tokens_per_step
        rates["share_of_matmul"] = self.flops_per_step * steps_per_second / self.peak / args.world_size
        rates["peak_memory_gb"] = read_peak_memory(args.device) / 1e9
        energy = self.meter()
        if energy is not None:
            rates["energy_wh"] = (energy - self._energy) / 3600

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Count energy anew after each line of training."""
        if "loss" in logs:
            self._energy = self.meter() if self.meter else 0.0


def count_flops(run) -> float:
    """Return the floating point operations that an optimizer step of a trainer needs, over all processes."""
    config, data, tokens = run.model.config, run.train_dataset, run.meta.tokens_per_step
    learned = getattr(data, "learned", None)
    labels = tokens * (1.0 if learned is None else float(learned.mean()))
    inner = find_inner(config)
    block = 4 * config.n_embd**2 + 2 * config.n_embd * inner
    per_token = config.n_layer * (6 * block + 12 * data.seq_len * config.n_embd)
    return tokens * per_token + labels * 6 * config.n_embd * config.vocab_size


def measure_matmul_rate(device: torch.device, *, bf16: bool, seconds: float = 0.3) -> float:
    """Return the floating point operations per second of a square product, the best of those that fit.

    Args:
        device: where.
        bf16: multiply in bfloat16, else in float32 as torch is set.
        seconds: of measuring, more or less.
    """
    size = 8192 if device.type == "cuda" else 512
    # Of the type itself: autocast would cast both at every product. Random: of equal numbers a GPU's products
    # are faster than those of a training (He 2024, "Strangely, Matrix Multiplications on GPUs Run Faster When
    # Given 'Predictable' Data!"). Of a generator of its own, for the run's is not to be touched.
    options = {"device": device, "dtype": torch.bfloat16 if bf16 else torch.float32}
    with torch.inference_mode():
        a = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), **options)
        best, end = 0.0, time.monotonic() + seconds
        while best == 0.0 or time.monotonic() < end:
            begin = time.perf_counter()
            torch.mm(a, a)
            _synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def read_peak_memory(device: torch.device) -> int:
    """Return bytes: of the GPU's memory what torch held at most, else the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def open_energy_meter(device: torch.device):
    """Return a function that reads the GPU's energy in joules so far; None each time where NVML is not."""
    if device.type == "cuda" and find_spec("pynvml") is not None:
        import pynvml

        try:
            pynvml.nvmlInit()
            # NVML counts all GPUs of the machine, torch those of CUDA_VISIBLE_DEVICES.
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError:
            return lambda: None
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    return lambda: None


# --- where the numbers go


class Reporter:
    """Send scalars to `wandb` or `trackio`, each step once, through any number of resumes.

    The last step of each tag that was sent stands in `runs/<name>.json` of the run; a life that goes on from
    an earlier step sends nothing again.

    Args:
        name: `wandb` or `trackio`.
        run_dir: the run; its folder's name is the name there.
        config: flags and data, shown beside the curves.
    """

    def __init__(self, name: str, run_dir: Path, config: dict):
        self.module = import_module(name)
        self.path = run_dir / "runs" / f"{name}.json"
        self.values: dict[int, dict[str, float]] = {}
        sent = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.state = {"id": uuid.uuid4().hex[:8], "last_steps": {}} | sent
        options = {"project": "firstwords", "name": run_dir.name, "config": config, "resume": "allow"}
        if name == "wandb":
            options |= {"id": self.state["id"], "dir": str(run_dir)}
        self.run = self.module.init(**options)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Hold a value until the next flush."""
        if step > self.state["last_steps"].get(tag, -1):
            self.values.setdefault(step, {})[tag] = value

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Texts stay in TensorBoard and `samples.md`."""

    def flush(self) -> None:
        """Send what is held, and write down that it was."""
        if not self.values:
            return
        for step, values in sorted(self.values.items()):
            self.module.log(values, step=step)
            self.state["last_steps"] |= dict.fromkeys(values, step)
        self.values.clear()
        atomic.write_text(self.path, atomic.format_json(self.state))

    def close(self) -> None:
        """Send what is left, and end."""
        self.flush()
        self.module.finish()


class Writers:
    """Several writers as one, with the four methods of a `SummaryWriter` that a run uses."""

    def __init__(self, *writers):
        self.writers = writers

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Hand on a number."""
        for writer in self.writers:
            writer.add_scalar(tag, value, step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Hand on a text."""
        for writer in self.writers:
            writer.add_text(tag, text, step)

    def flush(self) -> None:
        """Write through what can be."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        """End."""
        for writer in self.writers:
            writer.close()


def parse_report_to(text: str) -> list[str]:
    """Return where `--report_to` sends the curves: TensorBoard first and always, but for `none`.

    Raises:
        BadFlag: for an unknown one, or one whose package is missing, saying what to install.
    """
    names = [word.strip() for word in text.split(",") if word.strip()]
    if names == ["none"]:
        return []
    names = list(dict.fromkeys(["tensorboard", *names]))
    for name in names:
        if name not in REPORTERS:
            raise BadFlag(f"--report_to {name}: is not known; give wandb or trackio, or both, or none alone")
        if find_spec(name) is None:
            otherwise = ", or give --report_to none" if name == "tensorboard" else ""
            raise BadFlag(f"--report_to {name}: {name} is not installed; pip install {name}{otherwise}")
    return names
