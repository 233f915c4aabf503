"""Every option of a training, as one flat record that TOML files and the command line fill."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from segcli.errors import UsageError


def option(default: Any, meaning: str) -> Any:
    """A field of `TrainConfig` with its default and what `segcli train --help` says about it."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class TrainConfig:
    """The options of `segcli train`; `config.toml` in the run folder holds them resolved."""

    # What is learned, from what.
    data: str = option("", "Name of a data set, or a path; see `segcli data list`.")
    root: str = option("", "Where the data set is; else found as `segcli data list` says.")
    train_split: str = option("train", "Split to train on; a+b joins two.")
    val_split: str = option("val", "Split to validate on; an empty one trains without validation.")
    task: str = option("segment", "segment, or classify: pretrain an encoder on a folder per class.")
    model: str = option("", "Start from this model (name or file); new classes get new score layers.")
    encoder: str = option("mobilenet_v3_large", "Encoder of a new network: vgg16 or one of torchvision's.")
    stride: int = option(8, "8, 16 or 32: FCN-8s, FCN-16s or FCN-32s.")
    network: str = option("", "Instead of --encoder and --stride, e.g. fcn8s-atonce or deeplabv3_resnet50.")
    encoder_weights: str = option("none", "Start of the encoder: none, imagenet (torchvision's), or a file.")
    preprocessing: str = option(
        "auto", "How pixels become numbers: imagenet, caffe, or auto: as the starting weights want it."
    )
    # How samples are varied.
    crop: tuple[int, int] = option((288, 352), "Height and width of the training crops.")
    scale: tuple[float, float] = option(
        (0.5, 2.0), "Range of the random scale; 1 fits the image into the crop."
    )
    flip: float = option(0.5, "Probability of a horizontal flip.")
    jitter: float = option(0.3, "Largest change of brightness, contrast and saturation; hue: a tenth of it.")
    rotation: float = option(0.0, "Largest rotation, in degrees.")
    blur: float = option(0.0, "Probability of a Gaussian blur.")
    erase: float = option(0.0, "Probability that a rectangle of the image is painted over.")
    paste: float = option(
        0.0, "Probability that half the classes of another sample are pasted over one (ClassMix)."
    )
    shorter_side: int = option(
        0, "Images are resized to this shorter side, now and in predict; 0: as they are."
    )
    # What is minimised.
    loss: str = option("cross-entropy", "cross-entropy, focal, ohem, dice or cross-entropy+dice.")
    summed_loss: bool = option(
        False, "Sum the loss over pixels, as the reference release, instead of the mean."
    )
    class_weights: str = option(
        "none", "none, auto (rare classes count more), or a TOML file of name = weight."
    )
    label_smoothing: float = option(0.0, "Share of probability given to all classes alike.")
    auxiliary: float = option(0.3, "Weight of the losses on the scores at stride 32 and 16.")
    # How.
    epochs: int = option(60, "Passes over the training split.")
    batch_size: int = option(8, "Images per step, over all processes.")
    accumulate: int = option(1, "Split every batch into so many backward passes, to save memory.")
    optimizer: str = option("adamw", "sgd or adamw.")
    lr: float = option(1e-3, "Highest learning rate.")
    momentum: float = option(0.9, "Of sgd; the first beta of adamw.")
    weight_decay: float = option(1e-2, "Not applied to biases and normalisation layers.")
    encoder_lr: float = option(1.0, "Factor on the learning rate of the encoder.")
    bias_lr: float = option(1.0, "Factor on the learning rate of biases.")
    fixed_upsampling: bool = option(False, "Upsampling stays bilinear, as in the reference release.")
    schedule: str = option("poly", "poly (power 0.9), cosine or constant.")
    warmup: float = option(1.0, "Epochs over which the learning rate rises.")
    clip: float = option(0.0, "Largest gradient norm; 0 does not clip.")
    ema: float = option(
        0.0, "Decay of the moving average of weights that is kept; 0 keeps the weights as they are."
    )
    norm_momentum: float = option(0.1, "Momentum of batch normalisation; 0 keeps the encoder's own.")
    sync_norm: bool = option(False, "Batch normalisation over all processes (GPUs only).")
    precision: str = option("auto", "auto, fp32, bf16 or fp16.")
    seed: int = option(0, "Every random choice follows from it.")
    workers: int = option(-1, "Processes that load images; -1: one less than the cores.")
    patience: int = option(0, "Stop after so many validations without a better score; 0: never early.")
    validate_every: int = option(1, "Epochs between validations.")
    # What the model file says.
    storage: str = option("float16", "Type of the weights in the model file: float32, float16 or bfloat16.")
    licence: str = option("", "Licence of the weights.")
    notes: tuple[str, ...] = option((), "Lines that users of the model should read.")


