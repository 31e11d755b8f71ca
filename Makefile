# make test   lint and every test      make bench   plain against fused, on this machine
# Both make .venv first if it is not there: torch and all else, then the build.
PYTHON ?= python3
VENV := .venv
FLOOR := .venv-floor
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*)
RUN := $(VENV)/bin/python -m
PYTEST := $(RUN) pytest -q -n 2
# Of the interpreter's tests, and of those on the oldest versions, which part: 1/2 is a half, 2/2 the other.
SHARE ?= 1/1
TRITON_TESTS := tests/backends/triton
COMPILED_TESTS := $(TRITON_TESTS)/test_ahead_of_time.py $(TRITON_TESTS)/test_resources.py
CPP_FOLDERS := csrc tests/native tests/cuda_host benchmarks/native
CPP_FILES := $(foreach folder,$(CPP_FOLDERS),$(foreach ending,cpp h cu cuh,'$(folder)/*.$(ending)'))

.PHONY: test bench gpu lint format unit ahead-of-time cuda-resources interpreter sanitize test-floor figures clean

test: lint unit ahead-of-time cuda-resources interpreter

bench: $(VENV)/.built
	$(RUN) mod_kernels bench --quick $(ARGS)

# On the GPU machine nothing is installed: this uses what is there. Without a GPU it says what it skips.
gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

lint: $(VENV)/.built
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files $(CPP_FILES))

format: $(VENV)/.built
	$(RUN) ruff check --fix .
	$(RUN) ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files $(CPP_FILES))

# What times calls runs by itself: a second process on the same caches is in every one of its runs.
unit: $(VENV)/.built
	$(RUN) pytest -q tests/test_call_cost.py
	$(PYTEST) tests --ignore $(TRITON_TESTS) --ignore tests/test_call_cost.py

# The compiler proper and the interpreter can't share a process: triton.jit decides at import.
ahead-of-time: $(VENV)/.built
	$(PYTEST) $(COMPILED_TESTS)

# Every CUDA kernel for six architectures: a spill is an error.
cuda-resources: $(VENV)/.built
	@if command -v nvcc > /dev/null; then $(RUN) mod_kernels resources --engine cuda; \
	else echo "no nvcc: the CUDA kernels are not compiled"; fi

interpreter: $(VENV)/.built
	TEST_SHARE=$(SHARE) TRITON_INTERPRET=1 $(PYTEST) $(TRITON_TESTS) $(COMPILED_TESTS:%=--ignore %)

# The CPU kernels without torch, in guarded memory under sanitizers; part of `make unit`.
sanitize: $(VENV)/.built
	$(PYTEST) tests/backends/test_native_program.py

# The oldest versions promised. The library that runs here was built against the newest torch: that it loads
# is the point of the stable ABI. (Those of lower ISA levels are tested with the newest torch, in `make unit`.)
# The last line compiles it against the oldest headers as well.
test-floor: $(FLOOR)/.installed $(VENV)/.built
	TEST_SHARE=$(SHARE) $(FLOOR)/bin/python -m pytest -q -n 2 tests/test_compile.py tests/test_functional.py \
		tests/test_gradients.py \
		tests/test_reference.py tests/test_served.py tests/test_optimize.py tests/convert \
		tests/backends/test_cpu_*.py tests/nn \
		tests/accelerate tests/export tests/training \
		--deselect tests/backends/test_cpu_service.py::test_lower_isa_levels
	TEST_SHARE=$(SHARE) TRITON_INTERPRET=1 $(FLOOR)/bin/python -m pytest -q -n 2 $(TRITON_TESTS) \
		$(COMPILED_TESTS:%=--ignore %)
	MOD_KERNELS_BUILD=require $(FLOOR)/bin/python setup.py -q build_ext --build-lib build/floor

figures: $(VENV)/.built
	$(RUN) benchmarks.plot
	$(RUN) benchmarks.readme_table

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install -q --upgrade pip
	$(RUN) pip install -q torch torchvision setuptools wheel ninja
	touch $@

# Not isolated: the build uses the torch just installed instead of fetching another.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(RUN) pip install -q --no-build-isolation -e '.[test,export]'
	touch $@

$(FLOOR)/.installed: Makefile
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install -q --upgrade pip
	$(FLOOR)/bin/python -m pip install -q torch==2.11.0 torchvision==0.26.0 triton==3.6.0 'numpy<2.4' setuptools wheel \
		ninja typer rich pytest pytest-benchmark pytest-xdist hypothesis scikit-learn
	touch $@

clean:
	rm -rf build dist *.egg-info mod_kernels/_native $(VENV) $(FLOOR)
