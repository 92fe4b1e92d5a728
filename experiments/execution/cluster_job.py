"""What a job of a cluster does: wait for a run's own process, and let it save when time is up.

Before its time is up, or when it has to make room (where Slurm is set to say so), a job gets a
signal: the run saves its state and ends, and the job puts itself into the queue again, to go on
from there. A job imports nothing else of ours: it does no work itself.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SECONDS_TO_BE_ENDED = 60.0


class Training:
    """What a job does: start the run's process and wait for it; submitit calls `checkpoint`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command = tuple(command)
        self._log = log
        self._waiting: tuple[subprocess.Popen[bytes], threading.Thread] | None = None

    def __call__(self) -> int:
        """Run to the end; returns the exit code."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        # Slurm signals all processes of a job, and the run has no use for this signal.
        before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        # In a thread of its own: `checkpoint` interrupts this one, and waits as well.
        thread = threading.Thread(target=process.wait)
        thread.start()
        self._waiting = process, thread
        signal.signal(signal.SIGUSR2, before)
        try:
            thread.join()
        except BaseException:
            process.terminate()
            raise
        if process.returncode == os.EX_TEMPFAIL:
            # Somebody told the run to stop: Slurm as a rule, which is about to end this job too.
            # With no result written, it may then be queued again.
            time.sleep(_SECONDS_TO_BE_ENDED)
        return int(process.returncode)

    def checkpoint(self) -> Any:
        """Let the run save its state and end; returns what the next job is to do."""
        from submitit.helpers import DelayedSubmission

        if self._waiting is not None:
            process, thread = self._waiting
            process.terminate()
            thread.join()
        return DelayedSubmission(Training(self._command, self._log))
