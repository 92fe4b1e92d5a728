"""The fixture that starts processes for a test: none of them is left when the test fails."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A process that would go on for ten minutes, and has a child that would too.
PARENT = """
import subprocess, sys
command = "import os, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", "import sys; " + command, sys.argv[2]])
exec("import sys; " + command)
"""
TEST = """
import sys, time

def test_that_fails(start_together):
    command = [sys.executable, "-c", {parent!r}, {folder!r} + "/parent", {folder!r} + "/child"]
    start_together([command], devices=1)
    for name in ("parent", "child"):
        while True:
            try:
                if open({folder!r} + "/" + name).read():
                    break
            except FileNotFoundError:
                time.sleep(0.02)
    raise AssertionError("failed on purpose")
"""


def runs(pid: int) -> bool:
    """Whether a process is there and not merely unburied."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_test_that_fails_leaves_no_process_behind(tmp_path: Path) -> None:
    test = tmp_path / "test_inner.py"
    test.write_text(TEST.format(parent=PARENT, folder=str(tmp_path)))
    words = ["-p", "no:cacheprovider", "-p", "tests.conftest", "--confcutdir", str(tmp_path)]
    inner = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *words, str(test)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "failed on purpose" in inner.stdout, inner.stdout + inner.stderr
    assert inner.returncode == 1
    pids = [int((tmp_path / name).read_text()) for name in ("parent", "child")]
    deadline = time.monotonic() + 10  # a killed process needs a moment to be gone
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(runs, pids))
