# make demo           trains the small language model of examples/train_lm.py
# make test           builds everything, runs the C++ and the Python tests
# make test-sanitize  runs the CPU kernels' C++ tests under AddressSanitizer and UBSan
# All set up .venv on first use, with the newest versions of what they need, and are quick the second
# time. Another Python, torch or Transformers, in an environment of its own:
#   make test PYTHON=python3.10 TORCH=2.11 TRANSFORMERS=5.17 VENV=.venv-2.11

PYTHON ?= python3
# "2" is the newest torch of pyproject.toml's range that has a package for this Python.
TORCH ?= 2
TRANSFORMERS ?= 5
VENV ?= .venv
# ON: TRL and bitsandbytes as well, without which their tests skip.
TRAINERS ?= OFF
# ON: warnings are errors. Not for a user's compiler, which may know more of them.
WERROR ?= OFF
# Object files are those of one environment.
BUILD ?= build/cmake$(subst /,_,$(VENV:.venv%=%))
BIN := $(VENV)/bin
# The venv's cmake and ninja come first: the build must not depend on what the machine has.
export PATH := $(abspath $(BIN)):$(PATH)

BUILD_INPUTS := CMakeLists.txt setup.py pyproject.toml \
  $(shell find cmake csrc tests/cpp -type f)
CPP_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*.h' 'tests/cpp/*.cpp' 'tests/cpp/*.cu')

# Versions are part of the stamps' names, so that another one is installed and built when asked for.
# The tree holds one built library, hence one stamp of it, which names the environment.
READY := $(VENV)/.ready-torch$(TORCH)-transformers$(TRANSFORMERS)$(if $(filter ON,$(TRAINERS)),-trainers)
BUILT := build/.built$(subst /,_,$(VENV))-torch$(TORCH)

.PHONY: all demo test test-cpp test-python test-sanitize bench lint format clean gtest
all: $(BUILT)

demo: $(BUILT)
	$(BIN)/python examples/train_lm.py

test: test-cpp test-python

test-cpp: $(BUILT)
	ctest --test-dir $(BUILD) --output-on-failure

test-python: $(BUILT)
	OMNI_MOE_BUILD_DIR=$(BUILD) $(BIN)/python -m pytest

test-sanitize: $(READY) | gtest
	cmake -S . -B build/sanitize -G Ninja -DOMNI_MOE_TORCH=OFF -DOMNI_MOE_CUDA=OFF \
	  -DOMNI_MOE_BUILD_TESTS=ON -DOMNI_MOE_SANITIZE=address,undefined \
	  -DCMAKE_COMPILE_WARNING_AS_ERROR=$(WERROR)
	cmake --build build/sanitize
	ctest --test-dir build/sanitize --output-on-failure

bench: $(BUILT)
	$(BIN)/python -m benchmarks

lint: $(READY)
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(READY)
	$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info omni_moe/_C*.so omni_moe/lib omni_moe/include

# Python, torch and the build tools.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25.1"  # the first that knows dependency groups
	$(BIN)/python -m pip install --quiet --upgrade "torch==$(TORCH).*" \
	  "transformers==$(TRANSFORMERS).*" --group build --group test --group lint \
	  $(if $(filter ON,$(TRAINERS)),--group trainers)
	rm -f $(VENV)/.ready*
	touch $@

# GoogleTest comes from the system's packages.
gtest:
	@test -f /usr/include/gtest/gtest.h || \
	  { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq libgtest-dev; } || \
	  { echo "GoogleTest is missing: sudo apt-get install libgtest-dev" >&2; exit 1; }

# An editable install: the library lands in omni_moe/, the C++ tests stay in $(BUILD). compat: a
# plain path entry; the default import hook would also find _C for a copy of the package.
$(BUILT): $(READY) $(BUILD_INPUTS) | gtest
	OMNI_MOE_BUILD_DIR=$(BUILD) CMAKE_ARGS="-DOMNI_MOE_BUILD_TESTS=ON \
	  -DCMAKE_COMPILE_WARNING_AS_ERROR=$(WERROR) $(CMAKE_ARGS)" \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps \
	  --config-settings editable_mode=compat --editable .
	rm -f build/.built*
	touch $@
