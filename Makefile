# Everything runs in .venv, which is made on first use. `make` alone prints this list.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help why test check bench bench-quick sanitize docs clean browser

help:            ## print this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

# torch first and by its own line: the version that the tests are written for
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard native/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

why: $(STAMP)    ## run every claim of the lecture, print verdicts, write why.html
	$(BIN)/batchnorm why

test: $(STAMP) browser  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

check: $(STAMP)  ## format, lint, types, imports and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not slow'

# pages are tested in the system's Chromium; playwright drives it and downloads none of its own
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || \
	  { echo "the page tests need Chromium: install the package 'chromium', then run make again"; exit 1; }

bench: $(STAMP)  ## time everything against torch and other libraries (15 minutes), write docs/speed.md
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[bench]'
	$(BIN)/python benchmarks/run.py

bench-quick: $(STAMP)  ## the same in two minutes, a few cases
	$(BIN)/python benchmarks/run.py --quick

sanitize: $(STAMP)  ## the native kernels under ThreadSanitizer and AddressSanitizer
	native/sanitize.sh thread
	native/sanitize.sh address

docs: $(STAMP)   ## build the documentation into docs/_build/html
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[docs]'
	$(BIN)/sphinx-build -W -q docs docs/_build/html

clean:           ## remove what make made
	rm -rf .venv build dist docs/_build why.html why.json why.md .pytest_cache .ruff_cache .hypothesis .import_linter_cache
