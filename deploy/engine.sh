#!/bin/sh
# Says in one sentence what is missing to run containers; silent and 0 when nothing is.
die() {
  echo "$*" >&2
  exit 1
}
command -v docker >/dev/null ||
  die "Docker is not installed. Install Docker Engine, or use make run, which needs only Python."
docker compose version >/dev/null 2>&1 ||
  die "This Docker has no Compose v2. Install the package docker-compose-plugin."
docker info >/dev/null 2>&1 ||
  die "The Docker engine does not answer${DOCKER_HOST:+ at $DOCKER_HOST}. Start it, or join the group docker to use it."
