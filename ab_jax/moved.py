"""Modules that have another name now: the old ones still answer, with a warning, for one release.

Both ways: `from ab_jax.description import Description` imports from the new place, and
`python -m ab_jax.training.manifest` runs it.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder

MOVED = {
    "ab_jax.assigned": "ab_jax.rules",
    "ab_jax.data.facts": "ab_jax.data.load",
    "ab_jax.data.names": "ab_jax.data.layout",
    "ab_jax.description": "ab_jax.describe",
    "ab_jax.export.bits": "ab_jax.export.packed.bits",
    "ab_jax.export.container": "ab_jax.export.packed.container",
    "ab_jax.export.qwix_serving": "ab_jax.export.qwix",
    "ab_jax.layerwise": "ab_jax.schedules",
    "ab_jax.models.padding": "ab_jax.models.convolution",
    "ab_jax.quantized_inputs": "ab_jax.linen",
    "ab_jax.training.manifest": "ab_jax.training.seals",
    "ab_jax.training.readings": "ab_jax.training.accuracies",
    "ab_jax.training.step": "ab_jax.training.train_step",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds modules by their old names, where nothing else finds them."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module that has moved, else None."""
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: types.ModuleType) -> None:
        """Fill the old module with what the new one holds."""
        new = importlib.import_module(_told(module.__name__))
        own = {name: value for name, value in vars(new).items() if not name.startswith("__")}
        vars(module).update(own, __doc__=new.__doc__)

    def get_code(self, fullname: str) -> types.CodeType:
        """What `python -m` runs."""
        new = _told(fullname)
        source = f"import runpy; runpy.run_module({new!r}, run_name='__main__', alter_sys=True)"
        return compile(source, f"<{fullname}>", "exec")


def _told(old: str) -> str:
    new = MOVED[old]
    text = f"{old} is called {new} now; the old name goes with the next release."
    warnings.warn(text, FutureWarning, stacklevel=3)
    return new


def answer_by_old_names() -> None:
    """From now on old names answer with the new ones."""
    sys.meta_path.append(MovedModules())
