"""`segcli inspect`: how the network comes to its answer, in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from segcli.cli.downloading import get_model
from segcli.cli.options import Device, Json, Model, Offline, Quiet, Verbose
from segcli.cli.terminal import Terminal
from segcli.errors import UsageError

Image = Annotated[Path, typer.Argument(help="The image to look at.", show_default=False)]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", "-o", help="The picture to write (PNG). [IMAGE's name + -inspect.png, here]"),
]
Top = Annotated[int, typer.Option(min=1, help="How many classes get a heat map.")]


def inspect(
    image: Image,
    out: Out = None,
    model: Model = "",
    top: Top = 3,
    device: Device = "auto",
    offline: Offline = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Show how the network comes to its answer: strides 32, 16 and 8, and class heat maps.

    Writes one PNG with the image, the prediction, what each stride alone would give, and the probability
    of the top classes. This is the idea of the FCN paper on your own picture.

    \b
    Example:
      segcli inspect photo.jpg --out photo-inspect.png
    """
    from segcli.models.zoo import DEFAULT_MODEL

    target = out or Path(f"{image.stem}-inspect.png")
    if not image.is_file():
        raise UsageError(f"there is no image {image}")
    if target.suffix.lower() != ".png":
        raise UsageError(f"--out {target} must end in .png")
    if target.exists() and target.samefile(image):
        raise UsageError(f"--out {target} is the image itself; choose another name")
    terminal = Terminal(quiet, json)
    model_file = get_model(model or DEFAULT_MODEL, terminal, offline)

    from segcli.device import describe, pick_device
    from segcli.files import write_atomic
    from segcli.images import encode_png, read_image
    from segcli.inspection import inspect_image
    from segcli.models.checkpoint import load_model

    picked = pick_device(device)
    loaded = load_model(model_file)
    terminal.say(f"Model {loaded.path.stem} ({loaded.info.network}) on {describe(picked)}")
    sheet = inspect_image(loaded, read_image(image).pixels, picked, top)
    write_atomic(target, encode_png(sheet))
    terminal.say(f"Wrote {target}")
    terminal.document({"image": str(image), "output": str(target), "model": loaded.path.stem})
