"""From a flag's value to what it stands for: one of ours by its name, or somebody else's."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.settings.config import FlagError


class UnknownNameError(FlagError, ValueError):
    """A flag's value is the name of nothing that there is."""


def choose(flag: str, value: str, known: Mapping[str, Any]) -> Any:
    """What a name stands for.

    Raises:
      UnknownNameError: it is not known; lists what is.
    """
    if value not in known:
        raise UnknownNameError(f"--{flag}={value} is not known. Choose one of {', '.join(known)}.")
    return known[value]


def is_elsewhere(value: str) -> bool:
    """Whether a flag's value is `package.module:NAME`, and not the name of something of ours."""
    module, colon, name = value.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), name])


def load_elsewhere(flag: str, value: str) -> Any:
    """The object that `package.module:NAME` names, imported; the current directory counts too.

    Raises:
      FlagError: there is no such module, it fails while it is imported, or it has no such name.
    """
    module, _, name = value.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # a command such as pytest starts without it
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise FlagError(
            f"--{flag}={value}: there is no module {error.name!r}. Install it, or run the command "
            f"in the directory that holds it."
        ) from error
    except AttributeError as error:
        raise FlagError(f"--{flag}={value}: {error}.") from error
    except Exception as error:  # whatever somebody else's module does
        raise FlagError(f"--{flag}={value}: {module} cannot be imported: {error}") from error
