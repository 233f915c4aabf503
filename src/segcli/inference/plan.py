"""What `segcli predict` computes with, in plain values: any process can be told, and set itself up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segcli.inference.segmentation import Segmenter
    from segcli.models.checkpoint import Model
    from segcli.models.quantized import Ranges


@dataclass(frozen=True)
class Plan:
    """See `segmentation.Segmenter` for what is not said here."""

    model_file: Path
    device: str  # a name for `device.pick_runtime`
    precision: str
    kinds: Sequence[str]
    batch_size: int | None = None
    shorter_side: int | None = None
    opacity: float = 0.5
    tta: str = "none"
    runtime: str = "torch"
    tile: str = "auto"
    memory: int | None = None  # of this process
    processes: int = 1  # among which the threads of this machine are divided
    ranges: Mapping[str, Ranges] | None = None

    def start(self, model: Model | None = None) -> Segmenter:
        """Load the model onto the device.

        Args:
            model: What the file holds, where it was read before.

        Raises:
            UsageError: The device is not there, or the model cannot be used.
        """
        import torch

        from segcli.device import exact_float32, pick_runtime
        from segcli.inference.segmentation import Segmenter
        from segcli.models.checkpoint import load_model

        device = pick_runtime(self.runtime, self.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_num_threads(1)  # others would only wait, and take the time of those that decode
            if self.precision == "fp32":
                exact_float32()
        elif self.processes > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.processes))
        return Segmenter(
            model or load_model(self.model_file),
            device,
            self.kinds,
            self.batch_size,
            self.shorter_side,
            self.opacity,
            self.tta,
            self.precision,
            self.runtime,
            self.tile,
            self.memory,
            self.ranges,
        )
