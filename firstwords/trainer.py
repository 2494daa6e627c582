"""Model and data -> a run: the Trainer subclass and what watches over it.

    trainer = RunTrainer(model, training_arguments, train_set=..., val_set=..., tokenizer=..., meta=...)
    trainer.train(resume_from_checkpoint=None)

Invariants: a checkpoint appears whole or not at all; no step is taken on a loss or gradient that is not
finite; and what goes into `trainer_state.json` is a function of the flags and the data alone (no clock, no
rate), so that a run resumed and a run in one piece end in the same bytes.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from safetensors import SafetensorError
from torch import distributed
from torch.utils.data import Sampler, Subset
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from firstwords import atomic, checkpoint
from firstwords.args import TrainFlags, print_line
from firstwords.errors import BadBatch, BadFlag, Diverged, IOFailed
from firstwords.loss import evaluate_loss, sum_losses
from firstwords.model import GPT2LMHeadModel
from firstwords.optimizer import MUONS, MuonAdamWFactory
from firstwords.pace import HORIZON, Pace
from firstwords.signals import StopWish
from firstwords.tokenizer import Tokenizer
from firstwords.wishes import check_optimizer, check_wishes

# Modes of `--torch_compile_mode` that replay CUDA graphs. What a graph returns is overwritten by the next run
# of it, gradients too where autograd took them as they came (torch/_inductor/cudagraph_trees.py,
# `format_dealloc_msg` and `can_start_new_generation`).
GRAPHED = ("reduce-overhead", "max-autotune")
# What torch.save raises as a plain RuntimeError when a disk takes no more, or not at all.
FAILED_WRITES = (
    "PytorchStreamWriter failed",
    "unexpected pos",
    "iostream error",
    "open file failed",
    "Parent directory",
)


def count_steps(flags: TrainFlags, rows_per_epoch: int) -> int:
    """Return the optimizer steps of the run, from `--max_steps` or `--epochs`; `HORIZON` with `--hours`.

    Raises:
        BadFlag: unless one of the three is given.
    """
    if [flags.max_steps, flags.epochs, flags.hours].count(None) != 2:
        raise BadFlag("--max_steps: give either --max_steps or --epochs or --hours")
    steps = HORIZON if flags.hours is not None else flags.max_steps
    if steps is None:
        steps = math.ceil(flags.epochs * rows_per_epoch / rows_per_step(flags))
    if steps < 1:
        raise BadFlag(f"--max_steps: {steps} steps train nothing; give 1 or more")
    return steps


def find_eval_steps(flags: TrainFlags) -> int:
    """Return the optimizer steps between evaluations, 0 for none; without the flag each save has one."""
    return flags.save_steps if flags.eval_steps is None else flags.eval_steps


def rows_per_step(flags: TrainFlags) -> int:
    """Return the rows in an optimizer step, over micro-batches and processes: the same for any number."""
    return flags.batch_size * flags.grad_accum


def share_micro_batches(flags: TrainFlags, world_size: int) -> int:
    """Return the micro-batches of a step in each process.

    Raises:
        BadFlag: when they cannot be shared evenly, naming flags for which they can.
    """
    if flags.grad_accum % world_size == 0:
        return flags.grad_accum // world_size
    rows = rows_per_step(flags)
    fitting = [size for size in range(flags.batch_size, 0, -1) if rows % (size * world_size) == 0]
    if fitting:
        would = f"--batch_size {fitting[0]} --grad_accum {rows // fitting[0]} has the same rows in a step"
    else:
        would = f"give --grad_accum {math.ceil(flags.grad_accum / world_size) * world_size}"
    raise BadFlag(
        f"--grad_accum {flags.grad_accum}: the micro-batches of a step cannot be shared evenly among "
        f"{world_size} processes; {would}"
    )


def build_training_arguments(
    flags: TrainFlags, extra: dict, max_steps: int, world_size: int = 1
) -> TrainingArguments:
    """Turn our flags into `TrainingArguments`.

    Args:
        flags: ours.
        extra: fields of `TrainingArguments` named beside them.
        max_steps: optimizer steps in all.
        world_size: processes of the run.

    Raises:
        BadFlag: for a value that it refuses, micro-batches that the processes cannot share, a wish that this
            machine cannot meet (`wishes`), or checkpoints from which Trainer would go on with a fresh
            optimizer and say nothing.
    """
    check_wishes(flags, extra)
    if flags.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise BadFlag(
            f"--lr_scheduler_type {flags.lr_scheduler_type}: is no function of the step; use cosine"
        )
    for name in ("load_best_model_at_end", "metric_for_best_model"):
        if extra.get(name):
            raise BadFlag(
                f"--{name}: the finished model is that of the last step; leave it out, and give the "
                "checkpoint-<step> that you like best to --model_dir or --init_model_dir of what comes next"
            )
    eval_steps = find_eval_steps(flags)
    ours = {
        "output_dir": str(flags.model_dir),
        "per_device_train_batch_size": flags.batch_size,
        "per_device_eval_batch_size": flags.batch_size,
        "gradient_accumulation_steps": share_micro_batches(flags, world_size),
        "learning_rate": flags.lr,
        "lr_scheduler_type": flags.lr_scheduler_type,
        "warmup_steps": _count(flags.warmup_steps, max_steps),
        "max_steps": max_steps,
        "weight_decay": flags.weight_decay,
        "optim": "adamw_torch_fused" if flags.optim in MUONS else flags.optim,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": flags.bf16,
        "use_cpu": flags.device == "cpu",
        "seed": flags.seed,
        "logging_steps": flags.log_steps,
        "save_steps": flags.save_steps,
        "eval_strategy": "steps" if eval_steps else "no",
        "eval_steps": eval_steps or None,
        # The data set is the order: see dataset.py.
        "train_sampling_strategy": "sequential",
        # The filter would log NaN as the mean of what came before; RunTrainer stops on it instead.
        "logging_nan_inf_filter": False,
        # Else each batch would wait for all that the GPU has still to do.
        "accelerator_config": {"non_blocking": flags.device == "cuda"},
        "prediction_loss_only": True,
        # Every weight has a part in every loss, and the first process says what there is to say.
        "ddp_find_unused_parameters": False,
        "log_level_replica": "error",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    if "lr_scheduler_kwargs" not in extra:
        ours |= _build_schedule(flags, max_steps)
    try:
        arguments = TrainingArguments(**ours | extra)
    except (ValueError, ImportError) as error:
        raise BadFlag(f"train.py: {str(error).splitlines()[0]}; see --help") from None
    if arguments.n_gpu > 1:
        raise BadFlag(
            f"--device {flags.device}: {arguments.n_gpu} GPUs and one process; launch with torchrun "
            "--nproc_per_node, or let it see one by CUDA_VISIBLE_DEVICES=0"
        )
    check_optimizer(arguments)
    return arguments


def choose_optimizer(flags: TrainFlags, arguments: TrainingArguments) -> tuple[type, dict] | None:
    """Return what Trainer takes as `optimizer_cls_and_kwargs`; None where it knows the name itself."""
    if flags.optim not in MUONS:
        return None
    return MuonAdamWFactory, {
        "optim": flags.optim,
        "lr": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "momentum": flags.muon_momentum,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
    }


def _build_schedule(flags: TrainFlags, max_steps: int) -> dict:
    if flags.lr_scheduler_type == "warmup_stable_decay":
        decay = {
            "num_decay_steps": _count(flags.decay_steps, max_steps),
            "min_lr_ratio": flags.min_lr_ratio,
        }
        return {"lr_scheduler_kwargs": {**decay, "decay_type": "linear"}}
    if not flags.min_lr_ratio:
        return {}
    if flags.lr_scheduler_type != "cosine":
        raise BadFlag(f"--min_lr_ratio: {flags.lr_scheduler_type} takes none; use cosine")
    kwargs = {"min_lr_rate": flags.min_lr_ratio}
    return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}


def _count(steps: float, max_steps: int) -> int:
    return int(steps) if steps >= 1 else round(steps * max_steps)


@dataclass(frozen=True)
class RunMeta:
    """What a manifest says beside the files; see `checkpoint.write_manifest`.

    Attributes:
        fixed: keys that do not change during the run (data, tokenizer, flags, versions, parent).
        tokens_per_step: real tokens, padding not counted.
        save_total_limit: checkpoints that are kept.
    """

    fixed: dict
    tokens_per_step: float
    save_total_limit: int


class RunSampler(Sampler[int]):
    """The rows of a run in order, but for the batches that are left out.

    Micro-batch `m` of a step goes to process `m % processes` (accelerate's `BatchSamplerShard`): what a
    process trains on is a function of seed, step and rank, and all together train on what one alone would.

    Args:
        num_rows: rows of the whole run.
        rows_per_step: rows in an optimizer step, over micro-batches and processes.
        skipped: batches (of `rows_per_step` rows, from 0) that are left out; those behind move up.
    """

    def __init__(self, num_rows: int, rows_per_step: int, skipped: tuple[int, ...]):
        self.num_rows, self.rows_per_step, self.skipped = num_rows, rows_per_step, sorted(skipped)

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        for step in range(-(-self.num_rows // self.rows_per_step)):
            begin = self.find_batch(step) * self.rows_per_step
            yield from range(
                begin, begin + min(self.rows_per_step, self.num_rows - step * self.rows_per_step)
            )

    def find_batch(self, step: int) -> int:
        """Return the batch that step `step` (from 0) trains on."""
        for batch in self.skipped:
            step += batch <= step
        return step


class RunTrainer(transformers.Trainer):
    """Hugging Face's Trainer with safe saves, a finite check, and a loss weighted by tokens.

    Args:
        model: from `model.build_model` or `checkpoint.load_model`.
        args: from `build_training_arguments`.
        train_set: its `num_rows` is set to the length of the run.
        val_set: read in full at each evaluation.
        tokenizer: ours; its Hugging Face twin goes into every checkpoint.
        meta: for the manifest.
        collate: rows -> batch, from `dataset`.
        optimizer_cls_and_kwargs: from `choose_optimizer`.
        skipped: batches that are left out, see `RunSampler`.
        pace: what ends the run, when it is not `args.max_steps` alone.
        wish: what signals and files ask for; without one nothing does, which several processes cannot do.
    """

    def __init__(
        self,
        model,
        args,
        *,
        train_set,
        val_set,
        tokenizer: Tokenizer,
        meta: RunMeta,
        collate,
        optimizer_cls_and_kwargs=None,
        skipped: tuple[int, ...] = (),
        pace: Pace | None = None,
        wish: StopWish | None = None,
    ):
        train_set.num_rows = (
            args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=train_set,
            eval_dataset=val_set,
            processing_class=checkpoint.build_twin(tokenizer),
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.remove_callback(PrinterCallback)
        self.tokenizer, self.meta = tokenizer, meta
        self.pace = pace or Pace(args.max_steps)
        self.rates: dict[str, float] = {}
        self.warn = print_warning
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.sampler = RunSampler(train_set.num_rows, rows, skipped)
        self._micro_batches: list[tuple[dict, torch.Tensor]] = []
        self._staging: Path | None = None
        self._has_failed_to_save = False
        self._verified: dict[Path, tuple] = {}
        self.wish, self.pending_loss = wish, 0.0
        self._rng_files: dict[str, bytes] = {}
        # Trainer makes it when it trains, but asks PendingLoss for its state before.
        self._globalstep_last_logged = 0
        if args.world_size > 1:  # Trainer has seeded all processes alike: their dropout is to differ
            transformers.set_seed(args.seed + args.process_index)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Return the loss over the whole val set, weighted by tokens; log it and tell the callbacks."""
        model, places = self.find_whole_model()
        shares = []
        if model is not None:
            share = evaluate_loss(
                model,
                Subset(self.eval_dataset, places),
                self.tokenizer,
                batch_size=self.args.per_device_eval_batch_size,
                bf16=self.args.bf16,
            )
            shares.append(share)
        loss = sum_losses([share for shares in self._gather(shares) for share in shares])
        if not math.isfinite(loss.mean):
            raise Diverged(f"step {self.state.global_step}: the val loss is {loss.mean}; lower --lr")
        metrics = {
            "eval_loss": loss.mean,
            "eval_perplexity": loss.perplexity,
            "eval_bits_per_byte": loss.bits_per_byte,
            "eval_accuracy": loss.accuracy,
        }
        self.log(metrics)
        self.callback_handler.model = model
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.callback_handler.model = self.model
        return metrics

    def find_whole_model(self) -> tuple[GPT2LMHeadModel | None, range]:
        """Return a model that this process can ask alone, and which val rows it is to ask.

        Under FSDP each process has a part of every matrix. There the first gets a copy of the whole and asks
        all rows, and the others get None.
        """
        place, count, num_rows = self.args.process_index, self.args.world_size, len(self.eval_dataset)
        if not self.is_fsdp_enabled:
            return self.model, range(place, num_rows, count)
        weights = self.accelerator.get_state_dict(self.model)
        if place:
            return None, range(0)
        # By the loader, which draws no weights to begin with: the dropout of the run goes on undisturbed.
        whole = GPT2LMHeadModel.from_pretrained(
            None, config=self.model.config, state_dict=weights, attn_implementation="sdpa"
        )
        whole.attention = self.model.attention
        return whole.to(self.args.device), range(num_rows)

    def _gather(self, value) -> list:
        """Return the values of all processes, in their order."""
        values = [value]
        if self.args.world_size > 1:
            values *= self.args.world_size
            distributed.all_gather_object(values, value)
        return values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what follows from the loss and the step; rates go to the callbacks, never into the state."""
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            logs["perplexity"] = math.exp(min(logs["loss"], 700))
            logs["bits_per_byte"] = logs["loss"] * self.train_dataset.bits_per_byte
        logs["tokens_seen"] = self.tokens_seen
        logs["epoch"] = self.epochs_seen
        self.state.log_history.append({**logs, "step": self.state.global_step})
        shown = logs | self.rates if "loss" in logs else logs
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, shown)

    @property
    def tokens_seen(self) -> int:
        """Real tokens that the run has trained on."""
        return round(self.state.global_step * self.meta.tokens_per_step)

    @property
    def epochs_seen(self) -> float:
        """Passes over the training data, as a number with a fraction."""
        return self.state.global_step * self.sampler.rows_per_step / self.train_dataset.rows_per_epoch

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Return the schedule of the flags, bent by the pace of the run."""
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new:
            scheduler.lr_lambdas = [self.pace.bend(base) for base in scheduler.lr_lambdas]
        return scheduler

    def _init_training_state(self, max_steps, *args):
        begin = super()._init_training_state(max_steps, *args)
        # Trainer would go on with the intervals of the run before and say nothing.
        self.state.compute_steps(self.args, max_steps)
        return begin

    def _get_train_sampler(self, train_dataset=None) -> RunSampler:
        return self.sampler

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Return the loss of a micro-batch, a share of the step's; keep both for the finite check."""
        if self.args.torch_compile_mode in GRAPHED and self.args.gradient_accumulation_steps > 1:
            self._lay_gradients(model)
        # A copy: a CUDA graph writes the loss of the next micro-batch to where it wrote this one.
        loss = super().training_step(model, inputs, num_items_in_batch).clone()
        self._micro_batches.append((inputs, loss))
        return loss

    @staticmethod
    def _lay_gradients(model) -> None:
        """Give each weight a gradient to add to: else the first would lie in a graph's own memory."""
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _get_grad_norm(self, model, grad_norm=None):
        # Trainer asks for the norm just before the optimizer's step, whether it clips or not.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss = torch.stack([loss for _, loss in self._micro_batches]).sum()
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP shards it
        numbers = torch.stack([torch.as_tensor(whole).to(loss), loss.detach()])
        if self._agree(~numbers.isfinite().all()):
            self._break_off(float(whole))
        self._micro_batches.clear()
        return norm

    def _agree(self, is_broken: torch.Tensor) -> bool:
        """Tell whether the step is broken in any process; let what asks one for something ask all.

        The one exchange of a step beside those of the gradients and of the number of labels, and its only
        wait for the GPU: all is read at once, and the weights wait for it. Hours are of this step; their sum
        would want more digits than float32 has.
        """
        is_first = self.args.should_save
        hours = self.pace.look_at_clock() if is_first else 0.0
        signs = [hours, *(self.wish.list_signs(is_first=is_first) if self.wish else ())]
        shared = torch.cat(
            [is_broken.float()[None], torch.tensor(signs).to(is_broken.device, non_blocking=True)]
        )
        if self.args.world_size > 1:
            distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
        is_broken, hours, *signs = shared.tolist()
        self.pace.spend(hours)
        if self.wish:
            self.wish.settle(signs)
        return bool(is_broken)

    def _break_off(self, norm: float) -> None:
        """Write what the step was trained on, over all processes, and raise `BadBatch`."""
        step, batch = self.state.global_step, self.sampler.find_batch(self.state.global_step)
        # Trainer has multiplied each loss by the processes, over which the gradients are averaged.
        shares = [
            [*(inputs[name].tolist() for name in ("input_ids", "labels")), loss.item() / self.args.world_size]
            for inputs, loss in self._micro_batches
        ]
        # Micro-batch by micro-batch, in each the processes in their order: the order of the rows.
        parts = [part for parts in zip(*self._gather(shares), strict=True) for part in parts]
        loss = sum(part[2] for part in parts)
        path = Path(self.args.output_dir) / f"bad-batch-{step + 1}.json"
        record = {
            **{"step": step + 1, "batch": batch, "loss": str(loss), "grad_norm": str(norm)},
            "first_row": batch * self.sampler.rows_per_step,
            "losses": [str(part[2]) for part in parts],
            "input_ids": [row for part in parts for row in part[0]],
            "labels": [row for part in parts for row in part[1]],
        }
        if self.args.should_save:
            with suppress(IOFailed):  # the disk may be full too; the divergence is what has to be told
                atomic.write_text(path, json.dumps(record) + "\n")
        what = f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        raise BadBatch(
            f"step {step + 1}: {what}; nothing of it was kept, its batch is in {path.name}: run again with a "
            "lower --lr or with --on_nan rollback, it goes on from the last checkpoint",
            (*self.sampler.skipped, batch),
        )

    def _get_output_dir(self, trial) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict and self.model.config.tie_word_embeddings:
            # FSDP hands over what is shared under both of its names.
            state_dict = {name: part for name, part in state_dict.items() if name != "lm_head.weight"}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = Path(self.args.output_dir)
        # First what all have to say: then the first process writes alone, and may fail alone.
        losses = self._gather(self._tr_loss.item())
        self.pending_loss = sum(losses) / len(losses)
        if self.args.world_size > 1:
            files = self._gather(self._read_rng_files())
            self._rng_files = {name: content for part in files for name, content in part.items()}
        # On a disk that machines share, the number of a process may be that of one on another machine.
        self._staging = run_dir / f"{atomic.STAGING}{os.getpid()}-{self.args.process_index}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._finish_checkpoint(self._staging, run_dir)
            self._has_failed_to_save = False
        except (OSError, RuntimeError, SafetensorError, IOFailed) as error:
            if not is_failed_write(error):
                raise
            self._report_failed_save((str(error).splitlines() or [type(error).__name__])[0])
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _read_rng_files(self) -> dict[str, bytes]:
        """Return the file that Trainer writes in each process, which may be on another machine."""
        with TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.world_size == 1:
            super()._save_rng_state(output_dir)
        elif self.args.should_save:
            for name, content in self._rng_files.items():
                (Path(output_dir) / name).write_bytes(content)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        # Of another number of processes no state is this one's: Trainer would begin the dropout anew.
        saved_by = len(list(Path(checkpoint).glob("rng_state*")))
        if saved_by != self.args.world_size:
            place = self.args.process_index + self.args.world_size * self.state.global_step
            transformers.set_seed((self.args.seed + place) % 2**32)

    def _report_failed_save(self, why: str) -> None:
        """Warn the first time, when there is a next save to try it again; else raise `IOFailed`."""
        is_last = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        # Under FSDP the others still wait to hand over their parts.
        if is_last or self._has_failed_to_save or self.is_fsdp_enabled:
            raise IOFailed(
                f"{self.args.output_dir}: saving failed ({why}); free some space and run again"
            ) from None
        self._has_failed_to_save = True
        self.warn(
            f"step {self.state.global_step}: saving failed ({why}); what was saved before is there. Free "
            "some space: the next save tries again, and ends the run if it fails"
        )

    def _finish_checkpoint(self, staging: Path, run_dir: Path) -> None:
        folder = staging / f"checkpoint-{self.state.global_step}"
        # A pickle that nothing reads, with the clock in it.
        (folder / "training_args.bin").unlink()
        for path in folder.iterdir():
            path.chmod(0o644)
        place = {"step": self.state.global_step, "tokens_seen": self.tokens_seen}
        place |= {"max_steps": self.state.max_steps, "skipped": list(self.sampler.skipped)}
        checkpoint.write_manifest(folder, {**place, **self.pace.describe(), **self.meta.fixed})
        checkpoint.publish(folder, run_dir, keep=self.meta.save_total_limit, verified=self._verified)


def is_failed_write(error: Exception) -> bool:
    """Tell whether a save has failed at the disk, for which torch's writer has no class of its own."""
    return not isinstance(error, RuntimeError) or any(sign in str(error) for sign in FAILED_WRITES)


def print_warning(text: str) -> None:
    """Say on stderr what did not go as it should, and that the run goes on."""
    print_line(f"warning: {text}", sys.stderr)


class StopOnSignal(TrainerCallback):
    """SIGTERM, SIGINT, SIGHUP and `touch <run>/STOP`: finish the step, save, stop."""

    def __init__(self, wish: StopWish):
        self.wish = wish

    def on_step_end(self, args, state, control, **kwargs):
        """Ask Trainer for a save and a stop: here, between two steps, resuming is exact."""
        if self.wish.look():
            control.should_save = control.should_training_stop = True
        return control


class PendingLoss(TrainerCallback, ExportableState):
    """Carry the losses since the last log through a checkpoint.

    Trainer begins a new window when it resumes, and would log another mean than the run in one piece.
    """

    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer

    def state(self) -> dict:
        """Return what goes into `trainer_state.json`."""
        pending = {
            "loss": self.trainer.pending_loss,
            "last_logged": self.trainer._globalstep_last_logged,
        }
        return {"args": {}, "attributes": pending}

    def on_train_begin(self, args, state, control, **kwargs):
        """Put the window back where the checkpoint left it."""
        pending = state.stateful_callbacks["PendingLoss"]["attributes"]
        if state.global_step:
            self.trainer._tr_loss += pending["loss"]
            self.trainer._globalstep_last_logged = pending["last_logged"]


class LastStep(TrainerCallback):
    """Log and evaluate at the last step, also when it is no multiple of the intervals."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for both."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"
        return control


class Throughput(TrainerCallback):
    """Measure tokens per second over the steps since the last log, evaluations and saves left out."""

    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer
        self._seconds, self._steps = 0.0, 0
        self._first_step = self._begin_run = self._begin = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock of this life of the run."""
        self._begin_run, self._first_step = time.monotonic(), state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock of a step."""
        self._begin = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """Update the rates: tokens per second, and seconds left by the pace of this life of the run."""
        now = time.monotonic()
        self._seconds += now - self._begin
        self._steps += 1
        pace = (now - self._begin_run) / (state.global_step - self._first_step)
        self.trainer.rates = {
            "tokens_per_second": self._steps * self.trainer.meta.tokens_per_step / self._seconds,
            "seconds_left": pace * (state.max_steps - state.global_step),
        }

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Begin a new window after each line of training."""
        if "loss" in logs:
            self._seconds, self._steps = 0.0, 0
