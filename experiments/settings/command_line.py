"""How a command ends: with one line for what the user can fix, with 75 when asked to stop."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ab_jax.training.finite import NonFiniteLossError
from ab_jax.training.stopping import EXIT_CODE, StoppedError
from experiments.settings.config import FlagError


def end_with_a_line(run: Callable[[], Any]) -> None:
    """Run it, and exit with a line on stderr in place of a traceback where that says it all.

    Exit codes: 0 done; 1 an error, which the line names; 75 stopped by SIGTERM or SIGINT, to be
    resumed by the same command.
    """
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        # While nothing trains yet, or no more, there is nothing to save.
        signal.signal(signal.SIGTERM, _end_at_once)
    try:
        with _orbax_speaks_through_us():
            run()
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(EXIT_CODE)
    except (FlagError, ValueError, OSError, NonFiniteLossError) as error:
        # A full disk fails in hundreds of Orbax's tasks. As they go, after the line, asyncio would
        # log that nobody asked for their errors, and Python warn that they were never awaited.
        logging.disable()
        warnings.simplefilter("ignore")
        sys.exit(f"error: {error}")
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_at_once(*_: object) -> None:
    """As an exception it might be swallowed, by an import or a destructor, and the run go on."""
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.terminate()
        sys.stdout.flush()
    os.write(2, b"stopped by SIGTERM with nothing to save: the same command does it anew\n")
    os._exit(EXIT_CODE)


@contextlib.contextmanager
def _orbax_speaks_through_us() -> Iterator[None]:
    """Within it, what fails in the background is not told of there, since it is raised to us too.

    Orbax logs the traceback of each of its tasks; threads of tensorstore print those of callbacks
    that come when nobody waits any more.
    """

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "/orbax/" not in record.pathname

    def of_main_thread(*error: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            hook(*error)

    hook, logger = sys.excepthook, logging.getLogger("absl")
    sys.excepthook = of_main_thread
    logger.addFilter(from_elsewhere)
    try:
        yield
    finally:
        sys.excepthook = hook
        logger.removeFilter(from_elsewhere)
