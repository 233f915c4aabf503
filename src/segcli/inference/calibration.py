"""What `--precision int8` needs to know: which numbers the convolutions see on the user's own images.

Some of the inputs are chosen by a hash of their names, so the same inputs give the same choice in any order.
Three of four are looked at, the others are held out to tell how much the label maps change. The ranges found
are kept in `_run/calibration.json`: a run that goes on computes with the very same network.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from segcli.errors import UsageError
from segcli.inference.ahead import Ahead
from segcli.inference.decoders import Decoders
from segcli.inference.layout import RUN_FOLDER
from segcli.inference.sources import Input, PassedOver, Sources, discover
from segcli.inference.storage import Storage
from segcli.models.checkpoint import Model
from segcli.models.fcn import Network
from segcli.models.preprocessing import Preprocessing, normalize, to_pixels

if TYPE_CHECKING:
    from segcli.models.quantized import Ranges

FILE = f"{RUN_FOLDER}/calibration.json"
HELD_OUT = 4  # every fourth image
SIDE = 1024  # pixels of an image that are looked at, down and across


@dataclass(frozen=True)
class Calibration:
    """Ranges, and how they were found.

    Attributes:
        weights: SHA-256 of the model file.
        size: The shorter side at which images are computed; None is the model's.
        ranges: Of every part of the network, see `openvino_networks.with_openvino`.
        images: How many were looked at.
        held_out: How many others were compared; 0 when there were too few, and the same ones were.
        agreement: The share of their pixels that have the class they have in fp32.
    """

    weights: str
    size: int | None
    ranges: Mapping[str, Ranges]
    images: int
    held_out: int
    agreement: float

    @property
    def digest(self) -> str:
        """A short name for all that results depend on."""
        return hashlib.sha256(json.dumps(self.ranges, sort_keys=True).encode()).hexdigest()[:16]


def kept(out: Storage, weights: str, size: int | None) -> Calibration | None:
    """The calibration in an output folder, if it is of this model and size."""
    try:
        found = Calibration(**json.loads(out.read(FILE) or b"null"))
    except (TypeError, ValueError):
        return None
    return found if (found.weights, found.size) == (weights, size) else None


def keep(out: Storage, calibration: Calibration) -> None:
    """Write it for the next run. Raises MachineError."""
    out.write(FILE, json.dumps(asdict(calibration), indent=1).encode())


def calibrate(
    model: Model, weights: str, size: int | None, sources: Sources, count: int, workers: int, memory: int
) -> Calibration:
    """Look at up to `count` of the inputs, the held out ones included.

    Args:
        model: The network with its preprocessing.
        weights, size: See `Calibration`.
        sources: The inputs.
        count: Of images.
        workers: Processes that read them.
        memory: Bytes that this may take: an image that needs more is not looked at.

    Raises:
        UsageError: No image can be read, or OpenVINO cannot compute the network.
    """
    from segcli.models.openvino_networks import with_openvino

    preprocessing = model.info.preprocessing
    if size is not None:
        preprocessing = replace(preprocessing, shorter_side=size)
    inputs = _seen(_chosen(sources, count), sources, workers, memory, preprocessing)
    if not inputs:
        raise UsageError("--precision int8: none of the images that it would be calibrated on can be read")
    held_out = inputs[HELD_OUT - 1 :: HELD_OUT]
    looked_at = [tensor for number, tensor in enumerate(inputs, 1) if number % HELD_OUT]
    ranges, exact = ranges_on(model.network, looked_at)
    reduced = with_openvino(model.network, "int8", ranges)
    same = total = 0
    with torch.inference_mode():
        for tensor in held_out or looked_at:
            labels = [network(tensor).argmax(1) for network in (exact, reduced)]
            same += int((labels[0] == labels[1]).sum())
            total += labels[0].numel()
    return Calibration(weights, size, ranges, len(looked_at), len(held_out), same / total)


def ranges_on(network: Network, inputs: Iterable[Tensor]) -> tuple[dict[str, Ranges], Network]:
    """What the convolutions of a network see on some inputs, float (1, 3, H, W); and it in fp32."""
    from segcli.models.openvino_networks import observed

    found: dict[str, Ranges] = {}
    exact = observed(network, found)
    with torch.inference_mode():
        for tensor in inputs:
            exact.score_pyramid(tensor)
    return dict(found), exact  # later inputs do not change the copy


def _chosen(sources: Sources, count: int) -> list[Input]:
    inputs = (item for item in discover(sources, PassedOver()) if not item.problem)
    return heapq.nsmallest(
        count, inputs, key=lambda item: hashlib.sha256(repr(item.output).encode()).digest()
    )


def _seen(
    items: list[Input], sources: Sources, workers: int, memory: int, preprocessing: Preprocessing
) -> list[Tensor]:
    """What a network sees of the images that can be read, in their order, float (1, 3, H, W).

    Of large ones it is a corner: images that are held one beside the other need little memory then.
    """
    stop = threading.Event()
    decoders = Decoders(workers, "image", stop, remote=sources.may_be_remote, memory=memory)
    found: dict[str, Tensor] = {}
    for picture in decoders.run(Ahead(iter(items), len(items) or 1, stop)):
        if picture.pixels is not None:
            pixels = to_pixels(picture.pixels, preprocessing)[:, :, :SIDE, :SIDE].clone()
            found[picture.item.source] = normalize(pixels, preprocessing)
        decoders.release(picture)
    return [found[item.source] for item in items if item.source in found]
