"""`segcli evaluate`: scores of a model on a data set, or of masks against labels."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from segcli.cli.downloading import get_model
from segcli.cli.options import Device, Json, Offline, Precision, Quiet, Tta, Verbose
from segcli.cli.runs import Workers
from segcli.cli.terminal import Terminal
from segcli.errors import UsageError
from segcli.inference.crew import default_workers

if TYPE_CHECKING:
    from segcli.data.sets import DataSet
    from segcli.evaluation import Evaluation, ImageScore, Prediction
    from segcli.inference.segmentation import Segmenter

SHOWN_FAILURES = 10

Data = Annotated[
    str, typer.Option("--data", "-d", help="A name of `segcli data list`, a folder, a list or a TOML.")
]
Split = Annotated[str, typer.Option(help="Which part of the data; several are joined with +.")]
Root = Annotated[Optional[Path], typer.Option(help="The folder of a known data set.")]  # noqa: UP045
ModelName = Annotated[
    str, typer.Option("--model", "-m", help="A name of `segcli models list`, or a model file.")
]
Pred = Annotated[Optional[Path], typer.Option(help="A folder of masks to score, instead of a model.")]  # noqa: UP045
LabelFolder = Annotated[Path | None, typer.Option("--labels", help="A folder of labels, instead of --data.")]
Classes = Annotated[str, typer.Option(help="With --labels: a class set, its file, or the number of classes.")]
Ignore = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=0, max=255, help="With --labels: a value that does not count, besides the set's own."),
]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", "-o", help="Folder for scores.json, images.csv, confusion.csv and pictures."),
]
Size = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Shorter side at which the network sees the images. [the model's own]"),
]


def evaluate(
    data: Data = "",
    split: Split = "val",
    root: Root = None,
    model: ModelName = "",
    pred: Pred = None,
    labels: LabelFolder = None,
    classes: Classes = "",
    ignore: Ignore = None,
    out: Out = None,
    device: Device = "auto",
    precision: Precision = "auto",
    size: Size = None,
    tta: Tta = "none",
    workers: Workers = None,
    offline: Offline = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Score a model on a data set, or a folder of masks against labels.

    All scores are pooled over the set. mean IU is the mean over the classes that occur in labels or
    predictions, as in the reference score.py of fcn.berkeleyvision.org. Exit code 1 when a file could not
    be scored.

    \b
    Examples:
      segcli evaluate --data camvid --root CamVid/ --model fcn8s-camvid
      segcli evaluate --data voc --split seg11valid --pred masks/
      segcli evaluate --pred masks/ --labels truth/ --classes cityscapes --json
      segcli evaluate --pred masks/ --labels truth/ --classes 3 --ignore 0
    """
    check_options(data, model, pred, labels, classes)
    from segcli.evaluation import labels_as_data
    from segcli.files import remove_older_leftovers, require_writable

    began = time.time()
    terminal = Terminal(quiet, json, answers=True)
    if out is not None:
        require_writable(out)
    if labels is not None:
        dataset = labels_as_data(labels, parse_classes(classes), ignore)
    else:
        from segcli.data.sets import open_data

        dataset = open_data(data, split, root)
    readers = default_workers() if workers is None else workers
    stop = threading.Event()
    try:
        if pred is not None:
            from segcli.evaluation import predictions_in_folder

            about = {"pred": str(pred)}
            result = run(dataset, predictions_in_folder(dataset, pred, stop, readers), terminal)
        else:
            file = get_model(model, terminal, offline)
            segmenter, about = get_segmenter(dataset, file, device, precision, size, tta, terminal)
            from segcli.evaluation import predictions_of_model

            result = run(dataset, predictions_of_model(dataset, segmenter, stop, readers), terminal)
            about["model"] = model
    finally:
        stop.set()
    report(result, about | {"data": dataset.name, "split": dataset.split}, out, labels is None, terminal)
    if out is not None:
        remove_older_leftovers(out, began)
    if result.failed:
        raise typer.Exit(1)


def check_options(data: str, model: str, pred: Path | None, labels: Path | None, classes: str) -> None:
    """Refuse combinations of options that make no sense."""
    if bool(data) == (labels is not None):
        raise UsageError("give --data NAME, or --pred DIR --labels DIR --classes SET")
    if bool(model) == (pred is not None):
        raise UsageError("give --model NAME to score a model, or --pred DIR to score masks")
    if labels is not None and pred is None:
        raise UsageError("--labels needs --pred DIR; a model needs photographs: give --data")
    if labels is not None and not classes:
        raise UsageError(
            "--labels needs --classes: a class set such as voc, its file, or a number of classes"
        )
    if data and classes:
        raise UsageError("--classes belongs to --labels; the classes of --data are known")


def parse_classes(text: str) -> Any:
    """A class set from its name, its file, or the number of classes."""
    from segcli.palettes import generic_class_set, get_class_set

    return generic_class_set(int(text)) if text.isdecimal() and int(text) > 0 else get_class_set(text)


