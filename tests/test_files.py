"""Files that appear only when complete."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from segcli.errors import MachineError, UsageError
from segcli.files import locked, machine_errors, require_writable, sha256, write_atomic


def test_writes_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file.bin"
    write_atomic(target, b"first")
    write_atomic(target, memoryview(b"second"))
    assert target.read_bytes() == b"second"
    assert list(target.parent.iterdir()) == [target]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    code = """if True:
        import pathlib, sys
        from segcli.files import write_atomic
        write_atomic(pathlib.Path(sys.argv[1]), b"")"""
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        path = tmp_path / oct(umask)
        subprocess.run([sys.executable, "-c", code, path], check=True, umask=umask)
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_failed_write_keeps_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomic(target, "text")  # type: ignore[arg-type]
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_in_the_way_is_a_machine_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(MachineError, match=r"cannot write .*taken: Is a directory"):
        write_atomic(tmp_path / "taken", b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MachineError, match="cannot write"):
        write_atomic(tmp_path / "file" / "below", b"")


def test_errors_of_the_machine_come_with_a_hint() -> None:
    reason = "cannot save /x: No space left on device; free some space"
    with pytest.raises(MachineError, match=reason), machine_errors(Path("/x"), "save"):
        raise OSError(28, os.strerror(28))


def test_a_folder_that_cannot_be_written_to_is_found_at_once(tmp_path: Path) -> None:
    require_writable(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MachineError, match="file"):
        require_writable(tmp_path / "file" / "below")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_whoever_holds_a_lock_may_write_its_name_a_moment_later(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def write() -> None:
            held.write("process 7 on somewhere since yesterday\n")
            held.flush()

        writer = threading.Timer(0.02, write)
        writer.start()
        expected = "masks is in use by process 7 on somewhere since yesterday; wait for it"
        with pytest.raises(UsageError, match=expected), locked("masks", tmp_path / "lock"):
            pass
        writer.join()
