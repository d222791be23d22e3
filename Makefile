# make demo · make test · make lint · make fuzz · make chaos · make bench: each sets up .venv first, once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
FRAMES ?= 1000000
MINUTES ?= 2
SEED   ?= 0
MESSAGES ?= 1000000

.PHONY: demo test lint fuzz chaos bench clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch>=2.13,<2.14'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/trunkline demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-cache

# Damaged messages against every decoder, and hostile peers at the sockets of broker, worker and silo;
# `make fuzz FRAMES=100000 MESSAGES=50000` for a shorter run.
fuzz: $(READY)
	$(BIN)/python tests/codec/fuzz.py --frames $(FRAMES)
	$(BIN)/python tests/sockets/fuzz.py --messages $(MESSAGES)

# Processes die, stop and are cut off, and nothing is lost or wrong; `make chaos MINUTES=15 SEED=7`.
chaos: $(READY)
	$(BIN)/trunkline bench chaos --minutes $(MINUTES) --seed $(SEED)

bench: $(READY)
	$(BIN)/trunkline bench parity --model smollm2-135m --head 2 --tail 2

clean:
	rm -rf $(VENV) build dist *.egg-info
