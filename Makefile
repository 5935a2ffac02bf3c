# A bare `make` lists the targets. Each target that needs .venv makes it first, once.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: help quickstart demo record test test-gpu test-transformers lab docs lint .venv

help:  ## list the targets
	@sed -n 's/^\([a-z.-]*\):.*  ## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-24s %s\n", $$1, $$2}'

quickstart: $(BIN)/installed  ## one reconstruction with the trained model in models/phantom; a minute
	$(BIN)/python -m mrilib run params/quickstart --overwrite $(ARGS)

demo: $(BIN)/installed  ## phantom data, both stages, evaluation → outputs/demo; prints the metrics
	$(BIN)/python -m mrilib run params/demo $(ARGS)

test: $(BIN)/installed  ## all tests but those marked fullsize or gpu
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)  # one process a core, one thread each

test-gpu: $(BIN)/installed  ## the tests for a GPU → outputs/gpu_report.md, to send back
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

record: $(BIN)/installed  ## make the runs in outputs/reference* again, from a commit without changes
	$(BIN)/python -m mrilib run params/demo --name reference --overwrite
	$(BIN)/python -m mrilib run params/demo --name reference_no_tokens --overwrite -p stage2.decoder=no_token_decoder \
		-p 'compare.runs=["outputs/reference", "outputs/reference_no_tokens"]'
	$(BIN)/python -m mrilib run params/quickstart --name reference_quickstart --overwrite
	$(BIN)/python -m mrilib run params/pretrain --name reference_pretrain --overwrite -p pretrain.model_dir=outputs/reference_pretrain/model

# The oldest and the newest that pyproject allows, the older with what it needs; each in front of the environment's own.
OLDEST := transformers==5.6.2 tokenizers==0.22.2 huggingface_hub==1.33.0
NEWEST := transformers==5.24.0

test-transformers: $(BIN)/installed  ## the backbone's tests with the oldest and the newest transformers
	rm -rf .venv/oldest .venv/newest
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --target .venv/oldest $(OLDEST)
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --target .venv/newest $(NEWEST)
	for version in oldest newest; do \
		PYTHONPATH=.:.venv/$$version OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q \
			tests/backbone/test_nirvana.py tests/backbone/test_loading.py tests/backbone/test_huggingface.py $(ARGS) || exit 1; \
	done

lab: $(BIN)/installed  ## JupyterLab on copies of the notebooks in lab/
	$(BIN)/python -m mrilib.runs.lab
	$(BIN)/jupyter lab --notebook-dir=. lab/00_quickstart.ipynb $(ARGS)

docs: $(BIN)/installed  ## the documentation as a web site → docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -q -W --keep-going -n docs docs/_build/html
	@echo docs/_build/html/index.html

lint: $(BIN)/installed  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check mrilib tests
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv: $(BIN)/installed  ## the pinned packages

# The stamp is written last: an installation that was cut off is taken up again.
$(BIN)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 13) else "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $@
