"""Where the arithmetic of clustering runs: numpy on the processor, or a torch device such as a GPU.

The solvers are written once, in the functions that numpy and torch share by name and by `axis=` and `out=`. A
`Device` holds the module to call and moves arrays there and back. Torch is imported when it is asked for, not before,
and never chosen silently: `auto` is a choice, and a device asked for by name that is not there is an error.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from cbtm.errors import ConfigError

if TYPE_CHECKING:
    import torch

Array: TypeAlias = Any  # a numpy array or a torch tensor, whichever the device works on

# Numbers in one block of work: on a processor, as float32, they stay in a second-level cache; an accelerator wants
# few large kernels, and 256 MB of float32 at a time is little of its memory.
_BLOCK_NUMBERS = 1 << 17
_BLOCK_NUMBERS_OF_ACCELERATOR = 1 << 26
# One of these is there where a driver for CUDA devices is: NVIDIA's, that of Windows' Linux, and AMD's.
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


@dataclass(frozen=True)
class Device:
    """Numpy, or a torch device.

    Attributes:
        xp: The module of functions, `numpy` or `torch`.
        torch_device: The torch device, None for numpy.
    """

    xp: Any
    torch_device: torch.device | None = None

    @property
    def block_numbers(self) -> int:
        """Numbers that one block of work may hold."""
        on_processor = self.torch_device is None or self.torch_device.type == "cpu"
        return _BLOCK_NUMBERS if on_processor else _BLOCK_NUMBERS_OF_ACCELERATOR

    def blocks(self, n_rows: int, n_columns: int) -> Iterator[slice]:
        """Slices of the rows of a matrix that hold a bounded number of its numbers."""
        step = max(1, self.block_numbers // n_columns)
        return (slice(start, start + step) for start in range(0, n_rows, step))

    def holds(self, array: Array) -> bool:
        """Whether the array is a tensor of torch on this device."""
        if self.torch_device is None:
            return False
        return isinstance(array, self.xp.Tensor) and bool(array.device == self.torch_device)

    def put(self, array: Array) -> Array:
        """The array on this device; not copied if it is there."""
        if self.torch_device is None or self.holds(array):
            return array
        return self.xp.tensor(array, device=self.torch_device)  # copies, so that a read-only memmap will do

    def get(self, array: Array) -> NDArray[Any]:
        """The array as one of numpy; not copied if it is one."""
        host: NDArray[Any] = array.cpu().numpy() if self.holds(array) else np.asarray(array)
        return host

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
        """An array without content."""
        if self.torch_device is None:
            return np.empty(shape, dtype=dtype)
        return self.xp.empty(shape, dtype=getattr(self.xp, np.dtype(dtype).name), device=self.torch_device)

    @contextmanager
    def exact_products(self) -> Iterator[None]:
        """Hold matrix products to one thread of the processor and to `full_precision`: for the solvers."""
        with one_blas_thread(), _one_torch_thread(self), self.full_precision():
            yield

    def full_precision(self) -> AbstractContextManager[object]:
        """Hold matrix products to full float32, also where a training run has allowed TF32 (3 digits) in torch."""
        return nullcontext() if self.torch_device is None else _full_float32(self.xp)


NUMPY = Device(np)


def find_device(device: str | torch.device | Device | None) -> Device:
    """The device of a setting.

    Args:
        device: None or "cpu" is numpy; "auto" a CUDA device if torch sees one, else numpy; another string the torch
            device of that name, such as "cuda" or "cuda:1"; a `torch.device` is that device, the processor included.

    Raises:
        ConfigError: If torch is not installed, or the device is not there or has no float64.
    """
    if isinstance(device, Device):
        return device
    if device is None or (isinstance(device, str) and device == "cpu"):
        return NUMPY
    if isinstance(device, str) and device == "auto":
        return find_device("cuda") if _sees_cuda() else NUMPY
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"device={str(device)!r} needs PyTorch: pip install torch, or use device='cpu'") from error
    try:
        found = torch.device(device)
        probe = torch.zeros(1, dtype=torch.float64, device=found)
        probe.item()
    except (RuntimeError, AssertionError, TypeError) as error:  # an AssertionError of torch says "compiled without"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"device={str(device)!r} cannot be used here ({reason}); use 'cpu' or 'auto'") from error
    return Device(torch, probe.device)  # with the number that torch gave it: cuda:0 for cuda


def one_blas_thread() -> AbstractContextManager[object]:
    """Hold matrix products of numpy to one thread.

    The products here are small: threads that wait for each other on a busy machine made them ten times slower. It
    also keeps results independent of the number of cores.
    """
    return cast("AbstractContextManager[object]", _blas_libraries().limit(limits=1, user_api="blas"))


@functools.cache
def _blas_libraries() -> ThreadpoolController:
    return ThreadpoolController()  # a search through the loaded libraries: 3 ms, once


def _sees_cuda() -> bool:
    # Importing torch takes seconds: not to find out what the system says at once.
    if sys.platform == "linux" and not any(Path(path).exists() for path in _DRIVER_FILES):
        return False
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@contextmanager
def _one_torch_thread(device: Device) -> Iterator[None]:
    """The same for torch on the processor, where the wait was thirty times the work."""
    if device.torch_device is None or device.torch_device.type != "cpu":
        yield
        return
    n_threads = device.xp.get_num_threads()
    device.xp.set_num_threads(1)
    try:
        yield
    finally:
        device.xp.set_num_threads(n_threads)


@contextmanager
def _full_float32(torch_module: Any) -> Iterator[None]:
    allowed = torch_module.get_float32_matmul_precision()
    torch_module.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch_module.set_float32_matmul_precision(allowed)
