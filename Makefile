# SPDX-License-Identifier: Apache-2.0
# Everything is installed into .venv; nothing else on the machine is touched.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint types tests fork pythons oldest packages newest constraints wheel bench clean

BIN := .venv/bin
# Tools and tests are pinned, and so is setuptools, which builds the package: pip 25.3 took the
# second variable for that.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
PIP := $(PINNED) $(BIN)/python -m pip --disable-pip-version-check --quiet install
SOURCES := pyproject.toml README.md $(shell find traced_retry exporters dashboards -type f -not -name '*.pyc')
# The package is built once, and every environment installs this wheel.
WHEEL := dist/traced_retry-$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)-py3-none-any.whl
# Two processes per core, because the tests wait half of their time. Tests that share a server stay on
# one of them, and the longest start first: see tests/conftest.py.
CORES := $(shell getconf _NPROCESSORS_ONLN)
export PYTEST_XDIST_AUTO_NUM_WORKERS ?= $(shell echo $$(($(CORES) * 2)))
PARALLEL := -n auto --dist loadgroup --no-loadscope-reorder
# The compiled tests are kept, because each process of pytest would compile them again.
export PYTHONDONTWRITEBYTECODE :=

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: .venv/.demo  ## a dozen conversations with a server that fails, and the outcome of each
	@$(BIN)/traced-retry demo

test: lint types tests  ## lint, types, and the tests that need no further installation: 5 minutes

test-all: lint types tests-all  ## `make test`, other versions of Python and of packages, and the package itself

# `packages` waits for pip most of its time, so it runs beside the tests. `fork` and `pythons` run one
# process each, so as many of them run at once as there are cores.
.PHONY: tests-all
tests-all:
	$(MAKE) --jobs 2 tests packages
	$(MAKE) oldest
	$(MAKE) --jobs $(CORES) --output-sync=target fork pythons

lint: .venv/.test  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test  ## mypy, strict
	$(BIN)/mypy
	$(BIN)/mypy tests/typing_api.py

tests: .venv/.test  ## the tests, against the installed package
	$(BIN)/pytest $(PARALLEL)

# The core alone, without LiveKit: on python-backoff, and on every other Python on this machine.
OTHERS := $(foreach version,3.11 3.12 3.13 3.14,$(if $(shell tools/find-python $(version)),$(version)))

fork: core-fork  ## the core's tests on python-backoff

pythons: $(OTHERS:%=core-%)  ## the core's tests on every Python here, from 3.11 to 3.14

.PHONY: core-fork $(OTHERS:%=core-%)
core-fork $(OTHERS:%=core-%): core-%: .venv/.core-%
	.venv/core-$*/bin/pytest -q -p no:cacheprovider tests/core

# The private attributes that the adapters use, in the oldest plugins supported. 1.7.0 has neither
# VoiceLive nor inference's realtime model, and its AWS plugin cannot be pointed at a local server.
# With them the oldest OpenTelemetry, whose Prometheus exporter has to give the names that
# dashboards and alerts ask for.
oldest: .venv/.oldest  ## the adapters' tests on plugins 1.7.0; the dashboards' names on OpenTelemetry 1.39
	.venv/oldest/bin/pytest -q $(PARALLEL) $(addprefix tests/livekit/test_,hook.py openai.py failure_before_output.py interruption.py stateful.py regressions.py openai_compatible.py provider_contract.py google.py single_slot.py ultravox.py phonic.py nvidia.py server_events.py turns.py waiting.py filler.py) tests/dashboards/test_drift.py

packages: .venv/.test  ## build wheel and sdist; install the wheel with each extra; run the README's code
	$(BIN)/pytest -m packages tests/packages

newest: .venv/.newest  ## the tests on the newest version of everything
	.venv/newest/bin/pytest $(PARALLEL)

# MUTANTS="--number 0 core/loop.py" runs all mutants of one module.
.PHONY: mutants
mutants: .venv/.test  ## change the code in 60 small ways, and list the changes that no test notices
	$(BIN)/python tools/mutants.py $(MUTANTS)

constraints: .venv/.test  ## resolve constraints.txt again, for all Pythons and extras
	$(BIN)/python tools/constraints.py

wheel: $(WHEEL)  ## build dist/*.whl
	@ls $(WHEEL)

$(WHEEL): .venv/pyvenv.cfg constraints.txt $(SOURCES)
	@rm -rf build $@
	@$(PINNED) $(BIN)/python -m pip --disable-pip-version-check --quiet wheel --no-deps --wheel-dir dist .
	@rm -rf build

