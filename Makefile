# `make demo` and `make test` do all the set-up, once, in $(VENV).
#
#   PYTHON=python3.12   the interpreter that the environment is made from
#   VENV=.venv          where it lives
#   ENV=present         install nothing but Tigon itself: use the packages that PYTHON already has
#                       (a GPU machine with its own torch, a machine without network)
#   TESTS=tests/ops     what `make unit` runs
#   WORKERS=2           pytest processes

PYTHON ?= python3
VENV ?= .venv$(and $(ENV),-$(ENV))
TESTS ?= tests
WORKERS ?= auto

BIN := $(VENV)/bin
READY := $(VENV)/.tigon-ready
NATIVE := CMakeLists.txt $(wildcard csrc/* csrc/*/*) $(wildcard build_tools/*) setup.py
CPP := $(wildcard csrc/*.c* csrc/*/*.c* tests/csrc/*.c* tests/csrc/*.h*)
# Second opinions, their CUDA parts left out. In a folder of their own, where transformers does not see them.
PEERS := MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
  CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE
# Quantizers, with those of their own needs that Tigon's do not bring.
QUANTIZERS := torchao \
  nvidia-modelopt,nvidia-ml-py,omegaconf,antlr4-python3-runtime,pulp,scipy \
  compressed-tensors,loguru,psutil
COMMA := ,
# CUDA's compiler where the system has none; out of the builds' sight too.
NVCC := $(foreach part,cuda-nvcc cuda-crt nvvm cuda-runtime cuda-cccl,"nvidia-$(part)==13.0.*")
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
PARALLEL := -n $(WORKERS) --dist loadgroup

.PHONY: test demo env lint format unit codegen codegen-all csrc packaging docs bench-smoke bench-suites on-gpu clean

# pytest last and in one run: its closing line is the last line of `make test`.
test: lint docs
	@$(PYTEST) $(PARALLEL) tests

demo: env
	@$(BIN)/tigon demo

env: $(READY)

$(READY): pyproject.toml constraints.txt $(NATIVE)
ifeq ($(ENV),present)
	@$(PYTHON) -m venv --without-pip $(VENV)
	@$(PYTHON) -c "import sys; [print(f'import site; site.addsitedir({p!r})') for p in sys.path \
	  if p.endswith(('site-packages', 'dist-packages'))]" > `echo $(VENV)/lib/python3*`/site-packages/present.pth
	@$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
else
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make $(VENV): on Debian, apt install python3-venv"; exit 1; }
	@echo "Installing torch, triton, the test tools and Tigon into $(VENV): minutes the first time."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(PEERS) $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps \
	  --target $(VENV)/peers -c constraints.txt mamba-ssm causal-conv1d \
	  || echo "env: mamba-ssm and causal-conv1d cannot be installed; the tests against them are skipped"
	@$(foreach peer,$(QUANTIZERS),$(BIN)/python -m pip install -q --disable-pip-version-check \
	  --no-build-isolation --no-deps --target $(VENV)/peers -c constraints.txt $(subst $(COMMA), ,$(peer)) \
	  || echo "env: $(firstword $(subst $(COMMA), ,$(peer))) cannot be installed; the tests against it are skipped";)
	@command -v nvcc >/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps \
	  --target $(VENV)/peers $(NVCC) || echo "env: nvcc cannot be installed; its tests of csrc are skipped"
endif
	@$(BIN)/tigon doctor
	@touch $@

lint: env
	@if $(BIN)/python -c 'import ruff' 2>/dev/null; then \
	  $(BIN)/python -m ruff check -q . && $(BIN)/python -m ruff format -q --check .; \
	else echo "lint: ruff is not in this environment, Python sources are not checked"; fi
	@if test -x $(BIN)/clang-format; then \
	  $(BIN)/clang-format --dry-run --Werror $(CPP); \
	else echo "lint: clang-format is not in this environment, csrc is not checked"; fi

format: env
	@$(BIN)/python -m ruff check -q --fix . ; $(BIN)/python -m ruff format -q .
	@$(BIN)/clang-format -i $(CPP)

unit: env
	@$(PYTEST) $(PARALLEL) $(TESTS) --ignore=tests/codegen --ignore=tests/csrc --ignore=tests/packaging

codegen csrc packaging: env
	@$(PYTEST) $(PARALLEL) tests/$@

# Every dtype, not only one of each kernel and launch config.
codegen-all: env
	@TIGON_CODEGEN=all $(PYTEST) $(PARALLEL) tests/codegen

docs: env
	@if $(BIN)/python -c 'import sphinx, myst_parser' 2>/dev/null; then \
	  $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html; \
	else echo "docs: sphinx is not in this environment, the pages are not built"; fi

bench-smoke: env
	@$(BIN)/tigon bench ssd_scan --dry-run

# Each op under pytest-benchmark; TIGON_BENCH_SIZES=small|default.
bench-suites: env
	@$(BIN)/python -m pytest -q bench/suites --benchmark-only

# Build, warm, test, sanitize and measure on this machine's GPU; docs/gpu.md.
on-gpu:
	@PYTHON=$(PYTHON) bench/on_gpu.sh

clean:
	rm -rf build dist docs/_build *.egg-info python/_C*.so python/_build.json
