"""Signals ask, break off what may be broken off, and at the second time end."""

import os
import signal
import time

import pytest

from ldm.training import stop
from ldm.training.stop import SIGNALS, Stop


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_taken_note_of_and_the_handlers_come_back(number):
    before = [signal.getsignal(other) for other in SIGNALS]
    with Stop() as asked:
        assert not asked.agreed() and asked.attempt(lambda: "done") == "done"
        os.kill(os.getpid(), number)
        assert asked.asked == number and asked.agreed() and asked.exit_code == 128 + number
        assert asked.attempt(lambda: "done") is None  # what comes later is not begun
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_waiting_is_broken_off_at_once_and_nothing_takes_it_for_an_error():
    def wait() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            time.sleep(60)
        except Exception:  # as libraries do
            return "swallowed"
        return "slept"

    began = time.monotonic()
    with Stop() as asked:
        assert asked.attempt(wait) is None
    assert time.monotonic() - began < 30


def test_an_ignored_signal_stays_ignored():
    """As nohup wants it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_the_process_but_an_echo_does_not(monkeypatch):
    monkeypatch.setattr(stop, "ECHO", 0.2)
    if not (child := os.fork()):
        with Stop():
            for pause in (0.0, 0.0, 0.3):  # the launcher's copy, and then a second one
                time.sleep(pause)
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7)  # not reached
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM
