"""Which files are inputs, and what their masks are called."""

from __future__ import annotations

import io
import os
import socket
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segcli.errors import UsageError
from segcli.inference import sources
from segcli.inference.sources import Input, PassedOver, discover, name_masks, parse

SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def found(
    *given: Path | str, out: Path | str = "/nowhere/masks", passed: PassedOver | None = None
) -> list[Input]:
    parsed = parse([str(path) for path in given], None, str(out), SUFFIXES)
    return list(discover(parsed, passed or PassedOver()))


def outputs(*given: Path | str, out: Path | str = "/nowhere/masks") -> dict[str, str]:
    return {item.source: item.output for item in found(*given, out=out)}


def test_a_folder_keeps_its_tree_and_is_sorted_files_first(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a/z.jpg", "a/y/x.png", "c.PNG", "B/k.jpeg")
    assert outputs(tmp_path) == {
        f"{tmp_path}/b.jpg": "b.png",
        f"{tmp_path}/c.PNG": "c.png",
        f"{tmp_path}/B/k.jpeg": "B/k.png",
        f"{tmp_path}/a/z.jpg": "a/z.png",
        f"{tmp_path}/a/y/x.png": "a/y/x.png",
    }
    assert [item.source.removeprefix(f"{tmp_path}/") for item in found(tmp_path)] == [
        "b.jpg", "c.PNG", "B/k.jpeg", "a/z.jpg", "a/y/x.png",
    ]  # fmt: skip


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "notes.txt", "b/list.txt", "b/labels.xml", "README", ".hidden.jpg", ".git/x.jpg")
    passed = PassedOver()
    assert [item.output for item in found(tmp_path, passed=passed)] == ["a.png"]
    assert passed.suffixes == Counter({".txt": 2, ".xml": 1, "": 1})
    assert passed.hidden == 2
    assert passed.describe() == "4 files of other types (2 .txt, 1 without suffix, 1 .xml), 2 hidden"
    assert PassedOver().describe() == ""


@pytest.mark.parametrize(
    ("images", "folders", "masks"),
    [
        (["b.jpg"], [], ["b.png"]),
        (["b.jpg", "b.png"], [], ["b.jpg.png", "b.png.png"]),
        (["b.jpg", "b.png", "c.jpg"], [], ["b.jpg.png", "b.png.png", "c.png"]),
        (["A.jpg", "a.jpg"], [], ["A.jpg.png", "a.jpg.png"]),
        (["A.jpg", "a.png"], [], ["A.jpg.png", "a.png.png"]),
        (["\u00e9.jpg", "e\u0301.jpg"], [], ["\u00e9.jpg.png", "e\u0301.jpg.png"]),  # NFC and NFD
        (["b.jpg"], ["b.png"], ["b.jpg.png"]),
        (["b.jpg"], ["B.PNG"], ["b.jpg.png"]),
        (["b.jpg"], ["b.png", "b.jpg.png"], ["b.jpg.png.png"]),
        # b.jpg.jpg would be b.jpg.png, which b.jpg takes because of b.png
        (["b.jpg", "b.jpg.jpg", "b.png"], [], ["b.jpg.png", "b.jpg.jpg.png", "b.png.png"]),
        (["a.b.jpg"], [], ["a.b.png"]),
    ],
)
def test_names_of_masks(images: list[str], folders: list[str], masks: list[str]) -> None:
    assert name_masks(images, folders) == dict(zip(images, masks, strict=True))


NAMES = st.text(alphabet="ab.\u00e9E\u0301", min_size=1, max_size=4)


IMAGES = st.builds("{}.{}".format, NAMES, st.sampled_from(["jpg", "JPG", "png", "png.jpg"]))


@given(st.sets(IMAGES, max_size=8), st.sets(st.builds("{}.png".format, NAMES), max_size=3))
def test_no_two_masks_share_a_name(images: set[str], folders: set[str]) -> None:
    masks = name_masks(sorted(images), sorted(folders - images))
    assert masks.keys() == images
    assert len(set(masks.values())) == len(images)
    assert not set(masks.values()) & (folders - images)
    assert all(mask.endswith(".png") for mask in masks.values())
    # the order in which a folder is listed does not matter
    assert name_masks(sorted(images, reverse=True), sorted(folders - images)) == masks


def test_names_of_255_bytes_fit_again() -> None:
    longest = "é" * 125 + "x.jpg"  # 2 * 125 + 1 + 4 = 255 bytes
    assert len(longest.encode()) == 255
    assert name_masks([longest])[longest] == "é" * 125 + "x.png"
    twin = longest.removesuffix(".jpg") + ".png"
    masks = name_masks([longest, twin])  # the full names would have 259 bytes
    assert all(len(mask.encode()) <= 255 and mask.endswith(".png") for mask in masks.values())
    assert masks[longest] != masks[twin]


