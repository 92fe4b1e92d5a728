"""Stands in for `experiments.together`: each run by the stand-in for training, in turn.

Copied beside that one (`fake_training`) as `experiments/together.py`.
"""

import pathlib
import subprocess
import sys

own, *members = " ".join(sys.argv[1:]).split(" -- ")
codes = []
for words in (member.split() for member in members):
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    (pathlib.Path(flags.get("runs_dir", "runs")) / flags["name"]).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.train", *words]
    codes.append(subprocess.run(command).returncode)
sys.exit(max(codes))
