"""The first signal only sets a flag; a second one ends the process; the handlers are restored."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from common.command import ended_by_signals, exit_status_of
from common.errors import INTERRUPTED, Interrupted
from pipeline.training import signals
from pipeline.training.signals import STOP_SIGNALS, stop_requests


@pytest.fixture
def with_a_terminal() -> Iterator[None]:
    """With SIGHUP's default handler, which `nohup` around the tests would have replaced."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("with_a_terminal")
def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_requests() as stop, ended_by_signals():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop


@pytest.mark.usefixtures("with_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_makes_a_command_that_waits_for_jobs_raise_system_exit(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left, ended_by_signals():
        os.kill(os.getpid(), number)
    assert left.value.code == 128 + number
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("with_a_terminal")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal == number.name
    assert signal.getsignal(number) == before


def test_a_repeated_signal_within_a_second_does_not_end_the_process() -> None:
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)  # does not end it
        assert stop.signal == "SIGUSR2"


WAITS_IN_PYTHON = """
started = time.monotonic()
while time.monotonic() - started < 60:
    time.sleep(0.05)
"""
WAITS_IN_A_LIBRARY = """
mutex = ctypes.create_string_buffer(64)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
ctypes.CDLL(None).pthread_mutex_lock(mutex)  # for ever, whatever signals come
"""


@pytest.mark.parametrize("waits", [WAITS_IN_PYTHON, WAITS_IN_A_LIBRARY])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_later_ends_a_process_that_waits(waits: str, number: signal.Signals) -> None:
    program = f"""
import ctypes, time
from pipeline.training.signals import stop_requests
with stop_requests():
    print("ready", flush=True)
    {waits.strip().replace(chr(10), chr(10) + "    ")}
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        time.sleep(signals.SAME_REQUEST_SECONDS + 0.3)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=10) == 128 + number


def test_an_interrupted_command_prints_one_line_and_has_status_75(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise Interrupted("runs/a: saved after 64 samples; run again to go on")

    assert exit_status_of(work) == INTERRUPTED == 75
    assert capsys.readouterr().err == "interrupted: runs/a: saved after 64 samples; run again to go on\n"
