#!/bin/sh
# One call that builds, warms, tests, sanitizes and measures Tigon on a GPU, within nine minutes; docs/gpu.md.
#
#   bench/on_gpu.sh [build] [warm] [test] [sanitize] [bench]
#
#   PYTHON=python3   the interpreter with torch and Triton; the other settings are listed by --help
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
exec "${PYTHON:-python3}" "$here/on_gpu" "$@"
