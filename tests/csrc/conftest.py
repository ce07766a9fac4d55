"""The CUDA C++ kernels: natively on a GPU, otherwise in the host build (tests/support/host_build.py)."""

import host_build
import pytest
import torch

from tigon import native


@pytest.fixture(scope="session")
def host_library():
    """The fiber build, or a skip that names what is missing."""
    if reason := host_build.missing():
        pytest.skip(reason)
    return host_build.build("fibers")


@pytest.fixture
def kernels(request):
    """The device on which ``tigon.native`` can launch, with the host build plugged in where that is the CPU."""
    if torch.cuda.is_available():
        usable, reason = native.available()
        if not usable:
            pytest.skip(reason)
        yield torch.device("cuda")
        return
    native.use_host_library(request.getfixturevalue("host_library"))
    yield torch.device("cpu")
    native.use_host_library(None)


@pytest.fixture(scope="session", params=["asan", "tsan"])
def sanitizer(request):
    """The program built with these sanitizers."""
    if reason := host_build.missing():
        pytest.skip(reason)
    return host_build.build(request.param)
