"""A benchmark as a command: its flags are checked, its record is written, its table is printed.

A benchmark is a module with a `Config`, `run` from that to a record, and `table` from records to
Markdown.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from ab_jax.training.records import describe_run, write_json
from experiments.settings.command_line import end_with_a_line

Record = dict[str, Any]
Config = TypeVar("Config")


def recorded(
    name: str,
) -> Callable[[Callable[[Config], Mapping[str, Any]]], Callable[[Config], Record]]:
    """Let a function leave a record of what it finds, beside the flags, machine and versions.

    The record is written to the configuration's `out`, if that is a path, and returned; `name` is
    that of the module, as it is called. What is found must be as JSON has it.
    """

    def leaves_record(find: Callable[[Config], Mapping[str, Any]]) -> Callable[[Config], Record]:
        @functools.wraps(find)
        def run(config: Any) -> Record:
            flags = json.loads(json.dumps(dataclasses.asdict(config), default=str))  # paths as text
            record = {**describe_run(name, flags), **find(config)}
            if config.out is not None:
                config.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(config.out, record)
            return record

        return run

    return leaves_record


def require_at_least_one(config: Any, *flags: str) -> None:
    """Refuse a configuration in which one of these flags, or a part of it, is below 1.

    Raises:
      ValueError: names the flag.
    """
    for flag in flags:
        value = getattr(config, flag)
        if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            raise ValueError(f"--{flag}={value} must be at least 1.")


def versions(record: Record, others: Mapping[str, str] | None = None) -> str:
    """For a caption: `qwix 0.1.8, jax 0.10.2`."""
    named = {**(others or {}), "jax": record["packages"]["jax"]}
    return ", ".join(f"{name} {version}" for name, version in named.items())


def main(
    config_type: type[Config],
    run: Callable[[Config], Record],
    table: Callable[[Sequence[Record]], str],
    description: str | None,
) -> None:
    """The command line; what the user can mend ends it with one line on stderr."""
    config = tyro.cli(config_type, description=description, use_underscores=True)
    end_with_a_line(lambda: print(table([run(config)])))
