"""`segcli models`: which models there are, what they are, and foreign weights as models."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from segcli.cli.downloading import get_model
from segcli.cli.options import Json, Offline, Quiet, Verbose
from segcli.cli.terminal import Terminal
from segcli.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from segcli.models.info import ModelInfo
    from segcli.models.preprocessing import Preprocessing
    from segcli.models.published import Published

app = typer.Typer(
    help="List, describe, download, import and verify models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)

WIDTH = 80
LISTED_LEFTOVERS = 8

Name = Annotated[str, typer.Argument(help="A name of `segcli models list`, or a model file.")]
Card = list[tuple[str, str]]  # rows of a model's card: what, and its value


@app.command("list")
def list_(quiet: Quiet = False, verbose: Verbose = False, json: Json = False) -> None:
    """All models that have a name: bundled, in the cache, or to download on first use.

    \b
    Example:
      segcli models list
    """
    import dataclasses

    from segcli.models.zoo import list_models

    terminal = Terminal(quiet, json, answers=True)
    entries = list_models()
    remarks: dict[str, int] = {}  # on what a score was measured, and by whom -> its number below the table
    rows = []
    for entry in entries:
        score = "-"
        if entry.mean_iou is not None:
            remark = f"{'measured here' if entry.measured else 'published'}, on {entry.scored_on}"
            score = f"{entry.mean_iou:.1f} ({remarks.setdefault(remark, len(remarks) + 1)})"
        classes = " + ".join(str(number) for number in entry.classes)
        rows.append([entry.name, classes, f"{entry.mebibytes:.0f} MiB", score, entry.place])
    terminal.table(["model", "classes", "size", "mean IU %", "where"], rows)
    for remark, number in remarks.items():
        terminal.say(f"({number}) {remark}")
    terminal.say("\nMore about one: segcli models info NAME")
    terminal.document({"models": [dataclasses.asdict(entry) for entry in entries]})


@app.command()
def info(name: Name, quiet: Quiet = False, verbose: Verbose = False, json: Json = False) -> None:
    """The card of a model: classes, scores, licence, data, preprocessing, recipe.

    \b
    Examples:
      segcli models info fcn8s-camvid
      segcli models info runs/mine/best.safetensors
    """
    import dataclasses

    from segcli.models.info import read_info
    from segcli.models.published import PUBLISHED
    from segcli.models.zoo import cached_model, find_model

    terminal = Terminal(quiet, json, answers=True)
    record = PUBLISHED.get(name)
    document: dict[str, Any] = {"name": name}
    card: Card = []
    if record:
        card += _origin(record)
        document["published"] = dataclasses.asdict(record)
    if record and not cached_model(record).is_file():
        card += _promised(record)
    else:
        path = find_model(name)
        model = read_info(path)
        card += [("file", f"{path}, {path.stat().st_size / 2**20:.1f} MiB"), *_content(model)]
        document |= {"path": str(path), **dataclasses.asdict(model)}
    terminal.say(name)
    for what, value in card:
        terminal.say(_row(what, value))
    terminal.document(document)


@app.command()
def download(
    names: Annotated[list[str], typer.Argument(help="Names of `segcli models list`.")],
    offline: Offline = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Get published models ahead of their first use: download, check, import.

    A download that broke off is continued. Models are kept in the cache folder of the platform, or in the
    folder that the environment variable SEGCLI_CACHE names. Exit code 3 when one cannot be had.

    \b
    Example:
      segcli models download fcn-resnet50-voc
    """
    terminal = Terminal(quiet, json)
    models = []
    for name in names:
        path = get_model(name, terminal, offline)
        terminal.say(f"{name}: {path}")
        models.append({"name": name, "path": str(path)})
    terminal.document({"models": models})


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A .caffemodel, or a checkpoint of torch.save.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model file to write, .safetensors.")],
    source: Annotated[
        str, typer.Option(help="auto, caffe, torchfcn, semseg, zijundeng or torchvision.")
    ] = "auto",
    arch: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The network, where the file does not tell: fcn8s, fcn8s-atonce, ..."),
    ] = None,
    classes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Class set, by name or file. [the usual one of that many classes]"),
    ] = None,
    preprocessing: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="How images were prepared, where the source does not tell: caffe, imagenet, ..."),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Turn the weights of another program into a model file, checking every name and shape.

    Reads the .caffemodel files of the FCN authors, and checkpoints of wkentaro/pytorch-fcn (torchfcn),
    meetps/pytorch-semseg (semseg), zijundeng/pytorch-semantic-segmentation (zijundeng) and torchvision.
    Nothing in a file is executed; one that would need it is refused. FCN-8s and its at-once version have
    the same keys, so a file that does not say which it is needs --arch.

    \b
    Examples:
      segcli models import fcn8s-heavy-pascal.caffemodel -o fcn8s.safetensors
      segcli models import some.pth --arch fcn8s-atonce -o mine.safetensors
      segcli models import other.pkl --preprocessing imagenet -o a.safetensors
    """
    terminal = Terminal(quiet, json)
    if out.suffix != ".safetensors":
        raise UsageError(f"--out must end in .safetensors, unlike {out}")
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    if out.exists() and out.samefile(file):
        raise UsageError(f"--out {out} is the file to import; choose another name")

    from segcli.models.importers import import_model

    imported = import_model(file, out, source, arch, classes, preprocessing)
    model, foreign = imported.info, imported.foreign
    parameters = sum(value.numel() for value in foreign.tensors.values())
    names = [model.class_set.name, *([model.second_class_set.name] if model.second_class_set else [])]
    terminal.say(
        f"Read {file} as {foreign.source}: {model.network}, {parameters:,} numbers in "
        f"{len(foreign.tensors)} tensors, every name and shape right."
    )
    terminal.say(f"Classes: {' and '.join(names)}" + ("" if classes else " (--classes chooses another set)"))
    terminal.say(f"Images: {describe(model.preprocessing)}")
    if foreign.leftovers:
        shown = ", ".join(foreign.leftovers[:LISTED_LEFTOVERS])
        more = len(foreign.leftovers) - LISTED_LEFTOVERS
        terminal.warn(f"Not used: {shown}" + (f" and {more} more" if more > 0 else ""))
    terminal.say(f"Wrote {out}")
    terminal.document(
        {
            "file": str(file),
            "model": str(out),
            "source": foreign.source,
            "network": model.network,
            "classes": model.class_set.name,
            "second_classes": model.second_class_set.name if model.second_class_set else None,
            "tensors": len(foreign.tensors),
            "parameters": parameters,
            "leftovers": list(foreign.leftovers),
        }
    )


@app.command()
def verify(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Names, or model files. [all that are on this machine]"),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Load models, check every tensor, and compare them with what was recorded when they came.

    Exit code 2 when one is damaged.

    \b
    Example:
      segcli models verify
    """
    from segcli.models.zoo import list_models, verify_model

    terminal = Terminal(quiet, json)
    here = [entry.name for entry in list_models() if entry.place != "to download"]
    results: list[dict[str, Any]] = []
    for name in names or here:
        try:
            results.append({"name": name, "good": True, "found": verify_model(name)})
            terminal.say(f"good     {name}: {results[-1]['found']}")
        except CheckpointError as error:
            results.append({"name": name, "good": False, "found": str(error)})
            terminal.warn(f"damaged  {name}: {error}")
    terminal.document({"models": results})
    if not all(result["good"] for result in results):
        raise typer.Exit(CheckpointError.exit_code)


