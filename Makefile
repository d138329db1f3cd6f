# make demo    set up .venv, train the embedded default, evaluate it
# make test    set up .venv, check format, lint and types, run all tests
# make fast    the tests without those marked slow
# make sweep   sweep learning rates of a small model on this machine, and report
# make sky     set up .venv/sky, whose SkyPilot reads what is submitted to it, in tests
# make tpu     set up .venv/tpu, which compiles for TPUs without one (scripts/preflight.py)
# make rows    train every row of the paper's tables at test scale, save and resume it
# make faults  inject every fault of docs/reliability.md into real runs, print the table
# make lock    write the requirements*.lock: every package with its version and hashes
# make audit   look the locked packages up among known vulnerabilities
# make clean   remove .venv and caches; runs/ stays
#
# PYTHON=python3.12 picks another interpreter; LOCKED=1 installs what the lock files name.
# ARGS='-k gate' goes to pytest, which has JOBS=2 workers, ARGS='--only table1' to make
# rows, ARGS='--only 7' to make faults, ARGS=--upgrade to make lock, ARGS=--advisories=FILE
# to make audit, which then needs no network.

PYTHON ?= python3
WORKDIR ?= runs/demo
SWEEP ?= sweeps/lr
ARGS ?=
JOBS ?= 2
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null)

TOOLS := .venv/tools
FROM := $(if $(LOCKED),lock,txt)

# uv when it is there, pip otherwise.
ifneq ($(UV),)
CREATE := UV_PYTHON_DOWNLOADS=never $(UV) venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" .venv
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
else
CREATE := $(PYTHON) -m venv .venv
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

INSTALL += $(if $(LOCKED),--require-hashes)

.PHONY: demo test fast sweep tpu sky rows faults lock audit clean
.DELETE_ON_ERROR:

demo: .venv/run-$(FROM)
	$(BIN)/python train.py --config=configs/tiny.py --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR)

test: .venv/dev-$(FROM)
	@$(MAKE) --silent tpu || echo 'no libtpu here: what compiles for TPUs is skipped' >&2
	@$(MAKE) --silent sky || echo 'no SkyPilot here: what its parser checks is skipped' >&2
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check --python .venv
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

fast: .venv/dev-$(FROM)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not slow' $(ARGS)

sweep: .venv/report-$(FROM)
	$(BIN)/python scripts/sweep.py run --config=configs/lr_sweep.py:scale=test --dir=$(SWEEP) $(ARGS)
	$(BIN)/python scripts/sweep.py report $(SWEEP)

tpu: .venv/tpu/made-$(FROM)

sky: .venv/sky/made-$(FROM)

rows: .venv/run-$(FROM)
	$(BIN)/python scripts/train_rows.py $(ARGS)

faults: .venv/dev-$(FROM)
	$(BIN)/python tests/faults $(ARGS)

lock: $(TOOLS)/made
	PATH=$(TOOLS)/bin:$$PATH $(TOOLS)/bin/python scripts/lock.py $(ARGS)

# Without a network there may be no tools; then the audit says that it was skipped.
audit:
	@$(MAKE) --silent $(TOOLS)/made >/dev/null 2>&1 || true
	@python=$(TOOLS)/bin/python; test -e $(TOOLS)/made || python=$(PYTHON); \
	  $$python scripts/audit.py $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Empty files that say when the environment was last made to follow the requirements.
.venv/run-$(FROM): requirements.$(FROM)
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'gated needs Python 3.11 or 3.12, and $(PYTHON) is not there:' \
	    'make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if (3, 11) <= v < (3, 14) else "gated needs Python 3.11 or 3.12 (3.13 is" \
	  " untried), and $(PYTHON) is %d.%d: make PYTHON=/path/to/python3.12" % v)'
	$(CREATE)
	$(INSTALL) -r requirements.$(FROM)
	@: > $@

.venv/dev-$(FROM): requirements-dev.$(FROM) .venv/run-$(FROM)
	$(INSTALL) -r requirements-dev.$(FROM)
	@: > $@

.venv/report-$(FROM): requirements-report.$(FROM) .venv/run-$(FROM)
	$(INSTALL) -r requirements-report.$(FROM)
	@: > $@

# Of its own, for libtpu changes JAX's default platform.
.venv/tpu/made-$(FROM): requirements-tpu.$(FROM) .venv/run-$(FROM)
	$(subst .venv,.venv/tpu,$(CREATE))
	$(subst .venv/,.venv/tpu/,$(INSTALL)) -r requirements-tpu.$(FROM) || { rm -rf .venv/tpu; exit 1; }
	@: > $@

.venv/sky/made-$(FROM): requirements-sky.$(FROM) .venv/run-$(FROM)
	$(subst .venv,.venv/sky,$(CREATE))
	$(subst .venv/,.venv/sky/,$(INSTALL)) -r requirements-sky.$(FROM) || { rm -rf .venv/sky; exit 1; }
	@: > $@

$(TOOLS)/made: requirements-tools.lock
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 \
	  --require-hashes -r requirements-tools.lock
	@: > $@
