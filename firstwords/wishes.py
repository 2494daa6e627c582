"""Wishes that a machine may not be able to meet -> nothing, or a refusal that says what to install.

    check_wishes(flags, {"torch_compile": True})       # BadFlag: no C++ compiler; apt-get install g++

Invariant: what would be left out, or computed otherwise, without a word is refused before a run begins.
"""

import os
import shutil
import sys
from dataclasses import fields
from importlib.util import find_spec

from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from firstwords.args import TrainFlags
from firstwords.errors import BadFlag, suggest
from firstwords.optimizer import MUONS

# Fields of `TrainingArguments` that this trainer cannot do, and why.
REFUSED = {
    "fp16": "its scaled gradients overflow now and then, which ends a run here; use --bf16, or neither",
    "use_liger_kernel": "Liger has no kernels for GPT-2, nothing would change; leave it out",
    "label_smoothing_factor": "Trainer takes that loss itself, without the bounds between packed "
    "conversations; leave it out",
    "save_only_model": "such a run could not be gone on with; leave it out",
}
# Flags of ours whose values Trainer knows.
KNOWN = {
    "optim": [*MUONS, *(name.value for name in OptimizerNames)],
    "lr_scheduler_type": [name.value for name in SchedulerType],
}
# Given any of these, Trainer compiles.
COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
# What compiles a training with torch alone; the others that accelerate knows need packages, or only infer.
BACKENDS = ("inductor", "cudagraphs", "aot_eager", "eager")


def check_wishes(flags: TrainFlags, extra: dict) -> None:
    """Refuse what is wished for and not there.

    Args:
        flags: ours, with the device chosen.
        extra: fields of `TrainingArguments` beside them.

    Raises:
        BadFlag: with what to install, or what to use instead.
    """
    for name, known in KNOWN.items():
        value = getattr(flags, name)
        if value not in known:
            ways = next(spec.metadata["help"] for spec in fields(flags) if spec.name == name)
            raise BadFlag(f"--{name} {value}: is not known; give {ways}; {suggest(value, known)}")
    for name, why in REFUSED.items():
        if extra.get(name):
            raise BadFlag(f"--{name}: {why}")
    wished = {name: extra[name] for name in COMPILE if extra.get(name) not in (None, False)}
    if wished:
        backend = wished.get("torch_compile_backend", "inductor").lower()  # as accelerate reads it
        _check_backend(flags.device, backend, wished.get("torch_compile_mode", "default"))
        _check_compiler(flags.device, backend)
    _check_launcher(flags)


def check_optimizer(arguments: TrainingArguments) -> None:
    """Refuse an optimizer whose package is missing, in Trainer's words; it would fail at the first step.

    Raises:
        BadFlag: naming the package.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise BadFlag(f"--optim {arguments.optim.value}: {why}; or use adamw_torch_fused") from None


def _check_backend(device: str, backend: str, mode: str) -> None:
    if backend not in BACKENDS:
        raise BadFlag(f"--torch_compile_backend {backend}: is not known; {suggest(backend, BACKENDS)}")
    if backend == "cudagraphs" and device != "cuda":
        raise BadFlag(
            f"--torch_compile_backend cudagraphs: on {device} nothing would be compiled; leave it out"
        )
    if mode == "default":
        return
    from torch._inductor import list_mode_options

    if mode not in list_mode_options():
        raise BadFlag(f"--torch_compile_mode {mode}: is not known; {suggest(mode, list_mode_options())}")


def _check_compiler(device: str, backend: str) -> None:
    if backend != "inductor":
        return
    if device == "cuda" and find_spec("triton") is None:
        raise BadFlag("--torch_compile: triton is not installed; pip install triton")
    kind, package = ("C", "gcc") if device == "cuda" else ("C++", "g++")
    if not any(map(shutil.which, _name_compilers(device))):
        raise BadFlag(f"--torch_compile: there is no {kind} compiler; apt-get install {package}")


def _name_compilers(device: str) -> list[str]:
    # On a GPU Triton builds the launchers of its kernels (triton/runtime/build.py), on a CPU torch its
    # kernels (torch/_inductor/config.py, `cpp.cxx`).
    if device == "cuda":
        return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]


def _check_launcher(flags: TrainFlags) -> None:
    # accelerate launch --mixed_precision says it by this variable, and Trainer follows it without a word.
    wished = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wished == "fp8":
        raise BadFlag("--mixed_precision fp8: nothing is computed in fp8 here, with any package; use --bf16")
    if wished not in ("no", "bf16") or wished == "bf16" and not flags.bf16:
        raise BadFlag(f"--mixed_precision {wished}: give accelerate none, and train.py --bf16 or not")
    # So it says --dynamo_backend and what goes with it; with any of them Trainer's accelerate would compile.
    for name, value in sorted(os.environ.items()):
        if name.startswith("ACCELERATE_DYNAMO_") and value.lower() not in ("", "no", "default", "false"):
            flag = name.removeprefix("ACCELERATE_").lower()
            raise BadFlag(f"--{flag} {value}: give accelerate none, and train.py --torch_compile or not")
