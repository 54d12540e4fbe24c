# make demo | test | test-slow | test-packages | test-postgres | fresh | soak | fuzz | fuzz-guided | lint | format |
# results | studies | students | suite | benchmarks | zoo | emoji | dist | sbom | audit | licences | clean
# PYTHON=python3.12 for another interpreter; TORCH_INDEX=https://download.pytorch.org/whl/cpu for a torch without CUDA
# where the default index has one with it.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
CONFIG ?= configs/plain.yml
KILLS ?= 20
FILES ?= 100000
RUNS ?= 10000
SEED ?= 0
SOLVERS := unipc-3 dpmpp-2m
EMOJI := data autoencoder judges sd sheet-sd quality-sd sd3 sheet-sd3 quality-sd3
METHODS := static dmn gits oss
CORRECTIONS := shift,scale,coefficients
BENCHMARKS := scheduler_overhead pipeline_overhead search_batching network_share search_memory scaling cacher_cost
STUDIES := ablation training_size label_search learning_cost quantizer_quality
STUDY := unipc-3
STUDY_NFE := 5
STUDY_LABELS := 4096
STUDY_CONFIG := --config configs/fashion.yml --solvers $(STUDY)
STUDENTS := "--nfe 5 --student.quantizer hqq3" "--nfe 10 --student.cacher deepcache-2 --static_samples 128"
MORE := --teacher.train_samples 2048 --static_samples 768 --train.samples 2048
EMOJI_SD := --config configs/emoji-sd.yml $(MORE) --evaluate.grids quadratic,ays-svd
EMOJI_SD3 := --config configs/emoji-sd3.yml $(MORE) --evaluate.grids beta,quadratic
CHEAPER := "--nfe 6,8 --student.cacher deepcache-2" "--nfe 5 --student.quantizer hqq3" "--nfe 6 --student.cacher tgate-3"
PRUNED := train_data/pruned-90.json
PRUNING := --nfe 5 --static_samples 384 --train.samples 512 --student.pruned $(PRUNED)
QUANTIZERS := none,bf16,hqq4,hqq3,vqdm4,tdq-w8a8,tinydm-w8a8,tdq-w4a8,tdq-w4a8+ptqd
FEW := --evaluate.samples 512 --evaluate.grids ays-svd

BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TRAIN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 scripts/train_zoo.py
PIP := $(BIN)/python -m pip --disable-pip-version-check
WHEEL_ENV := build/wheel-env
BUILD_LOG := build/build.log
PINS := $(CURDIR)/constraints.txt
TORCH := $(shell sed -n 's/^\(torch\(vision\)\?==.*\)/\1/p' constraints.txt)

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-slow test-packages test-postgres fresh soak fuzz fuzz-guided lint format results studies \
	students suite benchmarks zoo emoji dist sbom audit licences supply install clean

demo: $(STAMP)
	$(BIN)/ts-adapt demo

# A process to each core, one thread each; a file's tests stay together.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not packages and not postgres"

test-packages: $(STAMP)
	$(PIP) install --quiet -c constraints.txt torchao atheris
	$(PIP) install --quiet -c constraints.txt --no-deps hqq einops termcolor torch-fidelity gguf
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m packages tests scripts/fuzzing

# The server is Debian's package postgresql (apt-get install postgresql); the test runs one of its own.
test-postgres: $(STAMP)
	$(PIP) install --quiet -c constraints.txt -e ".[postgres]"
	$(BIN)/python -m pytest -m postgres

# The demo, the snippets of README and docs, and the built wheel (STEPS="snippets wheel" for some), each from nothing:
# a clone of HEAD, empty environments, an empty home; the last lines say what was fetched.
fresh:
	TORCH_INDEX=$(TORCH_INDEX) $(PYTHON) scripts/fresh.py $(STEPS)

# Every job killed at random moments and run again; the last line is {"kills": n, "lost": n, "differing": n}.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/soak.py --kills $(KILLS)

