"""Ten thousand damaged and forged files: each is refused by the one error, or loads and is small.

Half of them are put together again with the right digest, so that what lies behind it is reached.
They are read in a process of their own whose memory is limited, so that none can ask for more, and
which is killed when it hangs.
"""

import json
import random
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors

from tests.export.forging import forged, forged_text, opened

ROOT = Path(__file__).parents[2]
COUNT = 10_000
SECONDS = 100  # for all of them; a few on an idle core
HEADROOM = 512 * 2**20  # bytes of address space beyond what JAX has taken when the reading starts
PEAK = 2**20  # bytes that Python and NumPy may hold beyond 40 times the file's own

GIANTS = (0, -1, 1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, 1e999, 1.5, True, None)
TEXTS = ("", "a", "params", "params/a", "params/a/codes", "a/" * 100, "\u00e9", "\\ud800", "F64")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "U32", "BOOL", "F4", "C64", "X")


def base_file(path: Path) -> bytes:
    import jax.numpy as jnp

    from ab_jax.export.packed import write_packed
    from ab_jax.export.packed.bits import Packing
    from ab_jax.quantizers import Quantized

    leaves = {}
    for name, bits, affine in (("a", 1, False), ("b", 2, False), ("c", 3, False), ("d", 4, True)):
        lowest, highest = Packing(bits, affine).levels
        codes = np.array([lowest, highest, lowest, 1, 1, highest], np.int8).reshape(3, 2)
        leaves[name] = Quantized(
            codes=jnp.asarray(codes),
            scale=jnp.asarray(np.ones((1, 2), np.float32)),
            zero_point=jnp.asarray(np.zeros((1, 2), np.int8)) if affine else None,
            bits=bits,
            dtype="float32",
        )
    variables = {"params": leaves, "batch_stats": {"mean": jnp.asarray(np.ones(3, np.float32))}}
    write_packed(path, variables, network={"config": {"width": 0.5, "deep": [[1, {"x": None}]]}})
    return path.read_bytes()


# Damage to bytes


