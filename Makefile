VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test stacks bench chaos soak campaign plain client-matrix lint types imports rules generated check protos docs clean

demo: $(READY)
	$(BIN)/tamiyo demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

chaos: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/chaos/campaign.py

soak: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/chaos/soak.py

campaign: $(READY)
	$(BIN)/python tests/chaos/policy_campaign.py kills 50
	$(BIN)/python -W ignore tests/chaos/policy_campaign.py mutations 100000

# Both install what they try from the package index.
plain: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/packages/plain_install.py

client-matrix: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/packages/client_matrix.py

# Twenty minutes on two cores.
stacks: $(READY)
	PYTHONPATH=tests $(BIN)/python -m stacks.matrix docs/training-stacks.md

bench: $(READY)
	$(BIN)/python -m benchmarks.parts
	$(BIN)/python -m benchmarks.agreement
	$(BIN)/python -m benchmarks.large
	$(BIN)/python -m benchmarks.commits
	$(BIN)/tamiyo bench --catalog tests/data/urza_catalog.db --blueprint demo-safe
	$(BIN)/tamiyo bench --catalog tests/data/urza_catalog.db --blueprint demo-safe \
		--trainers 64 --rate 0 --seconds 20 --set TAMIYO_STEP_TIMEOUT_MS=1000

check: lint types imports rules generated

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

# Generated code refuses every runtime but that of its own major version and the next. What it does
# otherwise is the same from protobuf 5.26 to 7, so the check is taken out of it.
protos: $(READY)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. tamiyo_svc/leyline/leyline.proto
	sed -i -e '/ import runtime_version as /d' -e '/^_runtime_version\./,/^)$$/d' tamiyo_svc/leyline/leyline_pb2.py

# Debian: the package prometheus.
rules: $(READY)
	cd deploy/prometheus && promtool check rules tamiyo.rules.yml
	cd deploy/prometheus && promtool check config --syntax-only prometheus.yml
	cd deploy/prometheus && promtool test rules tamiyo.rules.test.yml

docs: $(READY)
	$(BIN)/tamiyo docs docs
	$(BIN)/python deploy/prometheus/render.py
	$(BIN)/python deploy/grafana/build.py

generated: protos
	git diff --exit-code -- tamiyo_svc/leyline
	$(BIN)/tamiyo docs docs --check
	$(BIN)/python deploy/prometheus/render.py --check
	$(BIN)/python deploy/grafana/build.py --check

clean:
	rm -rf $(VENV) build dist *.egg-info

$(READY): pyproject.toml packages/client/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e packages/client -e '.[dev]'
	touch $@
