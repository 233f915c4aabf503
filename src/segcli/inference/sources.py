"""Which files are inputs, and where their masks go.

    parse(["photos/"], out="masks", ...)  -> Sources     wrong usage is found here, before anything slow
    discover(sources, passed_over)        -> Input, ...  streams: one folder at a time, sorted by name

The tree below the common folder of all sources is kept: photos/a/b.jpg -> a/b.png. The name of a mask
depends on nothing but the folder that its image lies in, so the same photograph gets the same name
whether its folder, a glob or the file itself is given, today or after a crash:

    b.jpg                     -> b.png
    b.jpg, b.png              -> b.jpg.png, b.png.png     two that would share a name keep theirs in full
    A.jpg, a.jpg              -> A.jpg.png, a.jpg.png     names that differ in case or Unicode form, too
    b.jpg, a folder "b.png"   -> b.jpg.png
    notes.dat, given by name  -> notes.dat.png            a file given by name is always an input

Paths are plain strings here: undecodable bytes in a name survive as surrogate escapes, and a hundred
thousand of them stay cheap. What is said of folders and files holds for URLs, too: s3://bucket/photos is a
folder, and so that nothing of a cloud is imported for files of this machine, `remote` is imported late.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import os
import re
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import BinaryIO

from segcli.errors import ImageError, UsageError
from segcli.files import TEMPORARY_PREFIX
from segcli.inference.layout import RESERVED, RUN_FILE, RUN_FOLDER
from segcli.inference.seen import Seen
from segcli.inference.storage import Content, absolute, canonical, exists, is_url

ObjectsIn = Callable[[str, frozenset[str]], tuple[dict[str, str], dict[str, Content]]]
NamesIn = Callable[[str, frozenset[str]], dict[str, str]]

WILDCARD = re.compile(r"[*?\[]")
LONGEST_NAME = 255  # bytes, on every file system in common use
MASK_SUFFIX = ".png"


@dataclass(frozen=True, slots=True)
class Input:
    """One file to segment."""

    source: str  # the path to open, as the user would write it
    output: str  # where its mask goes, below the output folder, with "/": "a/b.png"
    problem: str = ""  # the reason why it cannot be read, where looking at the folder was enough to know
    listed: Content | None = None  # its state when its folder was listed, where it lies below a URL
    copy: str = ""  # the file of this machine that holds what lies below a URL

    @property
    def path(self) -> str:
        """The file to open."""
        return self.copy or self.source


@dataclass
class PassedOver:
    """What lay in the folders and is no input: counted, so that nothing is missing silently."""

    suffixes: Counter[str] = field(default_factory=Counter)  # files of other types
    hidden: int = 0  # files and folders whose name starts with a dot
    outputs: int = 0  # folders that segcli has written
    links: int = 0  # links to folders that are read anyway, or that lead round in a circle

    def describe(self) -> str:
        """One line for people, or "" when nothing was passed over."""
        parts = []
        total = self.suffixes.total()
        if total:
            names = [
                f"{count:,} {suffix or 'without suffix'}" for suffix, count in self.suffixes.most_common(4)
            ]
            if len(self.suffixes) > len(names):
                names.append("...")
            parts.append(f"{counted(total, 'file')} of other types ({', '.join(names)})")
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden")
        if self.outputs:
            parts.append(f"{counted(self.outputs, 'output folder')} of segcli")
        if self.links:
            parts.append(f"{counted(self.links, 'link')} to folders that are read anyway")
        return ", ".join(parts)


@dataclass(frozen=True)
class Sources:
    """What `discover` reads. Made by `parse`."""

    entries: tuple[tuple[str, str], ...]  # ("folder" | "file" | "glob", path), or one ("list", path or "-")
    base: str  # absolute; the tree below it is kept
    out: str  # absolute and without links; nothing inside it is ever an input
    suffixes: frozenset[str]  # lower-case suffixes of images, with the dot

    @property
    def may_be_remote(self) -> bool:
        """Whether there can be inputs below URLs."""
        return any(kind == "list" or is_url(path) for kind, path in self.entries)


def parse(sources: Sequence[str], list_file: str | None, out: str, suffixes: frozenset[str]) -> Sources:
    """Check the sources of the command line and find the folder below which the tree is kept.

    Args:
        sources: Files, folders, globs, or a single "-" for a list of paths on stdin.
        list_file: A file with one path per line (or NUL-separated), instead of sources.
        out: The output folder; it need not exist.
        suffixes: Lower-case suffixes of the files that count as images inside folders.

    Raises:
        UsageError: A source does not exist or is no file or folder, or the output folder meets an input.
    """
    if (list_file is not None) == bool(sources):
        raise UsageError(
            "give either SOURCE (files, folders, globs, or - for a list on stdin) or --list FILE"
        )
    sources = [canonical(source) for source in sources]
    given_out, out = out, canonical(out)
    out = out.rstrip("/") if is_url(out) else os.path.realpath(out)
    if list_file is not None:
        if not os.path.isfile(list_file):
            raise UsageError(f"--list {list_file}: no such file{_nearest(list_file)}")
        return Sources((("list", list_file),), os.getcwd(), out, suffixes)
    if "-" in sources:
        if len(sources) > 1:
            raise UsageError(
                "- (paths on stdin) cannot be combined with other sources; put those on stdin as well"
            )
        return Sources((("list", "-"),), os.getcwd(), out, suffixes)

    unique = {absolute(source): source for source in reversed(sources)}
    entries = [(_kind(source), source) for source in reversed(unique.values())]
    anchors = [_anchor(kind, source) for kind, source in entries]
    for anchor, (kind, source) in zip(anchors, entries, strict=True):
        real = anchor if is_url(anchor) else os.path.realpath(anchor)
        if real == out:
            raise UsageError(
                f"--out {given_out} is the folder of the input {source}; inputs are never written over.\n"
                "Choose another folder, such as --out masks."
            )
        if _inside(real, out):
            raise UsageError(
                f"--out {given_out} contains the input {source}; outputs and inputs are kept apart.\n"
                f"Choose another folder, such as --out {os.path.join(given_out, 'masks')}."
            )
        if kind != "file" and _inside(out, real) and _holds_foreign_images(out, suffixes):
            raise UsageError(
                f"--out {given_out} lies in the input {source} and holds images that segcli did not write.\n"
                "Choose a new or an empty folder."
            )
    base = _common(anchors)
    folders = [absolute(path).rstrip("/") for kind, path in entries if kind == "folder"]
    kept = [
        (kind, path)
        for (kind, path), anchor in zip(entries, anchors, strict=True)
        if not any(_inside(absolute(path).rstrip("/"), folder) for folder in folders)  # it is found there
    ]
    return Sources(tuple(kept), base, out, suffixes)


def discover(sources: Sources, passed_over: PassedOver) -> Iterator[Input]:
    """Yield the inputs one by one: sources as given, folders sorted by name, files before sub-folders.

    Memory holds the names of one folder at a time. What cannot be read (a broken link, a FIFO, a folder
    without permission) is yielded with its `problem`; what is no image by its suffix is counted in
    `passed_over`.
    """
    seen: set[tuple[int, int]] = set()  # folders reached through links
    names_in = functools.lru_cache(maxsize=32)(_names_in)
    objects_in = functools.lru_cache(maxsize=2)(_objects_in)

    def walk(root: str) -> Iterator[Input]:
        if is_url(root):
            return _walk_url(root.rstrip("/"), sources, passed_over)
        return _walk(root, sources, passed_over, seen)

    def by_name(path: str) -> Input:
        return _object(path, sources, objects_in) if is_url(path) else _by_name(path, sources, names_in)

    for kind, path in sources.entries:
        if kind == "folder":
            yield from walk(path)
        elif kind == "glob":
            root = _fixed_part(path)
            pattern = _relative(path, root).split("/")
            for found in walk(root):
                if _matches(_relative(found.source, root).split("/"), pattern):
                    yield found
        elif kind == "file":
            yield by_name(path)
        else:
            seen_names = Seen()
            for line in map(canonical, _listed(path)):
                if seen_names.add(absolute(line)):
                    yield by_name(line)


def name_masks(images: Iterable[str], folders: Iterable[str] = ()) -> dict[str, str]:
    """Names for the masks of one folder's images: image name -> mask name.

    Args:
        images: The names of the images in the folder.
        folders: The names of its sub-folders, which masks must not take.
    """
    length = dict.fromkeys(images, 0)  # 0: the stem; 1, 2, ...: the full name and as many suffixes
    taken = Counter(folded(name) for name in folders)
    while True:
        wanted = {name: _candidate(name, n) for name, n in length.items()}
        uses = taken + Counter(map(folded, wanted.values()))
        crowded = sorted((n for n, mask in wanted.items() if uses[folded(mask)] > 1), key=length.__getitem__)
        # Full names that differ in case only stay as they are: no name that is made from them differs more.
        given: set[str] = set()
        longer = []
        for name in crowded:
            mask = wanted[name]
            if length[name] == 0 or folded(mask) in taken or mask in given:
                longer.append(name)
            else:
                given.add(mask)
        if not longer:
            return wanted
        for name in longer:
            length[name] += 1


def _candidate(name: str, length: int) -> str:
    return _fit((os.path.splitext(name)[0] if length == 0 else name) + MASK_SUFFIX * max(1, length))


def _fit(name: str) -> str:
    """The name itself, or, when no file system would take it, its start and a hash of the whole."""
    if len(name) * 4 <= LONGEST_NAME or len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    mark = "~" + hashlib.sha256(os.fsencode(name)).hexdigest()[:8] + MASK_SUFFIX
    stem = name
    while len(os.fsencode(stem)) + len(mark) > LONGEST_NAME:
        stem = stem[:-1]
    return stem + mark


def folded(name: str) -> str:
    """What a file system that ignores case and Unicode form makes of a name."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _walk(
    root: str, sources: Sources, passed_over: PassedOver, seen: set[tuple[int, int]]
) -> Iterator[Input]:
    real_root = os.path.realpath(root)
    root_is_output = _is_output(root)
    pending = [root]
    while pending:
        folder = pending.pop()
        below = os.path.relpath(os.path.abspath(folder), sources.base)
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            yield Input(folder, _output(below, ""), f"the folder cannot be listed: {error.strerror}")
            continue

        images: list[os.DirEntry[str]] = []
        subfolders: list[os.DirEntry[str]] = []
        for entry in entries:
            if entry.name.startswith("."):
                passed_over.hidden += not entry.name.startswith(TEMPORARY_PREFIX)
            elif _is_folder(entry):
                subfolders.append(entry)
            elif (suffix := os.path.splitext(entry.name)[1].lower()) in sources.suffixes:
                images.append(entry)
            else:
                passed_over.suffixes[suffix] += 1

        names = name_masks((entry.name for entry in images), (entry.name for entry in subfolders))
        for entry in images:
            if entry.is_symlink() and _inside(os.path.realpath(entry.path), sources.out):
                passed_over.outputs += 1
            else:
                yield Input(entry.path, _output(below, names[entry.name]), _problem(entry.path))

        for entry in reversed(subfolders):
            beside_masks = folder == root and root_is_output and entry.name.startswith("_")
            if beside_masks or os.path.realpath(entry.path) == sources.out or _is_output(entry.path):
                passed_over.outputs += 1
            elif entry.is_symlink() and _leads_back(entry, real_root, sources.out, seen):
                passed_over.links += 1
            else:
                pending.append(entry.path)


