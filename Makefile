# make demo      train the 1.8M-parameter demo on the embedded corpus and evaluate it
# make test      format, lint, types and the tests except those marked full: 8 minutes
# make test-all  everything, with the environments of make tpu and make sky
# make fast      the tests marked neither slow nor full
# make docs      build the site of docs/ in build/docs; a broken link fails
# make sweep     sweep the learning rate of a small model and write the report
# make claims    write docs/claims.md, the ledger of claims, from the committed results
# make board     start TensorBoard on runs/ (ARGS=--logdir=sweeps/lr/points for a sweep)
# make text      download the corpus of the experiments (0.7 GB) and make its dataset
# make rows      train, save and resume every row of the paper's tables at test scale
# make faults    inject every fault of docs/reliability.md into real runs, print the table
# make tpu       make .venv/tpu, which compiles for TPUs without one (scripts/preflight.py)
# make sky       make .venv/sky, where tests read our tasks with SkyPilot's parser
# make lock      write the requirements*.lock: every package with its version and hashes
# make audit     look up known vulnerabilities of the locked packages
# make clean     remove .venv, build/ and caches; runs/ and sweeps/ stay
#
# PYTHON=python3.12    another interpreter (3.11 to 3.13)
# LOCKED=1             install the versions of the lock files and check their hashes
# JOBS=3               pytest workers; some tests wait for processes, so 3 suit 2 cores
# REQUIRED=1           make audit fails where it would otherwise report that it was skipped
# ARGS=...             extra arguments: pytest (ARGS='-k gate'), make rows and make faults
#                      (ARGS='--only table1'), make sweep, make lock (ARGS=--upgrade)

PYTHON ?= python3
WORKDIR ?= runs/demo
SWEEP ?= sweeps/lr
ARGS ?=
JOBS ?= 3
BIN := .venv/bin
TOOLS := .venv/tools
UV := $(shell command -v uv 2>/dev/null)
FROM := $(if $(LOCKED),lock,txt)
HASHES := $(if $(LOCKED),--require-hashes)

# $(call create,ENVIRONMENT) and $(call install,ENVIRONMENT): by uv if present, else pip.
ifneq ($(UV),)
create = UV_PYTHON_DOWNLOADS=never $(UV) venv --quiet --allow-existing \
  --python "$$(command -v $(PYTHON))" $(1)
install = $(UV) pip install --quiet --python $(1)/bin/python
else
create = $(PYTHON) -m venv $(1)
# Python compiles what is imported, which is a small part of it.
install = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
endif

# Scripts import the package. An editable install has no hash to check.
editable = $(call install,$(1)) --no-deps --editable .
# Container images often set this; without it, tests and packages are parsed only once.
unexport PYTHONDONTWRITEBYTECODE
pytest = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo check test test-all fast docs sweep text board claims tpu sky rows faults \
  environments lock audit clean
.DELETE_ON_ERROR:

demo: .venv/run-$(FROM)
	$(BIN)/python train.py --config=configs/tiny.py --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR)

check: .venv/dev-$(FROM)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check --python .venv

test: check
	$(pytest) -m 'not full' $(ARGS)

# Without libtpu or SkyPilot the tests that need them are skipped.
test-all: check
	@$(MAKE) --silent tpu || echo 'make tpu failed: tests that compile for TPUs are skipped' >&2
	@$(MAKE) --silent sky || echo 'make sky failed: tests that need SkyPilot are skipped' >&2
	$(pytest) $(ARGS)

fast: .venv/dev-$(FROM)
	$(pytest) -m 'not slow and not full' $(ARGS)

docs: .venv/docs/made-$(FROM)
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/python -m mkdocs build --strict --quiet
	@echo 'build/docs/index.html'

sweep: .venv/report-$(FROM)
	$(BIN)/python scripts/sweep.py run --config=configs/lr_sweep.py:scale=test --dir=$(SWEEP) $(ARGS)
	$(BIN)/python scripts/sweep.py report $(SWEEP)

claims: .venv/run-$(FROM)
	$(BIN)/python scripts/claims.py

board: .venv/report-$(FROM)
	$(BIN)/tensorboard --logdir=runs $(ARGS)

