# Everything goes through a virtual environment in .venv; `make` alone lists the targets.
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.13 python3.11 python3.10 python,\
  $(shell $(p) -c 'import sys, ensurepip; sys.version_info >= (3, 10) and print("$(p)")' 2>/dev/null)))
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
# tests start many processes: they keep what they compile, also where the environment says that nothing may be kept
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
CHECK_SHAPES := -p tests.type_checker --jaxtyping-packages=visionpos,tests.type_checker.check

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-oldest lint docs dist site bench gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## create .venv and install visionpos with everything it can use

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or newer with ensurepip found (Debian: apt-get install python3-venv)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: install  ## train five encodings on a position task (about 2 minutes) and draw what they do
	$(BIN)/python -m train.demo --output runs/demo

test: install  ## the fast tests
	$(PYTEST) -m 'not slow and not unhooked' $(CHECK_SHAPES)
	$(PYTEST) -m 'unhooked and not slow'

test-slow: install  ## the long checks
	$(PYTEST) -m slow

OLDEST := $(VENV)-oldest
test-oldest:  ## the fast tests with the oldest supported torch and timm, in an environment of their own
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.8.0 torchvision==0.23.0 timm==1.0.26 --editable '.[dev]'
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(OLDEST)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow'

lint: install  ## style, format, and which imports are allowed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

docs: install  ## write docs/encodings.md, docs/hosts.md, docs/results.md and pictures from the registry and from measurements; run the notebooks
	$(BIN)/python -m visionpos docs
	$(BIN)/python -m visionpos hosts > docs/hosts.md.new && mv docs/hosts.md.new docs/hosts.md
	$(BIN)/python -m train.report results/* --page docs/results.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.notebooks

dist: install  ## build dist/ and try its wheel in an environment of its own
	rm -rf dist && $(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv --clear build/wheel && mkdir build/wheel/tried
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[train]"
	build/wheel/bin/python -I tests/try_wheel.py build/wheel/tried

SITE := $(VENV)-site
site:  ## build the documentation as a site in build/site, in an environment of its own; a dead link is an error
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]' ruff
	$(SITE)/bin/mkdocs build --strict --site-dir build/site

bench: install  ## speed against timm and against no encoding, as ratios in one run (about 4 minutes)
	$(BIN)/python -m benchmarks.speed --quick

gpu:  ## what a GPU is asked for, in four parts of minutes each, into runs/gpu; repeat to continue
	@python3 -c "import torch" 2>/dev/null || $(MAKE) install
	@export PYTHON=$$(python3 -c "import torch" 2>/dev/null && echo python3 || echo $(BIN)/python); status=0; \
	for part in "check 5" "record 9" "table 9" "speed 9"; do bash train/on_gpu.sh $$part || status=1; done; exit $$status

clean:  ## remove what was built and trained; data/ stays
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-site runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
