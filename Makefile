# Every target does its own set-up: a virtual environment in .venv, pinned dependencies, the package. Done once, it is
# skipped until pyproject.toml or constraints.txt changes.
#
#   make demo ARGS="--zero-stage 2 --steps 50"     arguments for the script
#   make test PYTEST_ARGS="-k layout -x"           arguments for pytest
#   make setup PYTHON=python3.12                   another interpreter for the virtual environment

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=

venv := .venv
ready := $(venv)/.ready
bin := $(venv)/bin
pip := $(bin)/python -m pip --disable-pip-version-check --no-input -qq install
torch := $(shell grep '^torch==' constraints.txt)

.PHONY: help setup demo test test-all lint docs bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(ready): pyproject.toml constraints.txt
	@$(bin)/python -m pip --version >/dev/null 2>&1 || { \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "shardwise needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." \
	      "Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }; \
	  echo "set-up: creating $(venv)"; "$(PYTHON)" -m venv $(venv); }
	@echo "set-up: installing $(torch) (the largest part; once)"
	@$(pip) "$(torch)"
	@echo "set-up: installing shardwise and its pinned dependencies"
	@$(pip) --editable '.[dev,demo]' --constraint constraints.txt
	@touch $(ready)

setup: $(ready) ## the virtual environment alone
	@:

demo: $(ready) ## train a GPT-2 under ZeRO on this machine (ARGS="…" goes to the script)
	@$(bin)/shardwise launch examples/train_gpt.py $(ARGS)

lint: $(ready) ## style, types and floors
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy
	@$(bin)/lint-imports --no-logo

test: lint ## lint, then the tests but the slow ones
	@$(bin)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: lint ## lint, then every test
	@$(bin)/python -m pytest $(PYTEST_ARGS)

docs: $(ready) ## write what is made of the config's schema: docs/configuration.md and the JSON Schema
	@$(bin)/python -m shardwise.config.document > docs/configuration.md.new
	@mv docs/configuration.md.new docs/configuration.md
	@$(bin)/python -m shardwise.config.json_schema > docs/deepspeed-config.schema.json.new
	@mv docs/deepspeed-config.schema.json.new docs/deepspeed-config.schema.json

bench: $(ready) ## speed and memory beside other engines (peers that are not installed are skipped and named)
	@$(bin)/python -m bench.training $(ARGS)

clean: ## remove the virtual environment, caches and builds
	@rm -rf $(venv) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
