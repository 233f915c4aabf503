"""From a configuration to what the loop needs: data, network, loss, validation."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from segcli.data.folders import ClassFolders, open_folders
from segcli.data.loading import ClassificationSamples, SegmentationSamples
from segcli.data.sets import DataSet, open_data, read_label
from segcli.data.transforms import Augmentation, classifier_transform, training_transform
from segcli.errors import CheckpointError, UsageError
from segcli.files import write_atomic
from segcli.images import read_image
from segcli.metrics import confusion_matrix, scores
from segcli.models.checkpoint import fill, save_model
from segcli.models.encoders import ENCODERS
from segcli.models.fcn import Network
from segcli.models.info import ModelInfo
from segcli.models.networks import get
from segcli.models.preprocessing import IMAGENET_MEAN, Preprocessing, to_tensor
from segcli.models.zoo import open_model
from segcli.training.config import TrainConfig
from segcli.training.tasks import (
    ClassificationObjective,
    SegmentationObjective,
    Task,
    autocast,
    plain,
)

GREY = (round(255 * IMAGENET_MEAN[0]), round(255 * IMAGENET_MEAN[1]), round(255 * IMAGENET_MEAN[2]))


def available_workers() -> int:
    """Processes for loading images: one less than the cores this process may use, at least one."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def make_task(config: TrainConfig, device: torch.device) -> Task:
    """What `config.task` names, with its data opened and its network initialised from the seed."""
    torch.manual_seed(config.seed)
    return (
        segmentation_task(config, device) if config.task == "segment" else classification_task(config, device)
    )


def augmentation(config: TrainConfig) -> Augmentation:
    """The options that say how samples are varied."""
    names = [field.name for field in dataclasses.fields(Augmentation)]
    return Augmentation(**{name: getattr(config, name) for name in names})


