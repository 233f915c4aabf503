"""Networks computed by OpenVINO, on the processor: an extra library with faster convolutions.

Only the convolutions go there. Which window of a VGG16 network is computed, the head and the last upsampling
stay as they are, in PyTorch and float32, so that there is one description of every network. A part of it is
exported once, with its height and width open: a folder of mixed sizes needs no further compilation.

OpenVINO is reached by its frontend for PyTorch; `openvino.convert_model` would ask to send usage data home.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segcli.errors import UsageError
from segcli.models.fcn import FCN, Features, Network
from segcli.models.prepared import interpolating, sharing_copy
from segcli.models.vgg import VGG16FCN
from segcli.models.windowed import BY_MATRIX, BY_TILES, STAGES, WindowedVGG16, as_matrix
from segcli.models.winograd import Product

if TYPE_CHECKING:
    import openvino
    from torch.export.decomp_utils import CustomDecompTable

    from segcli.models.quantized import Ranges

EXAMPLE = (96, 128)  # of an image or a map for the export; any other size does as well
REMEMBERED = 256  # shapes of layers for which OpenVINO keeps what it prepared; 5000 if it is not told


def with_openvino(network: Network, precision: str, ranges: Mapping[str, Ranges] | None = None) -> Network:
    """A network whose convolutions are computed by OpenVINO: float32 images to float32 scores, one at a time.

    Args:
        network: On the CPU, in evaluation mode. Its weights must not change while the result is in use.
        precision: fp32, bf16 or int8.
        ranges: For int8, what `Ranges` of every part were seen, see `observed`.

    Raises:
        UsageError: OpenVINO cannot compute this network or precision.
    """
    if precision not in ("fp32", "bf16", "int8"):
        raise UsageError(f"--runtime openvino computes in fp32, bf16 or int8, not in {precision}")
    if precision == "int8":
        if ranges is None:
            raise UsageError("--precision int8 needs images to calibrate on; use it with predict")
        return _computed(network, Compiler("f32", quantized=dict(ranges)))
    return _computed(network, Compiler("f32" if precision == "fp32" else "bf16"))


def observed(network: Network, ranges: dict[str, Ranges]) -> Network:
    """The network in fp32; what its convolutions see widens `ranges`, which begin empty, with every image."""
    return _computed(network, Compiler("f32", seen=ranges))


def _computed(network: Network, compiler: Compiler) -> Network:
    try:
        return OpenVinoNetwork(network, compiler)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
        raise UsageError(f"OpenVINO cannot compute this network ({reason}); use --runtime torch") from error


class OpenVinoNetwork(Network):
    """See `with_openvino`."""

    def __init__(self, network: Network, compiler: Compiler) -> None:
        super().__init__()
        self.num_classes = network.num_classes
        self.stride = network.stride
        self.network = interpolating(sharing_copy(network).eval())
        self.computed: Callable[[Tensor], Sequence[Tensor]]
        if isinstance(self.network, VGG16FCN):
            self.computed = WindowedByOpenVino(self.network, compiler).features
        elif isinstance(self.network, FCN):
            self.computed = compiler.compiled("all", self.network, self.network.features, 3)
        else:
            self.computed = compiler.compiled("all", self.network, self.network.score_pyramid, 3)

    def score_pyramid(self, images: Tensor) -> list[Tensor]:
        if isinstance(self.network, FCN):
            return self.network.score_features(Features(*self.computed(images)))
        return [scores.clone() for scores in self.computed(images)]

    def upsample(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        return self.network.upsample(scores, size)


class WindowedByOpenVino(WindowedVGG16):
    """A VGG16 network where the image can reach.

    In fp32 the stages of many channels, fc6 and fc7 are products of matrices here as well, and OpenVINO
    multiplies. In other precisions it computes them as the convolutions that they are.
    """

    def __init__(self, network: VGG16FCN, compiler: Compiler) -> None:
        by_products = compiler.precision == "f32" and not compiler.for_int8
        super().__init__(network, by_products)
        plain = WindowedVGG16(network)
        self._stages = {
            stage: compiler.compiled(
                f"stage {stage}", plain, partial(window_of, plain, stage), self._channels(stage)
            )
            for stage in STAGES
            if not (by_products and stage in BY_TILES)
        }
        self._whole: Callable[[Tensor], Sequence[Tensor]] | None = None
        self._products: dict[str, Product] = {}
        if by_products:
            self._products = {name: compiler.product(self.kernels(name)) for name in self.by_tiles}
            for name in BY_MATRIX:
                matrix = as_matrix(self._convolution(name).weight)
                self._products[name] = compiler.product(matrix, self._bias(name))
        else:
            self._whole = compiler.compiled("fc7", network, partial(fc7_of, network), self._channels(5))

    def _channels(self, stage: int) -> int:
        return self._convolution(f"conv{stage}_1").in_channels

    def compute_window(self, u: Tensor, stage: int) -> Tensor:
        return self._stages[stage](u)[0] if stage in self._stages else super().compute_window(u, stage)

    def compute_whole(self, pool4: Tensor) -> Tensor:
        return self._whole(pool4)[0] if self._whole else super().compute_whole(pool4)

    def product(self, name: str) -> Product:
        return self._products[name]


def window_of(network: WindowedVGG16, stage: int, u: Tensor) -> Tensor:
    """What `compute_window` gives, pooled in one operation."""
    return network.pooled_window(u, stage, partial(F.max_pool2d, kernel_size=2))


def fc7_of(network: VGG16FCN, pool4: Tensor) -> Tensor:
    """What the network makes of pool4, with fc6 as a convolution."""
    pool5 = network.encode_stage(pool4, 5)
    return F.relu(network.fc7(F.relu(network.fc6(pool5))))


class Part(nn.Module):
    """A function of a map that uses the weights of `owner`, as a module that can be exported."""

    def __init__(self, owner: nn.Module, function: Callable[[Tensor], Tensor | Sequence[Tensor]]) -> None:
        super().__init__()
        self.owner = owner
        self.function = function

    def forward(self, maps: Tensor) -> tuple[Tensor, ...]:
        found = self.function(maps)
        return (found,) if isinstance(found, Tensor) else tuple(found)


@dataclass(frozen=True)
class Compiler:
    """Makes OpenVINO compute functions of PyTorch.

    Attributes:
        precision: f32 or bf16, for OpenVINO.
        seen: Is told what convolutions see, by the name of the part.
        quantized: Compute in 8-bit integers with these ranges, by the name of the part.
    """

    precision: str
    seen: dict[str, Ranges] | None = None
    quantized: dict[str, Ranges] | None = None

    @property
    def for_int8(self) -> bool:
        return self.seen is not None or self.quantized is not None

    def compiled(
        self,
        name: str,
        owner: nn.Module,
        function: Callable[[Tensor], Tensor | Sequence[Tensor]],
        channels: int,
    ) -> Callable[[Tensor], list[Tensor]]:
        """A function of a map, (1, `channels`, H, W) of any size, as OpenVINO computes it.

        What it gives holds until it is called again.

        Args:
            name: Of this part of the network.
            owner: Whose weights it uses.
            function: From one tensor to one or several.
            channels: Of its argument.
        """
        from segcli.models.quantized import observing, quantize

        model = _converted(owner, function, channels)
        own = len(model.outputs)
        if self.quantized is not None:
            quantize(model, self.quantized[name])
        if self.seen is not None:
            self.seen[name] = [(math.inf, -math.inf)] * observing(model)
        run = self._runnable(model)

        def compute(maps: Tensor) -> list[Tensor]:
            outputs = run(maps)
            if self.seen is not None:
                extremes = [output.item() for output in outputs[own:]]
                now = zip(self.seen[name], extremes[::2], extremes[1::2], strict=True)
                self.seen[name] = [(min(old[0], low), max(old[1], high)) for old, low, high in now]
            return outputs[:own]

        return compute

    def product(self, weights: Tensor, bias: Tensor | None = None) -> Product:
        """What multiplies by weights, (..., O, K), and adds a bias, (O,), for any number of pixels."""
        import openvino
        from openvino import opset13 as operations

        *leading, _, inner = weights.shape if weights.ndim > 2 else (1, *weights.shape)
        pixels = operations.parameter([*leading, -1, inner], openvino.Type.f32)
        factor = operations.constant(weights.numpy(), shared_memory=True)
        multiplied = operations.matmul(pixels, factor, transpose_a=False, transpose_b=True)
        if bias is not None:
            multiplied = operations.add(multiplied, operations.constant(bias.numpy()))
        run = self._runnable(openvino.Model([multiplied], [pixels]))
        return lambda values: run(values)[0]

    def _runnable(self, model: openvino.Model) -> Callable[[Tensor], list[Tensor]]:
        """A function from its input to its outputs, which hold until it is called again."""
        import openvino

        options = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # other processes and threads want the processors, too
            "CPU_RUNTIME_CACHE_CAPACITY": REMEMBERED,
        }
        run = openvino.Core().compile_model(model, "CPU", options)

        def compute(values: Tensor) -> list[Tensor]:
            outputs = run(values.float().contiguous().numpy(), share_inputs=True, share_outputs=True)
            return [torch.from_numpy(output) for output in outputs.values()]

        return compute


def _converted(
    owner: nn.Module, function: Callable[[Tensor], Tensor | Sequence[Tensor]], channels: int
) -> openvino.Model:
    """A function of a map in OpenVINO's own form, for any height and width."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    example = torch.zeros(1, channels, *EXAMPLE)
    # It gives tracebacks in words where it cannot say what sizes are allowed; all of them are.
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    any_size = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        exported = torch.export.export(Part(owner, function).eval(), (example,), dynamic_shapes=(any_size,))
    # The decoder has to live until the model is converted.
    decoder = TorchFXPythonDecoder(exported.run_decompositions(_decompositions()).module())
    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))


def _decompositions() -> CustomDecompTable:
    """How PyTorch's operations are broken down: those that OpenVINO knows stay whole."""
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
    from torch.export.decomp_utils import CustomDecompTable

    table = CustomDecompTable()  # type: ignore[no-untyped-call]
    for operation in ops_to_not_decompose():
        if operation in table:
            table.pop(operation)  # type: ignore[no-untyped-call]
    return table
