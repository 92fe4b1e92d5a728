"""Signals: noted once, in the main thread, and given back."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from ab_jax.training.stopping import noted_signals, until_asked

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class SecondSignal(Exception):
    pass


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Ones of our own, which tell of a signal that is not noted."""

    def handler(*_: object) -> None:
        raise SecondSignal

    before = {number: signal.signal(number, handler) for number in NUMBERS}
    yield
    for number, old in before.items():
        signal.signal(number, old)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs the handler between two of its instructions


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_noted_and_the_second_one_is_not(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in NUMBERS}
    with noted_signals() as asked:
        assert asked() is None
        send(number)
        assert asked() == number.name
        with pytest.raises(SecondSignal):
            send(number)
        assert asked() == number.name
    assert {n: signal.getsignal(n) for n in NUMBERS} == before


def test_handlers_are_given_back_and_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = {n: signal.getsignal(n) for n in NUMBERS}
    with noted_signals() as asked:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
        send(signal.SIGINT)
        assert asked() is None
    assert {n: signal.getsignal(n) for n in NUMBERS} == before


def test_outside_of_the_main_thread_nothing_changes() -> None:
    before, inside = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with noted_signals() as asked:
            inside.append((signal.getsignal(signal.SIGTERM), asked()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [(before, None)]


def test_items_end_when_asked_and_their_failure_counts_only_before() -> None:
    asked: list[str] = []

    def items(fails_when: bool) -> Iterator[int]:
        for number in range(5):
            if number == 3:
                if fails_when:
                    asked.append("SIGTERM")
                raise RuntimeError("a worker was killed")
            yield number

    def answer() -> str | None:
        return asked[0] if asked else None

    assert list(until_asked(answer, range(3))) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="a worker was killed"):
        list(until_asked(answer, items(False)))
    assert list(until_asked(answer, items(True))) == [0, 1, 2]
    assert list(until_asked(answer, range(3))) == []
    # Others would wait for a process that ended before them.
    asked.clear()
    with pytest.raises(RuntimeError, match="a worker was killed"):
        list(until_asked(answer, items(True), alone=False))
