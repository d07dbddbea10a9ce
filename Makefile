# make setup | demo [VIDEO=clip.mp4] [MODEL=hub-id-or-path] | test | lint | bench
# Every target sets up what it needs; a second call finds it done.
SHELL := /bin/bash
PYTHON ?= python3
VIDEO ?=
MODEL ?=
PACKAGES := packages/codec_datasets packages/onevision_encoder packages/llava_codec
EDITABLE := $(foreach package,$(PACKAGES),-e $(package))
BIN := .venv/bin

.PHONY: setup demo test lint bench clean
.DELETE_ON_ERROR:

setup: .venv/.ready
	@echo "==> .venv is ready"

.venv/.ready: pyproject.toml $(PACKAGES:%=%/pyproject.toml)
	@echo "==> setting up .venv (first time: PyTorch and transformers are downloaded, a few minutes)"
	@if command -v uv >/dev/null 2>&1; then \
		echo "==> with uv"; \
		{ [ -x $(BIN)/python ] || uv venv --quiet --python "$(PYTHON)" .venv; } && \
		uv pip install --quiet --python $(BIN)/python --group dev $(EDITABLE); \
	else \
		echo "==> with pip"; \
		{ [ -x $(BIN)/python ] || $(PYTHON) -m venv .venv || \
			{ rm -rf .venv; echo "python3 -m venv failed. On Debian: apt-get install python3-venv"; exit 1; }; } && \
		$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1" && \
		$(BIN)/python -m pip install --quiet --group dev $(EDITABLE); \
	fi
	@touch $@
	@echo "==> ready: .venv"

demo: setup
	@$(BIN)/python examples/demo.py $(if $(VIDEO),--video "$(VIDEO)") $(if $(MODEL),--model "$(MODEL)")

test: setup
	@echo "==> running the tests on $$(nproc) processes"
	@$(BIN)/python -m pytest -n $$(nproc) tests

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

bench: setup
	@$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf .venv outputs
