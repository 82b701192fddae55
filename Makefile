# make install   .venv with torch, the build and every extra (again: does nothing)
# make demo      trains a small DALL-E on captioned pictures and draws what it is asked for
# make family    trains the rest beside the demo, which it makes where there is none: CLIP, pixels, unCLIP, pictures to pictures
# make test      every test
# make test-fast what a change most often breaks, in under two minutes
# make coverage  which lines of dalle_kernels the tests of its own rooms do not reach
# make docs      build/site: pages, pictures and notebooks, each made or run anew
# make lint      ruff, clang-format and type checks
# make matrix    the Triton tests and a build under every torch that is promised, each installed anew: 10 GB of disk
# make wheel     dist/: one wheel for every torch from 2.11 and Python from 3.11, and the sources

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# torch is installed first and the build runs without isolation, so that the CUDA kernels find its headers.
# TORCH=torch==2.13.0 pins it.
TORCH  ?= torch>=2.11
STAMP  := $(VENV)/installed
CPP     := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py pyproject.toml tests/peers.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: install demo family test test-fast coverage docs lint matrix wheel clean

install: $(STAMP)

$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or later is needed; set PYTHON=..."; exit 1; }
	@echo "==> making $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> installing torch and what the build needs"
	@$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" numpy
	@$(BIN)/python -m pip install --quiet "$(TORCH)"
	@# torch 2.11 brings Triton 3.6, whose interpreter wants an older NumPy.
	@! $(BIN)/python -m pip freeze | grep -q '^triton==3\.6' || $(BIN)/python -m pip install --quiet "numpy<2.4"
	@echo "==> building the kernels and installing dalle_kernels with its extras (a few minutes)"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[reference,serve,bench,test]'
	@$(BIN)/python -m pip install --quiet --no-deps -r tests/peers.txt
	@$(BIN)/python -m dalle_kernels.doctor --no-speed
	@touch $@

# NPROC=2 trains it on two processes.
NPROC ?= 1

demo: install
	$(BIN)/$(if $(filter-out 1,$(NPROC)),torchrun --standalone --nproc-per-node $(NPROC) -m dalle_reference,dalle-reference) demo

family: install
	@test -e runs/demo/report.json || $(BIN)/dalle-reference demo
	$(BIN)/dalle-reference family

test: install
	$(BIN)/python -m pytest -n auto --dist loadfile

# Everything of the library that needs no compiler, interpreter, emulator or other project.
FAST := tests/patterns tests/attention/test_op.py tests/attention/test_shapes.py tests/decode/test_op.py tests/codebook/test_op.py \
  tests/codebook/test_binary.py tests/codebook/test_entropy.py tests/likelihood/test_op.py tests/sampling/test_op.py \
  tests/test_backends.py tests/test_library.py tests/test_native.py tests/test_noise.py tests/test_docstrings.py

test-fast: install
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(FAST)

coverage: install
	$(BIN)/python -m pytest -q -n auto --dist loadfile --cov=dalle_kernels --cov-report=term:skip-covered $(FAST) \
	  tests/attention tests/decode tests/codebook tests/likelihood tests/sampling tests/test_nn.py tests/test_transforms.py

# What the site is built with comes when it is first asked for; nothing else needs it.
$(VENV)/docs: $(STAMP)
	@echo "==> installing what builds the site"
	@$(BIN)/python -m pip install --quiet 'dalle-kernels[docs]'
	@touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --config-file docs/mkdocs.yml
	@echo "open build/site/index.html"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

matrix:
	$(PYTHON) tests/matrix.py

# auditwheel gives it the tag of the oldest systems that have what its libraries call; torch itself is not packed in.
wheel: install
	rm -rf dist build/lib* build/bdist* build/wheel
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' > /dev/null
	DALLE_KERNELS_NATIVE=1 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	@ls -l dist

clean:
	rm -rf build dist *.egg-info dalle_kernels/*.so dalle_kernels/_left_out.txt