def segmentation_task(config: TrainConfig, device: torch.device) -> Task:
    """An FCN on a data set with label maps."""
    root = Path(config.root) if config.root else None
    train_set = open_data(config.data, config.train_split, root)
    val_set = open_data(config.data, config.val_split, root) if config.val_split else None
    name, network, preprocessing = starting_network(config, len(train_set.class_set))
    info = ModelInfo(
        network=name,
        class_set=train_set.class_set,
        preprocessing=preprocessing,
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

    return Task(
        objective=SegmentationObjective(
            network, preprocessing, config.precision, config, class_weights(config, train_set)
        ),
        samples=SegmentationSamples(train_set, training_transform(augmentation(config), GREY), preprocessing),
        names=[sample.name for sample in train_set.samples],
        validate=None
        if val_set is None
        else lambda network: validate(network, val_set, preprocessing, config, device),
        score="mean_iou",
        save=save,
    )


def starting_network(config: TrainConfig, num_classes: int) -> tuple[str, Network, Preprocessing]:
    """The network to train with its name and preprocessing: a new one, or that of `config.model`.

    Score and upsampling layers of a model with another number of classes start anew.
    """
    shorter_side = config.shorter_side or None
    if not config.model:
        name = f"fcn{config.stride}s" + ("" if config.encoder == "vgg16" else f"-{config.encoder}")
        network = get(name, num_classes)
        if config.encoder_weights != "none":
            start_encoder(network, config.encoder, config.encoder_weights)
        return name, network, Preprocessing(shorter_side=shorter_side)
    model = open_model(config.model)
    network = get(model.info.network, num_classes)
    wanted = network.state_dict()
    given = model.network.state_dict()
    kept = {name: value for name, value in given.items() if value.shape == wanted[name].shape}
    fill(network, wanted | kept, config.model)
    preprocessing = model.info.preprocessing
    if shorter_side is not None:
        preprocessing = dataclasses.replace(preprocessing, shorter_side=shorter_side)
    return model.info.network, network, preprocessing


def validate(
    network: nn.Module,
    dataset: DataSet,
    preprocessing: Preprocessing,
    config: TrainConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Scores pooled over a data set, each image at the network's size, compared at the label's."""
    matrix = np.zeros((len(dataset.class_set),) * 2, np.int64)
    for sample in dataset.samples:
        label = read_label(sample, dataset)
        image = to_tensor(read_image(sample.image).pixels, preprocessing).to(device)
        with torch.inference_mode(), autocast(device, config.precision):
            found = network(image.contiguous(memory_format=torch.channels_last)).float()
            if found.shape[-2:] != label.shape:
                found = nn.functional.interpolate(found, label.shape, mode="bilinear", align_corners=False)
        predicted = found[0].argmax(0).to(torch.uint8).cpu().numpy()
        matrix += confusion_matrix(label, predicted, len(dataset.class_set))
    result = scores(matrix)
    ious = zip(dataset.class_set.names, result.iou, strict=True)
    per_class = {name: round(float(iou), 4) for name, iou in ious if np.isfinite(iou)}
    return {
        "mean_iou": round(float(result.mean_iou), 5),
        "pixel_accuracy": round(float(result.pixel_accuracy), 5),
        "per_class": per_class,
    }


def class_weights(config: TrainConfig, dataset: DataSet) -> Tensor | None:
    """One factor per class: none, or 1 / log(1.02 + share of pixels) (ENet, Paszke et al. 2016), mean one."""
    if config.class_weights == "none":
        return None
    if config.class_weights != "auto":
        raise UsageError(f"class_weights is {config.class_weights!r}; use none or auto")
    counts = np.zeros(256, np.int64)
    for sample in dataset.samples:
        counts += np.bincount(read_label(sample, dataset).ravel(), minlength=256)
    counts = counts[: len(dataset.class_set)]
    weights = 1 / np.log(1.02 + counts / counts.sum())
    return torch.tensor(weights / weights.mean(), dtype=torch.float32)


def classification_task(config: TrainConfig, device: torch.device) -> Task:
    """A torchvision classifier on a folder-per-class data set; its encoder is the result."""
    from torchvision.models import get_model

    if config.encoder not in ENCODERS:
        raise UsageError(
            f"encoder {config.encoder!r} cannot be pretrained; choose one of {', '.join(ENCODERS)}"
        )
    train_set = open_folders(Path(config.data), config.train_split)
    val_set = open_folders(Path(config.data), config.val_split) if config.val_split else None
    network = get_model(config.encoder, weights=None, num_classes=len(train_set.names))
    preprocessing = Preprocessing()

    def save(path: Path, network: nn.Module, record: dict[str, Any]) -> None:
        state = {name: value.contiguous() for name, value in network.state_dict().items()}
        note = f"torchvision {config.encoder}, trained on {train_set.names} for {record['epoch']} epochs"
        write_atomic(path, safetensors.torch.save(state, {"encoder": note}))

    return Task(
        objective=ClassificationObjective(network, preprocessing, config.precision, config.label_smoothing),
        samples=ClassificationSamples(train_set, classifier_transform(augmentation(config))),
        names=[str(path) for path, _ in train_set.images],
        validate=None if val_set is None else lambda network: accuracy(network, val_set, config, device),
        score="accuracy",
        save=save,
    )


def accuracy(
    network: nn.Module, folders: ClassFolders, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Share of images whose highest score is their class; each image is seen whole, at the crop's height."""
    right = 0
    preprocessing = Preprocessing(shorter_side=config.crop[0])
    for path, number in folders.images:
        image = to_tensor(read_image(path).pixels, preprocessing).to(device)
        with torch.inference_mode(), autocast(device, config.precision):
            right += int(network(image).argmax(1).item() == number)
    return {"accuracy": right / len(folders.images)}


def start_encoder(network: Network, encoder: str, source: str) -> None:
    """Copy encoder weights from a file (or torchvision's ImageNet ones) into a network.

    Raises:
        CheckpointError: The file does not hold this encoder.
    """
    if source == "imagenet":
        from torchvision.models import get_model_weights

        state = get_model_weights(encoder).DEFAULT.get_state_dict(progress=False, check_hash=True)
    else:
        state = safetensors.torch.load_file(source)
    target = network.get_submodule("encoder")
    prefix = "encoder." if any(name.startswith("encoder.") for name in state) else ""
    own = {name: state[prefix + name] for name in target.state_dict() if prefix + name in state}
    if not own:
        raise CheckpointError(f"{source} holds no weights of {encoder}")
    fill(target, own, source)
