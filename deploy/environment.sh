#!/bin/sh
# environment.sh FILE    adds to FILE what the compose file needs and FILE lacks, secrets at random.
# Only its owner can read it.
set -eu
umask 077
touch "$1"
chmod 600 "$1"
has() { grep -q "^$1=" "$file"; }
file=$1
has HEADWAY_PORT || echo "HEADWAY_PORT=${HEADWAY_PORT:-8000}" >>"$file"
for name in HEADWAY_SECRET_KEY HEADWAY_KEY_PEPPER POSTGRES_PASSWORD DATABASE_PASSWORD SOURCE_PASSWORD; do
  has "$name" || echo "$name=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')" >>"$file"
done