CHOICES: dict[str, tuple[object, ...]] = {
    "stride": (8, 16, 32),
    "task": ("segment", "classify"),
    "preprocessing": ("auto", "imagenet", "caffe"),
    "loss": ("cross-entropy", "focal", "ohem", "dice", "cross-entropy+dice"),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("poly", "cosine", "constant"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "storage": ("float32", "float16", "bfloat16"),
}
MACHINE_OPTIONS = ("root", "workers")  # where things are and who does them: they do not change the result
POSITIVE = ("epochs", "batch_size", "accumulate", "lr", "validate_every")

# Long, Shelhamer & Darrell's release: voc-fcn8s-atonce/solver.prototxt, voc_layers.py and net.py. The crop
# holds any image of VOC as it is; 300,000 iterations are 35 epochs of SBD's 8,498 images.
FCN_HEAVY: dict[str, object] = {
    "network": "fcn8s-atonce",
    "crop": (500, 500),
    "epochs": 35,
    "batch_size": 1,
    "loss": "cross-entropy",
    "summed_loss": True,
    "auxiliary": 0.0,
    "optimizer": "sgd",
    "lr": 1e-10,
    "momentum": 0.99,
    "weight_decay": 5e-4,
    "bias_lr": 2.0,
    "fixed_upsampling": True,
    "schedule": "constant",
    "warmup": 0.0,
    "scale": (1.0, 1.0),
    "flip": 0.0,
    "jitter": 0.0,
}
RECIPES: dict[str, dict[str, object]] = {"fcn-heavy": FCN_HEAVY}


def read_config(path: Path) -> dict[str, Any]:
    """The options in a TOML file.

    Raises:
        UsageError: The file is not TOML, or has an unknown option.
    """
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid TOML: {error}") from error
    return options


def resolve(*layers: dict[str, Any]) -> TrainConfig:
    """One configuration from several sets of options; later ones win.

    Raises:
        UsageError: An option is unknown, or its value is of the wrong type or out of range.
    """
    types = get_type_hints(TrainConfig)
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name not in types:
                near = difflib.get_close_matches(name, types, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UsageError(f"unknown training option {name!r}{hint}")
            merged[name] = _typed(name, value, types[name])
    config = TrainConfig(**merged)
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            listed = ", ".join(map(str, allowed))
            raise UsageError(f"{name} is {getattr(config, name)!r}; choose one of {listed}")
    for name in POSITIVE:
        if getattr(config, name) <= 0:
            raise UsageError(f"{name} is {getattr(config, name)}; it must be above 0")
    if config.batch_size % config.accumulate:
        raise UsageError(
            f"batch_size {config.batch_size} cannot be split into {config.accumulate} equal parts"
        )
    return config


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """A value as the option's type; whole numbers pass for floats, lists for tuples."""
    if get_origin(wanted) is tuple and isinstance(value, list | tuple):
        item, *rest = get_args(wanted)
        if rest != [Ellipsis] and len(value) != 1 + len(rest):
            raise UsageError(f"{name} is {value!r}; it needs {1 + len(rest)} values")
        return tuple(_typed(name, part, item) for part in value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_origin(wanted) is tuple or not isinstance(value, wanted) or (wanted is int and value is True):
        raise UsageError(f"{name} is {value!r}; it must be {_in_words(wanted)}")
    return value


def _in_words(wanted: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(wanted, "a list")


def to_toml(config: TrainConfig) -> str:
    """The configuration as TOML that `read_config` reads back."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in dataclasses.asdict(config).items())
