"""How a command ends: with one line for what the user can mend, with 75 when asked to stop."""

import logging
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

from ab_jax.training.finite import NonFiniteLossError
from ab_jax.training.stopping import EXIT_CODE, StoppedError


def end_with_a_line(run: Callable[[], Any]) -> None:
    """Run it, and exit with a line on stderr in place of a traceback where that says it all.

    Exit codes: 0 done; 1 an error, which the line names; 75 stopped by SIGTERM or SIGINT, to be
    resumed by the same command.
    """
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        # While nothing trains yet, or no more, there is nothing to save.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_CODE))
    try:
        run()
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(EXIT_CODE)
    except (ValueError, OSError, NonFiniteLossError) as error:
        # A full disk fails in hundreds of Orbax's tasks. As they go, after the line, asyncio would
        # log that nobody asked for their errors, and Python warn that they were never awaited.
        logging.disable()
        warnings.simplefilter("ignore")
        sys.exit(f"error: {error}")
    finally:
        signal.signal(signal.SIGTERM, before)
