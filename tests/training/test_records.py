"""What a run leaves behind: files by content, and what is refused."""

import importlib.metadata
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from ab_jax.training import provenance
from ab_jax.training.provenance import digest_of_sources, revision
from ab_jax.training.records import RunDirectory, describe_run, write_json

ROOT = Path(__file__).parents[2]
CONFIG = {"name": "x", "epochs": 2.0, "learning_rate": 0.1, "clip_norm": None, "tags": ["a", "b"]}
LINES: list[dict[str, Any]] = [
    {"step": 4, "alpha": 0.25, "quantized_accuracy": 0.5, "histogram": [1, 2]},
    {"step": 8, "alpha": 1.0, "quantized_accuracy": 0.75, "histogram": [2, 1]},
]


def open_run(path: Path, **changes: Any) -> RunDirectory:
    return RunDirectory(path, experiment="experiments.mine", config={**CONFIG, **changes})


def read_scalars(path: Path) -> dict[str, dict[int, float]]:
    """Values by tag and step from the TensorBoard events: records of length, CRC, data, CRC."""
    scalars: dict[str, dict[int, float]] = {}
    for file in sorted(path.glob("events.out.tfevents.*")):
        data, start = file.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            start += 12 + length + 4
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return scalars


def test_config_holds_every_flag_and_where_it_ran(tmp_path: Path) -> None:
    with open_run(tmp_path / "study" / "seed3"):
        pass
    stored = json.loads((tmp_path / "study" / "seed3" / "config.json").read_text())
    assert stored["config"] == CONFIG
    assert stored["experiment"] == "experiments.mine"
    for package in ("jax", "flax", "optax", "orbax-checkpoint", "numpy"):
        assert stored["packages"][package] == importlib.metadata.version(package)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|\+00:00)", stored["started"])
    assert "8 cpu device(s)" in stored["hardware"]


def test_the_revision_is_the_commit_and_says_whether_files_differ() -> None:
    root = Path(__file__).parents[2]
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        pytest.skip("not in a git checkout")
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"]).returncode
    revision = describe_run("experiments.mine", {})["revision"]
    assert revision == head.stdout.strip() + ("-dirty" if changed else "")


def test_without_git_the_revision_is_a_digest_of_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("AB_JAX_REVISION", "c0ffee")
    assert revision() == "c0ffee"
    monkeypatch.delenv("AB_JAX_REVISION")
    found = revision()
    assert re.fullmatch(r"sources-[0-9a-f]{16}", found)
    assert found == revision()

    package = tmp_path / "package"
    (package / "room").mkdir(parents=True)
    (package / "a.py").write_text("x = 1\n")
    digests = [digest_of_sources(package)]
    (package / "notes.txt").write_text("no source")
    assert digest_of_sources(package) == digests[0]
    for path, text in (("a.py", "x = 2\n"), ("room/b.py", ""), ("room/c.py", "")):
        (package / path).write_text(text)
        digests.append(digest_of_sources(package))
    (package / "room/c.py").rename(package / "room/d.py")
    digests.append(digest_of_sources(package))
    assert len({*digests}) == len(digests)


