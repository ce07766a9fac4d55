"""Fixtures of all tests. Without a GPU, Triton kernels run in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, so it must be set before any test imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")

WAITS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)


@pytest.fixture
def device() -> torch.device:
    """Where the tests of kernels run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def no_host_sync(monkeypatch):
    """Reading a tensor's value from Python raises, as it would stall a GPU or break a graph capture."""

    def waits(name):
        def refuse(self, *args, **kwargs):
            raise AssertionError(f"Tensor.{name} waits for the device")

        return refuse

    monkeypatch.setenv("TIGON_CHECK", "0")
    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, waits(name))
    monkeypatch.setattr(torch, "nonzero", waits("nonzero"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20240521)
