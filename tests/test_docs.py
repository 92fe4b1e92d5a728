"""What the documents show: commands whose flags exist, job files that parse, tables as computed."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

import ab_jax
from experiments import plan, study

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
POD = (DOCS / "pod.md").read_text(encoding="utf-8")
DEPLOY = (DOCS / "deploy.md").read_text(encoding="utf-8")
FRAMEWORKS = (DOCS / "frameworks.md").read_text(encoding="utf-8")
PEERS = (DOCS / "peers.md").read_text(encoding="utf-8")
JOBSET = (DOCS / "jobset.yaml").read_text(encoding="utf-8")
SLURM = (DOCS / "slurm.sh").read_text(encoding="utf-8")


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each `python -m experiments.NAME flags ...`, or of benchmarks: the module, and its words."""
    joined = re.sub(r"\\\n\s*", " ", text)
    ours = r"python3? -m ((?:experiments|benchmarks)\.\w+)(?![\w.])([^`\n]*)"
    for name, rest in re.findall(ours, joined):
        words = rest.partition("#")[0].partition(" || ")[0].rstrip("'& ")
        yield name, shlex.split(words.partition(" -- ")[0])


def parse(name: str, words: list[str]) -> Any:
    """The command's configuration, as the module's own command line makes it."""
    module = importlib.import_module(name)
    return tyro.cli(module.Config, args=words, use_underscores=True)


def jobset() -> dict[str, Any]:
    return yaml.safe_load(JOBSET)


def jobset_command() -> tuple[str, list[str]]:
    template = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    python, dash_m, module, *words = container["command"]
    assert (python, dash_m) == ("python", "-m")
    return module, words


COMMANDS = [
    *(command for text in (POD, SLURM, DEPLOY, FRAMEWORKS, PEERS) for command in commands_in(text)),
    jobset_command(),
]


@pytest.mark.parametrize(
    ("name", "words"), COMMANDS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(COMMANDS)]
)
def test_the_flags_of_each_command_exist(name: str, words: list[str]) -> None:
    config = parse(name, words)
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    known = {field.name for field in dataclasses.fields(config)}
    assert {flag.removeprefix("no_") if flag not in known else flag for flag in given} <= known


def test_there_are_commands_for_every_place() -> None:
    pod, slurm = list(commands_in(POD)), list(commands_in(SLURM))
    assert len(slurm) == 1
    training = [words for name, words in pod if name.endswith(("imagenet", "cifar10"))]
    assert any("--distributed" in words for words in training)
    assert any(word.startswith("--coordinator=") for words in training for word in words)
    for name, words in (*slurm, jobset_command()):
        assert parse(name, words).distributed
    told = {"resnet50_imagenet", "binarynet_cifar10", "plan"}
    assert {name for name, _ in pod} >= {f"experiments.{name}" for name in told}
    assert {name for name, _ in commands_in(PEERS)} == {
        "benchmarks.peers",
        "benchmarks.peers_accuracy",
    }


def test_a_flag_that_does_not_exist_is_found() -> None:
    (wrong,) = commands_in(
        "    python -m experiments.resnet50_imagenet --distribute \\\n --seed=1\n"
    )
    with pytest.raises(SystemExit):
        parse(*wrong)


def test_the_shell_file_parses() -> None:
    subprocess.run(["bash", "-n", str(DOCS / "slurm.sh")], check=True)


def test_shell_blocks_parse() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", POD, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_slurm_reads_its_options_before_the_first_command() -> None:
    lines = SLURM.splitlines()
    assert lines[0] == "#!/bin/bash"
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert options
    assert max(options) < first_command


@pytest.mark.parametrize("text", [SLURM, JOBSET], ids=["slurm", "jobset"])
def test_a_user_edits_three_places(text: str) -> None:
    assert re.findall(r"# EDIT (\d):", text) == ["1", "2", "3"]


def test_the_jobset_is_as_large_as_its_slice() -> None:
    spec = jobset()
    assert (spec["apiVersion"], spec["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = spec["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * chips == int(rows) * int(columns) == 256
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    # The batch can be shared by all chips.
    assert parse(*jobset_command()).batch_size % 256 == 0


def test_an_indexed_job_runs_a_share_of_a_study() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", POD, re.DOTALL)
    job = yaml.safe_load(block)["spec"]
    (container,) = job["template"]["spec"]["containers"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "3") for word in container["command"][3:]]
    config = parse("experiments.study", words)
    assert study.parse_shard(config.shard) == (3, job["completions"])
    assert study.read_study(ROOT / config.file).stages


PLANS = re.findall(r"<!-- plan: (.*?) -->\n(.*?)\n<!-- /plan -->", POD, re.DOTALL)


@pytest.mark.parametrize(("flags", "shown"), PLANS, ids=[flags for flags, _ in PLANS])
def test_what_is_computed_is_shown_as_computed(flags: str, shown: str) -> None:
    config = tyro.cli(plan.Config, args=shlex.split(flags), use_underscores=True)
    if config.network == "all":
        assert shown == plan.table(config)
    else:
        assert shown == f"```text\n{plan.report(config)}\n```"


def test_plans_are_shown() -> None:
    assert len(PLANS) == 3


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link


# The API reference


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` writes, in the environment that runs the tests."""
    pages = tmp_path_factory.mktemp("api")
    made = ("-o", ".venv/.installed-test")  # no environment is made for it
    command = ["make", "docs", *made, f"PY={sys.executable}", f"API={pages}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return pages


def test_the_reference_holds_every_public_name(reference: Path) -> None:
    page = (reference / "ab_jax.html").read_text(encoding="utf-8")
    for name in ab_jax.__all__:
        assert f'id="{name}"' in page, name


def test_the_reference_has_a_page_for_every_room(reference: Path) -> None:
    rooms = {path.stem for path in ROOT.glob("ab_jax/[a-z]*") if path.name != "py.typed"}
    assert rooms == {path.stem for path in reference.glob("ab_jax/*.html")}


# What is committed of results


def test_results_hold_records_and_the_pictures_that_pages_show() -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "results"], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not in a git checkout")
    pages = [ROOT / "README.md", ROOT / "results/README.md", *DOCS.glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    others = [file for file in listed.stdout.split() if not file.endswith(".json")]
    assert [file for file in others if file != "results/README.md" and file not in text] == []
