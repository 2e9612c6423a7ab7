# SPDX-License-Identifier: Apache-2.0
# make demo   train and serve a small language model with DSA on this machine
# make test   build everything, run the C++ tests, then the Python tests
# make lint   ruff, mypy, clang-format     make format   fix what they can
# make asan   the C++ tests and the hostile-metadata Python tests under ASan and UBSan
# make bench  every op against its peers: on a GPU where there is one, else on the CPU
# make cuda-build  compile with the CUDA backend (needs nvcc, no GPU)
# make cuda-test   and run the tests of that build that need no GPU
# make cuda-archs  the same for the architectures that a default build leaves to PTX or to SM80's code
# make memcheck    a few calls of every op under compute-sanitizer (needs a GPU)
#
# Everything lives in .venv and build/. DSA_CUDA=ON|OFF|AUTO; by default CUDA is built only where a GPU
# is visible too.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
BUILD := build/dev
DSA_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CPP_FILES = $(shell git ls-files "*.h" "*.cpp" "*.cu" "*.cuh")
export PATH := $(BIN):$(PATH)

.PHONY: demo test install build-tests ctest pytest lint format asan bench cuda-build cuda-test cuda-archs memcheck clean gtest

demo: install
	$(BIN)/python examples/byte_lm.py

test: build-tests ctest pytest

ctest: build-tests
	ctest --test-dir $(BUILD) --output-on-failure

pytest: build-tests
	$(BIN)/python -m pytest -q

bench: install
	$(BIN)/python -m benchmarks

# The package, as a user gets it: pip builds a wheel (objects stay in build/dev) and installs it.
install: $(VENV)/.deps
	$(PIP_INSTALL) --no-build-isolation --no-deps -C build-dir=$(BUILD) \
	  -C cmake.define.DSA_CUDA=$(DSA_CUDA) -C cmake.define.DSA_BUILD_TESTS=OFF .

build-tests: $(VENV)/.deps gtest
	$(PIP_INSTALL) --no-build-isolation --no-deps -C build-dir=$(BUILD) \
	  -C cmake.define.DSA_CUDA=$(DSA_CUDA) -C cmake.define.DSA_BUILD_TESTS=ON .

$(VENV)/.deps: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -r requirements-dev.txt
	touch $@

# GoogleTest comes from the system; installed here where apt-get is and it is missing.
gtest:
	@if ! test -f /usr/include/gtest/gtest.h && ! test -f /usr/local/include/gtest/gtest.h; then \
	  echo "installing GoogleTest (libgtest-dev)"; \
	  SUDO=$$(test "$$(id -u)" = 0 || echo sudo); \
	  $$SUDO apt-get update -qq && $$SUDO apt-get install -qq -y libgtest-dev >/dev/null; \
	fi

lint: $(VENV)/.deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/.deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

ASAN_BUILD := build/asan
ASAN_SITE := $(CURDIR)/$(ASAN_BUILD)/site
asan: $(VENV)/.deps gtest
	$(BIN)/cmake -S . -B $(ASAN_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DDSA_CUDA=OFF \
	  -DDSA_SANITIZE=ON -DDSA_BUILD_TESTS=ON -DPython_EXECUTABLE=$(BIN)/python >/dev/null
	$(BIN)/cmake --build $(ASAN_BUILD)
	ctest --test-dir $(ASAN_BUILD) --output-on-failure
	rm -rf $(ASAN_SITE) && mkdir -p $(ASAN_SITE) && cp -r python/dsa_ext $(ASAN_SITE)/
	$(BIN)/cmake --install $(ASAN_BUILD) --prefix $(ASAN_SITE) >/dev/null
	PYTHONPATH=$(ASAN_SITE) ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -q tests/python/test_hostile.py

# Everything with the CUDA backend, tests and Python modules too: what CI compiles where no GPU is.
CUDA_BUILD := build/cuda
CUDA_SITE := $(CURDIR)/$(CUDA_BUILD)/site
cuda-build: $(VENV)/.deps gtest
	$(BIN)/cmake -S . -B $(CUDA_BUILD) -G Ninja -DDSA_CUDA=ON -DDSA_BUILD_TESTS=ON \
	  -DPython_EXECUTABLE=$(BIN)/python >/dev/null
	$(BIN)/cmake --build $(CUDA_BUILD)

cuda-test: cuda-build
	$(CUDA_BUILD)/tests/cpp/test_api
	rm -rf $(CUDA_SITE) && mkdir -p $(CUDA_SITE) && cp -r python/dsa_ext $(CUDA_SITE)/
	$(BIN)/cmake --install $(CUDA_BUILD) --prefix $(CUDA_SITE) >/dev/null
	PYTHONPATH=$(CUDA_SITE) $(BIN)/python -m pytest -q tests/python/test_readme.py \
	  tests/python/test_package.py tests/python/test_errors.py

CUDA_ARCHS := 86 89 100 120
cuda-archs: $(VENV)/.deps
	for arch in $(CUDA_ARCHS); do \
	  $(BIN)/cmake -S . -B build/cuda-$$arch -G Ninja -DDSA_CUDA=ON -DDSA_CUDA_ARCHS=$$arch \
	    -DDSA_BUILD_PYTHON=OFF >/dev/null && $(BIN)/cmake --build build/cuda-$$arch || exit 1; \
	done

memcheck: install
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python tests/python/memcheck.py

clean:
	rm -rf build
