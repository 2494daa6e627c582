"""Several processes of one run as children of the nursery: real processes that meet and really differ.

    team = start_team(nursery, words, 2, (signal_in, "forward", "15"), at=[1])
    codes, errors = wait_for(team)

They find each other by the environment that torchrun sets, so that each has the exit code that torchrun would
only report. Of what is done to a child, `at` says to which.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import distributed

from firstwords import pace, ranks
from firstwords.model import GPT2LMHeadModel


def start_team(nursery, words, size, *patches, at=None):
    """Start train.py in `size` processes; `patches` are for those whose ranks are in `at`, None means all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        nursery.start(words, (as_rank, rank, size, port), *(patches if at is None or rank in at else ()))
        for rank in range(size)
    ]


def wait_for(team):
    """Return the exit codes, and what each wrote to stderr."""
    return [child.wait() for child in team], [read_errors(child) for child in team]


def read_errors(child):
    """Return what a child wrote to stderr, without the remarks of torch about its own connections."""
    lines = child.err.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(("[W", "[rank", "[Gloo]")))


def run_team(nursery, words, size, *patches, at=None):
    """Run train.py in `size` processes to their end; as `start_team` and `wait_for`."""
    return wait_for(start_team(nursery, words, size, *patches, at=at))


# --- what is done to a child


def as_rank(rank, size, port):
    """Give the environment that torchrun gives; nobody waits for long for what does not come."""
    ranks.GRACE = 1.0
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def note_rows(folder):
    """Write down the rows that this process trains on, a line for each micro-batch."""
    original, rank = transformers.Trainer.training_step, os.environ["RANK"]

    def note(self, model, inputs, *rest, **options):
        with open(Path(folder) / rank, "a") as file:
            file.write(json.dumps([self.state.global_step, inputs["input_ids"].tolist()]) + "\n")
        return original(self, model, inputs, *rest, **options)

    transformers.Trainer.training_step = note


def poison_batch(path):
    """Make the loss of this process infinite whenever it sees the row that it saw first in step 3."""
    original, forward, state = transformers.Trainer.training_step, GPT2LMHeadModel.forward, {}

    def watch(self, *rest, **options):
        state["step"] = self.state.global_step
        return original(self, *rest, **options)

    def spoil(self, input_ids=None, **inputs):
        result = forward(self, input_ids=input_ids, **inputs)
        row = input_ids[0].tolist()
        if self.training and state.get("step") == 2:
            state.setdefault("row", row)
        if self.training and state.get("row") == row:
            Path(path).touch()
            result.loss = result.loss * float("inf")
        return result

    transformers.Trainer.training_step, GPT2LMHeadModel.forward = watch, spoil


def kill_in_step(step):
    """Kill this process in the forward of a step."""
    original = transformers.Trainer.training_step

    def do(self, *rest, **options):
        if self.state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *rest, **options)

    transformers.Trainer.training_step = do


def touch_in_step(step, path):
    """Make a file in the forward of a step, as a person would."""
    original = transformers.Trainer.training_step

    def do(self, *rest, **options):
        if self.state.global_step == int(step):
            Path(path).touch()
        return original(self, *rest, **options)

    transformers.Trainer.training_step = do


def turn_own_clock():
    """Have a clock that shows tenths of an hour more at each look, in each process others."""
    now, rank = [0.0], int(os.environ["RANK"])

    def look():
        now[0] += 360.0 * (1 + 3 * rank)
        return now[0]

    pace.time = SimpleNamespace(monotonic=look)


def note_exchanges(path):
    """Write down what the processes exchange by name, with the step, and what a step reads of its tensors."""
    state, do_step = {"step": -1}, transformers.Trainer.training_step

    def watch(self, *rest, **options):
        state["step"] = self.state.global_step
        return do_step(self, *rest, **options)

    def note(owner, name):
        original = getattr(owner, name)

        def call(*args, **options):
            caller = sys._getframe(1).f_code.co_filename
            if owner is distributed or caller.endswith(("trainer.py", "pace.py", "signals.py")):
                with open(path, "a") as file:
                    file.write(f"{state['step']} {name}\n")
            return original(*args, **options)

        setattr(owner, name, call)

    transformers.Trainer.training_step = watch
    for name in ("all_reduce", "broadcast_object_list", "all_gather_object"):
        note(distributed, name)
    for name in ("item", "tolist"):
        note(torch.Tensor, name)


def lose_at_start(rank):
    """Kill the process of this rank before it has met the others in a collective; soon they miss it."""
    from firstwords import opening

    ranks.PULSE, ranks.SILENCE = 0.2, 3.0

    def do(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == rank:
        opening.build_training_arguments = do


def lose_memory(step):
    """Find no memory for a step."""
    original = transformers.Trainer.training_step

    def do(self, *rest, **options):
        if self.state.global_step == int(step):
            raise MemoryError
        return original(self, *rest, **options)

    transformers.Trainer.training_step = do


def lose_data():
    """Be on a machine that has no data."""
    from firstwords import opening
    from firstwords.errors import MissingInput

    def open_train(data_dir, *rest, **options):
        raise MissingInput(f"--data_dir {data_dir}: is not on this machine; copy it")

    opening.open_train = open_train


def fsdp_on_cpu():
    """Let accelerate take this machine's CPU for GPUs, so that FSDP2 is really run, over gloo.

    Without it accelerate makes DDP of FSDP on a CPU and says nothing, which is why train.py refuses it there.
    """
    import accelerate.state

    from firstwords import opening

    os.environ |= {
        **{"ACCELERATE_USE_FSDP": "true", "ACCELERATE_TORCH_DEVICE": "cpu", "FSDP_VERSION": "2"},
        **{"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block"},
        **{"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    }
    kind = accelerate.state.DistributedType.MULTI_GPU
    accelerate.state.PartialState._prepare_backend = lambda *args: ("gloo", kind)
    opening.choose_device = lambda flags, extra: "gpus"


def share_number(path):
    """Have the number that a process on another machine has too; the first saves later than that one."""
    from firstwords import checkpoint
    from firstwords.trainer import RunTrainer

    os.getpid = lambda: 4321
    write, save = checkpoint.write_manifest, RunTrainer._save_checkpoint

    def write_late(folder, meta):
        until = time.monotonic() + 20
        while not Path(path).exists() and time.monotonic() < until:
            time.sleep(0.01)
        write(folder, meta)

    def mark(self, *rest):
        save(self, *rest)
        if os.environ["RANK"] == "1":
            Path(path).touch()

    checkpoint.write_manifest, RunTrainer._save_checkpoint = write_late, mark