def test_undecodable_names_survive(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(b"x")
    (item,) = found(tmp_path)
    assert os.fsencode(item.output) == b"\xff\xfe.png"
    assert Path(item.source).exists()


def test_folders_of_products_are_kept_clear(tmp_path: Path) -> None:
    touch(tmp_path, "_overlay/a.jpg", "_RUN/b.jpg", "_mine/c.jpg", "sub/_overlay/d.jpg", "_e.jpg")
    assert sorted(outputs(tmp_path).values()) == [
        "_RUN_/b.png", "_e.png", "_mine/c.png", "_overlay_/a.png", "sub/_overlay/d.png",
    ]  # fmt: skip


def test_a_file_gets_the_name_that_its_folder_gives_it(tmp_path: Path) -> None:
    touch(tmp_path, "p/b.jpg", "p/b.png", "p/c.jpg", "q/c.jpg")
    assert outputs(tmp_path / "p/b.jpg") == {f"{tmp_path}/p/b.jpg": "b.jpg.png"}
    assert outputs(tmp_path / "p/c.jpg") == {f"{tmp_path}/p/c.jpg": "c.png"}
    assert outputs(tmp_path / "p/c.jpg", tmp_path / "q/c.jpg") == {  # below their common folder
        f"{tmp_path}/p/c.jpg": "p/c.png",
        f"{tmp_path}/q/c.jpg": "q/c.png",
    }
    whole = outputs(tmp_path / "p")
    for path, mask in whole.items():
        assert outputs(path) == {path: mask}


def test_a_file_given_by_name_is_an_input_whatever_its_type(tmp_path: Path) -> None:
    touch(tmp_path, "b.dat", "b.dat.jpg", ".h.jpg", "plain")
    assert outputs(tmp_path / "b.dat")[f"{tmp_path}/b.dat"] == "b.dat.png.png"  # b.dat.png is b.dat.jpg's
    assert outputs(tmp_path / ".h.jpg")[f"{tmp_path}/.h.jpg"] == ".h.jpg.png"
    assert outputs(tmp_path / "plain")[f"{tmp_path}/plain"] == "plain.png"


def test_several_sources_keep_the_tree_below_their_common_folder(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "y/a.jpg", "y/z/b.jpg")
    assert sorted(outputs(tmp_path / "x", tmp_path / "y").values()) == ["x/a.png", "y/a.png", "y/z/b.png"]
    # what lies in another source is found once
    twice = found(tmp_path / "y/z", tmp_path / "y", tmp_path / "y/a.jpg", tmp_path / "y" / "")
    assert [item.output for item in twice] == ["a.png", "z/b.png"]


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "p/a.jpg", "p/b.png", "p/2019/c.jpg", "p/2020/d.jpg", "p/2020/x/e.jpg", "p/a.txt")
    assert sorted(outputs(tmp_path / "p/*.jpg").values()) == ["a.png"]
    assert sorted(outputs(tmp_path / "p/**/*.jpg").values()) == [
        "2019/c.png", "2020/d.png", "2020/x/e.png", "a.png",
    ]  # fmt: skip
    assert sorted(outputs(tmp_path / "p/202?").values()) == ["2020/d.png", "2020/x/e.png"]  # a folder
    assert sorted(outputs(tmp_path / "p/*/[cd].jpg").values()) == ["2019/c.png", "2020/d.png"]
    monkeypatch.chdir(tmp_path / "p")
    assert outputs("*.jpg") == {"./a.jpg": "a.png"}
    (tmp_path / "p/w[1].jpg").write_bytes(b"x")
    assert outputs("w[1].jpg") == {"w[1].jpg": "w[1].png"}  # a file of that very name


def test_a_list_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "in/a.jpg", "in/b.jpg", "in/b.png", "c d.jpg")
    listing = tmp_path / "list.txt"
    listing.write_bytes(b"in/a.jpg\r\n\nin/b.jpg\nin/../in/a.jpg\nmissing.jpg\n/dev/null\nc d.jpg")
    items = list(discover(parse([], str(listing), "masks", SUFFIXES), PassedOver()))
    assert [(item.source, item.output, item.problem) for item in items] == [
        ("in/a.jpg", "in/a.png", ""),
        ("in/b.jpg", "in/b.jpg.png", ""),
        ("missing.jpg", "missing.jpg.png", "no such file"),
        ("/dev/null", "dev/null.png", "a device, not a file"),
        ("c d.jpg", "c d.png", ""),
    ]


