# make demo      set up and run the main job: the benchmark on real data, quickly, with its report
# make test      set up and run the tests         make test-all   the slow sweeps and the peers as well
# make lint      ruff and mypy --strict           make docs       build the documentation site
# make peers     the tests side by side with other libraries, which it installs beside the environment
# make huggingface   the tests of the Hugging Face pages, with transformers installed
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-all peers huggingface lint docs clean

help:
	@sed -n 's/^# make/make/p' Makefile

$(VENV)/.made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "reweigh needs Python >= 3.10 as '$(PYTHON)'; name another with: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "this Python has no venv module (Debian: apt-get install python3-venv)"; exit 1; }
	@echo "setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch numpy
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.made
	@$(BIN)/python -m reweigh.benchmarks run all --quick --out $(RUN)

test: $(VENV)/.made
	@$(BIN)/python -m pytest -n auto --dist loadfile

test-all: $(VENV)/.made
	@$(BIN)/python -m pytest -n auto --dist loadfile -m "slow or not slow"

# Without their dependencies: some of them ask for torchvision, which brings another torch, and no loss needs it.
# torchvision has a folder of its own, because without its torch it does not load as a whole, and others try.
BESIDE := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade
$(VENV)/peers/.made: $(VENV)/.made
	@$(BESIDE) --target $(VENV)/peers kornia kornia-rs LibMTL liger-kernel monai pytorch-metric-learning \
	  segmentation-models-pytorch timm
	@$(BESIDE) --target $(VENV)/peers/torchvision-alone torchvision
	@touch $@

peers: $(VENV)/peers/.made
	@PYTHONPATH=$(VENV)/peers $(BIN)/python -m pytest -m peers

$(VENV)/.huggingface: $(VENV)/.made
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[hf]'
	@touch $@

huggingface: $(VENV)/.huggingface
	@$(BIN)/python -m pytest tests/test_huggingface.py tests/test_huggingface_language.py tests/test_coming_from.py

# The root is the package, so tools that read source see it through a link that bears the package's name.
$(VENV)/types/reweigh: $(VENV)/.made
	@mkdir -p $(VENV)/types && ln -sfn $(CURDIR) $@

lint: $(VENV)/types/reweigh
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@MYPYPATH=$(VENV)/types $(BIN)/mypy --config-file pyproject.toml -p reweigh.weighting -p reweigh.losses \
	  -p reweigh.lightning_callbacks -p reweigh.benchmarks
	@MYPYPATH=$(VENV)/types:docs/hooks $(BIN)/mypy --config-file pyproject.toml -p sitegen

$(VENV)/.docs: $(VENV)/.made
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build dist *.egg-info site runs .mypy_cache .ruff_cache .pytest_cache
