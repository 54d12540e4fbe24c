# make demo | test | test-slow | test-postgres | soak | fuzz | lint | results | benchmarks | zoo | dist | sbom | audit | licences | clean
# PYTHON=python3.12 for another interpreter; TORCH_INDEX=https://download.pytorch.org/whl/cpu for a torch without CUDA
# where the default index has one with it.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
CONFIG ?= configs/fashion.yml
KILLS ?= 20
FILES ?= 100000
SEED ?= 0
SOLVERS := unipc-3 dpmpp-2m
METHODS := static dmn gits oss
CORRECTIONS := shift scale coefficients shift,scale,coefficients
PREDICTORS := one-shot recursive
BENCHMARKS := scheduler_overhead search_batching network_share search_memory scaling label_search cacher_cost ablation

BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TRAIN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 scripts/train_zoo.py
PIP := $(BIN)/python -m pip --disable-pip-version-check
WHEEL_ENV := build/wheel-env
PINS := $(CURDIR)/constraints.txt
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.DELETE_ON_ERROR:
.PHONY: demo test test-slow test-packages test-postgres soak fuzz lint format results benchmarks zoo dist sbom \
	audit licences supply install clean

demo: $(STAMP)
	$(BIN)/ts-adapt demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "not packages and not postgres"

test-packages: $(STAMP)
	$(PIP) install --quiet torchao
	$(PIP) install --quiet --no-deps hqq einops termcolor
	$(BIN)/python -m pytest -m packages

# The server is Debian's package postgresql (apt-get install postgresql); the test runs one of its own.
test-postgres: $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e ".[postgres]"
	$(BIN)/python -m pytest -m postgres

# Every job killed at random moments and run again; the last line is {"kills": n, "lost": n, "differing": n}.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/soak.py --kills $(KILLS)

# Mutated files for every reader of the package; the last line is {"files": n, "failures": n}.
fuzz: $(STAMP)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzzing --files $(FILES) --seed $(SEED)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tables of the README; hours on two cores. Stopped and started again, it goes on. The solvers are learned side by
# side, one thread each: small convolutions gain little from a second thread.
results: $(STAMP)
	$(BIN)/ts-adapt teach --config $(CONFIG)
	OMP_NUM_THREADS=1 $(MAKE) -j 2 $(addprefix learn-,$(SOLVERS))
	$(BIN)/ts-adapt evaluate --config $(CONFIG)

learn-%: $(STAMP)
	for method in $(METHODS); do \
		$(BIN)/ts-adapt search --config $(CONFIG) --solvers [$*] --method $$method || exit; \
	done
	for some in $(CORRECTIONS); do \
		$(BIN)/ts-adapt search --config $(CONFIG) --solvers [$*] --static.corrections [$$some] || exit; \
	done
	$(BIN)/ts-adapt search --config $(CONFIG) --solvers [$*] --method per-sample --split test
	for kind in $(PREDICTORS); do $(BIN)/ts-adapt train --config $(CONFIG) --solvers [$*] --predictor $$kind || exit; done

# What the package costs, in figures; half an hour on a quiet core. One thread, whose own time is what is measured.
benchmarks: $(STAMP)
	for name in $(BENCHMARKS); do \
		echo "$$name"; OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || exit; \
	done

# The embedded models, trained anew as the model card says; hours on two cores. Stopped and started again, it goes on.
zoo: $(STAMP)
	$(BIN)/python scripts/train_zoo.py classifier
	$(TRAIN) ddpm --images 1100000 --out train_data/zoo/first
	$(TRAIN) ddpm --images 150000 --lr 8e-4 --init train_data/zoo/first/pipeline
	$(TRAIN) twin --images 150000 --lr 8e-4 --init train_data/zoo/ddpm/pipeline --half

# The wheel and the source archive, and what they promise: installed into an environment of their own, run elsewhere.
dist: $(WHEEL_ENV)/installed
	$(WHEEL_ENV)/bin/python scripts/smoke_wheel.py

# What comes along with the wheel, as CycloneDX.
sbom: $(WHEEL_ENV)/installed supply
	$(BIN)/cyclonedx-py environment --output-reproducible --output-file dist/sbom.json $(WHEEL_ENV)/bin/python

# Known vulnerabilities of everything pinned. A package that the service does not know is an error, as one that is bad.
audit: supply
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

licences: $(WHEEL_ENV)/installed supply
	$(BIN)/python scripts/licences.py $(WHEEL_ENV)/bin/python > docs/third-party.md

supply: $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e ".[supply]"

$(WHEEL_ENV)/installed: supply $(shell find ts_adapt -name "*.py") MANIFEST.in
	rm -rf dist $(WHEEL_ENV)
	PIP_CONSTRAINT=$(PINS) $(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python -m pip install --quiet --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(WHEEL_ENV)/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	touch $@

install: $(STAMP)

# torch goes first, by its exact version: resolved among the rest, a newer build with CUDA may be taken in its place.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
