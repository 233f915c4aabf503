"""From a configuration to what the loop needs: data, network, loss, validation."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from segcli.data import stats
from segcli.data.folders import ClassFolders, open_folders
from segcli.data.loading import ClassificationSamples, SegmentationSamples
from segcli.data.sets import DataSet, open_data
from segcli.data.transforms import Augmentation, classifier_transform, training_transform
from segcli.data.verify import Finding, check
from segcli.downloads import SILENT, Watch
from segcli.errors import ImageError, UsageError
from segcli.files import write_atomic
from segcli.images import read_image
from segcli.models.checkpoint import save_model
from segcli.models.encoders import ENCODERS
from segcli.models.info import ModelInfo
from segcli.models.preprocessing import IMAGENET_MEAN, Preprocessing
from segcli.palettes import ClassSet
from segcli.training import distributed
from segcli.training.config import TrainConfig
from segcli.training.initial import Start, require_encoder, starting_network
from segcli.training.tasks import ClassificationObjective, SegmentationObjective, Task, plain
from segcli.training.validation import validate_classifier, validate_segmentation

GREY = (round(255 * IMAGENET_MEAN[0]), round(255 * IMAGENET_MEAN[1]), round(255 * IMAGENET_MEAN[2]))


def available_workers() -> int:
    """Processes for loading images: one less than the cores for each training process, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // distributed.processes_here() - 1)


def make_task(config: TrainConfig, device: torch.device, watch: Watch = SILENT) -> Task:
    """What `config.task` names, with its data opened and its network initialised from the seed.

    Args:
        config: What is wanted.
        device: Where it will be trained.
        watch: Hears of downloads.

    Raises:
        UsageError: The options do not fit each other, or the data.
        MachineError: The data or weights are not on this machine.
    """
    if not config.data:
        raise UsageError("--data is missing: a data set's name (see `segcli data list`), or a folder")
    torch.manual_seed(config.seed)
    if config.task == "segment":
        task = segmentation_task(config, device, watch)
    else:
        task = classification_task(config, device)
    shares = distributed.processes() * config.accumulate
    if config.batch_size % shares:
        raise UsageError(
            f"batch_size {config.batch_size} cannot be split into {distributed.processes()} processes "
            f"with {config.accumulate} backward passes each"
        )
    if len(task.names) < config.batch_size and distributed.processes() > 1:
        raise UsageError(
            f"the {len(task.names)} training images do not fill a batch of {config.batch_size}; "
            "lower --batch-size"
        )
    return task


def augmentation(config: TrainConfig) -> Augmentation:
    """The options that say how samples are varied."""
    names = [field.name for field in dataclasses.fields(Augmentation)]
    return Augmentation(**{name: getattr(config, name) for name in names})


def segmentation_task(config: TrainConfig, device: torch.device, watch: Watch) -> Task:
    """An FCN on a data set with label maps."""
    root = Path(config.root) if config.root else None
    train_set = open_data(config.data, config.train_split, root)
    val_set = open_data(config.data, config.val_split, root) if config.val_split else None
    start = starting_network(config, train_set.class_set, watch)
    info = ModelInfo(
        network=start.name,
        class_set=train_set.class_set,
        preprocessing=start.preprocessing,
        dataset=f"{train_set.name} {train_set.split} ({len(train_set.samples)} images)",
        recipe=plain(config),
        licence=config.licence,
        dtype=config.storage,
        notes=config.notes,
    )

    def save(path: Path, network: nn.Module, record: dict[str, Any]) -> None:
        recipe = info.recipe | {"trained_epochs": record["epoch"]}
        metrics = {}
        if val_set is not None and "mean_iou" in record:
            kept = {key: record[key] for key in ("mean_iou", "pixel_accuracy", "per_class")}
            metrics[f"{val_set.name}/{val_set.split}"] = kept | {"images": len(val_set.samples)}
        save_model(path, network, dataclasses.replace(info, recipe=recipe, metrics=metrics))

    weights = class_weights(config.class_weights, train_set)
    sets = [train_set] if val_set is None else [train_set, val_set]
    return Task(
        objective=SegmentationObjective(
            start.network, start.preprocessing, config.precision, config, weights
        ),
        samples=SegmentationSamples(
            train_set,
            training_transform(augmentation(config), GREY),
            start.preprocessing,
            config.paste,
        ),
        about=describe_segmentation(config, start, sets, weights),
        names=[sample.name for sample in train_set.samples],
        validate=None
        if val_set is None
        else lambda network, go_on: validate_segmentation(network, info, val_set, device, go_on),
        score="mean_iou",
        save=save,
        check=lambda done: check_sets(sets, done),
    )


