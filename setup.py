"""Lists the packages of the rooms; ``tigon._C`` is built by CMake, the only build recipe.

Never imports torch, never reaches for the network, and never fails for want of CUDA unless
``TIGON_BUILD=require`` asks for it.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "build_tools"))
from tigon_build import BuildNative, mode

ROOMS = {
    "tigon": "python",
    "tigon.kernels": "kernels",
    "tigon.bench": "bench",
    "tigon.csrc": "csrc",
}
# Of the checkout only: records, pytest's suites, and the script that needs the Makefile and the tests.
UNSHIPPED = ("results", "results.*", "suites", "on_gpu")


def packages():
    """Every folder of every room, so that a new one needs no edit here."""
    for name, room in ROOMS.items():
        if not Path(room).is_dir():  # a room still empty is not in a fresh clone
            continue
        folders = find_namespace_packages(room, exclude=["*__pycache__*", *UNSHIPPED])
        yield from [name, *(f"{name}.{folder}" for folder in folders)]


setup(
    packages=[*packages()],
    package_data={
        "": ["py.typed", "*.cu", "*.cuh", "*.html", "*.css", "*.js"],
        "tigon.kernels": ["tuned/*.json"],
    },
    ext_modules=[] if mode() == "none" else [Extension("tigon._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
