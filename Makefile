# SPDX-License-Identifier: Apache-2.0
# Everything is installed into .venv; nothing else on the machine is touched.
.DEFAULT_GOAL := help
.PHONY: help demo test lint types tests core oldest bench clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
SOURCES := pyproject.toml README.md $(shell find traced_retry exporters dashboards -type f -not -name '*.pyc')

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-6s %s\n", $$1, $$2}' Makefile

demo: .venv/.demo  ## a dozen conversations with a server that fails, and what became of each
	@$(BIN)/traced-retry demo

test: lint types core oldest tests  ## lint, types, and all tests

lint: .venv/.test  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test  ## mypy, strict
	$(BIN)/mypy
	$(BIN)/mypy tests/typing_api.py

tests: .venv/.test  ## the tests, against the installed package
	$(BIN)/pytest

# The core alone, without LiveKit: on Python 3.10 where that is there, and on python-backoff.
core: .venv/.core-fork $(if $(shell tools/find-python 3.10),.venv/.core-3.10)  ## the core's tests elsewhere
	@for venv in $(patsubst .venv/.core-%,%,$^); do \
		echo "core tests: $$venv, $$(.venv/core-$$venv/bin/python --version)"; \
		.venv/core-$$venv/bin/pytest -q tests/core || exit 1; \
	done

# What the adapters rely on, in the oldest plugins supported. Not there yet in 1.7.0: VoiceLive and
# inference's realtime model. Its AWS plugin cannot be pointed at a local server. With them the oldest
# OpenTelemetry, whose Prometheus exporter is to give the names that dashboards and alerts ask for.
oldest: .venv/.oldest  ## the adapters' tests on plugins 1.7.0; the dashboards' names on OpenTelemetry 1.39
	.venv/oldest/bin/pytest -q $(addprefix tests/livekit/test_,hook.py openai.py failure_before_output.py interruption.py stateful.py regressions.py openai_compatible.py provider_contract.py google.py single_slot.py ultravox.py phonic.py nvidia.py) tests/dashboards/test_drift.py

bench: .venv/.bench  ## what retrying and tracing cost, beside tenacity and stamina
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/outage.py
	$(BIN)/python benchmarks/backends.py
	$(BIN)/python benchmarks/queries.py

.PHONY: backends
backends: .venv/pyvenv.cfg  ## build Jaeger and a Collector for the tests, once: ~/.cache, 8 minutes
	$(BIN)/python tools/backends/build.py

clean:  ## remove all that was built
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/pyvenv.cfg:
	"$$(tools/find-python)" -m venv .venv

# $(1): an extra. The package is built anew where a source changed; its dependencies only where
# pyproject.toml did (pip sees that they are there).
define environment
.venv/.$(1): .venv/pyvenv.cfg $(SOURCES)
	@echo "installing traced-retry[$(1)] into .venv (the first time takes a minute)"
	@rm -rf build
	@$(PIP) --force-reinstall --no-deps . && $(PIP) '.[$(1)]' && rm -rf build
	@touch $$@
endef
$(foreach extra,demo test bench,$(eval $(call environment,$(extra))))

OLDEST := $(patsubst %,livekit-%==1.7.0,agents plugins-openai plugins-xai plugins-google plugins-ultravox plugins-phonic plugins-nvidia[personaplex])
OLDEST += opentelemetry-api==1.39.0 opentelemetry-sdk==1.39.0 opentelemetry-instrumentation==0.60b0 \
	opentelemetry-exporter-prometheus==0.60b0 prometheus-client==0.22.0
OLDEST += pytest pytest-asyncio hypothesis h2 trustme backoff promql-parser pyyaml

.venv/.oldest: .venv/pyvenv.cfg $(SOURCES)
	@echo "installing the oldest plugins and OpenTelemetry supported into .venv/oldest"
	@test -x .venv/oldest/bin/pip || $(BIN)/python -m venv .venv/oldest
	@.venv/oldest/bin/pip --disable-pip-version-check --quiet install $(OLDEST)
	@rm -rf build; .venv/oldest/bin/pip --disable-pip-version-check --quiet install --force-reinstall --no-deps . \
		&& rm -rf build && touch $@

CORE_NEEDS := opentelemetry-api opentelemetry-sdk opentelemetry-instrumentation pytest pytest-asyncio hypothesis

.venv/.core-fork: .venv/pyvenv.cfg $(SOURCES)
	@$(call core,fork,$(BIN)/python,python-backoff)

.venv/.core-3.10: .venv/pyvenv.cfg $(SOURCES)
	@$(call core,3.10,"$$(tools/find-python 3.10)",backoff==2.2.1)

# $(1): name, $(2): Python, $(3): which backoff
core = test -x .venv/core-$(1)/bin/pytest || { $(2) -m venv .venv/core-$(1) && \
	.venv/core-$(1)/bin/pip --disable-pip-version-check --quiet install $(CORE_NEEDS) $(3); }; \
	rm -rf build; .venv/core-$(1)/bin/pip --disable-pip-version-check --quiet install --force-reinstall --no-deps . \
	&& rm -rf build && touch $@

.PHONY: dashboards preview
dashboards: .venv/.test  ## make rules, alerts, dashboards and the docs' tables anew
	$(BIN)/python dashboards/build.py
	$(BIN)/python dashboards/build_rules.py
	$(BIN)/python dashboards/build_dashboards.py
	$(BIN)/python dashboards/build_docs.py

preview: .venv/.test  ## draw the dashboards from real query results: dashboards/preview
	TRACED_RETRY_PREVIEW=dashboards/preview $(BIN)/pytest tests/dashboards/test_fleet.py -k preview

.PHONY: matrix
matrix: .venv/.test  ## every provider x every fault, with us and without; writes docs/providers.md
	$(BIN)/python tools/matrix.py --write docs/providers.md
