# make setup | demo | test | check | docs | docs-test | oldest | chaos | fuzz | distributed | balancing | preserved | soak | bench |
# clean | help. The first of them to run makes .venv; after that none needs the network, but for what `mpoe demo` itself
# downloads once, and `make oldest`.

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BENCHMARKS ?= layer memory training decode scaling balanced convert plan

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOG := $(VENV)/install.log
# It notes every line of a statement with a `nosec` that found nothing in it.
BANDIT_LOG := $(VENV)/bandit.log

# pyright's wrapper asks PyPI for a newer release, and can fetch Node and its own JavaScript. The nodejs wheel and the
# bundled copy make both needless; should it fetch after all, it does so at set-up, and into .venv.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PYRIGHT_PYTHON_CACHE_DIR := $(CURDIR)/$(VENV)/cache
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check docs docs-test oldest chaos fuzz distributed balancing preserved soak bench clean

help:
	@echo "make setup   make .venv, with mpoe and all that it is developed with"
	@echo "make demo    upcycle a small T5, fine-tune it, show the numbers   (ARGS='--compare')"
	@echo "make test    run the tests                                        (ARGS='-k router -x')"
	@echo "make check   ruff, pyright, import-linter, bandit, dependency pins and their advisories"
	@echo "make docs    the pages of docs/ as HTML, into docs/_build/html"
	@echo "make docs-test   run every code block of README and docs/          (ARGS=docs/quickstart.md)"
	@echo "make oldest  the tests with the oldest versions that we promise   (ARGS='tests/training')"
	@echo "make chaos   kill training at random moments, fill disks           (ARGS='--kills 20 --seed 1')"
	@echo "make fuzz    random shapes, configs and damaged files              (ARGS='--minutes 10 --seed 1')"
	@echo "make distributed   two processes beside one, whole and sharded, on the CPU"
	@echo "make balancing     the loads of the experts in four training loops"
	@echo "make preserved     what upcycling does to the logits of every family"
	@echo "make soak    train and answer for an hour: does anything grow?    (ARGS='--minutes 10')"
	@echo "make bench   the benchmarks, each in its short form               (BENCHMARKS='layer decode')"
	@echo "make clean   delete .venv, caches and build output; runs/ stays"
	@echo "The first run makes .venv (some minutes). PYTHON=python3.12 picks the interpreter, PIP_ARGS adds options to pip."

setup: $(READY)
	@echo "setup: .venv is ready; source .venv/bin/activate puts mpoe on the path"

demo: $(READY)
	@echo "demo: fine-tuning an upcycled T5 ($(strip mpoe demo $(ARGS)))"
	@$(BIN)/mpoe demo $(ARGS)

test: $(READY)
	@echo "test: running pytest $(ARGS)"
	@$(BIN)/python -m pytest $(ARGS)

check: $(READY)
	@echo "check: ruff check"
	@$(BIN)/ruff check .
	@echo "check: ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "check: pyright"
	@$(BIN)/pyright
	@echo "check: import-linter"
	@$(BIN)/lint-imports
	@echo "check: pip check"
	@$(BIN)/python -m pip check
	@echo "check: bandit"
	@$(BIN)/bandit --quiet --recursive src scripts 2>$(BANDIT_LOG) || { cat $(BANDIT_LOG) >&2; exit 1; }
	@echo "check: pip-audit (skipped without a network)"
	@$(BIN)/python scripts/audit.py

docs: $(READY)
	@echo "docs: sphinx-build docs docs/_build/html"
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env docs docs/_build/html
	@echo "docs: open docs/_build/html/index.html"

docs-test: $(READY)
	@echo "docs-test: running the code blocks of README.md and docs/ (tests/long/documented.py $(ARGS)); some minutes"
	@$(BIN)/python tests/long/documented.py $(ARGS)

oldest: $(READY)
	@echo "oldest: running pytest $(ARGS) with constraints-oldest.txt"
	@$(BIN)/nox -s oldest -- $(ARGS)

chaos: $(READY)
	@echo "chaos: killing, damaging and filling (tests/long/chaos.py $(ARGS)); some minutes"
	@$(BIN)/python tests/long/chaos.py $(ARGS)

fuzz: $(READY)
	@echo "fuzz: random shapes, configs and damaged files (tests/long/fuzz.py $(ARGS)); 10 minutes"
	@$(BIN)/python tests/long/fuzz.py $(ARGS)

distributed: $(READY)
	@echo "distributed: two processes beside one (tests/long/distributed.py)"
	@$(BIN)/python tests/long/distributed.py

balancing: $(READY)
	@echo "balancing: four training loops (tests/long/balancing.py); some minutes"
	@$(BIN)/python tests/long/balancing.py

preserved: $(READY)
	@$(BIN)/python tests/long/preserved.py

soak: $(READY)
	@echo "soak: looking for growth (tests/long/soak.py $(ARGS))"
	@$(BIN)/python tests/long/soak.py $(ARGS)

# All of them run, whatever becomes of the others.
bench: $(READY)
	@failed=; for name in $(BENCHMARKS); do \
	  echo "bench: benchmarks/$$name.py --short $(ARGS)"; \
	  $(BIN)/python benchmarks/$$name.py --short $(ARGS) || failed="$$failed $$name"; \
	done; \
	[ -z "$$failed" ] || { echo "bench: these failed:$$failed; what they wrote is above" >&2; exit 1; }

clean:
	@echo "clean: deleting .venv, caches and build output"
	@rm -rf $(VENV) .nox build dist docs/_build .pytest_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	@find src tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last and removed first, so that a set-up cut short starts again from an empty .venv.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] < (3, 14) and \
	  f"mpoe needs Python 3.11 to 3.13; $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.11 ...")'
	@if [ -f $@ ]; then \
	  echo "setup: pyproject.toml or constraints.txt changed, updating $(VENV)"; rm -f $@; \
	else \
	  echo "setup: making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "setup: installing mpoe and its dependencies (about 1 GB; takes some minutes; log in $(LOG))"
	@$(BIN)/python -m pip install -c constraints.txt $(PIP_ARGS) -e '.[dev,docs,loops]' >$(LOG) 2>&1 \
	  || { cat $(LOG) >&2; echo "setup: pip failed, its output is above; run the same command again to retry" >&2; exit 1; }
	@$(BIN)/pyright --version >>$(LOG) 2>&1 || { cat $(LOG) >&2; echo "setup: pyright does not start" >&2; exit 1; }
	@touch $@
	@echo "setup: done"
