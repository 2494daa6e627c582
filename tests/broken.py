"""What is done to a child of the nursery before train.py's `main`: faults, and versions known to be wrong.

Each is a function; one that returns a function gives another `main`.
"""

import ctypes
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import transformers
from torch.utils.tensorboard import SummaryWriter
from transformers.trainer_utils import get_last_checkpoint

from firstwords import atomic, checkpoint, dataset, log, opening, signals, trainer
from firstwords.args import parse_train_args
from firstwords.model import GPT2LMHeadModel, build_model
from firstwords.tokenizer import load_tokenizer

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "open"}


def ours():
    """Change nothing."""


# --- versions that are known to be wrong


def stock_trainer():
    """Train with Hugging Face's Trainer as it is: its saves, its choice of a checkpoint, its signals."""
    return train_by_stock


def train_by_stock(argv):
    """Do what train.py does, on the stock Trainer."""
    flags, extra = parse_train_args(argv)
    tokenizer = load_tokenizer(flags.data_dir)
    options = {"assistant_only": flags.assistant_only_loss}
    rows = dataset.open_train(flags.data_dir, tokenizer, flags.seq_len, seed=flags.seed, **options)
    rows.num_rows = flags.max_steps * flags.batch_size * flags.grad_accum
    stock = {"save_total_limit": flags.save_total_limit, "logging_nan_inf_filter": True}
    run = transformers.Trainer(
        build_model(flags.cfg, tokenizer, seed=flags.seed),
        trainer.build_training_arguments(flags, extra | stock, flags.max_steps),
        data_collator=dataset.collate,
        train_dataset=rows,
        eval_dataset=dataset.open_val(flags.data_dir, tokenizer, flags.seq_len, **options),
    )
    last = get_last_checkpoint(flags.model_dir) if flags.model_dir.is_dir() else None
    run.train(resume_from_checkpoint=last)
    run.save_model(flags.model_dir)


def chance_forgotten():
    """Resume without the state of the random numbers."""
    trainer.RunTrainer._load_rng_state = lambda self, folder: None


def prints_to_the_end():
    """Speak by a plain `print`."""
    log.print_line = trainer.print_line = lambda text, stream: print(text, file=stream, flush=True)


def hangup_always_caught():
    """Install the handler whatever the process was started with."""
    signals.signal.getsignal = lambda number: signal.SIG_DFL


def second_signal_ends():
    """Take every second signal for the last."""

    def receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    signals.StopWish._receive = receive


def second_ctrl_c_waits():
    """Note Ctrl-C however often it comes."""

    def receive(self, number, frame):
        self.received = signal.Signals(number)

    signals.StopWish._receive = receive


def no_lock():
    """Hold no lock."""
    from contextlib import nullcontext

    atomic.lock_folder = lambda folder: folder.mkdir(parents=True, exist_ok=True) or nullcontext()


def model_in_place():
    """Publish the finished model file by file, `COMPLETE` first."""

    def publish(folder, run_dir):
        atomic.write_text(run_dir / "COMPLETE", "step\n")
        for path in sorted(folder.iterdir()):
            shutil.copyfile(path, run_dir / path.name)

    checkpoint.publish_final = publish


def events_not_purged():
    """Write TensorBoard's events without a word about the steps that come again."""
    log.EventWriter.__init__ = lambda self, folder, first_step: (
        setattr(self, "_folder", folder) or setattr(self, "_writer", SummaryWriter(str(folder)))
    )


# --- faults


def kill_at_write(number, save):
    """Kill this process at write `number` (from 1) of save `save` (from 0); exit 42 when it has fewer."""
    number, save, seen, count = int(number), int(save), set(), 0

    def watch(event, args):
        nonlocal count
        if event not in WRITES or not args or not isinstance(args[0], str | os.PathLike):
            return
        if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wa+")):
            return
        path = Path(args[0])
        if event == "os.mkdir" and path.name.startswith("checkpoint-"):
            seen.add(path.name)
        if len(seen) > save + 1:
            os._exit(42)
        count += len(seen) == save + 1 and "checkpoint-" in str(path)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def at_call(owner, name, do, after=0):
    """Call `do` just before the call of `owner.name` that has `after` before it."""
    original, left = getattr(owner, name), [after]

    def call(*args, **options):
        left[0] -= 1
        if left[0] == -1:
            do()
        return original(*args, **options)

    setattr(owner, name, call)


PHASES = {
    "start-up": [(opening, "open_train", 0), (dataset, "open_train", 0)],
    "forward": [(GPT2LMHeadModel, "forward", 4), (transformers.GPT2LMHeadModel, "forward", 4)],
    "save": [(transformers.Trainer, "_save_rng_state", 1)],
    "evaluation": [(trainer, "evaluate_loss", 1), (transformers.Trainer, "evaluate", 1)],
    "prune": [(atomic, "remove_folder", 0)],
}


def signal_in(phase, *numbers):
    """Send this process signals in a phase of the run."""

    def send():
        for number in numbers:
            os.kill(os.getpid(), int(number))

    sent = []
    for owner, name, after in PHASES[phase]:
        at_call(owner, name, lambda: sent or sent.append(True) or send(), after)


def ignore_hangup():
    """Ignore SIGHUP from the start, as `nohup` has it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def wait_at_step(step, marker):
    """Make a file before a step, and wait there until this process is killed."""

    def wait(self, args, state, control, **kwargs):
        if state.global_step + 1 == int(step):
            Path(marker).touch()
            signal.pause()

    trainer.StopOnSignal.on_step_begin = wait


def fill_disk(folder, left):
    """Leave a disk that many bytes."""
    disk = os.statvfs(folder)
    with open(Path(folder) / "of-others", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - int(left))


def limit_files(left):
    """Let this process write no file of more bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(left), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def take_writing(*folders):
    """Take the right to write into folders, from root too: modes count for who may not override them."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    libc, header, words = ctypes.CDLL(None, use_errno=True), Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(ctypes.byref(header), words)
    words[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, among the effective ones
    if libc.capset(ctypes.byref(header), words):
        raise OSError(ctypes.get_errno(), "capset")
    for folder in folders:
        os.chmod(folder, 0o555)


def in_step(step, name, *args):
    """Call a function of this module in the forward of a step."""
    original = transformers.Trainer.training_step

    def do(self, *rest, **options):
        if self.state.global_step == int(step):
            globals()[name](*args)
        return original(self, *rest, **options)

    transformers.Trainer.training_step = do


def before_publishing(name, *args):
    """Call a function of this module when all is saved and the finished model is to be written."""
    for owner, last in ((checkpoint, "publish_final"), (transformers.Trainer, "save_model")):
        at_call(owner, last, lambda: globals()[name](*args), 0 if owner is checkpoint else 4)


def kill_before(module, name):
    """Kill this process before a function of ours is called."""
    at_call(sys.modules[f"firstwords.{module}"], name, lambda: os.kill(os.getpid(), signal.SIGKILL))
