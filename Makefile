VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test chaos lint types imports generated check protos docs clean

demo: $(READY)
	$(BIN)/tamiyo demo

test: $(READY)
	$(BIN)/python -m pytest

chaos: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/chaos/campaign.py

check: lint types imports generated

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

protos: $(READY)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. tamiyo_svc/leyline/leyline.proto

docs: $(READY)
	$(BIN)/tamiyo config docs > docs/settings.md

generated: protos docs
	git diff --exit-code -- tamiyo_svc/leyline docs/settings.md

clean:
	rm -rf $(VENV) build dist *.egg-info

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
