"""PyTorch's own checkpoint files, without running what is in them.

A pickle is a program. torch.load with weights_only=True runs only the part of it that builds tensors and
plain containers; here numpy's numbers are allowed as well, because training checkpoints of 2017-2019 hold
their best score as one. All else is refused, and the message says what it was.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segcli.errors import CheckpointError

_make_scalar = np.float64(0).__reduce__()[0]
NUMPY_SCALARS: list[Any] = [
    (_make_scalar, "numpy.core.multiarray.scalar"),  # its name before numpy 2
    (_make_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, np.dtypes.Int32DType),
]
TAR_MAGIC = slice(257, 262)  # where a tar archive says "ustar"


def load_pickle(path: Path) -> Any:
    """What a file of torch.save holds: tensors (on the CPU), numbers, texts and containers of them.

    Raises:
        CheckpointError: The file is damaged, something else, or holds what would have to be executed.
    """
    try:
        refusal = _refusal(path)
        if refusal:
            raise CheckpointError(f"{path} {refusal}")
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_SCALARS):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None:
            raise CheckpointError(f"{path} is damaged, or no PyTorch checkpoint") from error
        raise CheckpointError(
            f"{path} is refused: to load it, {name[1]} would have to be executed. "
            "Save the model's state_dict() alone, with tensors only, and import that."
        ) from error
    except Exception as error:  # damaged pickles end in exceptions of every kind
        reason = str(error).split(". ")[0].split("\n")[0]
        raise CheckpointError(f"{path} is cut off or damaged ({reason}); get the file again") from error


def _refusal(path: Path) -> str | None:
    """Why a file is not even tried, from how it begins and what it contains."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "is empty; get the file again"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not a checkpoint; download the file itself"
    if head[TAR_MAGIC] == b"ustar":
        return "is a tar archive of PyTorch before 0.1.10, which cannot be loaded safely"
    if not head.startswith((b"PK", b"\x80")):  # zip archives, and pickles of protocol 2
        return "is no PyTorch checkpoint"
    if head[:2] == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        names = {entry.filename.partition("/")[2] for entry in entries}
        if "constants.pkl" in names or any(name.startswith("code/") for name in names):
            return (
                "is a TorchScript program, which segcli does not run; save the model's state_dict() instead"
            )
        if "data.pkl" not in names:
            return "is a zip archive without weights of torch.save (.pt2 programs are not run)"
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            return "is a compressed archive, which torch.save never writes; unpack it, or get the file again"
    return None