def _by_name(path: str, sources: Sources, names_in: NamesIn) -> Input:
    """An input that was given by its name: on the command line or in a list."""
    folder, name = os.path.split(path)
    below = _below(os.path.abspath(folder), sources.base)
    names = names_in(folder or ".", sources.suffixes)
    mask = names.get(name)
    for length in range(1, 10):  # a file of another type, or a hidden one: its full name, after all others
        if mask is not None:
            break
        candidate = _candidate(name, length)
        mask = candidate if candidate not in names.values() else None
    problem = _problem(path)
    if not problem and _inside(os.path.realpath(path), sources.out):
        problem = "lies in the output folder, and outputs are never inputs"
    return Input(path, _output(below, mask or name), problem)


def _walk_url(root: str, sources: Sources, passed_over: PassedOver) -> Iterator[Input]:
    """The same as `_walk`, for objects: there are no links, and every name is UTF-8."""
    root_is_output = exists(f"{root}/{RUN_FOLDER}/{RUN_FILE}")
    pending = [root]
    while pending:
        folder = pending.pop()
        below = _below(folder, sources.base)
        try:
            objects, subfolders, others, hidden = _list_url(folder, sources.suffixes)
        except ImageError as error:
            yield Input(folder, _output(below, ""), str(error))
            continue
        if folder != root and RUN_FOLDER in subfolders and exists(f"{folder}/{RUN_FOLDER}/{RUN_FILE}"):
            passed_over.outputs += 1
            continue
        passed_over.suffixes += others
        passed_over.hidden += hidden
        names = name_masks(sorted(objects), subfolders)
        for name, mask in names.items():
            yield Input(f"{folder}/{name}", _output(below, mask), listed=objects[name])
        for name in sorted(subfolders, reverse=True):
            inner = f"{folder}/{name}"
            if not name:
                yield Input(inner, "", "a name with // in it has no place in a tree of folders")
            elif inner == sources.out or (folder == root and root_is_output and name.startswith("_")):
                passed_over.outputs += 1
            else:
                pending.append(inner)


