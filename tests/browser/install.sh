#!/bin/sh
# Finds what the tests in browsers need, or installs it when run as root on Debian: browsers, Node, nginx, and the
# packages of package-lock.json.
set -eu
cd "$(dirname "$0")"
PATH="$PATH:/usr/sbin"

missing=
for pair in chromium:chromium firefox-esr:firefox-esr nginx:nginx node:nodejs npm:npm; do
  command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
if [ -n "$missing" ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "make browser needs$missing; install them, or run it as root on Debian." >&2
    exit 1
  fi
  echo "Installing$missing ..."
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # Services are not to be started: the tests run their own.
  # shellcheck disable=SC2086
  RUNLEVEL=1 apt-get install -qq -y --no-install-recommends $missing >/dev/null
fi

if [ ! -f node_modules/.package-lock.json ] || [ package-lock.json -nt node_modules/.package-lock.json ]; then
  npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
  touch node_modules/.package-lock.json
fi
