"""`segcli bench`: how fast a model is on this machine, and where the time goes."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from segcli.cli.downloading import get_model
from segcli.cli.options import Device, Json, Model, Offline, Precision, Quiet, Runtime, Verbose
from segcli.cli.predict import BatchSize, Processes, kinds_of, number_or_auto
from segcli.cli.runs import Workers
from segcli.cli.terminal import Terminal
from segcli.errors import UsageError
from segcli.inference.crew import by_processor, crew_of
from segcli.models.zoo import DEFAULT_MODEL

if TYPE_CHECKING:
    from segcli.inference.benchmark import FolderSpeed, Speed

GIGA = 1e9
LARGEST = 20_000  # pixels along a side

Sizes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--size", help="Width x height of the images; may be given several times.", metavar="WxH"),
]
Runs = Annotated[int, typer.Option(min=1, help="How often everything is timed, after one run to warm up.")]
Images = Annotated[int, typer.Option(min=0, help="Photographs in the folder; 0 leaves that part out.")]


def bench(
    model: Model = DEFAULT_MODEL,
    sizes: Sizes = None,
    device: Device = "auto",
    precision: Precision = "auto",
    runtime: Runtime = "torch",
    processes: Processes = "auto",
    batch_size: BatchSize = "auto",
    runs: Runs = 10,
    images: Images = 100,
    workers: Workers = None,
    offline: Offline = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Measure a model on this machine: latency, images per second, memory, and where the time goes.

    Nothing is needed but the model: the photographs are synthetic, and whatever is written is deleted. The
    options mean what they mean to predict, which is what is timed. Close other programs first.

    \b
    Examples:
      segcli bench
      segcli bench --model fcn8s-voc --size 500x375 --size 1920x1080 --json
    """
    chosen = [size_of(text) for text in sizes or ["500x375"]]
    images_at_a_time = number_or_auto(batch_size, "--batch-size")
    of_the_device = number_or_auto(processes, "--processes")
    if images == 1:
        raise UsageError(
            "--images 1: a folder is timed from the first result to the last; give 0, or at least 2"
        )
    terminal = Terminal(quiet, json, answers=True)
    model_file = get_model(model, terminal, offline)

    from segcli.device import cpus, describe, memory_of_gpu, pick_precision, pick_runtime

    picked = pick_runtime(runtime, device)  # first: it says how the threads of PyTorch are to wait

    import torch

    from segcli import __version__
    from segcli.inference import benchmark
    from segcli.inference.plan import Plan
    from segcli.memory import memory_of
    from segcli.models.checkpoint import load_model
    from segcli.models.prepared import prepare
    from segcli.models.preprocessing import to_tensor

    precision = pick_precision(precision, picked, runtime)
    loaded = load_model(model_file)
    ranges = None
    if precision == "int8":
        from segcli.inference.calibration import ranges_on

        photo = benchmark.synthetic_photo(benchmark.Size(*chosen[0]), 0)
        ranges, _ = ranges_on(loaded.network, [to_tensor(photo, loaded.info.preprocessing)])
    parameters = sum(parameter.numel() for parameter in loaded.network.parameters())
    kinds = kinds_of("mask,overlay")
    plan = Plan(model_file, device, precision, kinds, images_at_a_time, runtime=runtime, ranges=ranges)
    segmenter = plan.start(loaded)
    counted = segmenter.network if runtime == "torch" else prepare(loaded.network, picked)
    progress = Terminal(quiet)
    progress.say(
        f"Measuring {model_file.stem} on {describe(picked)} in {precision}, by {runtime}: {runs} runs."
    )
    found_sizes = [benchmark.Size(*size) for size in chosen]
    with tempfile.TemporaryDirectory(prefix="segcli-bench-") as name:
        folder = Path(name)
        rates = benchmark.matrix_rates(picked, runs)
        speeds = benchmark.speeds(segmenter, counted, found_sizes, runs, folder / "single")
        whole = None
        if images:
            progress.say(f"Segmenting a folder of {images} photographs.")
            shared = memory_of("auto") if by_processor(device, runtime) else 0
            crew = crew_of([device], memory_of_gpu(picked), shared, lambda: images, of_the_device, workers)
            whole = benchmark.folder_speed(segmenter, plan, crew, found_sizes, images, folder)
            if whole.interrupted:
                raise typer.Exit(128 + whole.interrupted)
    content = {
        "segcli": __version__,
        "torch": torch.__version__,
        "processor": benchmark.processor_name(),
        "cpus": cpus(),
        "device": describe(picked),
        "model": model_file.stem,
        "network": loaded.info.network,
        "parameters": parameters,
        "precision": precision,
        "runtime": runtime,
        "batch_size": segmenter.batch_size,
        "runs": runs,
        "matrix_gflops": {key: round(rate / GIGA, 1) for key, rate in rates.items()},
        "sizes": [document(speed, rates, precision, segmenter.batch_size) for speed in speeds],
        "folder": None if whole is None else folder_document(whole, speeds),
        "peak_memory_bytes": benchmark.peak_memory(picked),
    }
    show(content, terminal)
    terminal.document(content)


