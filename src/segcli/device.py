"""Which device, which precision and which library to compute with.

Functions import torch when they run: that a name is wrong is told without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from segcli.errors import UsageError

if TYPE_CHECKING:
    import torch

RUNTIMES = ("torch", "openvino")


def pick_device(name: str) -> torch.device:
    """The device of that name: auto, cpu, cuda, cuda:N or mps; auto takes a GPU when there is one.

    Raises:
        UsageError: The name is unknown, or the device is not there.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not (kind == "cuda" and number.isdecimal())):
        raise UsageError(f"--device {name!r} is unknown; use auto, cpu, cuda, cuda:N, cuda:all or mps")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            found = f"this machine has {count}" if count else "PyTorch sees no GPU on this machine"
            raise UsageError(f"--device {name}: {found}; use --device auto or --device cpu")
        return torch.device("cuda", int(number or 0))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has no Apple GPU; use --device auto or --device cpu")
    return torch.device(kind)


def check_runtime(name: str) -> None:
    """Raise UsageError for a library that is unknown."""
    if name not in RUNTIMES:
        raise UsageError(f"--runtime {name!r} is unknown; use {' or '.join(RUNTIMES)}")


def pick_runtime(runtime: str, device: str) -> torch.device:
    """The device of that name, see `pick_device`, for a library that computes: torch or openvino.

    OpenVINO computes on the processor, also where `auto` would take a GPU.

    Raises:
        UsageError: The library is unknown or not installed, or the device is not there or not for it.
    """
    check_runtime(runtime)
    if runtime == "torch":
        return pick_device(device)
    if find_spec("openvino") is None:
        raise UsageError("--runtime openvino needs OpenVINO; run: pip install 'segcli[openvino]'")
    if device not in ("auto", "cpu"):
        raise UsageError(f"--runtime openvino computes on the processor; leave out --device {device}")
    # PyTorch's threads turn in circles while they wait, on processors that OpenVINO's threads want. They read
    # this when torch is first imported, here or in a process that this one starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return pick_device("cpu")


def pick_devices(name: str) -> list[str]:
    """The devices of a name that may be `cuda:all`: a list of names for `pick_device`.

    Raises:
        UsageError: The name is unknown, or the device is not there.
    """
    import torch

    if name != "cuda:all":
        return [str(pick_device(name))]
    pick_device("cuda")
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_of_gpu(device: torch.device) -> int:
    """The bytes of a CUDA device; 0 of others, which share the machine's."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def exact_float32() -> None:
    """Let GPUs convolve float32 numbers as such. By default they round them to the 10 bits of TF32."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


def describe(device: torch.device) -> str:
    """The device for people, such as `cuda:0 (NVIDIA H200)` or `cpu (2 threads)`."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def check_precision(name: str, runtime: str = "torch") -> None:
    """Raise UsageError for a precision that is unknown, or that the library has on no device."""
    if name not in ("auto", "fp32", "bf16", "fp16", "int8"):
        raise UsageError(f"--precision {name!r} is unknown; use auto, fp32, bf16, fp16 or int8")
    if name == "int8" and runtime != "openvino":
        raise UsageError("--precision int8 needs --runtime openvino, which predict and bench have")


def pick_precision(name: str, device: torch.device, runtime: str = "torch") -> str:
    """`fp32`, `bf16`, `fp16` or `int8`; auto is bf16 where the hardware computes in it, else fp32.

    Raises:
        UsageError: The name is unknown, or device or library cannot compute in that precision.
    """
    import torch

    check_precision(name, runtime)
    if name == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        # torch.cpu.get_capabilities is there since PyTorch 2.12
        capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"