def _list_url(
    folder: str, suffixes: frozenset[str]
) -> tuple[dict[str, Content], list[str], Counter[str], int]:
    """Images with their states, sub-folders, the suffixes of other objects, and how many are hidden.

    Raises:
        ImageError: The folder cannot be listed.
        MachineError: The store cannot be reached.
    """
    from segcli.inference import remote

    images: dict[str, Content] = {}
    subfolders: list[str] = []
    others: Counter[str] = Counter()
    hidden = 0
    for name, found in remote.listing(folder):
        if name.startswith("."):
            hidden += not name.startswith(TEMPORARY_PREFIX)
        elif found is None:
            subfolders.append(name)
        elif (suffix := os.path.splitext(name)[1].lower()) in suffixes:
            images[name] = found
        else:
            others[suffix] += 1
    return images, subfolders, others, hidden


def _object(url: str, sources: Sources, objects_in: ObjectsIn) -> Input:
    """An object that was given by its name: on the command line or in a list."""
    folder, _, name = url.rpartition("/")
    below = _below(folder, sources.base)
    if {"", ".", ".."} & set(url.partition("://")[2].lstrip("/").split("/")):
        return Input(url, "", "a name with //, . or .. in it has no place in a tree of folders")
    try:
        names, objects = objects_in(folder, sources.suffixes)
    except ImageError as error:
        return Input(url, "", str(error))
    problem = "" if name in objects else "no such object"
    if _inside(url, sources.out):
        problem = "lies in the output folder, and outputs are never inputs"
    return Input(url, _output(below, names.get(name) or _candidate(name, 1)), problem, objects.get(name))


