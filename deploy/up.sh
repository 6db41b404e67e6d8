#!/bin/sh
# Builds and starts the compose stack, waits until it is healthy, and on the first start writes the credentials.
#
# ENV_FILE (default .env), CREDENTIALS (default .headway/compose-credentials.json) and COMPOSE_PROJECT_NAME (default
# headway) make a second stack possible beside the first.
set -eu
env_file=${ENV_FILE:-.env}
credentials=${CREDENTIALS:-.headway/compose-credentials.json}
compose() { docker compose --env-file "$env_file" "$@"; }
die() {
  echo "$*" >&2
  exit 1
}

sh deploy/environment.sh "$env_file"
# Under their own names: WEB_IMAGE and WORKER_IMAGE may name images that are built on these.
(export WEB_IMAGE='' WORKER_IMAGE='' && compose build web worker)
compose up --detach --wait --no-build web worker prometheus || die "The stack did not start: the lines above say" \
  "which part, make logs says why. If a port is in use, set HEADWAY_PORT or PROMETHEUS_PORT in $env_file."

url="http://$(compose port web 8000)"
made=$(compose exec -T web python -m services.web.manage first_start --url "$url" --credentials -) ||
  die "The stack runs, but first_start failed: the lines above say why."
if [ -n "$made" ]; then
  mkdir -p "$(dirname "$credentials")"
  (umask 077 && printf '%s\n' "$made" >"$credentials.new" && mv "$credentials.new" "$credentials")
fi
[ -s "$credentials" ] || die "The stack runs at $url, but $credentials is gone, and a key is shown only once." \
  "Make a new key in $url/admin/, or start anew with make down volumes=1."
field() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" "$credentials"; }

cat <<END

Headway      $url
Admin        $url/admin/    $(field admin_user) / $(field admin_password)
Prometheus   http://$(compose port prometheus 9090)
Credentials  $credentials

A first job:
  docker compose exec -e HEADWAY_URL=http://127.0.0.1:8000 -e HEADWAY_API_KEY=$(field api_key) web \\
    headway submit demo.countdown --input '{"seconds": 5}' --follow
END
