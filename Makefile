# slime: two commands on a fresh machine (Python >= 3.11, gcc, make)
#   make quickstart   install into .venv, then train: SFT warm start, GRPO with real SGLang rollouts, report
#   make test         install into .venv, then the tests; `make test-slow` runs the few that it leaves out
PYTHON ?= python3
VENV ?= .venv
# A further wheel index, where the default one serves a CUDA build of torch:
#   make quickstart EXTRA_INDEX=https://download.pytorch.org/whl/cpu
EXTRA_INDEX ?=
LEARN ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(EXTRA_INDEX),--extra-index-url $(EXTRA_INDEX))
INSTALLED := $(VENV)/.installed
UNIT := $(BIN)/python -m pytest tests -m "not e2e and not slow" --numprocesses=auto --maxprocesses=8

.PHONY: quickstart quickstart-bf16 learn test test-slow test-kills test-gpu unit lint install clean

quickstart: install
	$(BIN)/python -m examples.quickstart

quickstart-bf16: install
	$(BIN)/python -m examples.quickstart --recipe quickstart_bf16

# Every recipe on three seeds: about two hours on two cores; what was interrupted goes on. A part of it:
#   make learn LEARN="--only grpo opd_full --seeds 0"
learn: install
	$(BIN)/python -m benchmarks.learning $(LEARN)

# The trainer's tests leave a core idle one by one, so two files of them run at once.
test: install
	$(UNIT)
	$(BIN)/python -m pytest tests/trainer -m "e2e and not slow" --numprocesses=2 --dist=loadfile --durations=15
	$(BIN)/python -m pytest tests -m "e2e and not slow" --ignore=tests/trainer --durations=15

test-slow: install
	$(BIN)/python -m pytest tests -m "slow and not kills"

test-kills: install  # 40 kills in each mode: about an hour. SLIME_TEST_KILLS=10 makes it shorter, SLIME_TEST_KILL_SEED=1 draws others
	$(BIN)/python -m pytest tests/test_kills.py -m kills

test-gpu:  # in an environment with a CUDA build of torch and with SGLang, on a machine with 4 Hopper GPUs
	SLIME_TEST_DEVICE=cuda $(PYTHON) -m pytest tests/trainer/test_layouts.py tests/trainer/test_shards.py tests/engine/test_fp8.py

unit: install
	$(UNIT)

lint: install
	$(BIN)/ruff check slime tests examples benchmarks
	$(BIN)/ruff format --check slime tests examples benchmarks
	$(BIN)/mypy

install: $(INSTALLED)

# The lock is complete, so nothing is resolved; torch comes first and with its own dependencies, which differ between builds.
$(INSTALLED): constraints/cpu.txt pyproject.toml slime/sync/native.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints/cpu.txt torch==2.13.0 setuptools
	$(PIP) --no-deps --requirement constraints/cpu.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
