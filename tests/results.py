"""What a run has left in its output folder."""

from __future__ import annotations

import os
from pathlib import Path


def tree(out: Path | str) -> dict[str, bytes]:
    """Every file but the record, by its name below the folder."""
    files = {
        os.fsencode(path.relative_to(out)): path.read_bytes()
        for path in sorted(Path(out).rglob("*"))
        if path.is_file() and path.relative_to(out).parts[0] != "_run"
    }
    return {os.fsdecode(name): data for name, data in files.items()}


def complete_files(out: Path) -> dict[str, bytes]:
    """The same without temporary files, which a run that was stopped may leave."""
    return {name: data for name, data in tree(out).items() if ".segcli-" not in name}
