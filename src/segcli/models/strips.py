"""A function of an image computed strip by strip, so that memory does not grow with the image's height.

A convolution needs only a few rows of its input to give a few rows of its output. So the rows of an image go
through a network in strips, from top to bottom, and every operation keeps only the rows that its next strip
needs again. No number is computed twice, and there is no margin to choose: how far an operation reaches
follows from its kernel, stride and padding.

    tracing    The function runs once on a `_Map`, a tensor without numbers that notes what is done to it.
    running    Strip by strip, each operation computes the rows that those after it ask for.

Global pooling, and every operation that is not in `OPERATIONS`, sees its input whole. Such operations divide
the work into phases; only maps that cross from one phase to a later one are kept whole.

The result is that of the function itself, up to rounding: libraries sum up in another order when a tensor has
another shape. Strips have the full width, where that happens least.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

T = TypeVar("T", bound=Callable[..., Tensor])

SMALL = 1 << 18  # pixels of an image that is computed whole, whatever the network
# Bytes of the largest operation's input and output in one strip: little on processors, where small strips
# cost nothing, and more on GPUs, which want much to do at a time.
WORKING = {"cpu": 1 << 28, "cuda": 1 << 32, "mps": 1 << 30}
REMEMBERED = 16  # sizes of images whose operations are kept
Shape = tuple[int, ...]  # (N, C, H, W)


class Rows(NamedTuple):
    """How an operation makes the rows start to stop - 1 of its output.

    Attributes:
        shape: Of the whole output.
        reach: From (start, stop) to the rows of its inputs that it needs; they may lie beyond the edges.
        compute: From what there is of these rows, of each input, how many are missing above and below, start
            and stop, to the output's rows, (N, C, stop - start, W).
    """

    shape: Shape
    reach: Callable[[int, int], tuple[int, int]]
    compute: Callable[[list[Tensor], int, int, int, int], Tensor]


@dataclass(eq=False)
class _Step:
    """One operation. In `args` and `kwargs` a map is represented by the step that makes it."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[_Step]
    dtype: torch.dtype
    shape: Shape = ()  # of the output
    rows: Rows | None = None  # None: it sees its inputs whole
    consumers: list[_Step] = field(default_factory=list)
    phase: int = 0
    kept: bool = False  # whole, for a later phase
    done: int = 0  # rows that have been computed
    held: Tensor = field(default_factory=lambda: torch.empty(0))  # the last of them, or all that are `kept`

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", "")

    @property
    def length(self) -> int:
        return self.shape[2]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def in_place(self) -> bool:
        return bool(self.kwargs.get("inplace")) or (self.name.endswith("_") and not self.name.endswith("__"))

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    def call(self, parts: Sequence[Tensor]) -> Tensor:
        """The operation itself on parts of its inputs; others still need them, so it does not change them."""
        values = dict(zip(self.inputs, parts, strict=True))
        source = self.inputs[0]
        if self.in_place and (source.kept or len(source.consumers) > 1):
            values[source] = values[source].clone()
        args, kwargs = (_replaced(given, _Step, values.__getitem__) for given in (self.args, self.kwargs))
        return self.function(*args, **kwargs)

    def needs(self, number: int, start: int, stop: int) -> tuple[int, int]:
        """The rows of an input that its rows start to stop - 1 are made of; they may lie beyond the edges."""
        length = self.inputs[number].length
        if self.rows is None or (self.name in POINTWISE and length == 1):  # one row goes with all others
            return 0, length
        return self.rows.reach(start, stop)

    def advance(self, stop: int) -> Tensor:
        """Compute the rows from `done` to stop - 1."""
        parts, above, below = [], 0, 0
        for number, source in enumerate(self.inputs):
            first, end = self.needs(number, self.done, stop)
            above, below = max(0, min(0, end) - first), max(0, end - max(first, source.length))
            parts.append(source.part(first, end))
        if self.rows is None:
            new = self.call(parts)
        else:
            new = self.rows.compute(parts, above, below, self.done, stop)
        if self.kept:
            if not self.done:
                last = new.is_contiguous(memory_format=torch.channels_last)
                layout = torch.channels_last if last else torch.contiguous_format
                self.held = torch.empty(self.shape, dtype=new.dtype, device=new.device, memory_format=layout)
            self.held[:, :, self.done : stop] = new
        else:
            self.held = torch.cat([self.held, new], 2) if self.held.shape[2] else new
        self.done = stop
        return new

    def part(self, start: int, stop: int) -> Tensor:
        """The rows from start to stop - 1, but for those beyond the edges."""
        first = 0 if self.kept else self.done - self.held.shape[2]
        return self.held[:, :, max(0, start) - first : max(0, stop) - first]

    def forget(self) -> None:
        """Let go of the rows that no consumer needs again."""
        if self.kept:
            return
        again = self.done
        for consumer in self.consumers:
            for number, source in enumerate(consumer.inputs):
                if source is self and consumer.done < consumer.length:
                    again = min(again, max(0, consumer.needs(number, consumer.done, consumer.done + 1)[0]))
        first = self.done - self.held.shape[2]
        if again > first:
            self.held = self.held[:, :, again - first :].clone()


