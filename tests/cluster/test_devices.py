"""Devices of clustering: what a setting chooses, and that arrays go there and back."""

import importlib.util
import sys

import numpy as np
import pytest

from cbtm.cluster.devices import NUMPY, find_device
from cbtm.errors import ConfigError

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("setting", [None, "cpu"])
def test_none_and_cpu_are_numpy(setting):
    assert find_device(setting) is NUMPY


def test_a_torch_device_is_torch_even_on_the_processor():
    found = find_device(torch.device("cpu"))
    assert found.xp is torch
    assert found.torch_device == torch.device("cpu")
    assert find_device(found) is found


def test_auto_is_cuda_where_torch_sees_it_and_else_numpy():
    found = find_device("auto")
    assert (found is NUMPY) == (not torch.cuda.is_available())


def test_auto_is_numpy_where_torch_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_device("auto") is NUMPY


def test_a_device_asked_for_by_name_needs_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="device='cuda' needs PyTorch: pip install torch, or use device='cpu'"):
        find_device("cuda")


# `meta` holds shapes without numbers, `cuda:99` is on no machine.
@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_refused_with_what_torch_says(name):
    with pytest.raises(ConfigError, match=rf"device='{name}' cannot be used here \(.+\); use 'cpu' or 'auto'"):
        find_device(name)


@pytest.mark.parametrize("device", [NUMPY, find_device(torch.device("cpu"))], ids=["numpy", "torch"])
def test_arrays_go_there_and_back(device):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    array.flags.writeable = False
    there = device.put(array)
    assert device.put(there) is there
    back = device.get(there)
    assert isinstance(back, np.ndarray)
    assert back.dtype == np.float32
    assert np.array_equal(back, array)
    assert tuple(device.empty((2, 3), np.float64).shape) == (2, 3)
    assert device.get(device.empty((1,), np.float64)).dtype == np.float64


def test_blocks_cover_all_rows_once():
    assert [(part.start, part.stop) for part in NUMPY.blocks(5, NUMPY.block_numbers // 2)] == [(0, 2), (2, 4), (4, 6)]
    assert len(list(NUMPY.blocks(3, 10 * NUMPY.block_numbers))) == 3  # a row is never cut


def test_products_are_of_full_precision_and_one_thread_and_the_settings_come_back():
    allowed, n_threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("high")
    try:
        with find_device(torch.device("cpu")).exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == n_threads
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(allowed)