def test_another_repository_around_the_package_is_not_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    installed = tmp_path / ".venv/ab_jax/training/provenance.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("x = 1\n")
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(provenance, "__file__", str(installed))
    monkeypatch.delenv("AB_JAX_REVISION", raising=False)
    assert revision().startswith("sources-")
    subprocess.run([*git, "add", "-f", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}", revision())


def test_what_changes_jax_from_outside_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    with jax.default_matmul_precision("highest"):
        told = describe_run("experiments.mine", {})["settings_of_jax"]
    assert told == {
        "XLA_FLAGS": "--xla_cpu_enable_fast_math=false",
        "jax_default_matmul_precision": "highest",
    }
    monkeypatch.delenv("XLA_FLAGS")
    told = describe_run("experiments.mine", {})["settings_of_jax"]
    assert told == {"XLA_FLAGS": None, "jax_default_matmul_precision": None}


def test_metrics_are_lines_and_events(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert run.metrics == []
        for line in LINES:
            run.write_metrics(line)
        assert run.metrics == LINES
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == LINES
    assert text.endswith("\n")
    assert read_scalars(tmp_path) == {
        name: {line["step"]: line[name] for line in LINES}
        for name in ("alpha", "quantized_accuracy")
    }


def test_lines_after_a_checkpoint_are_forgotten(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        for line in LINES:
            run.write_metrics(line)
        run.forget_after(7)
        assert run.metrics == LINES[:1]
        run.forget_after(0)
        assert run.metrics == []


def test_record_is_config_metrics_and_summary(tmp_path: Path) -> None:
    summary = {"validation": {"quantized": 0.5}, "test": None, "steps": 8}
    with open_run(tmp_path) as run:
        for line in LINES:
            run.write_metrics(line)
        returned = run.complete(summary)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record == returned
    described = json.loads((tmp_path / "config.json").read_text())
    assert record == {**described, "metrics": LINES, "summary": summary}


def test_a_complete_run_is_not_run_again(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.complete({})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"is complete\. Choose another --name") as error:
        open_run(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_goes_on_with_its_own_flags_alone(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_metrics(LINES[0])
    stored = (tmp_path / "config.json").read_bytes()
    with open_run(tmp_path, tags=("a", "b")) as run:  # JSON has no tuples
        assert run.metrics == LINES[:1]
    with pytest.raises(ValueError, match="was begun with other flags") as error:
        open_run(tmp_path, learning_rate=0.2, clip_norm=1.0)
    assert "--clip_norm was None, is 1.0, --learning_rate was 0.1, is 0.2" in str(error.value)
    assert "--epochs" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == stored


def test_a_run_that_left_no_line_may_begin_anew_with_other_flags(tmp_path: Path) -> None:
    with open_run(tmp_path, learning_rate=-1.0):
        pass  # it stopped over that flag
    with open_run(tmp_path, learning_rate=0.2):
        pass
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["config"] == {**CONFIG, "learning_rate": 0.2}


def test_a_run_with_a_checkpoint_has_something_to_resume(tmp_path: Path) -> None:
    with open_run(tmp_path):
        (tmp_path / "checkpoints" / "3").mkdir(parents=True)  # asked to stop before its first line
    with pytest.raises(ValueError, match=r"--learning_rate was 0\.1, is 0\.2"):
        open_run(tmp_path, learning_rate=0.2)


def test_free_flags_may_differ(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_metrics(LINES[0])
    stored = (tmp_path / "config.json").read_bytes()
    config = {**CONFIG, "name": "moved", "workers": 3}
    with RunDirectory(tmp_path, experiment="m", config=config, free={"name", "workers"}) as run:
        run.forget_after(4)
    assert (tmp_path / "config.json").read_bytes() == stored


def test_a_run_of_older_code_goes_on_with_the_flags_that_it_lacks(tmp_path: Path) -> None:
    """As that code did: 1 of a flag that came later is what it always had, 2 is a change."""

    def resume(value: int) -> RunDirectory:
        config = {**CONFIG, "refits": value}
        return RunDirectory(tmp_path, experiment="m", config=config, added={"refits": 1, "no": 0})

    with open_run(tmp_path) as run:
        run.write_metrics(LINES[0])
    stored = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"--refits was 1, is 2"):
        resume(2)
    with resume(1) as run:
        run.forget_after(4)
    assert (tmp_path / "config.json").read_bytes() == stored


def test_a_change_that_is_allowed_is_told_of_in_the_record(tmp_path: Path) -> None:
    def resume(learning_rate: float, *, step: int, allow: bool) -> dict[str, Any]:
        config = {**CONFIG, "learning_rate": learning_rate}
        run = RunDirectory(tmp_path, experiment="m", config=config, allow_changed=allow)
        with run:
            run.forget_after(step)
            run.write_metrics(LINES[0])
        return json.loads((tmp_path / "config.json").read_text())

    resume(0.1, step=0, allow=False)
    assert "changed" not in resume(0.1, step=4, allow=True)  # nothing did
    resume(0.2, step=4, allow=True)
    stored = resume(0.3, step=8, allow=True)
    assert stored["config"] == {**CONFIG, "learning_rate": 0.3}
    change = {"of": "config", "name": "learning_rate"}
    assert stored["changed"] == [
        {"after_step": 4, **change, "was": 0.1, "is": 0.2},
        {"after_step": 8, **change, "was": 0.2, "is": 0.3},
    ]
    with pytest.raises(ValueError, match=r"--learning_rate was 0\.3, is 0\.1.*--allow_changed"):
        resume(0.1, step=8, allow=False)
    assert resume(0.3, step=8, allow=False) == stored  # the flags as they are now, without a word


def test_a_change_is_recorded_only_when_the_run_goes_on(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_metrics(LINES[0])
    stored = (tmp_path / "config.json").read_bytes()
    config = {**CONFIG, "learning_rate": 0.2}
    with RunDirectory(tmp_path, experiment="m", config=config, allow_changed=True):
        pass
    assert (tmp_path / "config.json").read_bytes() == stored


def test_other_data_are_an_error_that_names_them(tmp_path: Path) -> None:
    data = {"name": "tiny", "version": "1.0.0", "images": {"train": 90, "test": 10}}

    def open_on(**changes: Any) -> RunDirectory:
        now = {**data, **changes}
        return RunDirectory(tmp_path, experiment="m", config=CONFIG, data=now, free={"name"})

    with open_on() as run:
        run.write_metrics(LINES[0])
    assert json.loads((tmp_path / "config.json").read_text())["data"] == data
    with open_on():
        pass
    with pytest.raises(ValueError, match="was begun on other data: data version was"):
        open_on(version="2.0.0")
    with pytest.raises(ValueError, match="data name was 'tiny', is 'large'"):
        open_on(name="large")
    with pytest.raises(ValueError, match=r"Give the --data_dir of that data to resume it"):
        open_on(images={"train": 91, "test": 10})
    with open_on(classes=10):  # of which older code took no note
        pass
    assert json.loads((tmp_path / "config.json").read_text())["data"] == data


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Also after one was killed, which leaves its lock file there."""
    code = (
        "import sys, time, pathlib\n"
        "from ab_jax.training.records import RunDirectory\n"
        "run = RunDirectory(pathlib.Path(sys.argv[1]), experiment='m', config={})\n"
        "print('open', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        before = sorted(tmp_path.iterdir())
        with pytest.raises(BlockingIOError, match="is in use by another process") as error:
            open_run(tmp_path)
        assert f"The run {tmp_path}" in str(error.value)
        assert f"process {process.pid} on" in str(error.value)
        assert "choose another --name" in str(error.value)
        assert sorted(tmp_path.iterdir()) == before
    finally:
        process.kill()
        process.communicate()
    with open_run(tmp_path), pytest.raises(BlockingIOError):
        open_run(tmp_path)
    with open_run(tmp_path):
        pass


def test_a_refused_run_gives_the_directory_free(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_metrics(LINES[0])
    with pytest.raises(ValueError, match="other flags"):
        open_run(tmp_path, learning_rate=0.2)
    with open_run(tmp_path):
        pass


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written: Not a directory") as error:
        open_run(tmp_path / "file" / "run")
    assert str(tmp_path / "file" / "run") in str(error.value)


def test_a_read_only_directory_is_named(tmp_path: Path) -> None:
    """On a disk that not even root can write to."""
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here (that takes root)")
    try:
        for path in (tmp_path, tmp_path / "new"):
            with pytest.raises(OSError, match="Read-only file system") as error:
                open_run(path)
            assert str(error.value).startswith(f"{path} cannot be written")
            assert "choose another directory" in str(error.value)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_ends_a_run_with_its_earlier_lines_whole(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.write_metrics(LINES[0])
        lines = (tmp_path / "metrics.jsonl").read_bytes()
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: No space left"):
            run.write_metrics(LINES[1])
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").write_bytes(lines + b'{"step": 8, "alp')  # what fitted
    with open_run(tmp_path) as run:
        assert run.metrics == LINES[:1]
        run.forget_after(4)
        run.write_metrics(LINES[1])
        assert run.metrics == LINES


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        for line in LINES:
            run.write_metrics(line)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 8', '"step" 8'))
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged in line 2"):
        open_run(tmp_path)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, number: float) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": 2, "b": [number]})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
