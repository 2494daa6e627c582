"""Signals: a wish to stop, met where nothing is lost."""

import signal

import pytest

from firstwords.errors import Stopped
from firstwords.signals import SIGNALS, StopWish


def test_an_ignored_hangup_stays_ignored(handlers, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    wish = StopWish(tmp_path)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.raise_signal(signal.SIGHUP)
    assert wish.received is None
    assert signal.getsignal(signal.SIGTERM) == wish._receive


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_start_up_it_ends_at_once(handlers, tmp_path, number):
    StopWish(tmp_path)
    with pytest.raises(Stopped, match=f"stopped by {number.name} before the first step, nothing is lost"):
        signal.raise_signal(number)


def test_what_a_library_swallowed_is_found_again(handlers, tmp_path):
    wish = StopWish(tmp_path)
    wish.check_startup()
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        wish.check_startup()


@pytest.mark.parametrize("number", SIGNALS)
def test_in_training_it_is_noted(handlers, tmp_path, number):
    wish = StopWish(tmp_path)
    wish.defer()
    signal.raise_signal(number)
    assert wish.received == number
    wish.check_startup()


def test_the_second_ctrl_c_stops_at_once(handlers, tmp_path):
    wish = StopWish(tmp_path)
    wish.defer()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
