"""Models by name: those that ship with segcli, and model files on disk.

This module must stay cheap to import (no torch, no numpy): commands look a model up before anything heavy.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from segcli.errors import UsageError

if TYPE_CHECKING:
    from segcli.models.checkpoint import Model

SUFFIX = ".safetensors"
PACKAGE = Path(__file__).parents[1]
IN_WHEEL, IN_SOURCE_TREE = PACKAGE / "weights", PACKAGE.parents[1] / "weights"


def bundled_models() -> dict[str, Path]:
    """The models that ship with segcli: name -> file, in order of names."""
    folder = IN_WHEEL if IN_WHEEL.is_dir() else IN_SOURCE_TREE
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


DEFAULT_MODEL = "fcn8s-voc" if "fcn8s-voc" in bundled_models() else "fcn8s-camvid"


def find_model(name_or_path: str) -> Path:
    """The file of a model: a bundled name, or the path of a model file.

    Raises:
        UsageError: Neither a known name nor a file; the nearest name is suggested.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    bundled = bundled_models()
    if name_or_path in bundled:
        return bundled[name_or_path]
    raise UsageError(_unknown(name_or_path, list(bundled)))


def open_model(name_or_path: str) -> Model:
    """`find_model`, then load it: a network in evaluation mode with all that is known about it."""
    from segcli.models.checkpoint import load_model

    return load_model(find_model(name_or_path))


def _unknown(name_or_path: str, names: list[str]) -> str:
    path = Path(name_or_path)
    if path.is_dir():
        return f"{path} is a folder; give the model file in it (*{SUFFIX})"
    if path.suffix or len(path.parts) > 1:
        return f"there is no model file {path}; `segcli models list` shows the names"
    near = difflib.get_close_matches(name_or_path, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no model is called {name_or_path!r}; {hint}`segcli models list` shows the names"