class _Map(Tensor):
    """A tensor of zeros that takes no memory. What is done to it is noted, not done."""

    step: _Step

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        maps: list[_Map] = []
        _replaced([*args, *kwargs.values()], _Map, maps.append)
        with torch._C.DisableTorchFunctionSubclass():
            if function.__name__ in QUERIES:
                answer = function(*args, **kwargs)
                if not isinstance(answer, Tensor):
                    return answer
            dtype = functools.reduce(torch.promote_types, [map_.dtype for map_ in maps])
            if any(isinstance(each, float) for each in args):
                dtype = dtype if dtype.is_floating_point else torch.float32
            given, named = (_replaced(each, _Map, lambda map_: map_.step) for each in (args, kwargs))
            step = _Step(function, given, named, [map_.step for map_ in maps], dtype)
            if step.name in OPERATIONS:
                step.rows = OPERATIONS[step.name](step)
            if step.rows is not None:
                step.shape = step.rows.shape
            elif step.name == "adaptive_avg_pool2d" and _pair(step.argument(1, "output_size")) == (1, 1):
                step.shape = (*step.inputs[0].shape[:2], 1, 1)
            else:
                bare, named = (
                    _replaced(each, Tensor, lambda tensor: tensor.to("meta")) for each in (args, kwargs)
                )
                result = function(*bare, **named)
                step.shape, step.dtype = tuple(result.shape), result.dtype
            made = maps[0] if step.in_place else _map(step, maps[0].device)
        made.step = step
        return made


def _map(step: _Step, device: torch.device) -> _Map:
    made = torch.zeros((), dtype=step.dtype, device=device).expand(step.shape).as_subclass(_Map)
    made.step = step
    return made


QUERIES = {"__get__", "dim", "size", "__len__", "numel", "is_floating_point"}


def _replaced(value: Any, kind: type, replace: Callable[[Any], Any]) -> Any:
    """A copy of nested tuples, lists and dicts in which every value of a kind is replaced."""
    if isinstance(value, kind):
        return replace(value)
    if type(value) in (tuple, list):
        return type(value)(_replaced(each, kind, replace) for each in value)
    if type(value) is dict:
        return {name: _replaced(each, kind, replace) for name, each in value.items()}
    return value


# ---- running ----


