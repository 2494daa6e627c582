"""What all tests share: no network, one thread, two small tokenizers."""

import functools
import os
import signal
import socket
import string
import sys

import pytest

# Before any import of huggingface_hub, and for the scripts that tests start.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

SENTENCES = (
    "The cat sat on the mat, and the dog sat on the log.",
    "What does the function return? It returns the length of the list.",
    "In 1969, 2 men walked on the moon; they'll tell you it's true, won't they?",
    "Das Mädchen mißt die Größe: 12,5 m². Où est la bibliothèque?\n\n    return x + 1\n",
    "日本語のテキスト 🎉 привет мир",
)
LOCAL = ("localhost", "::1", "0.0.0.0", "", None)


def pytest_configure(config):
    # Started in the background or by nohup, a process ignores these; the tests of signals send them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Under these pytest makes whole diffs, also of the failures that tests expect: of two long rows
    # that never ended.
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)


def pytest_collection_finish(session):
    # Two threads on tiny products wait for one another: 7 times slower on 2 busy cores.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def is_local(host) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    return host in LOCAL or host.startswith("127.")


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Let sockets reach this machine and no other."""
    patch = pytest.MonkeyPatch()

    def guard(name):
        original = getattr(socket.socket, name)

        def reach(self, *args):
            address = args[-1]
            if self.family != socket.AF_UNIX and not is_local(address[0]):
                raise OSError(f"tests have no network: {address}")
            return original(self, *args)

        patch.setattr(socket.socket, name, reach)

    for name in ("connect", "connect_ex", "sendto"):
        guard(name)
    look_up = socket.getaddrinfo

    @functools.wraps(look_up)  # pydocs compares what is documented with what is there
    def look_up_local(host, *args, **options):
        if not is_local(host):
            raise socket.gaierror(f"tests have no network: {host}")
        return look_up(host, *args, **options)

    patch.setattr(socket, "getaddrinfo", look_up_local)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE with some merges."""
    from firstwords.tokenizer import train_bpe

    return train_bpe(SENTENCES * 3, 400)


@pytest.fixture(scope="session")
def char_tokenizer():
    """A tokenizer of the characters of `SENTENCES` and of all that ASCII prints."""
    from firstwords.tokenizer import build_char

    return build_char([*SENTENCES, string.printable])


@pytest.fixture
def handlers():
    """Put the signals' handlers back that a test changes."""
    from firstwords.signals import SIGNALS

    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def no_matmul(monkeypatch):
    """Leave out what each run begins with: 0.3 seconds of measuring the machine."""
    from firstwords import monitor

    monkeypatch.setattr(monitor, "measure_matmul_rate", lambda device, bf16: 1e9)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """The warmed process of which runs of train.py are forked."""
    from nursery import Nursery

    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    assert nursery.threads == 1, "what is forked has started threads"
    yield nursery
    nursery.close()
