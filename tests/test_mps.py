"""Apple's GPU, as far as a CPU can tell: how it is chosen, and that nothing asks it for what it has not."""

import contextlib

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import BYTES, SHAPE, build_flags, invent_talks, run_script, write_chats, write_config, write_store
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, training_args

import evaluate
import inference
import train
from firstwords import model
from firstwords.args import TrainFlags
from firstwords.checkpoint import is_complete
from firstwords.model import GPT2LMHeadModel
from firstwords.trainer import build_training_arguments


class AppleGPU(TorchFunctionMode):
    """Treat all tensors as Apple's GPU would: no float64 among them until they are fetched by `.cpu()`.

    Its message is torch's own on such a machine.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            result = result.detach().clone()
            result.is_fetched = True
        elif isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            known = [t for t in tensors if t.dtype == torch.float64 or hasattr(t, "is_fetched")]
            lists = [value for value in args if isinstance(value, list | tuple)]  # torch.cat
            if len(known) < len(tensors) or not (tensors or lists):
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


@pytest.fixture
def data(tmp_path):
    """Data of both stages and a model configuration."""
    write_store(tmp_path / "text", ["tea and birds " * 30] * 5, ["birds and tea " * 9])
    write_chats(tmp_path / "chats", invent_talks(20), invent_talks(5, seed=1))
    write_config(tmp_path / "c.json")
    return tmp_path


def test_auto_takes_it_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for has_cuda, device in ((False, "mps"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=has_cuda: found)
        assert model.find_device("auto") == device
    assert model.find_device("cpu") == "cpu"


def test_what_a_run_says_of_its_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert model.explain_device("cpu") == " (no GPU found)"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert model.explain_device("mps") == " (Apple's GPU)"
    assert model.explain_device("cpu") == " (a GPU is left alone)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4060 Ti")
    assert model.explain_device("cuda") == " (NVIDIA GeForce RTX 4060 Ti)"


def test_bf16_is_refused_on_it_and_never_left_out_in_silence(data, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    words = build_flags(data / "chats", data / "run", data / "c.json", device="mps", bf16=True)
    code, errors = run_script(train, words)
    assert (code, errors) == (2, "error: --bf16: this mps cannot compute in bfloat16; use --no_bf16\n")


@pytest.fixture
def apple(monkeypatch):
    """A machine that says it has Apple's GPU; what others remember of it is forgotten afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(training_args, "is_torch_mps_available", lambda: True)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_it_reaches_trainer_as_the_device(data, apple):
    flags = TrainFlags(data_dir=data / "chats", model_dir=data / "run", device="mps")
    arguments = build_training_arguments(flags, {}, 4)
    assert not arguments.use_cpu
    assert arguments.device == torch.device("mps")


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_both_stages_need_no_float64(data, optim, capsys):
    quick = {"max_steps": 2, "eval_steps": 2, "optim": optim, "log_steps": 1}
    text = build_flags(data / "text", data / "base", data / "c.json", no_assistant_only_loss=True, **quick)
    chat = build_flags(data / "chats", data / "chat", None, init_model_dir=data / "base", **quick)
    with AppleGPU():
        for words in (text, chat):
            assert run_script(train, words) == (0, "")
        assert run_script(evaluate, ["--model_dir", data / "chat", "--device", "cpu"])[0] == 0
        words = ["--model_dir", data / "chat", "--device", "cpu", "--prompt", "Hi", "--max_new_tokens", "3"]
        assert run_script(inference, [*words, "--temperature", "1"])[0] == 0
    assert is_complete(data / "chat")
    capsys.readouterr()


def test_the_stand_in_refuses_float64():
    tiny_model = GPT2LMHeadModel(GPT2Config(vocab_size=BYTES.vocab_size_padded, **SHAPE))
    weight = tiny_model.lm_head.weight
    with AppleGPU():
        assert weight.cpu().double().sum() > -1e9
        for convert in (
            lambda: weight.double(),
            lambda: weight.to(torch.float64),
            lambda: torch.zeros(2).double(),
        ):
            with pytest.raises(TypeError, match="float64"):
                convert()
        with contextlib.suppress(TypeError):
            torch.zeros(2, dtype=torch.float64)
            pytest.fail("a new tensor of float64 was let through")
