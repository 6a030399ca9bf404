# `make train` and `make test` need make and Python 3.11+; `make help` lists all targets and the variables below.
PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/quickstart
ARGS ?=
JOBS ?= 2
GPU_JOBS ?= 8

# Without an NVIDIA GPU: PyTorch's CPU build, which does not come with gigabytes of CUDA packages.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
else
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
endif

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CORPUS := data/stdlib

.PHONY: help train test test-all gpu-test lint clean

help:
	@echo 'make train     train configs/quickstart.yaml on 2 CPU ranks; ARGS="optim.lr=1e-3 --steps 50" changes settings'
	@echo 'make test      run the tests, JOBS=2 files at a time, without what takes longest'
	@echo 'make test-all  run all tests: also of benchmarks, SLURM, eight ranks'
	@echo 'make gpu-test  run the tests that need a CUDA GPU, those of kernels in GPU_JOBS=8 processes'
	@echo 'make lint      check the style of the code'
	@echo 'make clean     remove the virtual environment, the quickstart corpus and caches; runs/ stays'
	@echo
	@echo 'PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) TORCH_INDEX=$(TORCH_INDEX) RUN_DIR=$(RUN_DIR) JOBS=$(JOBS) GPU_JOBS=$(GPU_JOBS)'

train: $(INSTALLED) $(CORPUS).idx
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 launcher/train.py \
		--config configs/quickstart.yaml --run-dir $(RUN_DIR) $(ARGS)
	@echo 'run directory: $(RUN_DIR)   (`make train` again continues it if interrupted; RUN_DIR=runs/another starts anew)'
	@echo "next: $(BIN)/longspan generate $(RUN_DIR) --prompt 'def '   or evaluate, report, export; $(BIN)/longspan --help"

# A file at a time per process; files in their order, in which those that take long do not come last.
test: $(INSTALLED)
	$(BIN)/pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not slow'

test-all: $(INSTALLED)
	$(BIN)/pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Tests of kernels take as long as it takes to compile these. Others have processes that wait for each other on the GPU.
gpu-test: $(INSTALLED)
	@failed=; \
	$(BIN)/pytest -q -m gpu --ignore tests/kernels || failed=1; \
	$(BIN)/pytest -q -m gpu -n $(GPU_JOBS) --dist worksteal tests/kernels || failed=1; \
	test -z "$$failed"

lint: $(INSTALLED)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) $(CORPUS).* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The source of Python's standard library: real text that every machine has.
$(CORPUS).idx: | $(INSTALLED)
	@mkdir -p $(@D)
	@echo 'preparing $(CORPUS) from the standard library of $(PYTHON)'
	@$(BIN)/longspan prepare --tokenizer bytes --output $(CORPUS) --input $$( \
		find "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
		\( -name '*-packages' -o -name test -o -name tests \) -prune -o -name '*.py' -size +0 -print | sort)

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo 'installing longspan and its other dependencies'
	@$(BIN)/pip install --quiet --editable '.[test]' || { \
		command -v c++ >/dev/null || echo 'longspan: error: no C++ compiler, which a dependency without a binary' \
			'package for this Python needs: apt-get install g++ python3-dev, or use Python 3.11 to 3.13' >&2; \
		exit 1; }
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo 'longspan: error: $(PYTHON) not found: apt-get install python3 python3-venv, or set PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "longspan: error: $$($(PYTHON) --version) is too old: set PYTHON to a Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo 'longspan: error: $(PYTHON) has no venv module: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
