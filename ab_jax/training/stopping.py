"""Stopping when asked to: SIGTERM and SIGINT are noted, and the loop ends at its next step."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

EXIT_CODE = os.EX_TEMPFAIL  # 75: not done, and worth the same command again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

Item = TypeVar("Item")


class StoppedError(Exception):
    """A run was asked to stop and has saved its state; the command line exits with `EXIT_CODE`."""

    def __init__(self, run: Path, step: int, asked_by: str | None) -> None:
        super().__init__(
            f"{run} stopped at step {step}, asked by {asked_by}. All of it is saved: the same "
            f"command goes on from there."
        )


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], str | None]]:
    """Within it, the first SIGTERM or SIGINT is only noted; a second one has its usual effect.

    Outside of the main thread, which alone may handle signals, and for a signal that is ignored (by
    nohup, say), nothing changes.

    Yields:
      A function that returns the name of the signal noted, or None.
    """
    noted: list[str] = []
    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def give_back() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        give_back()
        noted.append(signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield lambda: noted[0] if noted else None
    finally:
        give_back()


def until_asked(
    asked: Callable[[], str | None], items: Iterable[Item], *, alone: bool = True
) -> Iterator[Item]:
    """The items up to the moment when the run is asked to stop.

    The signal may have reached the processes that make the items too: that they failed is then no
    error, unless others compute with this process (`alone`), which could not go on to the step at
    which all stop.
    """
    iterator = iter(items)
    while not asked():
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception:
            if alone and asked():
                return
            raise
        yield item