def test_a_list_on_stdin_is_read_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a.jpg", "new\nline.jpg")
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as stdin, os.fdopen(writer, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
        items = discover(parse(["-"], None, "masks", SUFFIXES), PassedOver())
        pipe.write(b"a.jpg\0new\n")
        assert next(items).source == "a.jpg"
        pipe.write(b"line.jpg\0")
        assert next(items).source == "new\nline.jpg"
        pipe.close()
        assert next(items, None) is None


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "in/sub/b.jpg", "elsewhere/c.jpg", "elsewhere/deep/d.jpg")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/up").symlink_to(tmp_path)
    (tmp_path / "in/again").symlink_to("sub")
    (tmp_path / "in/self").symlink_to("self")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/link.jpg").symlink_to("a.jpg")
    passed = PassedOver()
    names = [item.output for item in found(tmp_path / "in", passed=passed)]
    assert names == ["a.png", "link.png", "linked/c.png", "linked/deep/d.png", "sub/b.png"]
    assert passed.links == 4
    assert "4 links to folders that are read anyway" in passed.describe()


def test_special_files_are_inputs_with_a_problem(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        problems = {Path(item.source).name: item.problem for item in found(tmp_path)}
    assert problems == {
        "a.jpg": "",
        "circle.jpg": "cannot be opened: Too many levels of symbolic links",
        "fifo.jpg": "a named pipe (FIFO), not a file",
        "gone.jpg": "a link to a file that does not exist",
        "s.jpg": "a socket, not a file",
    }


def test_a_folder_that_cannot_be_listed_is_a_failed_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:  # root may list every folder, so permissions cannot show it here
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(sources.os, "scandir", refuse)
    assert [(Path(i.source).name, i.problem) for i in found(tmp_path)] == [
        ("a.jpg", ""),
        ("locked", "the folder cannot be listed: Permission denied"),
    ]


def test_outputs_are_never_read_back(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "masks/a.png", "masks/_overlay/a.jpg", "old/a.png", "old/_run/run.json")
    (tmp_path / "link.jpg").symlink_to("masks/a.png")
    (tmp_path / "masks/_run").mkdir()
    passed = PassedOver()
    assert [item.output for item in found(tmp_path, out=tmp_path / "masks", passed=passed)] == ["a.png"]
    assert passed.outputs == 3  # masks/, old/ and the link
    listing = tmp_path / "list.txt"
    listing.write_text(f"{tmp_path}/masks/a.png\n")
    (item,) = discover(parse([], str(listing), str(tmp_path / "masks"), SUFFIXES), PassedOver())
    assert item.problem == "lies in the output folder, and outputs are never inputs"


def test_a_folder_of_segcli_as_source_gives_its_masks_only(tmp_path: Path) -> None:
    touch(tmp_path, "old/a.png", "old/_overlay/a.jpg", "old/_run/run.json", "old/sub/b.png")
    assert sorted(outputs(tmp_path / "old").values()) == ["a.png", "sub/b.png"]


@pytest.mark.parametrize(
    ("given", "out", "message"),
    [
        ([], "masks", "give either SOURCE"),
        (["photo"], "masks", "no such file or folder: photo; did you mean photos?"),
        (["gone/photos"], "masks", "there is no folder gone either"),
        (["photos", "-"], "masks", "cannot be combined"),
        (["photos"], "photos", "is the folder of the input photos; inputs are never written over"),
        (["photos/../photos"], "photos", "is the folder of the input"),
        (["photos/a.jpg"], "photos", "is the folder of the input"),
        (["photos/*.jpg"], "photos", "is the folder of the input"),
        (["photos"], ".", "contains the input photos"),
        (["photos"], "photos/mine", "holds images that segcli did not write"),
        (["photos/fifo"], "masks", "photos/fifo is a named pipe (FIFO), not a file"),
    ],
)
def test_wrong_usage(
    given: list[str], out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "photos/a.jpg", "photos/mine/own.jpg")
    os.mkfifo(tmp_path / "photos/fifo")
    with pytest.raises(UsageError) as caught:
        parse(given, None, out, SUFFIXES)
    assert message in str(caught.value)


def test_a_link_to_the_input_is_the_input(tmp_path: Path) -> None:
    touch(tmp_path, "photos/a.jpg")
    (tmp_path / "alias").symlink_to("photos")
    with pytest.raises(UsageError, match="is the folder of the input"):
        parse([str(tmp_path / "photos")], None, str(tmp_path / "alias"), SUFFIXES)


def test_discovery_streams(tmp_path: Path) -> None:
    for folder in string.ascii_lowercase:
        touch(tmp_path, f"{folder}/1.jpg")
    items = discover(parse([str(tmp_path)], None, "/nowhere", SUFFIXES), PassedOver())
    assert next(items).output == "a/1.png"
    touch(tmp_path, "m/2.jpg")  # seen, because m is not listed before its turn
    assert [item.output for item in items].count("m/2.png") == 1


def test_it_is_cheap_to_import() -> None:
    code = (
        "import sys, segcli.inference.sources; print({'torch', 'numpy', 'PIL', 'cv2'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