def flip(data: bytes, random: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(data: bytes, random: random.Random) -> bytes:
    begin = random.randrange(len(data))
    return data[:begin] + random.choice((b"", data[begin + random.randrange(1, 99) :]))


def insert(data: bytes, random: random.Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.choice((1, 8, 300))) + data[at:]


def splice(data: bytes, random: random.Random) -> bytes:
    a, b = sorted(random.randrange(len(data)) for _ in range(2))
    at = random.randrange(len(data))
    return data[:at] + data[a:b] + data[at:]


def lie_of_length(data: bytes, random: random.Random) -> bytes:
    length = random.choice((0, 1, 7, 2**20, 2**32, 2**63, 2**64 - 1, random.randrange(len(data))))
    return struct.pack("<Q", length) + data[8:]


# Forgeries: edits of the parsed header, sealed again


def somewhere(tree: Any, random: random.Random) -> tuple[Any, Any]:
    """A container within a tree of JSON values, and a key of it."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = random.choice(list(keys))
        inner = tree[key]
        if not isinstance(inner, dict | list) or not inner or random.random() < 0.3:
            return tree, key
        tree = inner


def a_value(random: random.Random) -> Any:
    kind = random.randrange(5)
    if kind == 0:
        return random.choice(TEXTS)
    if kind == 1:
        return random.choice(DTYPES)
    if kind == 2:
        return [random.choice(GIANTS) for _ in range(random.choice((0, 1, 2, 3, 40)))]
    if kind == 3:
        return {random.choice(TEXTS): random.choice(GIANTS)}
    return random.choice(GIANTS)


def edit(header: Any, about: Any, body: bytes, random: random.Random) -> bytes:
    """Other values, missing and more keys, in the header or in the text."""
    for _ in range(random.choice((1, 1, 2))):
        tree, key = somewhere(random.choice((header, about, about["quantized"])), random)
        action = random.randrange(3)
        if action == 0 or (action == 1 and isinstance(tree, list)):
            tree[key] = a_value(random)
        elif action == 1:
            tree[random.choice(TEXTS)] = tree.pop(key)
        else:
            del tree[key]
        if not isinstance(about.get("quantized"), dict) or not about["quantized"] or not header:
            break
    return forged(header, about, body)


def overwrite(header: Any, about: Any, body: bytes, random: random.Random) -> bytes:
    """Other bytes in the arrays."""
    changed = bytearray(body)
    for _ in range(random.choice((1, 2, 4))):
        changed[random.randrange(len(changed))] = random.choice((0, 127, 128, 255, 243))
    return forged(header, about, bytes(changed))


def resize(header: Any, about: Any, body: bytes, random: random.Random) -> bytes:
    """Sizes that the header and the text agree on."""
    name = random.choice(list(about["quantized"]))
    shape = random.choice(([2**31 - 1] * 9, [3, 2, 1], [6], [3, 4], [2**20, 2**20, 2], [1] * 33))
    about["quantized"][name]["shape"] = shape
    if random.random() < 0.5:
        header[f"{name}/scale"]["shape"] = [*[1] * (len(shape) - 1), 2]
    if random.random() < 0.5:
        header[f"{name}/codes"]["shape"] = random.choice((shape, [0, *shape], [len(body)]))
    return forged(header, about, body + bytes(random.choice((0, 0, 1, 64))))


def duplicate(header: Any, about: Any, body: bytes, random: random.Random) -> bytes:
    """A key that stands twice, in the header or in the text."""
    if random.random() < 0.5:
        text = json.dumps(about)
        text = text[:-1] + f', "version": {random.randrange(3)}}}'
        return forged(header, text, body)
    text = json.dumps({"__metadata__": {"ab_jax": json.dumps(about)}, **header})
    name = random.choice(list(header))
    return forged_text(f'{text[:-1]}, "{name}": {json.dumps(header[name])}}}', about, body)


def deepen(header: Any, about: Any, body: bytes, random: random.Random) -> bytes:
    """JSON within JSON, deeper than any stack."""
    depth = random.choice((10, 500, 5_000, 50_000))
    opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
    deep = opening * depth + "1" + closing * depth * random.randrange(2)
    if random.random() < 0.5:
        return forged_text(f'{{"__metadata__": {deep}}}', about, body)
    text = json.dumps({**about, "network": "HERE"}).replace('"HERE"', deep)
    return forged(header, text, body)


DAMAGES: tuple[Callable[..., bytes], ...] = (flip, cut, insert, splice, lie_of_length)
FORGERIES: tuple[Callable[..., bytes], ...] = (
    *(edit, edit, edit, edit),
    *(overwrite, overwrite, resize, duplicate, deepen),
)


def mutated(data: bytes, random: random.Random) -> tuple[str, bytes]:
    """What was done to the file, and what came of it."""
    if random.random() < 0.5:
        damage = random.choice(DAMAGES)
        return damage.__name__, damage(data, random)
    forge = random.choice(FORGERIES)
    return forge.__name__, forge(*opened(data), random)


def read_all(directory: Path, seed: int) -> dict[str, Any]:
    """In the process of limited memory: reads them all; what came of it, as JSON values."""
    from ab_jax.export.packed import read_packed
    from ab_jax.export.packed.container import PackedError

    generator = random.Random(seed)
    data = base_file(directory / "base")
    jax.block_until_ready(read_packed(directory / "base").variables)
    with open("/proc/self/statm") as statm:
        limit = int(statm.read().split()[0]) * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    path = directory / "mutant"
    file = path.open("wb")  # once, since that is what would take most of the time
    outcomes: Counter[str] = Counter()
    largest, slowest, peak = 0, 0.0, 0
    for number in range(COUNT):
        how, mutant = mutated(data, generator)
        file.seek(0)
        file.truncate()
        file.write(mutant)
        file.flush()
        measured = number % 20 == 0  # tracing slows Python down
        if measured:
            tracemalloc.start()
        start = time.perf_counter()
        refusal = None
        try:
            variables = read_packed(path).variables
        except PackedError as error:
            refusal = str(error)
        if refusal is not None:
            assert refusal.startswith(f"{path} cannot be read as a packed network: ")
            assert refusal.isascii()
            assert len(refusal) < 1000
            outcomes[f"{how}: refused"] += 1
        else:
            outcomes[f"{how}: {'same' if mutant == data else 'loaded'}"] += 1
            largest = max(largest, sum(x.nbytes for x in jax.tree.leaves(variables)))
            # What is read here the library reads, too.
            assert len(safetensors.deserialize(mutant)) >= len(variables)
        slowest = max(slowest, time.perf_counter() - start)
        if measured:
            peak = max(peak, tracemalloc.get_traced_memory()[1] - 40 * len(mutant))
            tracemalloc.stop()
    return {"outcomes": outcomes, "largest": largest, "slowest": slowest, "peak": peak}


@pytest.mark.long
def test_ten_thousand_mutants_are_refused_or_small(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    seed = int(rng.integers(2**32))
    done = subprocess.run(
        [sys.executable, "-m", "tests.export.test_fuzzing", str(tmp_path), str(seed)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"seed {seed}, the file is {tmp_path}/mutant:\n{done.stderr}"
    found = json.loads(done.stdout)
    outcomes = found["outcomes"]
    assert sum(outcomes.values()) == COUNT
    # Whatever was done to bytes alone is refused, by the digest if by nothing else.
    damaged = {name for name in outcomes if name.partition(":")[0] in [d.__name__ for d in DAMAGES]}
    assert all(name.endswith((": refused", ": same")) for name in damaged)
    # The forgeries get past it: some load, as they are well made.
    assert outcomes["edit: loaded"] > 20
    assert outcomes["overwrite: loaded"] > 20
    assert {"resize: refused", "duplicate: refused", "deepen: refused"} <= outcomes.keys()
    assert found["largest"] < 10_000, "bytes of the largest tree"
    assert found["peak"] < PEAK
    assert found["slowest"] < 5


if __name__ == "__main__":
    print(json.dumps(read_all(Path(sys.argv[1]), int(sys.argv[2]))))
