"""OpenVINO models computed in 8-bit integers: ranges of what convolutions see, and the model with them.

A convolution's weights are rounded to 255 steps per output channel, its input to 256 steps over the range
that was seen on a few images. Both are noted in the model as `FakeQuantize`; where OpenVINO finds them on
both sides of a convolution it computes that in integers. (The scheme of Jacob et al. 2018, "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", without training.) The ranges
are all there is to know besides the weights: a few numbers, so the same ones always give the same network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
from openvino import opset13 as operations
from openvino.passes import ConstantFolding, Manager

KINDS = ("Convolution", "GroupConvolution")
INPUT_LEVELS = 256
WEIGHT_LEVELS = 255  # -127 to 127
SMALLEST = 1e-12  # range of an input or a channel that is zero throughout

Ranges = list[tuple[float, float]]  # lowest and highest input of every convolution, in the model's order


def convolutions(model: openvino.Model) -> list[Any]:
    """The convolutions of a model with constant weights, in an order that is always the same."""
    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    return [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() in KINDS and node.input_value(1).get_node().get_type_name() == "Constant"
    ]


def observing(model: openvino.Model) -> int:
    """Let a model also give the lowest and the highest input of every convolution, as further outputs.

    Returns:
        How many convolutions there are: two outputs each, after the model's own.
    """
    found = convolutions(model)
    outputs = []
    for node in found:
        axes = np.arange(4)
        for reduce in (operations.reduce_min, operations.reduce_max):
            outputs.append(reduce(node.input_value(0), axes).output(0))
    model.add_outputs(outputs)
    return len(found)


def quantize(model: openvino.Model, ranges: Ranges) -> None:
    """Note in a model in which steps the inputs and weights of its convolutions are to be rounded.

    Raises:
        ValueError: The ranges are those of another model.
    """
    found = convolutions(model)
    if len(found) != len(ranges):
        raise ValueError(f"{len(ranges)} ranges for {len(found)} convolutions")
    for node, (lowest, highest) in zip(found, ranges, strict=True):
        node.input(0).replace_source_output(_rounded_input(node.input_value(0), lowest, highest))
        node.input(1).replace_source_output(_rounded_weights(node))


def _rounded_input(value: Any, lowest: float, highest: float) -> Any:
    """Zero, which padding adds, is one of the steps: 0 to 255, or -128 to 127 where there are negatives."""
    if -lowest < highest / 255:  # less than a step below zero
        bottom, top = 0.0, highest
    else:
        step = max(-lowest / 128, highest / 127, SMALLEST)
        bottom, top = -128 * step, 127 * step
    limits = [np.float32(limit) for limit in (bottom, top)]
    return operations.fake_quantize(value, *limits, *limits, INPUT_LEVELS).output(0)


def _rounded_weights(node: Any) -> Any:
    weights = node.input_value(1)
    values = weights.get_node().data
    inner = tuple(range(2 if node.get_type_name() == "GroupConvolution" else 1, values.ndim))
    limit = np.maximum(np.abs(values).max(inner, keepdims=True), SMALLEST).astype(np.float32)
    return operations.fake_quantize(weights, -limit, limit, -limit, limit, WEIGHT_LEVELS).output(0)
