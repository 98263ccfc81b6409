# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_OUT ?= results/lavacrossing_dqn

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/raypatch generate --type single_neuron --agent_path examples/lavacrossing_dqn
	$(BIN)/raypatch run --agent_path examples/lavacrossing_dqn \
		--definition_file Definitions/single_neuron_experiment.json --output_dir $(DEMO_OUT)

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing raypatch into $(VENV) (torch and ray are large; a few minutes the first time)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) results .pytest_cache .mypy_cache .ruff_cache