# What the loop and its mutations promise, then mutated files for every reader of the package; the last line is
# {"files": n, "failures": n}.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q scripts/fuzzing
	PYTHONPATH=scripts OMP_NUM_THREADS=1 $(BIN)/python -m fuzzing --files $(FILES) --seed $(SEED)

# The same readers under atheris, which looks for inputs that reach other lines of the package.
fuzz-guided: $(STAMP)
	$(PIP) install --quiet atheris
	for reader in $$(PYTHONPATH=scripts $(BIN)/python -m fuzzing --list); do \
		PYTHONPATH=scripts OMP_NUM_THREADS=1 $(BIN)/python -m fuzzing.guided $$reader --runs $(RUNS) --seed $(SEED) || exit; \
	done

lint: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tables of "Without text" in docs/RESULTS.md, of one-shot predictors from more noises than there; hours on two
# cores. Stopped and started again, it goes on. The solvers are learned side by side, one thread each: small convolutions
# gain little from a second thread.
results: $(STAMP)
	$(BIN)/ts-adapt teach --config $(CONFIG)
	OMP_NUM_THREADS=1 $(MAKE) -j 2 $(addprefix learn-,$(SOLVERS))
	$(BIN)/ts-adapt evaluate --config $(CONFIG)

learn-%: $(STAMP)
	for method in $(METHODS); do \
		$(BIN)/ts-adapt search --config $(CONFIG) --solvers [$*] --method $$method || exit; \
	done
	$(BIN)/ts-adapt search --config $(CONFIG) --solvers [$*] --method per-sample --split test
	for kind in recursive one-shot; do \
		$(BIN)/ts-adapt train --config $(CONFIG) --solvers [$*] --predictor $$kind || exit; \
	done

# What each part is worth, on one solver and NFE; then schedules for cheaper networks.
studies: $(STAMP)
	$(BIN)/ts-adapt teach $(STUDY_CONFIG)
	$(BIN)/ts-adapt search $(STUDY_CONFIG) --nfe $(STUDY_NFE),10 --static.corrections []
	OMP_NUM_THREADS=1 $(BIN)/ts-adapt search $(STUDY_CONFIG) --nfe $(STUDY_NFE) --method per-sample \
		--label_samples $(STUDY_LABELS)
	$(MAKE) $(addprefix bench-,$(STUDIES))
	$(MAKE) students
	$(BIN)/ts-adapt evaluate --config configs/suite_smoke.yml

students: $(STAMP)
	for student in $(STUDENTS); do \
		$(BIN)/ts-adapt search $(STUDY_CONFIG) $$student || exit; \
		$(BIN)/ts-adapt search $(STUDY_CONFIG) $$student --static.corrections $(CORRECTIONS) || exit; \
		$(BIN)/ts-adapt train $(STUDY_CONFIG) $$student --predictor recursive || exit; \
	done
	$(BIN)/ts-adapt evaluate $(STUDY_CONFIG) --nfe $(STUDY_NFE) --quantizers none,hqq3 $(FEW) --log_root logs/quantized
	$(BIN)/ts-adapt evaluate $(STUDY_CONFIG) --nfe $(STUDY_NFE),10 --cachers none,deepcache-2,deepcache-2-branch2 $(FEW) \
		--log_root logs/cached

