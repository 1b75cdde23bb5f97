# make demo   trains the small language model of examples/train_lm.py
# make test   builds everything, runs the C++ and the Python tests
# Both set up .venv on first use and are quick the second time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The venv's cmake and ninja come first: the build must not depend on what the machine has.
export PATH := $(abspath $(BIN)):$(PATH)

BUILD_INPUTS := CMakeLists.txt setup.py pyproject.toml \
  $(shell find cmake csrc tests/cpp -type f)
CPP_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*.h' 'tests/cpp/*.cpp')

.PHONY: all demo test test-cpp test-python bench lint format clean gtest
all: $(VENV)/.built

demo: $(VENV)/.built
	$(BIN)/python examples/train_lm.py

test: test-cpp test-python

test-cpp: $(VENV)/.built
	ctest --test-dir build/cmake --output-on-failure

test-python: $(VENV)/.built
	$(BIN)/python -m pytest

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks

lint: $(VENV)/.ready
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.ready
	$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info omni_moe/_C*.so omni_moe/lib omni_moe/include $(VENV)/.built

# Python, torch and the build tools.
$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.11.0" "setuptools>=77" wheel "cmake>=3.26,<4" \
	  ninja "pybind11>=2.13" numpy
	$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*extras['test'], *extras['lint'], sep='\n')" > $(VENV)/extras.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/extras.txt
	touch $@

# GoogleTest comes from the system's packages.
gtest:
	@test -f /usr/include/gtest/gtest.h || \
	  { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq libgtest-dev; } || \
	  { echo "GoogleTest is missing: sudo apt-get install libgtest-dev" >&2; exit 1; }

# An editable install: the library lands in omni_moe/, the C++ tests stay in build/cmake. compat: a
# plain path entry; the default import hook would also find _C for a copy of the package.
$(VENV)/.built: $(VENV)/.ready $(BUILD_INPUTS) | gtest
	CMAKE_ARGS="-DOMNI_MOE_BUILD_TESTS=ON $(CMAKE_ARGS)" \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps \
	  --config-settings editable_mode=compat --editable .
	touch $@
