"""Clocks of a GPU through NVML: read, throttling in words, none without a GPU or with a library that is too old."""

import ctypes

import pytest
import torch

from tigon.bench import clocks


class Nvml:
    """A driver's library with some readings."""

    def __init__(self, reasons=0x4 | 0x1, power_code=0):
        self.reasons, self.power_code = reasons, power_code

    def nvmlDeviceGetClockInfo(self, handle, kind, out):
        ctypes.cast(out, ctypes.POINTER(ctypes.c_uint))[0] = {1: 1755, 2: 3201}[kind]
        return 0

    def nvmlDeviceGetPowerUsage(self, handle, out):
        ctypes.cast(out, ctypes.POINTER(ctypes.c_uint))[0] = 650_500
        return self.power_code

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, out):
        ctypes.cast(out, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.reasons
        return 0


@pytest.fixture
def gpu(monkeypatch):
    def have(nvml):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(clocks, "_device", lambda index: (nvml, ctypes.c_void_p()))

    return have


def test_clocks_power_and_what_slows_are_read(gpu):
    gpu(Nvml())  # 0x1 is idle, which is no slowdown
    assert clocks.clocks() == {
        "sm_mhz": 1755,
        "memory_mhz": 3201,
        "power_w": 650.5,
        "throttle": ["power cap"],
    }


def test_what_a_card_does_not_tell_is_none(gpu):
    gpu(Nvml(reasons=0, power_code=3))
    found = clocks.clocks()
    assert found["power_w"] is None and found["throttle"] == [] and found["sm_mhz"] == 1755


def test_without_a_gpu_or_with_an_old_library_there_are_none(gpu, monkeypatch):
    gpu(object())
    assert clocks.clocks() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert clocks.clocks() is None
