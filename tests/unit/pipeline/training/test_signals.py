"""A signal asks, and does nothing else; a second one ends the process; the handlers of before come back."""

import os
import signal
import subprocess
import sys
import time

import pytest

from common.command import guarded
from common.errors import INTERRUPTED, Interrupted
from pipeline.training import signals
from pipeline.training.signals import STOP_SIGNALS, stop_requests


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal == number.name
    assert signal.getsignal(number) == before


def test_an_echo_of_the_same_request_does_not_end_the_process() -> None:
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)  # still here
        assert stop.signal == "SIGUSR2"


def test_a_second_signal_leaves_at_once() -> None:
    program = """
import time
from pipeline.training.signals import stop_requests
with stop_requests():
    print("ready", flush=True)
    started = time.monotonic()
    while time.monotonic() - started < 60:
        time.sleep(0.05)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(signals.SAME_REQUEST_SECONDS + 0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM


def test_a_command_that_was_interrupted_says_so_in_one_line_with_status_75(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise Interrupted("runs/a: saved after 64 samples; run again to go on")

    assert guarded(work) == INTERRUPTED == 75
    assert capsys.readouterr().err == "interrupted: runs/a: saved after 64 samples; run again to go on\n"
