# On a fresh machine with Python >= 3.11, `make quickstart` and `make test` do everything.
# An installed CPU build of torch is kept: constraints.txt pins the version, not the build.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help install quickstart test test-all lint format site notebooks benchmark wheel clean docs/settings.md docs/files.md

help:
	@echo "make install      .venv with screformer in it"
	@echo "make quickstart   the whole chain on simulated cells, in ./quickstart (ARGS='--h5ad FILE' for yours)"
	@echo "make test         the tests (ARGS='-k stream' for some)"
	@echo "make test-all     the tests, then the slow ones, each with its time"
	@echo "make lint         ruff and mypy"
	@echo "make docs/settings.md docs/files.md   the pages made from the code"
	@echo "make site         the documentation site, in ./site"
	@echo "make notebooks    the notebooks of docs/notebooks, on simulated cells"
	@echo "make wheel        wheel and sdist in dist/, tested in a fresh environment"
	@echo "make benchmark    the stream and the attention against their peers"

install: $(VENV)/installed

quickstart: install
	$(RUN) -m jobs.quickstart $(ARGS)

test: $(VENV)/installed-for-tests
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: test
	$(RUN) -m pytest -m slow --durations=0 --durations-min=1 $(ARGS)

lint: $(VENV)/installed-for-tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/installed-for-tests
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs/settings.md docs/files.md: $(VENV)/installed
	$(RUN) docs/make_$(notdir $(basename $@)).py > $@.part && mv $@.part $@

benchmark: $(VENV)/installed-for-tests
	$(RUN) -m jobs.benchmark stream
	$(RUN) -m jobs.benchmark attention
	$(RUN) -m jobs.benchmark step

wheel: $(VENV)/installed-for-tests
	rm -rf build dist
	$(RUN) -m build --quiet --outdir dist .
	$(RUN) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		dist/screformer-*.whl
	$(RUN) tests/wheel.py build/fresh

site: $(VENV)/installed-for-tests
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

notebooks: $(VENV)/installed-for-tests
	rm -rf build/notebooks && mkdir -p build/notebooks
	cd build/notebooks && for name in label explain train; do \
		MPLBACKEND=agg $(abspath $(RUN)) $(CURDIR)/docs/notebooks/$$name.py >$$name.log 2>&1 \
			|| { tail -40 $$name.log; echo "notebook $$name failed"; exit 1; }; \
	done

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(RUN):
	@test -n "$(PYTHON)" && $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "screformer needs Python >= 3.11, found '$(PYTHON)'; use make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(RUN)
	$(PIP) --quiet -e ".[all]"
	@touch $@

$(VENV)/installed-for-tests: pyproject.toml constraints.txt | $(RUN)
	$(PIP) --quiet -e ".[all,test,dev,docs,baselines]"
	@touch $@ $(VENV)/installed
