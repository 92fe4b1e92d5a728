"""How a command ends: the line that names the error is the last one, whatever is left behind."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# When the process ends and drops them: asyncio logs that a task failed and nobody asked, and Python
# warns of one that was never begun.
LEFT_BEHIND = """
import asyncio, atexit
from experiments.recipes.command_line import end_with_a_line

async def fail():
    raise ValueError("in the background")

def run():
    global task, unawaited
    loop = asyncio.new_event_loop()
    task = loop.create_task(fail())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    unawaited = fail()
    raise OSError("the disk is full")

atexit.register(lambda: [globals().pop(name) for name in ("task", "unawaited")])
end_with_a_line(run)
"""


def test_nothing_is_said_after_the_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: the disk is full\n"