class InStrips:
    """A function of an image, computed in as many strips as its size asks for.

    How an image is computed depends on its size, never on the memory that happens to be free: the same image
    always gives the same bits.

    Args:
        function: Takes an image, (N, 3, H, W), and gives a map, (N, C, h, w).
        rows: Of the image, in a strip; 0 computes all of them at once, None lets the image's size decide.
        working: Bytes of the largest operation in a strip; None takes what suits the device.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], rows: int | None = None, working: int | None = None
    ) -> None:
        self._function = function
        self._rows = rows
        self._working = working
        self._remembered: dict[tuple[Any, ...], Strips] = {}

    def __call__(self, image: Tensor) -> Tensor:
        """The map as a whole."""
        if self.count(image) == 1:
            return self._function(image)
        whole, done = image.new_empty(0), 0
        for rows in self.bands(image):
            if done == 0:
                whole = rows.new_empty(self.strips(image).output.shape)
            whole[:, :, done : done + rows.shape[2]] = rows
            done += rows.shape[2]
        return whole

    def bands(self, image: Tensor) -> Iterator[Tensor]:
        """The map's rows from top to bottom, some at a time."""
        count = self.count(image)
        if count == 1:
            yield self._function(image)
        else:
            yield from self.strips(image).run(image, count)

    def count(self, image: Tensor) -> int:
        """In how many strips an image is computed."""
        size, _, height, width = image.shape
        if self._rows is not None:
            return -(-height // self._rows) if self._rows else 1
        if size * height * width <= SMALL:
            return 1
        return self.strips(image).count(self.working(image.device))

    def working(self, device: torch.device) -> int:
        """Bytes of the largest operation's input and output in a strip."""
        return self._working or WORKING[device.type]

    def memory(self, image: Tensor) -> int:
        """The bytes that this takes besides the image and the weights; roughly, rather too many than too few.

        Half as much again as the maps, for what the libraries allocate beside them.
        """
        working = self.working(image.device)
        if image.shape[0] * image.shape[2] * image.shape[3] <= SMALL:
            return working
        strips = self.strips(image)
        if self.count(image) == 1:
            return strips.whole() * 3 // 2
        return strips.kept() + strips.output.bytes + 2 * working * 3 // 2

    def strips(self, image: Tensor) -> Strips:
        """The operations on an image of this shape."""
        key = tuple(image.shape), image.dtype, image.device
        if key not in self._remembered:
            while len(self._remembered) >= REMEMBERED:
                self._remembered.pop(next(iter(self._remembered)))
            self._remembered[key] = Strips(self._function, image)
        return self._remembered[key]


class Strips:
    """A function that makes one map of an image, ready to run on images of one size.

    Args:
        function: Takes an image, (N, 3, H, W), and gives a map, (N, C, h, w).
        image: The image; only its shape, type and device matter.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], image: Tensor) -> None:
        self.image = _Step(function, (), {}, [], image.dtype, tuple(image.shape), kept=True)
        result = function(_map(self.image, image.device))
        assert isinstance(result, _Map), "the function has to do something to the image"
        self.output = result.step
        self.steps = _in_order(self.output)
        for step in self.steps:
            for source in dict.fromkeys(step.inputs):
                source.consumers.append(step)
                step.phase = max(step.phase, source.phase + (step.rows is None))
        for step in self.steps:
            step.kept = step is self.image or any(each.phase > step.phase for each in step.consumers)

    def largest(self) -> int:
        """The bytes of the input and output of the operation where these are the most, on the whole image."""
        return max(step.bytes + sum(source.bytes for source in step.inputs) for step in self.steps)

    def count(self, working: int) -> int:
        """In how many strips its input and output take up to `working` bytes, roughly."""
        return max(1, -(-self.largest() // working))

    def kept(self) -> int:
        """The most bytes of maps that are kept whole at a time."""
        maps = [step for step in self.steps if step.kept and step is not self.image]
        phases = range(self.output.phase + 1)
        return max(sum(s.bytes for s in maps if s.phase <= phase <= _last_phase(s)) for phase in phases)

    def whole(self) -> int:
        """The most bytes of maps that there are at a time when the image is computed whole."""
        most, last = 0, {source: number for number, step in enumerate(self.steps) for source in step.inputs}
        for number, step in enumerate(self.steps):
            live = [each for each in self.steps[: number + 1] if each is step or last[each] >= number]
            most = max(most, sum(each.bytes for each in live))
        return most

    def run(self, image: Tensor, count: int) -> Generator[Tensor, None, None]:
        """The rows of the output from top to bottom, in up to `count` strips, each (N, C, rows, w)."""
        self._begin(image)
        try:
            for phase in range(self.output.phase + 1):
                for number in range(1, count + 1):
                    yield from self._advance(phase, number, count)
                for step in self.steps:
                    if step.kept and _last_phase(step) <= phase:
                        step.held = image.new_empty(0)
        finally:
            self._begin(image.new_empty(0))  # whatever happened, no memory is held

    def _begin(self, image: Tensor) -> None:
        for step in self.steps:
            size, channels, _, width = step.shape
            step.done = 0
            step.held = torch.empty((size, channels, 0, width), dtype=step.dtype, device=image.device)
        self.image.done, self.image.held = self.image.length, image

    def _advance(self, phase: int, number: int, count: int) -> Iterator[Tensor]:
        """Strip `number` of a phase, and the rows of the output that it gives."""
        now = [step for step in self.steps if step.phase == phase and step is not self.image]
        stops = self._stops(now, number, count)
        for step in now:
            if stops[step] > step.done:
                new = step.advance(stops[step])
                if step is self.output:
                    yield new
                del new
            for source in step.inputs:
                if not source.kept and source.consumers[-1] is step:
                    source.forget()
        self.output.forget()

    def _stops(self, now: list[_Step], number: int, count: int) -> dict[_Step, int]:
        """How far every operation of a phase has to be after strip `number` of `count`."""
        stops = dict.fromkeys(now, 0)
        for step in reversed(now):
            if step.kept or step is self.output:
                stops[step] = max(stops[step], step.length * number // count)
            if stops[step] and step.rows is None:
                stops[step] = step.length
            if stops[step] > step.done:
                for place, source in enumerate(step.inputs):
                    if source in stops:
                        end = min(step.needs(place, step.done, stops[step])[1], source.length)
                        stops[source] = max(stops[source], end)
        return stops


def _in_order(output: _Step) -> list[_Step]:
    """All operations that the output depends on, each after its inputs."""
    order: dict[_Step, None] = {}
    waiting = [output]
    while waiting:
        missing = [source for source in waiting[-1].inputs if source not in order]
        if missing:
            waiting += missing
        else:
            order.setdefault(waiting.pop())
    return list(order)


def _last_phase(step: _Step) -> int:
    return max((consumer.phase for consumer in step.consumers), default=step.phase)


# ---- operations ----


def _pointwise(step: _Step) -> Rows:
    """Every row follows from the same row of each input."""
    shape = tuple(map(max, *(source.shape for source in step.inputs), (1, 1, 1, 1)))
    return Rows(shape, lambda start, stop: (start, stop), lambda parts, *_: step.call(parts))


def _flip(step: _Step) -> Rows | None:
    return _pointwise(step) if step.args[1:] == (1,) else None


def _cast(step: _Step) -> Rows:
    """`to` and `float`."""
    types = [each for each in (*step.args, *step.kwargs.values()) if isinstance(each, torch.dtype)]
    step.dtype = torch.float32 if step.name == "float" else [*types, step.dtype][0]
    return _pointwise(step)


def _concatenation(step: _Step) -> Rows | None:
    if step.argument(1, "dim", 0) != 1:
        return None
    size, _, height, width = step.inputs[0].shape
    shape = size, sum(source.shape[1] for source in step.inputs), height, width
    return Rows(shape, lambda start, stop: (start, stop), lambda parts, *_: step.call(parts))


def sliding(
    shape: Shape, window: tuple[int, int, int], fill: float, apply: Callable[[Tensor], Tensor]
) -> Rows:
    """A window that slides down.

    Args:
        shape: Of the output.
        window: Rows that it covers, steps that it takes, and rows of padding above.
        fill: What the padding holds.
        apply: Computes rows without padding above and below.
    """
    extent, stride, padding = window

    def reach(start: int, stop: int) -> tuple[int, int]:
        return start * stride - padding, (stop - 1) * stride - padding + extent

    def compute(parts: list[Tensor], above: int, below: int, *_: int) -> Tensor:
        part = parts[0]
        return apply(F.pad(part, (0, 0, above, below), value=fill) if above or below else part)

    return Rows(shape, reach, compute)


def _convolution(step: _Step) -> Rows:
    weight, bias = step.argument(1, "weight"), step.argument(2, "bias")
    stride, padding, dilation = (
        _pair(step.argument(place, name, default))
        for place, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    groups = step.argument(6, "groups", 1)

    def apply(part: Tensor) -> Tensor:
        return F.conv2d(part, weight, bias, stride, (0, padding[1]), dilation, groups)

    window = _pair(weight.shape[2:]), stride, padding, dilation
    return convolution_rows(step.inputs[0].shape, weight.shape[0], *window, apply)


def convolution_rows(
    shape: Shape,
    channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    apply: Callable[[Tensor], Tensor],
) -> Rows:
    """A convolution as PyTorch describes it.

    Args:
        shape: Of the input.
        channels: Of the output.
        kernel_size, stride, padding, dilation: Down and across.
        apply: Computes rows without padding above and below.
    """
    extents = [spread * (side - 1) + 1 for spread, side in zip(dilation, kernel_size, strict=True)]
    height, width = (
        (length + 2 * around - extent) // stepped + 1
        for length, around, extent, stepped in zip(shape[2:], padding, extents, stride, strict=True)
    )
    made = shape[0], channels, height, width
    return sliding(made, (extents[0], stride[0], padding[0]), 0, apply)


def _max_pooling(step: _Step) -> Rows:
    kernel = _pair(step.argument(1, "kernel_size"))
    stride = _pair(step.argument(2, "stride") or kernel)
    padding, dilation = _pair(step.argument(3, "padding", 0)), _pair(step.argument(4, "dilation", 1))
    ceil_mode = step.argument(5, "ceil_mode", False)
    extents = [spread * (side - 1) + 1 for spread, side in zip(dilation, kernel, strict=True)]
    lengths = []
    for length, around, extent, stepped in zip(
        step.inputs[0].shape[2:], padding, extents, stride, strict=True
    ):
        room = length + 2 * around - extent
        count = (-(-room // stepped) if ceil_mode else room // stepped) + 1
        lengths.append(count - (ceil_mode and (count - 1) * stepped >= length + around))

    def apply(part: Tensor) -> Tensor:
        return F.max_pool2d(part, kernel, stride, (0, padding[1]), dilation, ceil_mode)

    shape = (*step.inputs[0].shape[:2], *lengths)
    return sliding(shape, (extents[0], stride[0], padding[0]), -math.inf, apply)


def _transposed_convolution(step: _Step) -> Rows | None:
    weight, bias = step.argument(1, "weight"), step.argument(2, "bias")
    stride, padding, beyond = (
        _pair(step.argument(place, name, default))
        for place, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "output_padding", 0))
    )
    if any(beyond):
        return None
    groups, dilation = step.argument(6, "groups", 1), _pair(step.argument(7, "dilation", 1))
    extents = [spread * (side - 1) + 1 for spread, side in zip(dilation, weight.shape[2:], strict=True)]
    size, _, *lengths = step.inputs[0].shape
    height, width = (
        (lengths[axis] - 1) * stride[axis] - 2 * padding[axis] + extents[axis] for axis in range(2)
    )

    def reach(start: int, stop: int) -> tuple[int, int]:
        # Row i of the input goes to the row i * stride - padding and the extent - 1 rows after it.
        first = -(-(start + padding[0] - extents[0] + 1) // stride[0])
        return max(0, first), (stop - 1 + padding[0]) // stride[0] + 1

    def compute(parts: list[Tensor], above: int, below: int, start: int, stop: int) -> Tensor:
        rows = F.conv_transpose2d(parts[0], weight, bias, stride, (0, padding[1]), 0, groups, dilation)
        top = start - (reach(start, stop)[0] * stride[0] - padding[0])
        return rows[:, :, top : top + stop - start]

    return Rows((size, weight.shape[1] * groups, height, width), reach, compute)


def _padding(step: _Step) -> Rows | None:
    pad = step.argument(1, "pad")
    if len(pad) > 4 or step.argument(2, "mode", "constant") != "constant":
        return None
    left, right, top, bottom = (*pad, 0, 0)[:4]
    value = step.argument(3, "value", 0)
    size, channels, height, width = step.inputs[0].shape

    def compute(parts: list[Tensor], above: int, below: int, *_: int) -> Tensor:
        return F.pad(parts[0], (left, right, above, below), value=value)

    shape = size, channels, top + height + bottom, left + width + right
    return Rows(shape, lambda start, stop: (start - top, stop - top), compute)


def _cropping(step: _Step) -> Rows | None:
    index = step.args[1] if isinstance(step.args[1], tuple) else (step.args[1],)
    if Ellipsis in index:
        place = index.index(Ellipsis)
        index = (*index[:place], *[slice(None)] * (5 - len(index)), *index[place + 1 :])
    index = (*index, *[slice(None)] * (4 - len(index)))
    if not all(isinstance(each, slice) and each.step in (None, 1) for each in index):
        return None
    ranges = [range(length)[each] for length, each in zip(step.inputs[0].shape, index, strict=True)]
    top = ranges[2].start

    def compute(parts: list[Tensor], *_: int) -> Tensor:
        return parts[0][index[0], index[1], :, index[3]]

    return Rows(tuple(map(len, ranges)), lambda start, stop: (start + top, stop + top), compute)


def _interpolation(step: _Step) -> Rows | None:
    mode, aligned = step.argument(3, "mode", "nearest"), step.argument(4, "align_corners")
    if mode not in ("nearest", "bilinear") or step.argument(6, "antialias"):
        return None
    size, scale = step.argument(1, "size"), step.argument(2, "scale_factor")
    before = step.inputs[0].length
    if size is None:
        scales = (scale, scale) if isinstance(scale, int | float) else scale
        after, width = (
            math.floor(length * each) for length, each in zip(step.inputs[0].shape[2:], scales, strict=True)
        )
    else:
        after, width = _pair(size)
    shape = (*step.inputs[0].shape[:2], after, width)
    if after % before == 0 and not aligned and before > 1:
        return _whole_upsampling(shape, before, mode)
    places = torch.arange(after, dtype=torch.float32)
    if mode == "nearest":
        places = (places * (before / after)).floor()
    elif aligned:
        places *= (before - 1) / max(1, after - 1)
    else:
        places = ((places + 0.5) * (before / after) - 0.5).clamp(min=0)
    upper = places.long().clamp(max=before - 1)
    lower = (upper + 1).clamp(max=before - 1)

    def reach(start: int, stop: int) -> tuple[int, int]:
        return int(upper[start]), int(lower[stop - 1]) + 1

    def compute(parts: list[Tensor], above: int, below: int, start: int, stop: int) -> Tensor:
        part, rows = parts[0], slice(start, stop)
        first = reach(start, stop)[0]
        mixed = part[:, :, upper[rows].to(part.device) - first]
        if mode == "bilinear":
            share = (places - upper)[rows, None].to(part)  # (rows, 1) of the lower row
            mixed = mixed * (1 - share) + part[:, :, lower[rows].to(part.device) - first] * share
        return F.interpolate(mixed, (stop - start, width), mode=mode, align_corners=aligned)

    return Rows(shape, reach, compute)


def _whole_upsampling(shape: Shape, before: int, mode: str) -> Rows:
    """Interpolation that makes a whole number of rows of each: of pieces with a row more on either side."""
    factor = shape[2] // before

    def reach(start: int, stop: int) -> tuple[int, int]:
        return max(0, start // factor - 1), min(before, (stop - 1) // factor + 2)

    def compute(parts: list[Tensor], above: int, below: int, start: int, stop: int) -> Tensor:
        size = (parts[0].shape[2] * factor, shape[3])
        aligned = None if mode == "nearest" else False
        rows = F.interpolate(parts[0], size, mode=mode, align_corners=aligned)
        top = start - reach(start, stop)[0] * factor
        return rows[:, :, top : top + stop - start]

    return Rows(shape, reach, compute)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


POINTWISE = {
    *("add", "add_", "sub", "mul", "div", "clamp_", "contiguous"),
    *("relu", "relu_", "hardswish", "hardsigmoid", "silu", "sigmoid"),
    *("batch_norm", "local_response_norm", "dropout", "dropout2d"),
}

OPERATIONS: dict[str, Callable[[_Step], Rows | None]] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    "to": _cast,
    "float": _cast,
    "flip": _flip,
    "cat": _concatenation,
    "conv2d": _convolution,
    "max_pool2d": _max_pooling,
    "conv_transpose2d": _transposed_convolution,
    "pad": _padding,
    "__getitem__": _cropping,
    "interpolate": _interpolation,
}


def operation(rows: Callable[..., Rows]) -> Callable[[T], T]:
    """Make a function of a map, and of other things, one operation.

    Args:
        rows: Takes the shape of the map and all other arguments of the function.
    """

    def decorate(function: T) -> T:
        @functools.wraps(function)
        def dispatched(tensor: Tensor, *args: Any) -> Any:
            if has_torch_function_unary(tensor):
                return handle_torch_function(dispatched, (tensor,), tensor, *args)
            return function(tensor, *args)

        OPERATIONS[function.__name__] = lambda step: rows(step.inputs[0].shape, *step.args[1:])
        return dispatched  # type: ignore[return-value]

    return decorate
