"""What is wished for and not there: exit 2, with what to install, before a run begins."""

import sys

import pytest
from tiny import build_flags, invent_talks, run_script, write_chats, write_config

import train
from firstwords import wishes
from firstwords.args import TrainFlags


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_config(home / "c.json")
    write_chats(home / "chats", invent_talks(10))
    return home


def refuse(home, tmp_path, **flags):
    """Run train.py, which refuses; return its one line."""
    words = build_flags(home / "chats", tmp_path / "run", home / "c.json", **flags)
    code, errors = run_script(train, words)
    assert (code, len(errors.splitlines())) == (2, 1), errors
    assert not (tmp_path / "run").exists()
    return errors


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"fp16": True}, "--fp16: its scaled gradients overflow"),
        ({"fp8": True}, "--fp8: nothing is computed in fp8 here"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor: Trainer takes that loss itself"),
        ({"use_liger_kernel": True}, "--use_liger_kernel: Liger has no kernels for GPT-2"),
        ({"optim": "nromuon"}, "any of Trainer's; did you mean 'normuon'?"),
        ({"optim": "foo"}, "--optim foo: is not known; give adamw_torch_fused, muon, "),
        ({"lr_scheduler_type": "cosin"}, "any of Trainer's; did you mean 'cosine'?"),
        ({"optim": "lomo"}, "--optim lomo: You need to install `lomo"),
        ({"optim": "adamw_torch_8bit"}, "torchao"),
    ],
)
def test_what_cannot_be_done_is_said(home, tmp_path, flags, why):
    assert why in refuse(home, tmp_path, **flags)


def test_eight_bits_without_bitsandbytes_name_the_package(home, tmp_path, monkeypatch):
    from transformers import trainer_optimizer

    monkeypatch.setattr(trainer_optimizer, "is_bitsandbytes_available", lambda: False)
    assert "pip install -U bitsandbytes" in refuse(home, tmp_path, optim="adamw_bnb_8bit")


@pytest.mark.parametrize(
    "flags",
    [{"torch_compile": True}, {"torch_compile_mode": "default"}, {"torch_compile_backend": "inductor"}],
)
def test_compile_without_a_compiler(home, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(wishes.shutil, "which", lambda name: None)
    line = "--torch_compile: there is no C++ compiler; apt-get install g++"
    assert line in refuse(home, tmp_path, **flags)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"torch_compile_backend": "inducter"}, "_backend inducter: is not known; did you mean 'inductor'?"),
        ({"torch_compile_backend": "no"}, "_backend no: is not known; known: aot_eager, cudagraphs, eager"),
        ({"torch_compile_backend": "cudagraphs"}, "_backend cudagraphs: on cpu nothing would be compiled"),
        (
            {"torch_compile_mode": "max-autotun"},
            "_mode max-autotun: is not known; did you mean 'max-autotune'?",
        ),
    ],
)
def test_a_way_to_compile_that_there_is_not(home, tmp_path, flags, why):
    assert f"--torch_compile{why}" in refuse(home, tmp_path, **flags)


def test_compile_on_a_gpu_without_triton(monkeypatch):
    monkeypatch.setattr(wishes, "find_spec", lambda name: None)
    with pytest.raises(wishes.BadFlag, match="pip install triton"):
        wishes._check_compiler("cuda", "inductor")


def test_a_compiler_may_have_any_name(monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    wishes._check_compiler("cpu", "inductor")


def test_a_gpu_takes_a_c_compiler_and_a_cpu_one_for_cpp(monkeypatch):
    monkeypatch.setattr(wishes, "find_spec", lambda name: name)
    monkeypatch.setattr(wishes.sys, "platform", "linux")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wishes.shutil, "which", {"clang": "/usr/bin/clang"}.get)
    wishes._check_compiler("cuda", "inductor")
    monkeypatch.setattr(wishes.shutil, "which", {"clang++": "/usr/bin/clang++"}.get)  # torch asks for g++
    with pytest.raises(wishes.BadFlag, match="no C compiler; apt-get install gcc"):
        wishes._check_compiler("cuda", "inductor")
    with pytest.raises(wishes.BadFlag, match="apt-get install g"):
        wishes._check_compiler("cpu", "inductor")


@pytest.mark.parametrize(
    ("wished", "bf16", "why"),
    [
        ("fp8", None, "fp8: nothing is computed in fp8"),
        ("bf16", None, "bf16: give accelerate none"),
        ("fp16", None, "fp16: give"),
    ],
)
def test_a_precision_that_only_the_launcher_names(home, tmp_path, monkeypatch, wished, bf16, why):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", wished)
    assert f"--mixed_precision {why}" in refuse(home, tmp_path)


def test_compile_that_only_the_launcher_names(home, tmp_path, monkeypatch):
    settings = {"BACKEND": "NO", "MODE": "default", "USE_FULLGRAPH": "False"}
    for name, value in settings.items():  # as accelerate launch sets them when nobody asks
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    wishes.check_wishes(TrainFlags(device="cpu"), {})
    for name, value in {"BACKEND": "INDUCTOR", "MODE": "max-autotune", "USE_FULLGRAPH": "True"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
            line = (
                f"--dynamo_{name.lower()} {value}: give accelerate none, and train.py --torch_compile or not"
            )
            assert line in refuse(home, tmp_path)


def test_a_gpu_that_is_not_there_says_what_it_takes(home, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert "torch must be a build for CUDA" in refuse(home, tmp_path, device="cuda")
    assert "it takes a Mac" in refuse(home, tmp_path, device="mps")