# experiments/text/README.md. What is complete is neither downloaded nor made again.
PINNED := $(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps \
  --require-hashes --dest=data/archives
CP311 := --only-binary=:all: --implementation=cp --python-version=3.11 \
  --platform=manylinux2014_x86_64 --platform=manylinux_2_28_x86_64

# A source archive by itself: with the whole list, pip also compiles all build backends.
SOURCE := echo "$$0 $$1" | $(PINNED) --no-binary="$${0%%==*}" -r /dev/stdin

text: .venv/run-$(FROM)
	test -e data/text/manifest.json || { \
	  $(PINNED) $(CP311) -r experiments/text/wheels.txt && \
	  grep == experiments/text/sources.txt | xargs -L 1 -P 6 sh -c '$(SOURCE)' && \
	  $(BIN)/python scripts/make_text.py --archives=data/archives --out=data/text; }
	$(BIN)/python scripts/prepare_data.py --out=data/text/dataset --length=1024 \
	  --tokenizer=bpe:8192 --dedup=none --domain=code=data/text/code \
	  --domain=prose=data/text/prose

tpu: .venv/tpu/made-$(FROM)

sky: .venv/sky/made-$(FROM)

# All that the checks need; with --jobs=2 in half of the time.
environments: .venv/dev-$(FROM) .venv/docs/made-$(FROM) tpu sky

rows: .venv/run-$(FROM)
	$(BIN)/python tests/rows.py $(ARGS)

faults: .venv/dev-$(FROM)
	$(BIN)/python tests/faults $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is an empty file: when its environment last followed the requirements.
.venv/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'gated needs Python 3.11, 3.12 or 3.13, but $(PYTHON) was not found:' \
	    'make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if (3, 11) <= v < (3, 14) else "gated needs Python 3.11, 3.12 or 3.13," \
	  " but $(PYTHON) is %d.%d: make PYTHON=/path/to/python3.12" % v)'
	@mkdir -p .venv
	@: > $@

.venv/run-$(FROM): requirements.$(FROM) pyproject.toml | .venv/python
	$(call create,.venv)
	$(call install,.venv) $(HASHES) -r requirements.$(FROM)
	$(call editable,.venv)
	@: > $@

.venv/report-$(FROM): requirements-report.$(FROM) .venv/run-$(FROM)
	$(call install,.venv) $(HASHES) -r requirements.$(FROM) -r requirements-report.$(FROM)
	@: > $@

DEV := requirements.$(FROM) $(foreach part,cloud report dev,requirements-$(part).$(FROM))

.venv/dev-$(FROM): $(DEV) .venv/run-$(FROM)
	$(call install,.venv) $(HASHES) $(DEV:%=-r %)
	@: > $@

# libtpu changes JAX's default platform, so it has an environment of its own.
.venv/tpu/made-$(FROM): requirements.$(FROM) requirements-tpu.$(FROM) pyproject.toml | .venv/python
	$(call create,.venv/tpu)
	$(call install,.venv/tpu) $(HASHES) -r requirements.$(FROM) -r requirements-tpu.$(FROM) \
	  || { rm -rf .venv/tpu; exit 1; }
	$(call editable,.venv/tpu)
	@: > $@

.venv/sky/made-$(FROM): requirements-sky.$(FROM) | .venv/python
	$(call create,.venv/sky)
	$(call install,.venv/sky) $(HASHES) -r requirements-sky.$(FROM) \
	  || { rm -rf .venv/sky; exit 1; }
	@: > $@

.venv/docs/made-$(FROM): requirements-docs.$(FROM) | .venv/python
	$(call create,.venv/docs)
	$(call install,.venv/docs) $(HASHES) -r requirements-docs.$(FROM)
	@: > $@

$(TOOLS)/made: requirements-tools.lock | .venv/python
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 \
	  --require-hashes -r requirements-tools.lock
	@: > $@

# $(call compile,NAME,LOCKED NAMES): NAME.txt -> NAME.lock for Python 3.11 to 3.13 on Linux
# and macOS, at the versions of the named lock files, which are installed beside it.
compile = $(TOOLS)/bin/uv pip compile --quiet --universal --python-version=3.11 \
  --generate-hashes --no-annotate --custom-compile-command='make lock' $(ARGS) \
  $(2:%=--constraint=%.lock) --output-file=$(1).lock $(1).txt >/dev/null

lock: $(TOOLS)/made
	$(call compile,requirements)
	$(call compile,requirements-cloud,requirements)
	$(call compile,requirements-report,requirements requirements-cloud)
	$(call compile,requirements-dev,requirements requirements-cloud requirements-report)
	$(call compile,requirements-cuda,requirements requirements-cloud)
	$(call compile,requirements-tpu,requirements requirements-cloud)
	$(call compile,requirements-tasks,requirements requirements-cloud)
	$(call compile,requirements-docs)
	$(call compile,requirements-sky)
	$(call compile,requirements-tools)
	@! grep -n '://' requirements*.lock

# Looks up what each lock file installs on this Python and platform. pip-audit writes its
# list only if the service answered, so an empty file means that the lookup did not work.
skipped = { echo "audit: skipped: $(1)"; exit $(if $(REQUIRED),1,0); }

audit:
	@$(MAKE) --silent $(TOOLS)/made >/dev/null 2>&1 || \
	  $(call skipped,pip-audit could not be installed (is there a network?)); \
	test -e $(TOOLS)/made || exit 0; \
	failed=0; list=$(TOOLS)/audit.txt; \
	for lock in requirements*.lock; do \
	  rm -f $$list; \
	  if $(TOOLS)/bin/pip-audit --vulnerability-service=osv --require-hashes --disable-pip \
	    --progress-spinner=off --output=$$list -r $$lock 2>$(TOOLS)/audit.log; then continue; \
	  fi; \
	  test -s $$list || $(call skipped,no answer from the vulnerability service for $$lock); \
	  echo "$$lock"; cat $$list; failed=1; \
	done; \
	test $$failed = 1 || echo 'audit: no known vulnerabilities'; exit $$failed
