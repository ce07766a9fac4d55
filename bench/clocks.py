"""What a GPU's clocks do while something is timed, through NVML: a throttled card's numbers are another card's.

NVML is read by ctypes, as in `tigon doctor`: it is part of the driver, and starts no CUDA context.
"""

import ctypes
import functools

import torch

SM, MEMORY = 1, 2  # nvmlClockType_t
# nvmlClocksEventReasons that mean "slower than it could be"; idle and application settings are not among them.
THROTTLED = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}


def clocks() -> dict | None:
    """sm_mhz, memory_mhz, power_w and throttle (reasons) of the current GPU; None without one or without NVML."""
    if not torch.cuda.is_available():
        return None
    try:
        return _read(*_device(torch.cuda.current_device()))
    except (OSError, AttributeError, RuntimeError):  # no library, an old one, or it does not answer
        return None


def _read(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> dict:
    value, reasons = ctypes.c_uint(), ctypes.c_ulonglong()

    def read(function: str, *args) -> int | None:
        code = getattr(nvml, function)(handle, *args, ctypes.byref(value))
        return None if code else value.value

    power = read("nvmlDeviceGetPowerUsage")
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle, ctypes.byref(reasons))
    return {
        "sm_mhz": read("nvmlDeviceGetClockInfo", SM),
        "memory_mhz": read("nvmlDeviceGetClockInfo", MEMORY),
        "power_w": None if power is None else power / 1e3,
        "throttle": [name for bit, name in THROTTLED.items() if reasons.value & bit],
    }


@functools.cache
def _device(index: int) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """The library and its handle of a torch device, found by UUID: CUDA_VISIBLE_DEVICES renumbers torch's alone."""
    nvml, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        raise RuntimeError("NVML does not answer")
    return nvml, handle
