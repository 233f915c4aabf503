"""Options that several commands share, written once."""

from __future__ import annotations

from typing import Annotated

import typer

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print more, and tracebacks of errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; text goes to stderr.")]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; auto takes a GPU when there is one.")
]
Precision = Annotated[
    str,
    typer.Option(
        help="auto, fp32, bf16, fp16 (GPU) or int8 (OpenVINO); auto takes bf16 where the hardware computes "
        "in it, else fp32."
    ),
]
Runtime = Annotated[
    str, typer.Option(help="torch, or openvino: faster on many processors; needs 'segcli[openvino]'.")
]
Tile = Annotated[
    str,
    typer.Option(
        help="Compute images in strips of rows: on, off, or auto: large ones. Masks are the same (fp32, CPU)."
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        metavar="SIZE|auto",
        help="What the run may take, such as 6G; auto is half of the machine's. Images that need more fail.",
    ),
]
Model = Annotated[str, typer.Option("--model", "-m", help="A name of `segcli models list`, or a model file.")]
Offline = Annotated[
    bool, typer.Option("--offline", help="Do not use the network; SEGCLI_OFFLINE=1 says so for all commands.")
]
Tta = Annotated[
    str,
    typer.Option(
        help="none; flip: also mirrored; scales: at 0.75, 1 and 1.25 times the size, also mirrored."
    ),
]
