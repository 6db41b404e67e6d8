#!/bin/sh
# The end-to-end test: a compose stack of its own, tested from outside, taken down with its volumes whatever happens.
set -eu
work=$(mktemp -d)
export COMPOSE_PROJECT_NAME=headway-e2e ENV_FILE="$work/env" CREDENTIALS="$work/credentials.json"
export HEADWAY_PORT="${E2E_PORT:-18000}" PROMETHEUS_PORT="${E2E_PROMETHEUS_PORT:-19090}"
trap 'docker compose --env-file "$ENV_FILE" down --volumes --timeout 5; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

sh deploy/up.sh
status=0
"${PYTHON:-python3}" -m pytest -c tests/e2e/pytest.ini tests/e2e "$@" || status=$?
[ "$status" = 0 ] || docker compose --env-file "$ENV_FILE" logs --tail 50 web worker migrate
exit "$status"
