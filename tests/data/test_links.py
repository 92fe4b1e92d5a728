"""Hidden names and links: what counts, once, and the same in a directory and in its archives."""

import contextlib
import io
import os
import shutil
import signal
import socket
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from PIL import Image

from ab_jax.data.prepare import prepare_image_folder
from ab_jax.data.sources import read_images, scan

SPLITS = ("train", "test")
BOTH = {"train": {"ant": 1, "bee": 1}, "test": {"ant": 1, "bee": 1}}
KINDS = ("directory", "a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2", "a.zip")


def pack(source: Path, kind: str) -> Path:
    """A directory as it is, or an archive of it with its links as links, beside it."""
    if kind == "directory":
        return source
    archive = source.parent / kind
    if kind != "a.zip":
        with tarfile.open(archive, f"w:{kind.removeprefix('a.tar').lstrip('.')}") as packed:
            packed.add(source, ".")
        return archive
    with zipfile.ZipFile(archive, "w") as packed:
        for parent, directories, files in os.walk(source):
            for name in [*directories, *files]:
                path = Path(parent, name)
                member = zipfile.ZipInfo(path.relative_to(source).as_posix())
                mode = path.lstat().st_mode
                member.external_attr = mode << 16
                if stat.S_ISDIR(mode):
                    member.filename += "/"
                link = stat.S_ISLNK(mode)
                content = os.fsencode(os.readlink(path)) if link else b""
                packed.writestr(member, path.read_bytes() if stat.S_ISREG(mode) else content)
    return archive


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails where something blocks, or goes on for ever."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def images(source: Path) -> list[tuple[str, bytes]]:
    return sorted(
        (file.name, read) for split in SPLITS for file, read in read_images(source, split)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/train/ant/1.png",
        "train/.ipynb_checkpoints/1.png",
        "train/ant/.git/1.png",
        "train/ant/.hidden/deeper/1.png",
        "train/ant/.1.png",
        "__MACOSX/train/ant/1.png",
        "train/__MACOSX/1.png",
        "train/ant/@eaDir/1.png/small.png",
    ],
)
def test_hidden_directories_are_no_classes(image_folder, name, kind):
    source, _ = image_folder({"train": 1, "test": 1})
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "train/ant/0.png", source / name)
    contents = scan(pack(source, kind))
    assert contents.counts == BOTH
    assert set(contents.ignored) == {name}
    assert "hidden" in contents.ignored[name].value


def test_a_source_below_a_hidden_directory_is_read(image_folder):
    source, _ = image_folder({"train": 1, "test": 1})
    hidden = source.parent / ".cache"
    source.rename(hidden)
    assert scan(hidden).counts == BOTH


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["..", ".", "../..", "../bee", "loop1", "loop2"])
def test_links_that_lead_in_circles_add_nothing(image_folder, kind, target):
    source, _ = image_folder({"train": 1, "test": 1})
    for name in ("loop1", "loop2"):
        (source / "train/ant" / name).symlink_to(target)
    with within(5):
        contents = scan(pack(source, kind))
    assert contents.counts == BOTH
    assert len(contents.ignored) >= 2
    assert all("link" in reason.value for reason in contents.ignored.values())


def test_a_link_never_takes_the_images_of_the_real_directory(image_folder):
    """Though it comes first by name."""
    source, _ = image_folder({"train": 1, "test": 1})
    (source / "train/aaa").symlink_to("bee")
    (source / "test/ant/again").symlink_to("../bee")
    contents = scan(source)
    assert contents.counts == BOTH
    assert set(contents.ignored) == {"train/aaa", "test/ant/again"}


@pytest.mark.parametrize("kind", KINDS)
def test_links_to_what_counts_nowhere_else_are_followed(image_folder, kind):
    """To a class, a split and images that lie outside of all splits, hidden or not."""
    source, pixels = image_folder({"train": 1, "test": 1})
    (source / "store").mkdir()
    (source / "train").rename(source / "store/x")
    (source / "train").symlink_to("store/x")
    (source / ".blobs").mkdir()
    (source / "test/bee/0.png").rename(source / ".blobs/1f")
    (source / "test/bee/0.png").symlink_to("../../.blobs/1f")
    (source / "test/ant").rename(source / "store/y")
    (source / "test/ant").symlink_to("../store/y")
    found = images(pack(source, kind))
    assert found == [(name, (source / name).read_bytes()) for name in sorted(pixels)]


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("target", ["/etc/hostname", "../../../0.png", "none.png", "1.png"])
def test_links_out_of_an_archive_are_left_out_and_said(
    image_folder, tmp_path, capsys, kind, target
):
    source, _ = image_folder({"train": 1, "test": 1})
    (source / "train/ant/1.png").symlink_to(target)
    prepare_image_folder(pack(source, kind), "bugs", tmp_path / "data")
    out = capsys.readouterr().out
    assert "train: 2 images" in out
    assert "1 files of" in out
    assert "(links that lead nowhere, or out of the archive), such as train/ant/1.png" in out


