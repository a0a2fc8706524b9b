# Every target sets up what it needs by itself: a virtual environment in .venv with the pinned packages.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV   ?= .venv
RUN    ?= runs/demo
COMPARE ?= runs/compare
PORT   ?= 5000
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo compare test test-containers images lint types compile compile-check check ui clean help
help:           ## Show the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(READY)  ## Run the whole pipeline on real text (CORPUS=folder of own text, RUN=folder for the results)
	$(BIN)/cbtm demo --root $(RUN) $(if $(CORPUS),--corpus "$(CORPUS)")

compare: $(READY) ## Compare dense, random and 2, 4, 8 experts on real text (CORPUS=, COMPARE=folder for the results)
	$(BIN)/cbtm compare --root $(COMPARE) $(if $(CORPUS),--corpus "$(CORPUS)")

test: $(READY)  ## Run all tests
	$(BIN)/python -m pytest

images: $(READY) ## Build the images with the engine of this machine (BASE=another base)
	images/build

test-containers: $(READY) ## Run the pipeline in its images, against Ceph and an MLflow server
	tests/containers/run

lint: $(READY)  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## Check types
	$(BIN)/mypy

compile: $(READY) ## Compile the pipelines into cbtm/compiled
	$(BIN)/python -m pipelines.compile

compile-check: $(READY) ## Check that the committed pipelines are what they compile to
	$(BIN)/python -m pipelines.compile --check

check: lint types compile-check test ## Everything that must be green

ui: $(READY)    ## Open the comparison of the demo's models in MLflow (PORT=5000)
	$(BIN)/cbtm ui --root $(RUN) --port $(PORT)

clean:          ## Remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an installation that was interrupted is done again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cbtm needs Python 3.11 or newer; found $$($(PYTHON) --version). Set PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "this Python has no venv; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "installing the pinned packages into $(VENV); this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@
