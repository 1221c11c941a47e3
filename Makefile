# The developer's whole interface. Every target works on a fresh machine with make and Python 3.11 or later.

PYTHON ?= python3
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
DURABLY_URL ?= kafka://127.0.0.1:9092
FUZZ_SECONDS ?= 120

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: help demo test browser chaos fuzz lint bench bench-peers up down topics
.DEFAULT_GOAL := help

help:
	@echo "make demo     400 real orders, a kill -9 half-way, and a check of the books"
	@echo "make test     all tests; those that need Kafka start it in a container"
	@echo "make chaos    20,000 runs under 200 faults; CHAOS='--help' lists the options"
	@echo "make lint     ruff and mypy"
	@echo "make bench    measures, and writes bench/README.md; NOTE='what has changed since the last time'"
	@echo "make bench-peers  installs what durably is compared with: needs the network, and npm for one of them"
	@echo "make fuzz     coverage-guided fuzzing of the decoders, FUZZ_SECONDS=$(FUZZ_SECONDS) each; longer property tests"
	@echo "make up       Kafka, all processes of durably and two examples in containers; make down ends them"
	@echo "make topics   creates the topics at DURABLY_URL ($(DURABLY_URL))"

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { \
	  for candidate in "$(PYTHON)" python3.14 python3.13 python3.12 python3.11; do \
	    if "$$candidate" -c '$(NEW_ENOUGH)' 2>/dev/null; then "$$candidate" -m venv $(VENV) && exit 0; exit 1; fi; \
	  done; \
	  echo "durably needs Python 3.11 or later; '$(PYTHON)' is not. Name one: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,bench,http,crypto,faust]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/orders/demo.py

test: $(STAMP) browser
	$(BIN)/python -m pytest

# What the dashboard is looked at with: one that is installed, else Playwright fetches its own.
browser: $(STAMP)
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null || \
	  $(BIN)/playwright install chromium || true

chaos: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m chaos $(CHAOS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python bench/run.py

bench-peers: $(STAMP)
	$(BIN)/python bench/environments.py

fuzz: export PYTHONPATH := tests
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m fuzz.corpus .fuzz
	$(BIN)/python tests/fuzz/atheris_codec.py -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2048 .fuzz/codec
	$(BIN)/python tests/fuzz/atheris_payloads.py -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2048 .fuzz/payloads
	DURABLY_FUZZ=20 $(BIN)/python -m pytest --timeout=3600 tests/fuzz

up:
	$(COMPOSE) up --detach --build

down:
	$(COMPOSE) --profile metrics down --volumes

topics: $(STAMP)
	$(BIN)/durably topics create --url $(DURABLY_URL)
