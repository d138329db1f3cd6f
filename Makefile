# make demo    set up .venv, train the embedded default, evaluate it
# make test    set up .venv, check format, lint and types, run all tests
# make fast    the tests without those marked slow
# make rows    train every row of the paper's tables at test scale, save and resume it
# make clean   remove .venv and caches; runs/ stays
#
# PYTHON=python3.12 picks another interpreter; ARGS='-k gate' goes to pytest, or
# ARGS='--only table1' to make rows.

PYTHON ?= python3
WORKDIR ?= runs/demo
ARGS ?=
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null)

# uv when it is there, pip otherwise.
ifneq ($(UV),)
CREATE := UV_PYTHON_DOWNLOADS=never $(UV) venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" .venv
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
else
CREATE := $(PYTHON) -m venv .venv
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

.PHONY: demo test fast rows clean
.DELETE_ON_ERROR:

demo: .venv/run
	$(BIN)/python train.py --config=configs/tiny.py --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR)

test: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check --python .venv
	$(BIN)/python -m pytest $(ARGS)

fast: .venv/dev
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

rows: .venv/run
	$(BIN)/python scripts/train_rows.py $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Empty files that say when the environment was last made to follow the requirements.
.venv/run: requirements.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'gated needs Python 3.11 or 3.12, and $(PYTHON) is not there:' \
	    'make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if (3, 11) <= v < (3, 14) else "gated needs Python 3.11 or 3.12 (3.13 is" \
	  " untried), and $(PYTHON) is %d.%d: make PYTHON=/path/to/python3.12" % v)'
	$(CREATE)
	$(INSTALL) -r requirements.txt
	@: > $@

.venv/dev: requirements-dev.txt .venv/run
	$(INSTALL) -r requirements-dev.txt
	@: > $@