def get_segmenter(
    dataset: DataSet,
    model_file: Path,
    device_name: str,
    precision: str,
    size: int | None,
    tta: str,
    terminal: Terminal,
) -> tuple[Segmenter, dict[str, Any]]:
    """What computes the predictions of a model; the second result says which, and how."""
    from segcli.device import describe, pick_device, pick_precision
    from segcli.evaluation import matching_classes
    from segcli.inference.plan import Plan
    from segcli.inference.tta import variants_of
    from segcli.models.checkpoint import load_model

    variants_of(tta)
    device = pick_device(device_name)
    precision = pick_precision(precision, device)
    model = load_model(model_file)
    matching_classes(model.info.class_set, dataset.class_set)
    terminal.say(
        f"{model_file.stem} on {len(dataset.samples)} images of {dataset.name} "
        f"on {describe(device)} in {precision}"
    )
    plan = Plan(model_file, device_name, precision, (), shorter_side=size, tta=tta)
    segmenter = plan.start(model)
    return segmenter, {
        "sha256": model.sha256,
        "size": segmenter.preprocessing.shorter_side,
        "tta": tta,
        "precision": precision,
    }


def run(dataset: DataSet, predictions: Iterator[Prediction], terminal: Terminal) -> Evaluation:
    """Evaluate with a progress bar."""
    from segcli.evaluation import evaluate as score

    started, count = time.monotonic(), 0
    with terminal.progress() as bar:
        line = bar.add_task("scored", total=len(dataset.samples), rate="")

        def done(_: ImageScore) -> None:
            nonlocal count
            count += 1
            bar.update(line, completed=count, rate=f"{count / (time.monotonic() - started):.1f}")

        return score(dataset, predictions, done)


def report(
    result: Evaluation, about: dict[str, Any], out: Path | None, with_images: bool, terminal: Terminal
) -> None:
    """Tables for people, JSON for programs, files in `out`."""
    from segcli.metrics import MEAN_IU_DEFINITION
    from segcli.scorecard import document

    content = about | document(result)
    show_classes(content["per_class"], terminal)
    names = {
        "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy", "mean_iou": "mean IU",
        "frequency_weighted_iou": "frequency weighted IU", "dice": "Dice (F1)",
        "boundary_iou": "boundary IoU", "boundary_f_score": "boundary F-score",
    }  # fmt: skip
    rows = [[name, percent(content[key])] for key, name in names.items()]
    terminal.table([f"{content['images']} images", "%"], rows)
    terminal.say(MEAN_IU_DEFINITION)
    if out is not None:
        write_files(result, content, out, with_images, terminal)
        content["out"] = str(out)
    for failure in result.failed[:SHOWN_FAILURES]:
        terminal.warn(f"not scored: {failure.name}: {failure.problem}")
    if len(result.failed) > SHOWN_FAILURES:
        where = f"; all are in {out / 'images.csv'}" if out else "; --out DIR lists all"
        terminal.warn(f"not scored: {len(result.failed)} images in all{where}")
    terminal.document(content)


def show_classes(per_class: list[dict[str, Any]], terminal: Terminal) -> None:
    """The scores of every class that occurs, in the order of the class set."""
    keys = ("iou", "precision", "recall", "boundary_iou")
    shown = [entry for entry in per_class if entry["iou"] is not None]
    total = sum(entry["pixels"] for entry in shown) or 1
    rows = [
        [
            entry["name"],
            *(percent(entry[key]) for key in keys),
            f"{100 * entry['pixels'] / total:.2f}",
            str(entry["images"]),
        ]
        for entry in shown
    ]
    terminal.table(["class", "IoU", "precision", "recall", "boundary IoU", "% of pixels", "images"], rows)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def write_files(
    result: Evaluation, content: dict[str, Any], out: Path, with_images: bool, terminal: Terminal
) -> None:
    """scores.json, images.csv, confusion.csv, worst.jpg; confusion.png and classes.png with matplotlib."""
    import json

    from segcli import scorecard
    from segcli.files import write_atomic
    from segcli.images import encode_jpeg

    write_atomic(out / "scores.json", json.dumps(content, indent=2).encode())
    write_atomic(out / "images.csv", scorecard.images_csv(result))
    write_atomic(out / "confusion.csv", scorecard.matrix_csv(result))
    written = ["scores.json", "images.csv", "confusion.csv"]
    if result.worst:
        write_atomic(out / "worst.jpg", encode_jpeg(scorecard.worst_picture(result, with_images)))
        written.append("worst.jpg")
    try:
        write_atomic(out / "confusion.png", scorecard.confusion_chart(result.matrix, result.class_set))
        write_atomic(out / "classes.png", scorecard.class_chart(result.scores.iou, result.class_set))
        written += ["confusion.png", "classes.png"]
    except ImportError:
        terminal.warn("confusion.png and classes.png need matplotlib; run: pip install 'segcli[train]'")
    terminal.say(f"{out}: {', '.join(written)}")
