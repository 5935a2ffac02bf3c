# make demo · make test · make lab · make lint: each makes .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test lab lint .venv

demo: $(BIN)/installed  ## phantom data, both stages, evaluation → outputs/demo; prints the metrics
	$(BIN)/python -m mrilib run params/demo $(ARGS)

test: $(BIN)/installed  ## all tests but those marked fullsize
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)  # one process a core, one thread each

lab: $(BIN)/installed  ## JupyterLab on notebooks/
	$(BIN)/jupyter lab --notebook-dir=. notebooks/01_explore_data.ipynb $(ARGS)

lint: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check mrilib tests
	$(BIN)/mypy

.venv: $(BIN)/installed

# The stamp is written last: an installation that was cut off is taken up again.
$(BIN)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 13) else "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $@