def _objects_in(folder: str, suffixes: frozenset[str]) -> tuple[dict[str, str], dict[str, Content]]:
    objects, subfolders, _, _ = _list_url(folder, suffixes)
    return name_masks(sorted(objects), subfolders), objects


def _names_in(folder: str, suffixes: frozenset[str]) -> dict[str, str]:
    try:
        with os.scandir(folder) as scan:
            entries = [entry for entry in scan if not entry.name.startswith(".")]
    except OSError:
        return {}
    folders = [entry.name for entry in entries if _is_folder(entry)]
    images = [
        entry.name
        for entry in entries
        if not _is_folder(entry) and os.path.splitext(entry.name)[1].lower() in suffixes
    ]
    return name_masks(sorted(images), folders)


def _listed(path: str) -> Iterator[str]:
    """The paths of a list: separated by NUL if it holds one, else by newlines; "-" is stdin."""
    if path == "-":
        # Unbuffered: a thread that waits in the buffer would not let Python end.
        yield from _split(getattr(sys.stdin.buffer, "raw", sys.stdin.buffer))
    else:
        with open(path, "rb") as file:
            yield from _split(file)


def _split(stream: BinaryIO) -> Iterator[str]:
    rest = b""
    separator = b""
    while chunk := stream.read(1 << 16):
        rest += chunk
        if not separator:
            separator = b"\0" if b"\0" in rest else b"\n" if b"\n" in rest else b""
        if separator:
            *lines, rest = rest.split(separator)
            yield from _paths(lines, separator)
    yield from _paths([rest], separator)


def _paths(lines: Iterable[bytes], separator: bytes) -> Iterator[str]:
    for line in lines:
        if path := line if separator == b"\0" else line.rstrip(b"\r"):
            yield os.fsdecode(path)


def _kind(source: str) -> str:
    if is_url(source):
        return _kind_of_url(source)
    if os.path.isdir(source):
        return "folder"
    if os.path.isfile(source):
        return "file"
    if os.path.lexists(source):
        raise UsageError(f"{source} is {_problem(source)}; give files, folders or globs")
    if WILDCARD.search(source) and os.path.isdir(_fixed_part(source)):
        return "glob"
    raise UsageError(f"no such file or folder: {source}{_nearest(source)}")


