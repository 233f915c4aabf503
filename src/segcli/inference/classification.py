"""From scores to classes, for images of one size at a time.

What a GPU is asked for is there later: everything comes back in memory of this machine that is filled once
the GPU is done, so nobody waits for it before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segcli.errors import ImageError
from segcli.inference.products import Segmentation
from segcli.models.strips import Strips

# Scores of the full size at a time, whatever the size of the images. GPUs want much to do at a time.
BAND = {"cpu": 1 << 24, "cuda": 1 << 26, "mps": 1 << 24}


@dataclass(frozen=True)
class Classes:
    """What was found in N images of one size. Of a GPU's, nothing may be read before it is done.

    Attributes:
        finite: Whether all scores of an image are finite numbers, bool (N,).
        labels: Class ids (N, H, W), uint8, or int32 above 256 classes.
        confidence: uint8 (N, H, W), see `Segmentation`.
        probabilities: float16 (N, C, H, W), see `Segmentation`.
    """

    finite: Tensor
    labels: Tensor
    confidence: Tensor | None = None
    probabilities: Tensor | None = None

    def of(self, number: int) -> Segmentation:
        """Those of one image.

        Raises:
            ImageError: A score of it is not a finite number.
        """
        if not self.finite[number]:
            raise ImageError("the network gave scores that are not finite numbers; the model is damaged")
        labels = self.labels[number].numpy()
        return Segmentation(
            labels if labels.dtype == np.uint8 else labels.astype(np.uint16),
            None if self.confidence is None else self.confidence[number].numpy(),
            None if self.probabilities is None else self.probabilities[number].numpy(),
        )


def classify(
    scores: Tensor,
    size: tuple[int, int],
    confidence: bool = False,
    probabilities: bool = False,
    upsample: Callable[[Tensor], Tensor] = torch.Tensor.float,
) -> Classes:
    """The classes of images of one size from their scores.

    Args:
        scores: Before softmax, float (N, C, h, w), on any device.
        size: (H, W) of the images. Scores of another size are resized to it bilinearly before the classes are
            decided, so that borders are smooth; some images, or a band of rows, at a time.
        confidence, probabilities: Also compute these.
        upsample: What is done to the scores, (n, C, h, w), before that.
    """

    def full_size(scores: Tensor) -> Tensor:
        scores = upsample(scores.float())
        if tuple(scores.shape[2:]) == size:
            return scores
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)

    most = BAND[scores.device.type]
    each = scores.shape[1] * size[0] * size[1]

    def pieces() -> Iterator[tuple[slice, int, Tensor]]:
        """Scores of the full size (n, C, rows, W), of which images, and the first row."""
        at_a_time = max(1, most // each)
        for first in range(0, len(scores), at_a_time):
            some = slice(first, min(first + at_a_time, len(scores)))
            if each <= most:
                yield some, 0, full_size(scores[some])
                continue
            bands, top = Strips(full_size, scores[some]), 0
            for values in bands.run(scores[some], bands.count(4 * most)):
                yield some, top, values
                top += values.shape[2]

    finite = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    labels = certainty = shares = None
    for some, top, values in pieces():
        count = values.shape[1]
        if labels is None:
            shape = (len(scores), *size)
            labels = _made(shape, torch.uint8 if count <= 256 else torch.int32, scores.device)
            certainty = _made(shape, torch.uint8, scores.device) if confidence else None
            shares = (
                _made((len(scores), count, *size), torch.float16, scores.device) if probabilities else None
            )
        rows = slice(top, top + values.shape[2])
        best, winner = values.max(1)
        finite[some] &= torch.isfinite(best).flatten(1).all(1)
        _fill(labels[some, rows], winner)
        if certainty is not None or shares is not None:
            soft = values.softmax(1)
            if certainty is not None:
                _fill(certainty[some, rows], (soft.amax(1) * 255).round())
            if shares is not None:
                _fill(shares[some, :, rows], soft)
    assert labels is not None
    known = _made((len(scores),), torch.bool, scores.device)
    _fill(known, finite)
    return Classes(known, labels, certainty, shares)


def _made(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of this machine that a device fills, for a GPU such as it can reach on its own."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def _fill(made: Tensor, values: Tensor) -> None:
    """Let the device fill a part of what was made; it converts the values before they travel."""
    made.copy_(values.to(made.dtype), non_blocking=values.device.type == "cuda")
