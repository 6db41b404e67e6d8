# The same as containers. Included by the Makefile.
.PHONY: engine up down logs scale e2e

engine:
	@sh deploy/engine.sh

up: engine ## Run everything as containers, with Docker Compose
	@sh deploy/up.sh

down: engine ## Stop the containers; volumes=1 deletes their data too
	@docker compose down $(if $(volumes),--volumes)

logs: engine ## Follow the containers' logs
	@docker compose logs --follow --tail 100

scale: engine ## Run more or fewer worker containers: make scale worker=3
	@test -n "$(worker)" || { echo 'Say how many: make scale worker=3' >&2; exit 2; }
	@docker compose up --detach --wait --no-deps --no-recreate --scale worker=$(worker) worker

e2e: engine $(VENV)/dev.stamp ## Test a compose stack of its own from outside, and take it down again
	@PYTHON=$(BIN)/python sh deploy/e2e.sh $(ARGS)