# ---- cards ----


def _origin(record: Published) -> Card:
    """Where a published file comes from."""
    checksum = record.checksum or "none published; the one of the first download is kept"
    return [("published as", record.file), ("address", record.addresses[0]), ("checksum", checksum)]


def _promised(record: Published) -> Card:
    """What a published file will be; it is not here yet."""
    from segcli.models.preprocessing import PREPROCESSINGS
    from segcli.palettes import CLASS_SETS

    score = "none published"
    if record.mean_iou is not None:
        score = f"mean IU {record.mean_iou:.1f} % on {record.scored_on}; published by {record.said_by}"
    sets = [CLASS_SETS[name] for name in record.classes]
    return [
        ("size", f"about {record.mebibytes:.0f} MiB, to download on first use"),
        ("network", record.network),
        *(("classes", f"{len(classes)} ({classes.name}): {', '.join(classes.names)}") for classes in sets),
        ("score", score),
        ("trained on", record.trained_on),
        ("licence", record.licence),
        ("images", describe(PREPROCESSINGS[record.preprocessing])),
        *(("note", note) for note in record.notes),
    ]


def _content(model: ModelInfo) -> Card:
    """What a model file says of itself."""
    sets = [classes for classes in (model.class_set, model.second_class_set) if classes is not None]
    return [
        ("network", model.network),
        *(("classes", f"{len(classes)} ({classes.name}): {', '.join(classes.names)}") for classes in sets),
        *(("score", _score(on, score)) for on, score in model.metrics.items()),
        ("trained on", model.dataset or "not stated"),
        ("licence", model.licence or "not stated"),
        ("images", describe(model.preprocessing)),
        ("recipe", ", ".join(f"{key} {value}" for key, value in model.recipe.items()) or "not stated"),
        *(("note", note) for note in model.notes),
    ]


def _score(scored_on: str, score: dict[str, Any]) -> str:
    """One entry of a model's metrics, in words."""
    parts = []
    if "mean_iou" in score:
        parts.append(f"mean IU {100 * score['mean_iou']:.1f} %")
    if "pixel_accuracy" in score:
        parts.append(f"pixel accuracy {100 * score['pixel_accuracy']:.1f} %")
    images = f", {score['images']} images" if "images" in score else ""
    by = f"published by {score['published_by']}" if "published_by" in score else "measured by segcli"
    per_class = score.get("per_class", {})
    classes = "".join(f"; {name} {100 * value:.0f}" for name, value in per_class.items())
    return f"{', '.join(parts)} on {scored_on}{images}; {by}{classes}"


def describe(preprocessing: Preprocessing) -> str:
    """How images are prepared, in words."""
    numbers = ", ".join(f"{value:g}" for value in preprocessing.mean)
    text = f"{preprocessing.order} from 0 to {preprocessing.scale:g}, minus ({numbers})"
    if set(preprocessing.std) != {1}:
        text += f", divided by ({', '.join(f'{value:g}' for value in preprocessing.std)})"
    side = preprocessing.shorter_side
    return text + (f", shorter side {side} pixels" if side else ", at their own size")


def _row(what: str, value: str) -> str:
    return textwrap.fill(
        value,
        WIDTH,
        initial_indent=f"  {what:<14}",
        subsequent_indent=" " * 16,
        break_long_words=False,
        break_on_hyphens=False,
    )
