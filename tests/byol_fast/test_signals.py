"""A signal is a wish to stop, noticed between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from byol_fast.session.signals import StopSignal


@pytest.fixture
def as_from_a_terminal() -> Iterator[None]:
    """What nohup (SIGHUP) and a shell's & (SIGINT) ignore is not ignored."""
    default = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in default.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_from_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_the_first_signal_counts_and_the_second_does_no_harm(number: signal.Signals) -> None:
    with StopSignal() as stop:
        assert not stop.received
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
        assert stop.name == number.name


def test_a_terminal_that_is_closed_ends_nothing_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
