# `make demo`, `make app` and `make test` set everything up by themselves, in a virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo app test lint clean

demo: $(VENV)/.installed
	$(RUN) -m examples.demo

app: $(VENV)/.installed
	$(RUN) -m app

test: $(VENV)/.installed-dev lint
	$(RUN) -m pytest

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
