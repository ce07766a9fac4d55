"""The decode kernels with rollback by replay, and the narrow states, on host threads under the sanitizers."""

import pytest
import torch
from decode_cases import moved
from replay_launches import conv_check, conv_make, ssd_check, ssd_make
from sanitized import Sanitized, pointer_places

from tigon import native
from tigon.native import mamba2, replay

PACKED = (mamba2.SSD_UPDATE, replay.SSD_REPLAY, replay.CONV1D_REPLAY)
PLACES = {packed.size: pointer_places(packed) for packed in PACKED}


def run(sanitizer, arguments: dict, launcher, folder) -> torch.Tensor:
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    x = arguments["x"]
    loader = Sanitized(sanitizer, tensors, x.numel() * x.element_size(), PLACES, folder)
    native.use_host_library(loader)
    try:
        return launcher(**arguments)
    finally:
        native.use_host_library(None)


SSD = [
    dict(held=torch.float32, shape=(16, 32), flush=(8, 4), behind="all"),
    dict(held=torch.float16, shape=(5, 17), flush=(4, 4), stochastic=True, ragged=True),
    dict(held=torch.int8, shape=(16, 32), flush=(20, 18), stochastic=True, behind="all"),
    dict(held=torch.float8_e4m3fn, shape=(3, 9), flush=(4, 3), form="tree", behind="all"),
]


@pytest.mark.parametrize("case", range(len(SSD)))
def test_ssd_replay_is_clean(sanitizer, case, tmp_path):
    before = ssd_make(**SSD[case])
    arguments = moved(before, "cpu")
    ssd_check(before, arguments, run(sanitizer, arguments, native.ssd_replay, tmp_path))


@pytest.mark.parametrize("form", ["chain", "tree"])
def test_conv1d_replay_is_clean(sanitizer, form, tmp_path):
    before = conv_make(form=form, d=40, m=5, ragged=True)
    arguments = moved(before, "cpu")
    conv_check(before, arguments, run(sanitizer, arguments, native.conv1d_replay, tmp_path))
