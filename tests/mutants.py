"""Damaged files, read in a process of their own, whose memory is limited and which may die.

    python -m tests.mutants KIND DIRECTORY SEED COUNT

reads mutants of a small file of this kind. Each is refused by one line that names its file, or
read; what is neither ends the process, or stands among the outcomes.
"""

import bz2
import collections
import functools
import gzip
import io
import json
import lzma
import random
import resource
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
LONGEST = 1000  # characters of a refusal
_MEGABYTE = 2**20
_OUTCOME = '{"outcome": '  # how a line begins that tells what came of a mutant


def damaged(data: bytes, generator: random.Random) -> bytes:
    """Bytes and words changed, doubled, cut out; most of it where a file speaks of its arrays."""
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 8))):
        at = generator.randrange(len(changed))
        match generator.randrange(8):
            case 0 | 1 | 2:
                changed[at] ^= 1 << generator.randrange(8)
            case 3:
                changed[at] = generator.choice((0, 1, 127, 128, 255))
            case 4 | 5:
                word = generator.choice((0, 2**64 - 1, 1 << generator.randrange(64), at, len(data)))
                changed[at : at + 8] = word.to_bytes(8, "little")
            case 6:
                other_place = generator.randrange(len(changed))
                changed[at : at + 16] = changed[other_place : other_place + 16]
            case 7:
                del changed[at : at + generator.choice((1, 8, len(data)))]
                changed += bytes(generator.choice((0, 9)))
                changed = changed or bytearray(1)
    return bytes(changed)


class Found(NamedTuple):
    """What came of many mutants.

    Attributes:
      outcomes: how many were read, and refused, and anything else in words.
      deaths: numbers of mutants over which the process died.
      slowest: seconds of one.
    """

    outcomes: collections.Counter[str]
    deaths: list[int]
    slowest: float


def read_mutants(kind: str, directory: Path, seed: int, count: int, seconds: float) -> Found:
    """Read so many; a process that dies by a signal is started again behind the culprit."""
    outcomes: collections.Counter[str] = collections.Counter()
    deaths: list[int] = []
    slowest, end = 0.0, time.monotonic() + seconds
    begin = 0
    while begin < count:
        words = [kind, str(directory), str(seed), str(count), str(begin)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.mutants", *words],
            capture_output=True,
            text=True,
            errors="backslashreplace",
            cwd=ROOT,
            timeout=end - time.monotonic(),
        )
        assert done.returncode <= 0, f"seed {seed}, {directory}: {done.stdout[-300:]}{done.stderr}"
        # Runtimes write to stdout, too.
        lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith(_OUTCOME)]
        outcomes.update(line["outcome"] for line in lines)
        slowest = max([slowest, *(line["seconds"] for line in lines)])
        begin += len(lines)
        if done.returncode < 0:
            deaths.append(begin)
            begin += 1
    return Found(outcomes, deaths, slowest)


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
      suffix: of its name.
      write: writes a small one.
      read: reads it, and raises ValueError or OSError over what it refuses.
      megabytes: of address space that reading may take.
      sealed: puts the right checksums into a damaged file, so that what lies behind them is
        reached; done to half of the mutants.
    """

    suffix: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    megabytes: int
    sealed: Callable[[bytes], bytes] = bytes


def classify(path: Path) -> None:
    """What `experiments.classify` does, with images that are black."""
    from experiments.exported.classifiers import read_classifier
    from experiments.exported.image_inputs import Told

    network = read_classifier(path, Told(mean=(0.5,), std=(0.5,)))
    count = network.batch or 2
    network.probabilities(np.zeros((count, *network.image_shape), np.uint8))


def write_onnx(path: Path) -> None:
    from tests.experiments import test_classify_others

    rng = np.random.default_rng(0)
    test_classify_others.write_onnx(path, rng, ("n", 3, 6, 6))


def write_litert(path: Path) -> None:
    from tests.experiments import test_classify_others

    rng = np.random.default_rng(0)
    test_classify_others.write_litert(path, rng, "UINT8", out=(1 / 256, 0), softmax=True)


def write_stablehlo(path: Path) -> None:
    import jax
    import jax.numpy as jnp

    import ab_jax as ab
    from ab_jax.export.stablehlo import to_stablehlo

    weight = jnp.asarray(np.random.default_rng(0).normal(size=(108, 4)), jnp.float32)
    codes = ab.quantize({"kernel": weight}, ab.Rules([("kernel", ab.Uniform(bits=4))]))

    def apply(params: Any, images: jax.Array) -> jax.Array:
        return images.reshape(images.shape[0], -1) @ params["kernel"]

    path.write_bytes(to_stablehlo(apply, codes, (6, 6, 3)))


def picture(form: str) -> bytes:
    """A small photograph, with the note of a camera that it is to be turned."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **({} if form == "BMP" else {"exif": exif}))
    return buffer.getvalue()


