"""Make the parts of the documentation that the program itself writes: `make docs`.

docs/commands.md    the help text of every command
docs/images/*.png   pictures of the README, from photographs that installed packages ship
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import typer.main

from segcli.cli import app, main

DOCS = Path(__file__).parent
PHOTO = "cat.png"


def command_paths() -> list[list[str]]:
    """Every command and sub-command, as arguments."""
    group = typer.main.get_command(app)
    found: list[list[str]] = []
    for name, command in getattr(group, "commands", {}).items():
        found += [[name], *([name, child] for child in getattr(command, "commands", {}))]
    return found


def help_of(command: list[str]) -> str:
    """What `segcli COMMAND --help` prints on a terminal of 80 columns."""
    os.environ["COLUMNS"] = "80"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return text.getvalue().rstrip()


def commands_page() -> str:
    """The text of commands.md."""
    parts = ["# Commands\n\nWhat `segcli COMMAND --help` prints; written by `make docs`.\n"]
    for command in [[], *command_paths()]:
        parts.append(f"## segcli {' '.join(command)}".rstrip() + f"\n\n```\n{help_of(command)}\n```\n")
    return "\n".join(parts)


def pictures(folder: Path) -> None:
    """Photograph, mask and overlay of one demo photograph, and what every stride sees."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        photos, masks = Path(work, "photos"), Path(work, "masks")
        subprocess.run([sys.executable, DOCS.parent / "examples" / "demo_photos.py", photos], check=True)
        segcli = [sys.executable, "-m", "segcli"]
        subprocess.run([*segcli, "predict", photos / PHOTO, "--out", masks, "--save", "compare"], check=True)
        (masks / "_compare" / PHOTO).replace(folder / "compare.png")
        subprocess.run([*segcli, "inspect", photos / PHOTO, "--out", folder / "inspect.png"], check=True)


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(commands_page(), encoding="utf-8")
    pictures(DOCS / "images")