def _kind_of_url(source: str) -> str:
    from segcli.inference import remote

    kind = remote.kind_of(source)
    if not kind and WILDCARD.search(source) and remote.kind_of(_fixed_part(source)) == "folder":
        return "glob"
    if not kind:
        raise UsageError(f"there is no object, and none in a folder, named {source}")
    return kind


def _nearest(path: str) -> str:
    folder, name = os.path.split(os.path.normpath(path))
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or "."), 1)
    except OSError:
        return f" (there is no folder {folder} either)"
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else ""


def _anchor(kind: str, source: str) -> str:
    """The folder below which the tree of one source is kept."""
    if kind == "folder":
        return absolute(source).rstrip("/") or "/"
    return absolute(os.path.dirname(source) if kind == "file" else _fixed_part(source))


def _common(anchors: Sequence[str]) -> str:
    """The folder that holds all of them."""
    if not any(map(is_url, anchors)):
        return os.path.commonpath(anchors)
    columns = zip(*(anchor.split("/") for anchor in anchors), strict=False)
    common = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
    if not common:
        raise UsageError(
            "sources of different kinds (folders of this machine, s3://, ...) have no folder in common;\n"
            "give them one after the other, or as a list with --list"
        )
    return "/".join(common)


def _fixed_part(pattern: str) -> str:
    """The folder before the first wildcard of a glob."""
    parts = pattern.split(os.sep)
    first = next(number for number, part in enumerate(parts) if WILDCARD.search(part))
    return os.sep.join(parts[:first]) or (os.sep if pattern.startswith(os.sep) else ".")


def _matches(path: list[str], pattern: list[str]) -> bool:
    """Whether a path, or a folder above it, matches: photos/* takes the folders in photos, as in a shell."""
    if not pattern:
        return True
    if not path:
        return pattern == ["**"]
    if pattern[0] == "**":
        return _matches(path, pattern[1:]) or _matches(path[1:], pattern)
    return fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _output(below: str, name: str) -> str:
    """Join the folder below the base and the mask's name, keeping clear of the names that segcli uses."""
    if below == os.curdir:
        return name
    parts = below.split(os.sep)
    if folded(parts[0]) in RESERVED:
        parts[0] += "_"
    return "/".join([*parts, name])


def _below(folder: str, base: str) -> str:
    """The folder relative to the base; a folder elsewhere keeps its whole path, without the root."""
    if is_url(folder):
        inside = _inside(folder, base)
        return folder[len(base.rstrip("/")) + 1 :] if inside else "." if folder == base else _path_of(folder)
    if folder == base or _inside(folder, base):
        return os.path.relpath(folder, base)
    return os.path.splitdrive(folder)[1].lstrip(os.sep) or os.curdir


def _relative(path: str, folder: str) -> str:
    return _below(path, folder) if is_url(path) else os.path.relpath(path, folder)


def _path_of(url: str) -> str:
    return url.partition("://")[2].strip("/") or os.curdir


def _inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_output(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, RUN_FOLDER, RUN_FILE))


def _leads_back(link: os.DirEntry[str], real_root: str, out: str, seen: set[tuple[int, int]]) -> bool:
    """Whether a link leads to a folder that is read anyway, was read already, or holds this walk."""
    real = os.path.realpath(link.path)
    if real == real_root or _inside(real, real_root) or _inside(real_root, real) or _inside(real, out):
        return True
    status = link.stat()
    key = (status.st_dev, status.st_ino)
    if key in seen:
        return True
    seen.add(key)
    return False


def _holds_foreign_images(out: str, suffixes: frozenset[str]) -> bool:
    if is_url(out):
        own = Sources((("folder", out),), out, "", suffixes)
        return not exists(f"{out}/{RUN_FOLDER}") and next(discover(own, PassedOver()), None) is not None
    if not os.path.isdir(out) or os.path.isdir(os.path.join(out, RUN_FOLDER)):
        return False
    return any(
        os.path.splitext(name)[1].lower() in suffixes for _, _, names in os.walk(out) for name in names
    )


def _problem(path: str) -> str:
    """Why a path can be no input, or ""."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a link to a file that does not exist" if os.path.islink(path) else "no such file"
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    if stat.S_ISREG(mode):
        return ""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe (FIFO)",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return f"{kinds.get(stat.S_IFMT(mode), 'a special file')}, not a file"


def counted(number: int, noun: str) -> str:
    """`1 image`, `40,000 images`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