def describe_segmentation(
    config: TrainConfig, start: Start, sets: list[DataSet], weights: Tensor | None
) -> list[str]:
    """What is trained on what, in a few lines."""
    count = sum(parameter.numel() for parameter in start.network.parameters()) / 1e6
    classes = sets[0].class_set
    splits = ", ".join(f"{len(one.samples)} images of {one.split}" for one in sets)
    lines = [
        f"{start.name}, {count:.1f} M parameters, {start.about}.",
        f"{sets[0].name}: {len(classes)} classes; {splits}.",
    ]
    if weights is not None:
        heavy = sorted(zip(weights.tolist(), classes.names, strict=True), reverse=True)
        shown = ", ".join(f"{name} {weight:.2f}" for weight, name in heavy[:3])
        lines.append(f"Class weights: {shown}, ... {heavy[-1][1]} {heavy[-1][0]:.2f}.")
    return lines


def check_sets(sets: list[DataSet], done: Callable[[int, int], object]) -> list[Finding]:
    """Look at every image and label of some data sets."""
    count = sum(len(one.samples) for one in sets)
    seen = 0

    def one_more() -> None:
        nonlocal seen
        seen += 1
        done(seen, count)

    findings = [finding for one in sets for finding in check(one, one_more)]
    return list(dict.fromkeys(findings))  # files that both splits lack a partner for


def class_weights(source: str, dataset: DataSet) -> Tensor | None:
    """One factor per class, float (C,), or None for ones.

    Args:
        source: none; auto, from the pixels per class as `segcli data stats` shows it; or a TOML file with a
            line `name = weight` per class.

    Raises:
        UsageError: The file cannot be read, or does not have a weight above 0 for every class.
    """
    if source == "none":
        return None
    if source != "auto":
        return weights_from_file(Path(source), dataset.class_set)
    pixels = distributed.from_first(lambda: stats.statistics(dataset).pixels)
    return torch.tensor(stats.class_weights(pixels), dtype=torch.float32)


def weights_from_file(path: Path, classes: ClassSet) -> Tensor:
    """See `class_weights`."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"--class-weights {path}: {error.strerror}; give none, auto or a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--class-weights {path} is not valid TOML: {error}") from error
    for name, weight in given.items():
        if name not in classes.names:
            near = difflib.get_close_matches(name, classes.names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(classes.names[:8])}, ..."
            raise UsageError(f"--class-weights {path}: {classes.name} has no class {name!r}; {hint}")
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UsageError(f"--class-weights {path}: {name} is {weight!r}; it must be a number above 0")
    missing = [name for name in classes.names if name not in given]
    if missing:
        raise UsageError(f"--class-weights {path} has no weight for {', '.join(missing[:8])}")
    return torch.tensor([float(given[name]) for name in classes.names])


def classification_task(config: TrainConfig, device: torch.device) -> Task:
    """A torchvision classifier on a folder-per-class data set; its encoder is the result."""
    from torchvision.models import get_model

    require_encoder(config.encoder, [*ENCODERS, "vgg16"])
    if config.model or config.network or config.encoder_weights != "none":
        raise UsageError("--task classify trains an --encoder from random weights; give no other start")
    train_set = open_folders(Path(config.data), config.train_split)
    val_set = open_folders(Path(config.data), config.val_split) if config.val_split else None
    network = get_model(config.encoder, weights=None, num_classes=len(train_set.names))

    def save(path: Path, network: nn.Module, record: dict[str, Any]) -> None:
        state = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
        note = f"torchvision {config.encoder}, {len(train_set.names)} classes, {record['epoch']} epochs"
        write_atomic(path, safetensors.torch.save(state, {"encoder": note}))

    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    sets = [train_set] if val_set is None else [train_set, val_set]
    splits = zip((config.train_split, config.val_split), sets, strict=False)
    images = ", ".join(f"{len(one.images)} images of {split}" for split, one in splits)
    return Task(
        objective=ClassificationObjective(network, Preprocessing(), config.precision, config.label_smoothing),
        samples=ClassificationSamples(train_set, classifier_transform(augmentation(config))),
        about=[
            f"{config.encoder} as a classifier, {count:.1f} M parameters, from random weights.",
            f"{config.data}: {len(train_set.names)} classes; {images}.",
        ],
        names=[str(path) for path, _ in train_set.images],
        validate=None
        if val_set is None
        else lambda network, go_on: validate_classifier(network, val_set, config.crop[0], device, go_on),
        score="accuracy",
        save=save,
        check=lambda done: check_folders(sets, done),
    )


def check_folders(sets: list[ClassFolders], done: Callable[[int, int], object]) -> list[Finding]:
    """Decode every image of some folder-per-class data sets."""
    paths = [path for one in sets for path, _ in one.images]

    def look(path: Path) -> Finding | None:
        try:
            read_image(path)
        except ImageError as error:
            return Finding(path, str(error), "replace or remove it")
        return None

    findings = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, finding in enumerate(pool.map(look, paths), start=1):
            findings += [finding] if finding is not None else []
            done(number, len(paths))
    return findings
