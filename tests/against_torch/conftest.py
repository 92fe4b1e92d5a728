"""Where torch is not installed, what needs it is not collected."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    collect_ignore = ["live.py", "make_references.py"]
