"""What a study is: stages of runs, what they start from, what is chosen and by which rule.

How a file says it: `experiments/study_design/study_file.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.reporting.table_parts import TableOptions

CHOSEN = "chosen"  # a flag's value, until trials say which one


class StudyError(Exception):
    """A study's file makes no sense, or cannot be run as it stands; the message says where."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a stage's settings are chosen: the best mean of a reading on validation images.

    The reading is that of the integer codes, of float that of the weights as trained. Of equal
    means the first one counts, smaller values of `flags` before larger ones.

    Attributes:
      stage: whose runs are the trials; `STUDY/STAGE`.
      flags: what is chosen, together.
      per: flags for each of whose values the choice is made anew.
      statistics: of batch norm, `running` along with training or `re-estimated` at its end.
    """

    stage: str
    flags: tuple[str, ...]
    per: tuple[str, ...] = ("method",)
    statistics: Literal["running", "re-estimated"] = "re-estimated"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Runs of a stage: the product of the values of their flags, for each seed.

    Attributes:
      values: of each flag, all that are run.
      choose: what finds the values that are `CHOSEN`.
      chosen_for: values of the choice's `per` flags that are looked up in place of the run's own.
    """

    seeds: tuple[int, ...]
    run_name: str
    values: Mapping[str, tuple[Any, ...]]
    choose: Choice | None = None
    chosen_for: Mapping[str, Any] = field(default_factory=dict)
    later: str = ""

    @property
    def asks(self) -> tuple[str, ...]:
        """The flags that trials choose."""
        return tuple(flag for flag, values in self.values.items() if CHOSEN in values)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Runs that need no other than those of earlier stages.

    Attributes:
      name: `STUDY/STAGE`; its runs are `STUDY/STAGE/RUN`.
      is_own: whether the file itself has it, and not another study.
    """

    name: str
    parts: tuple[Part, ...]
    is_own: bool = True

    @property
    def study(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Those that its runs wait for."""
        asked = [part.choose for part in self.parts if part.choose and part.asks]
        return tuple(dict.fromkeys(asked))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study's file.

    Attributes:
      table: options of the table at its end; `table_stages`: whose records it is made of, empty:
        its own stages but those that others start from.
    """

    path: Path
    about: str
    stages: tuple[Stage, ...]
    table: TableOptions = field(default_factory=TableOptions)
    table_stages: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem

    def stage(self, name: str) -> Stage | None:
        """The stage of that full name."""
        return next((stage for stage in self.stages if stage.name == name), None)
