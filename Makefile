# Everything runs in the project's own .venv; `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-faults lint format bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(INSTALLED)  ## make .venv and install segcli with everything needed to work on it

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	PATH="$(CURDIR)/$(BIN):$$PATH" uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[all]'
	touch $@

demo: setup  ## segment a few real photographs with a bundled model, into demo/masks
	$(BIN)/python examples/demo_photos.py demo/photos
	$(BIN)/segcli predict demo/photos --out demo/masks --save mask,overlay,compare

test: setup  ## run the tests
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --openvino

docs: setup  ## write docs/commands.md and the pictures of the README
	$(BIN)/python docs/make.py

test-faults: setup  ## run the fault suite with its full counts (an hour or so)
	SEGCLI_FAULTS=full $(BIN)/python -m pytest -m faults -s

bench: setup  ## time networks, folders, colorize and start-up beside what people would use instead (an hour)
	PATH="$(CURDIR)/$(BIN):$$PATH" uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/border.py
	$(BIN)/python benchmarks/packed.py
	$(BIN)/python benchmarks/folders.py
	$(BIN)/python benchmarks/photographs.py
	$(BIN)/python benchmarks/colorize.py
	$(BIN)/python benchmarks/startup.py

lint: setup  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup  ## bring the code into the project's style
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:  ## remove what the targets made
	rm -rf .venv demo dist