bench: .venv/.bench  ## the cost of retries and traces, beside tenacity and stamina
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/events.py
	$(BIN)/python benchmarks/outage.py
	$(BIN)/python benchmarks/replies.py
	$(BIN)/python benchmarks/breaker.py
	$(BIN)/python benchmarks/backends.py
	$(BIN)/python benchmarks/queries.py
	$(BIN)/python benchmarks/aggregation.py
	$(BIN)/python benchmarks/report.py

.PHONY: backends
backends: .venv/pyvenv.cfg  ## build the servers of the tests, once: ~/.cache, 13 minutes
	$(BIN)/python tools/backends/build.py

.PHONY: docs
docs: .venv/.docs  ## build the documentation site into site, and check its links
	@NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict --quiet
	@.venv/docs/bin/python tools/docs/check_site.py site

clean:  ## remove all that was built
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/pyvenv.cfg:
	"$$(tools/find-python)" -m venv .venv

# $(1): an extra. The package is installed again if a source changed. pip then finds its
# dependencies installed, unless pyproject.toml or constraints.txt changed.
define environment
.venv/.$(1): $(WHEEL)
	@echo "installing traced-retry[$(1)] into .venv (the first time takes a minute)"
	@$(PIP) --force-reinstall --no-deps $(WHEEL) && $(PIP) '$(WHEEL)[$(1)]'
	@touch $$@
endef
$(foreach extra,demo test bench,$(eval $(call environment,$(extra))))

# $(1): name, $(2): Python, $(3): its needs. An environment of its own in .venv, by uv of the extra
# `test`, because pip takes a minute for what uv does in seconds.
UV := $(BIN)/python -m uv
apart = test -x .venv/$(1)/bin/python || $(UV) venv --quiet --no-python-downloads --python $(2) .venv/$(1); \
	$(UV) pip install --quiet --compile-bytecode --reinstall-package traced-retry --python .venv/$(1)/bin/python $(3)

OLDEST := $(patsubst %,livekit-%==1.7.0,agents plugins-openai plugins-xai plugins-google plugins-ultravox plugins-phonic plugins-nvidia[personaplex])
OLDEST += opentelemetry-api==1.39.0 opentelemetry-sdk==1.39.0 opentelemetry-instrumentation==0.60b0 \
	opentelemetry-exporter-prometheus==0.60b0 prometheus-client==0.22.0
OLDEST += azure-ai-voicelive pytest pytest-asyncio pytest-randomly pytest-xdist hypothesis h2 trustme backoff promql-parser pyyaml

.venv/.oldest: .venv/.test
	@echo "installing the oldest plugins and OpenTelemetry supported into .venv/oldest"
	@$(call apart,oldest,$(BIN)/python,$(WHEEL) $(OLDEST))
	@touch $@

# The documentation's tools are not in .venv, because tests do not need them.
.venv/.docs: .venv/.test
	@echo "installing the documentation's tools into .venv/docs"
	@$(call apart,docs,$(BIN)/python,-c constraints.txt '$(WHEEL)[docs]')
	@touch $@

CORE_NEEDS := opentelemetry-api opentelemetry-sdk opentelemetry-instrumentation pytest pytest-asyncio pytest-randomly hypothesis grimp

.venv/.core-fork: .venv/.test
	@echo "installing python-backoff into .venv/core-fork"
	@$(call apart,core-fork,$(BIN)/python,$(CORE_NEEDS) python-backoff)
	@$(call apart,core-fork,$(BIN)/python,--no-deps $(WHEEL))
	@touch $@

.venv/.core-3.%: .venv/.test
	@echo "installing the core into .venv/core-3.$*"
	@$(call apart,core-3.$*,"$$(tools/find-python 3.$*)",-c constraints.txt $(WHEEL) $(CORE_NEEDS) backoff)
	@touch $@

# Always again, for the newest version is another tomorrow.
.PHONY: .venv/.newest
.venv/.newest: .venv/.test
	@echo "installing the newest version of everything into .venv/newest"
	@$(call apart,newest,$(BIN)/python,--upgrade '$(WHEEL)[test]')

.PHONY: dashboards preview
dashboards: .venv/.test  ## make rules, alerts, dashboards and the docs' tables anew
	$(BIN)/python tools/dashboards

preview: .venv/.test  ## draw the dashboards from real query results: dashboards/preview
	TRACED_RETRY_PREVIEW=dashboards/preview $(BIN)/pytest tests/dashboards/test_fleet.py -k preview

.PHONY: matrix
matrix: .venv/.test  ## every provider x every fault, with us and without; writes docs/providers.md
	$(BIN)/python tools/matrix.py --write docs/providers.md