def write_picture(form: str, path: Path) -> None:
    path.write_bytes(picture(form))


def read_picture(path: Path) -> None:
    """As `experiments.classify` and as `experiments.pretrained` read it."""
    from ab_jax.data.jpeg import decode_photo
    from experiments.exported import pictures

    refused = None
    try:
        pictures.read_picture(path, (16, 16, 3))
    except ValueError as error:
        refused = error
    decode_photo(path.read_bytes(), str(path), upright=True)
    if refused:
        raise refused


PHOTOGRAPHS = {
    f"{wnid}/{number}.jpg": "JPEG" for wnid in ("n01440764", "n01443537") for number in (1, 2)
}


def write_tar(packed: Callable[[bytes], bytes], path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, form in PHOTOGRAPHS.items():
            content = picture(form)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.pax_headers = {"comment": "a photograph"}
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("n01443537/3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "1.jpg"
        archive.addfile(link)
    path.write_bytes(packed(buffer.getvalue()))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, form in PHOTOGRAPHS.items():
            archive.writestr(name, picture(form))


def read_photographs(path: Path) -> None:
    from experiments.pretrained.photographs import Photographs

    photographs = Photographs(path, 16)
    photographs.calibration()
    photographs.test()


def sealed_png(data: bytes) -> bytes:
    """With the checksum of each chunk, as far as lengths tell where these are."""
    changed, at = bytearray(data), 8
    while at + 12 <= len(changed):
        end = at + 8 + int.from_bytes(changed[at : at + 4], "big")
        if end + 4 <= len(changed):
            changed[end : end + 4] = zlib.crc32(changed[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(changed)


def sealed_tar(data: bytes) -> bytes:
    """With the checksum of each header."""
    changed = bytearray(data)
    for at in range(0, len(changed) - 511, 512):
        if changed[at + 257 : at + 262] == b"ustar":
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


KINDS = {
    "onnx": Kind(".onnx", write_onnx, classify, 512),
    "tflite": Kind(".tflite", write_litert, classify, 512),
    "stablehlo": Kind(".stablehlo", write_stablehlo, classify, 2048),
    "jpeg": Kind(".jpg", functools.partial(write_picture, "JPEG"), read_picture, 2048),
    "png": Kind(".png", functools.partial(write_picture, "PNG"), read_picture, 2048, sealed_png),
    "webp": Kind(".webp", functools.partial(write_picture, "WEBP"), read_picture, 2048),
    "bmp": Kind(".bmp", functools.partial(write_picture, "BMP"), read_picture, 2048),
    "tar": Kind(".tar", functools.partial(write_tar, bytes), read_photographs, 1024, sealed_tar),
    "tar.gz": Kind(".tar.gz", functools.partial(write_tar, gzip.compress), read_photographs, 1024),
    "tar.xz": Kind(".tar.xz", functools.partial(write_tar, lzma.compress), read_photographs, 1024),
    "tar.bz2": Kind(".tar.bz2", functools.partial(write_tar, bz2.compress), read_photographs, 1024),
    "zip": Kind(".zip", write_zip, read_photographs, 1024),
}


def outcome_of(kind: Kind, path: Path) -> str:
    """Reads a file: whether it is read, refused, or refused in a way that tells too little."""
    try:
        kind.read(path)
    except (ValueError, OSError) as error:
        told = str(error)
        fine = str(path) in told and len(told.splitlines()) == 1 and len(told) < LONGEST
        return "refused" if fine else f"refused by {type(error).__name__}: {told[:LONGEST]!a}"
    return "read"


def main(name: str, directory: str, seed: str, count: str, begin: str) -> None:
    kind = KINDS[name]
    path = Path(directory) / f"mutant{kind.suffix}"
    base = Path(directory) / f"base{kind.suffix}"
    if begin == "0":
        kind.write(base)
    data = base.read_bytes()
    kind.read(base)  # which loads what it needs
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    limit = taken + kind.megabytes * _MEGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(int(begin), int(count)):
        generator = random.Random(f"{seed} {number}")
        mutant = damaged(data, generator)
        path.write_bytes(kind.sealed(mutant) if generator.random() < 0.5 else mutant)
        start = time.process_time()
        outcome = outcome_of(kind, path)
        seconds = time.process_time() - start
        print(json.dumps({"outcome": outcome, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