def size_of(text: str) -> tuple[int, int]:
    """The width and height of `--size`."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UsageError(f"--size {text!r}: give width and height in pixels, such as 500x375")
    size = int(width), int(height)
    if not all(1 <= side <= LARGEST for side in size):
        raise UsageError(f"--size {text!r}: sides are from 1 to {LARGEST:,} pixels")
    return size


def document(speed: Speed, rates: dict[str, float], precision: str, batch_size: int) -> dict[str, Any]:
    """One size for programs; times in milliseconds."""
    rate = rates.get(precision)  # none for fp16, which no matrix product was timed in
    return {
        "width": speed.size.width,
        "height": speed.size.height,
        "network_sees": str(speed.seen),
        "latency_ms": dataclasses.asdict(speed.whole),
        "latency_images": batch_size,
        "images_per_second": round(speed.images_per_second, 3),
        "multiplications": speed.multiplications,
        "network_gflops": round(speed.operations_per_second / GIGA, 2),
        "share_of_matrix_rate": round(speed.operations_per_second / rate, 4) if rate else None,
        "stream_ms": dataclasses.asdict(speed.stream),
        "stages_ms": {name: dataclasses.asdict(timing) for name, timing in speed.stages.items()},
    }


def folder_document(whole: FolderSpeed, speeds: list[Speed]) -> dict[str, Any]:
    """The folder for programs."""
    alone = len(speeds) / sum(1 / speed.images_per_second for speed in speeds)
    return {
        "images": whole.images,
        "processes": whole.processes,
        "seconds": round(whole.seconds, 6),
        "images_per_second": round(whole.images_per_second, 3),
        "of_network_and_labels": round(whole.images_per_second / alone, 3),
    }


def show(content: dict[str, Any], terminal: Terminal) -> None:
    """The same for people, in 80 columns."""
    terminal.say(
        f"\n{content['model']} ({content['network']}, {content['parameters'] / 1e6:.1f} million weights) "
        f"in {content['precision']},\n"
        f"by {content['runtime']} on {content['device']}, {content['processor']}\n"
    )
    at_a_time = "one image" if content["batch_size"] == 1 else f"{content['batch_size']} images"
    rows = []
    for size in content["sizes"]:
        share = size["share_of_matrix_rate"]
        rows.append(
            [
                f"{size['width']}x{size['height']}",
                size["network_sees"],
                milliseconds(size["latency_ms"]["median"]),
                milliseconds(size["latency_ms"]["p90"]),
                f"{size['images_per_second']:.2f}",
                f"{size['multiplications'] / GIGA:.2f}",
                "-" if share is None else f"{share:.0%}",
            ]
        )
    columns = ["Image", "seen as", "median ms", "90% within", "images/s", "10^9 mult.", "of peak"]
    terminal.table(columns, rows, f"From pixels to label map, {at_a_time} at a time")
    rates = ", ".join(f"{rate:,.0f} in {name}" for name, rate in content["matrix_gflops"].items())
    terminal.say(
        "images/s: where many wait. 10^9 mult.: the network's multiplications per image.\n"
        "of peak: its share of what products of large matrices reach on this machine,\n"
        f"in 10^9 operations per second: {rates}.\n"
    )
    names = list(content["sizes"][0]["stages_ms"])
    rows = [
        [f"{size['width']}x{size['height']}"]
        + [milliseconds(size["stages_ms"][name]["median"]) for name in names]
        for size in content["sizes"]
    ]
    terminal.table(["Image", *names], rows, "Where the time of one image goes, ms")
    if folder := content["folder"]:
        by = "" if folder["processes"] == 1 else f" by {folder['processes']} processes"
        terminal.say(
            f"A folder of photographs, with masks and overlays{by}: "
            f"{folder['images_per_second']:.2f} images/s,\n"
            f"{folder['of_network_and_labels']:.0%} of network and labels alone."
        )
    memory = content["peak_memory_bytes"]
    gpu = f", {memory['cuda'] / 2**20:,.0f} MiB on the GPU" if "cuda" in memory else ""
    terminal.say(f"Peak memory: {memory['process'] / 2**20:,.0f} MiB{gpu}.")


def milliseconds(value: float) -> str:
    """With three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