# A schedule, a cacher, or both at equal cost, and quantizers, on the text-to-image models: schedules learned for the whole
# network and for the cheaper one. Hours on two cores, resumable.
suite: $(STAMP)
	$(BIN)/ts-adapt learn $(EMOJI_SD) --nfe 3,5,10
	for student in $(CHEAPER); do \
		$(BIN)/ts-adapt search $(EMOJI_SD) $$student || exit; \
		$(BIN)/ts-adapt train $(EMOJI_SD) $$student || exit; \
	done
	[ -e $(PRUNED) ] || $(BIN)/ts-adapt prune $(EMOJI_SD) --nfe 5 --schedule static --prune.cost 0.9 --prune.samples 32 \
		--out $(PRUNED)
	$(BIN)/ts-adapt search $(EMOJI_SD) $(PRUNING)
	$(BIN)/ts-adapt train $(EMOJI_SD) $(PRUNING)
	$(BIN)/ts-adapt evaluate $(EMOJI_SD) --nfe 3,5,6,8,10 --cachers none,deepcache-2 --log_root logs/cached
	$(BIN)/ts-adapt evaluate $(EMOJI_SD) --nfe 6 --cachers none,tgate-3 --log_root logs/gated
	$(BIN)/ts-adapt evaluate $(EMOJI_SD) --nfe 5 --quantizers $(QUANTIZERS) --log_root logs/quantized
	$(BIN)/ts-adapt evaluate $(EMOJI_SD) --nfe 5 --pruned none,$(PRUNED) --log_root logs/pruned
	$(BIN)/ts-adapt learn $(EMOJI_SD3) --nfe 3,5
	$(BIN)/ts-adapt search $(EMOJI_SD3) --nfe 8 --student.cacher firstblock-.2
	$(BIN)/ts-adapt train $(EMOJI_SD3) --nfe 8 --student.cacher firstblock-.2 --train.samples 512
	$(BIN)/ts-adapt evaluate $(EMOJI_SD3) --nfe 3,5,6,8,10 --cachers none,firstblock-.2 --log_root logs/cached

# What the package costs, in figures; half an hour on a quiet core.
benchmarks: $(addprefix bench-,$(BENCHMARKS))

# One thread, whose own time is what is measured.
bench-%: $(STAMP)
	mkdir -p logs/benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$*.py | tee logs/benchmarks/$*.txt

# The embedded models, trained anew as the model card says; hours on two cores. Stopped and started again, it goes on.
zoo: $(STAMP)
	$(BIN)/python scripts/train_zoo.py classifier
	$(TRAIN) ddpm --images 1100000 --out train_data/zoo/first
	$(TRAIN) ddpm --images 150000 --lr 8e-4 --init train_data/zoo/first/pipeline
	$(BIN)/python scripts/train_zoo.py plain --images 360000 --half
	$(TRAIN) twin --images 150000 --lr 8e-4 --init train_data/zoo/ddpm/pipeline --half

# The text-to-image models under train_data/emoji, and two sheets of what they make; hours on two cores. Stopped and
# started again, it goes on. `make emoji-data emoji-autoencoder emoji-sd`, and so on, are its parts.
emoji: $(addprefix emoji-,$(EMOJI))

emoji-data: $(STAMP)
	PYTHONPATH=scripts $(BIN)/python -m emoji data

emoji-sheet-%: $(STAMP)
	PYTHONPATH=scripts $(BIN)/python -m emoji sheet --of $* --out train_data/emoji/$*.png

emoji-quality-%: $(STAMP)
	PYTHONPATH=scripts $(BIN)/python -m emoji quality --of $* | tee train_data/emoji/quality-$*.json

emoji-%: $(STAMP)
	PYTHONPATH=scripts OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m emoji $*

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

$(WHEEL_ENV)/installed: $(shell find ts_adapt -name "*.py") MANIFEST.in | supply
	rm -rf dist $(WHEEL_ENV)
	mkdir -p $(dir $(WHEEL_ENV))
	@echo "building in dist/; what is said meanwhile goes to $(BUILD_LOG)"
	@PIP_CONSTRAINT=$(PINS) $(BIN)/python -m build --outdir dist > $(BUILD_LOG) 2>&1 || { tail -n 60 $(BUILD_LOG); exit 1; }
	@tail -n 1 $(BUILD_LOG)
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python -m pip install --quiet --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(WHEEL_ENV)/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	touch $@

install: $(STAMP)

# torch and the torchvision that is made for it go first, by their exact versions: resolved among the rest, a newer build
# with CUDA may be taken in their place.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
