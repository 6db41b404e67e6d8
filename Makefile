# Headway's front door. `make` alone prints the manual.
.DEFAULT_GOAL := help
.PHONY: help run test browser check docs bench chaos storm lock clean

VENV := .venv
BIN := $(VENV)/bin
# Checks that only load the code need settings, but no server.
UNCONNECTED := HEADWAY_DATABASE_URL=postgresql://none@127.0.0.1:1/none HEADWAY_REDIS_URL=redis://127.0.0.1:1/0 \
	HEADWAY_SECRET_KEY=no-secret-since-nothing-connects HEADWAY_KEY_PEPPER=no-secret-since-nothing-connects

help: ## Print this manual
	@echo 'make TARGET, with TARGET one of:'
	@sed -n 's/^\([a-z][a-z0-9-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  %-8s %s\n", $$1, $$2 }'

run: $(VENV)/run.stamp ## Start everything here, without Docker; HEADWAY_PORT (8000) and HEADWAY_HOME (.headway) move it
	@$(BIN)/python -m services.run

test: $(VENV)/dev.stamp ## Run the tests on servers of their own; ARGS="-k csv" chooses some
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadfile $(ARGS)

browser: $(VENV)/dev.stamp ## Test pages and clients in Chromium and Firefox, with programs of npm, and through nginx
	@sh tests/browser/install.sh
	@$(BIN)/python -m pytest tests/browser --numprocesses 2 --dist loadfile $(ARGS)

check: $(VENV)/dev.stamp ## Check style, types, import contracts, migrations, manifests and the docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(UNCONNECTED) $(BIN)/python -W ignore::RuntimeWarning -m services.web.manage makemigrations --check --dry-run
	sh deploy/check.sh
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/dev.stamp ## Write docs/reference/ from the code
	@$(BIN)/python docs/generate.py

bench: $(VENV)/dev.stamp ## Run the benchmarks
	@for file in benchmarks/[a-z]*.py; do $(BIN)/python "$$file" || exit 1; done

chaos: $(VENV)/dev.stamp ## Random faults under load: seconds=600, and seed=… to repeat a run
	@$(BIN)/python -m tests.faults.chaos --seconds $(or $(seconds),600) $(if $(seed),--seed $(seed))

storm: $(VENV)/dev.stamp ## The live stream under faults: sockets=1000 reconnects=20 events=10000, and seed=… to repeat a run
	@$(BIN)/python -m tests.faults.storm --sockets $(or $(sockets),1000) --reconnects $(or $(reconnects),20) \
		--events $(or $(events),10000) $(if $(seed),--seed $(seed)) $(if $(seconds),--seconds $(seconds))

lock: ## Write requirements/*.txt anew from pyproject.toml (needs uv); ARGS=--upgrade takes newer versions
	$(LOCK) -o requirements/base.txt
	$(LOCK) --extra embedded -o requirements/run.txt
	$(LOCK) --extra embedded --extra dev -o requirements/dev.txt
LOCK = uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url pyproject.toml $(ARGS)

clean: ## Remove .venv and caches; data in .headway stays
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis tests/browser/node_modules

# One virtual environment; a stamp is older than its lock when packages must be installed again.
$(VENV)/%.stamp: requirements/%.txt pyproject.toml
	@$(MAKE_VENV)
	@echo 'Installing from $< (the first time takes about a minute) ...'
	@umask 022 && $(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r $<
	@umask 022 && $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@ $(if $(filter dev,$*),$(VENV)/run.stamp)

# Python 3.11 and 3.12 come first: for them there are wheels of everything. A name on PATH may be a shim that runs
# nothing, so each one is tried. The umask lets another user run the embedded servers when root made the environment.
define MAKE_VENV
$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exit 0; \
for python in $(or $(PYTHON),python3.12 python3.11 python3 python3.13 python3.14); do \
	if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		umask 022 && exec "$$python" -m venv --clear $(VENV); \
	fi; \
done; \
echo 'Headway needs Python 3.11 or newer with its venv module, and found none on PATH. Install one' >&2; \
echo '(Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.12),' >&2; \
echo 'or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12' >&2; \
exit 1
endef

# The same as containers: up, down, logs, scale, e2e.
include deploy/compose.mk
