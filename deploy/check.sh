#!/bin/sh
# Checks the Dockerfile, the compose file, the manifests and the Prometheus rules, with whatever tools are here: needs
# only the Python packages of requirements/dev.txt; docker, kubectl and promtool are used where they are found.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

hadolint Dockerfile

check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml
sh deploy/environment.sh "$work/env"
if docker compose version >/dev/null 2>&1; then
  # No engine is needed to read the file.
  DOCKER_HOST=unix:///nonexistent.sock docker compose --env-file "$work/env" config --quiet
else
  echo "check.sh: docker compose is not here; docker-compose.yml was checked against its schema only"
fi

# A kind without a schema is only a warning to the validator.
validate() {
  kubernetes-validate --strict -k 1.37 "$@" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  if grep "Couldn't find schema" "$work/log"; then exit 1; fi
}
# servers.yaml is a patch, whole only in the overlay.
validate $(find deploy/k8s -name '*.yaml' ! -name kustomization.yaml ! -path '*/production/servers.yaml')

if command -v kubectl >/dev/null; then
  cp -r deploy/k8s "$work"
  sh "$work/k8s/overlays/dev/secrets.sh"
  cp "$work/k8s/overlays/production/headway.env.example" "$work/k8s/overlays/production/headway.env"
  for overlay in dev production; do
    kubectl kustomize "$work/k8s/overlays/$overlay" >"$work/$overlay.yaml"
    validate "$work/$overlay.yaml"
  done
else
  echo "check.sh: kubectl is not here; the overlays were not put together"
fi

if command -v promtool >/dev/null; then
  promtool check config deploy/prometheus/prometheus.yml
  promtool test rules deploy/prometheus/alerts_test.yml
else
  echo "check.sh: promtool is not here; the Prometheus rules were not run"
fi