@pytest.mark.parametrize("kind", KINDS[1:-1])
def test_hard_links_count_where_their_file_is_in_the_archive(image_folder, kind):
    source, _ = image_folder({"train": 1, "test": 1})
    os.link(source / "train/ant/0.png", source / "train/ant/1.png")
    (source / "train/bee/1.png").symlink_to("../ant/1.png")
    archive = pack(source, kind)
    assert scan(archive).counts["train"] == {"ant": 2, "bee": 2}
    assert images(archive) == images(source)
    with tarfile.open(archive, f"w:{kind[6:]}") as packed:
        for i, target in enumerate(("none.png", "../0.png", "train/ant/odd2.png", "")):
            link = tarfile.TarInfo(f"train/ant/odd{i}.png")
            link.type, link.linkname = tarfile.LNKTYPE, target
            packed.addfile(link)
        packed.add(source, ".")
    contents = scan(archive)
    assert contents.counts["train"] == {"ant": 2, "bee": 2}
    assert len(contents.ignored) == 4


@pytest.mark.parametrize("kind", ["directory", "a.tar", "a.zip"])
def test_only_regular_files_are_opened(image_folder, kind):
    """A FIFO blocks whoever opens it, a device never ends."""
    source, _ = image_folder({"train": 1, "test": 1})
    os.mkfifo(source / "train/ant/f.png")
    odd = {"train/ant/f.png"}
    if kind == "directory":
        with socket.socket(socket.AF_UNIX) as unix:
            there = Path.cwd()
            os.chdir(source)  # for a socket's path is short
            unix.bind("train/ant/s.png")
            os.chdir(there)
        (source / "test/ant/zero.png").symlink_to("/dev/zero")
        (source / "test/ant/fifo.png").symlink_to("../../train/ant/f.png")
        odd |= {"train/ant/s.png", "test/ant/zero.png", "test/ant/fifo.png"}
    with within(5):
        contents = scan(pack(source, kind))
    assert contents.counts == BOTH
    assert set(contents.ignored) == odd
    assert {reason.value for reason in contents.ignored.values()} == {"no regular files"}


def test_a_source_that_is_a_fifo_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with within(5), pytest.raises(ValueError, match=r"a.tar is neither a directory nor a regular"):
        scan(tmp_path / "a.tar")


# A directory and its archives

NAMES = st.sampled_from(["train", "test", "ant", "bee", "x.png", "y.PNG", "z", ".h", "é.jpg"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
TARGETS = st.lists(st.one_of(NAMES, st.just("..")), min_size=1, max_size=4).map("/".join)
ITEMS = st.one_of(
    st.tuples(st.just("file"), PATHS, st.binary(max_size=4)),
    st.tuples(st.just("link"), PATHS, TARGETS),
    st.tuples(st.just("hard"), PATHS, PATHS),
    st.tuples(st.just("directory"), PATHS, st.none()),
)


def grow(root: Path, items: list[tuple[str, str, object]]) -> None:
    """Makes what can be made; links of directories above, and names in use, get in the way."""
    for kind, name, what in items:
        path = root / name
        with contextlib.suppress(OSError):
            # Nothing is made through a link, which may lead out of the root.
            parents = [root / parent for parent in Path(name).parents]
            if any(parent.is_symlink() for parent in parents):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file" and not path.is_symlink():
                path.write_bytes(what)
            elif kind == "link" and (path.parent / what).resolve().is_relative_to(root):
                path.symlink_to(what)
            elif kind == "hard" and not (root / what).is_symlink():
                os.link(root / what, path)
            elif kind == "directory":
                path.mkdir()


@hypothesis.settings(max_examples=25)
@hypothesis.given(items=st.lists(ITEMS, max_size=12))
def test_a_directory_and_its_archives_hold_the_same_images(items):
    with tempfile.TemporaryDirectory() as made:
        root = Path(made).resolve() / "source"
        root.mkdir()
        grow(root, [("file", f"{s}/{c}/x.png", b"x") for s in SPLITS for c in ("ant", "bee")])
        grow(root, items)
        links = [path for path in root.rglob("*") if path.is_symlink()]
        hypothesis.assume(all(Path(os.path.realpath(p)).is_relative_to(root) for p in links))
        expected = images(root)
        for kind in ("a.tar", "a.zip"):
            assert images(pack(root, kind)) == expected
        paths = list(root.rglob("*"))
        if any(path.is_symlink() and path.is_dir() for path in paths):
            return
        # Then it is every file by the right name to which no hidden one leads.
        reference = []
        for path in paths:
            parts = path.relative_to(root).parts
            splits = [i for i, part in enumerate(parts[:-2]) if part in SPLITS]
            hidden = any(part.startswith(".") for part in parts)
            named = splits and not hidden and path.suffix.lower() in (".png", ".jpg")
            if named and path.is_file():
                reference.append(("/".join(parts[splits[0] :]), path.read_bytes()))
        assert expected == sorted(reference)


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    links=st.lists(st.tuples(PATHS, TARGETS), min_size=1, max_size=8), deep=st.booleans()
)
def test_no_image_counts_twice_in_a_class_by_links_to_directories(links, deep):
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    with tempfile.TemporaryDirectory() as made:
        root = Path(made).resolve() / "source"
        root.mkdir()
        below = "deep/" if deep else ""
        files = [f"{s}/{c}/{below}0.png" for s in SPLITS for c in ("ant", "bee")]
        grow(root, [("file", file, buffer.getvalue()) for file in files])
        made_links = [("link", f"{path}.d", target) for path, target in links]
        grow(root, [link for link in made_links if not link[2].endswith((".png", ".PNG", ".jpg"))])
        with within(5):
            contents = scan(root)
        assert sum(sum(classes.values()) for classes in contents.counts.values()) == 4
