"""What a training leaves behind beside its weights: curves, TensorBoard events, sample predictions."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segcli.files import write_atomic

CURVES = "curves.png"


def draw_curves(run: Path, history: Sequence[dict[str, Any]], score: str) -> bool:
    """Plot loss, score and learning rate over the epochs; False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    epochs = [record["epoch"] for record in history]
    scored = [record for record in history if score in record]
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(epochs, [record["loss"] for record in history], color="tab:blue")
    left.set(title="training loss", xlabel="epoch")
    middle.plot([r["epoch"] for r in scored], [100 * r[score] for r in scored], color="tab:green")
    middle.set(title=f"validation {score.replace('_iou', ' IU')} (%)", xlabel="epoch")
    right.plot(epochs, [record["lr"] for record in history], color="tab:orange")
    right.set(title="learning rate", xlabel="epoch")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(run / CURVES, buffer.getbuffer())
    return True


class Events:
    """TensorBoard events of a run; writes nothing when tensorboard is not installed.

    Args:
        run: The run folder.
        epochs: How many are done. What an interrupted run wrote about later ones is hidden.
    """

    def __init__(self, run: Path, epochs: int) -> None:
        self.writer = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=epochs + 1)

    def epoch(self, record: dict[str, Any]) -> None:
        """Write the numbers of an epoch's log record."""
        if self.writer is None:
            return
        for name, value in record.items():
            if isinstance(value, int | float) and name != "epoch":
                self.writer.add_scalar(name, value, record["epoch"])
        for name, value in record.get("per_class", {}).items():
            self.writer.add_scalar(f"iou/{name}", value, record["epoch"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
