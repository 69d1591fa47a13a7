# The README's two commands are `make quickstart` and `make test`; each does its own set-up.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help setup quickstart test test-slow lint format bench emoji clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   train an MMDiT and a U-Net on the same data and compare them (15 minutes on 2 CPU cores)"
	@echo "make test         the default tests (CPU, offline); make test-slow runs the long ones"
	@echo "make lint         ruff check, ruff format, mypy"
	@echo "make bench        peers and ours interleaved in one process"
	@echo "make emoji        draw the emoji data set (needs Debian's fonts-noto-color-emoji and unicode-data)"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; ok = v >= (3, 11); print("python", sys.version.split()[0], "" if ok else "is too old: need 3.11 or 3.12; run make PYTHON=/path/to/python3.11"); sys.exit(not ok)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --upgrade "pip>=25"
	@touch $@

$(VENV)/.core: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable ".[test,lint]"
	@touch $@

setup: $(VENV)/.core

quickstart: $(VENV)/.core
	$(BIN)/python scripts/ablate.py configs/studies/quickstart.yaml

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/backbones.py --out results/benchmarks/backbones.json

emoji: $(VENV)/.core
	$(BIN)/python scripts/build_emoji.py --out data/emoji.parquet

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
