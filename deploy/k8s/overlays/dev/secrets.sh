#!/bin/sh
# Writes headway.env and postgres.env beside this file, with random secrets; does nothing if they are there.
set -eu
umask 077
cd "$(dirname "$0")"
if [ -e headway.env ] && [ -e postgres.env ]; then exit 0; fi
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
database=$(random) source=$(random)
cat >postgres.env <<END
POSTGRES_PASSWORD=$(random)
DATABASE_PASSWORD=$database
SOURCE_PASSWORD=$source
END
cat >headway.env <<END
HEADWAY_DATABASE_URL=postgresql://headway:$database@postgres:5432/headway
HEADWAY_REDIS_URL=redis://redis:6379/0
HEADWAY_SOURCES={"default": "postgresql+asyncpg://headway_source:$source@postgres:5432/headway_source"}
HEADWAY_SECRET_KEY=$(random)
HEADWAY_KEY_PEPPER=$(random)
END
