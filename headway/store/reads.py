"""The SQL of the store that changes no job: what clients and operators ask for, files, keys and kinds. Named."""

from headway.store.sql import FORM, JOB

# One job of a tenant. $1: id, $2: tenant
GET = f"SELECT {JOB} FROM jobs WHERE id = $1 AND tenant_id = $2"

# With the values known, what is NULL falls away and an index of its own serves each filter.
_MATCHES = """($3::text IS NULL OR state = $3) AND ($4::text IS NULL OR kind = $4)
    AND ($5::uuid IS NULL OR parent_id = $5)"""

# The newest jobs of a tenant that match, before a cursor.
# $1: tenant, $2: before id, $3: state, $4: kind, $5: parent, $6: how many
LIST = f"""
SELECT {JOB} FROM jobs
WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id < $2) AND {_MATCHES}
ORDER BY id DESC LIMIT $6
"""

# The same of those with a tag. $7: tag
LIST_TAGGED = f"""
SELECT {JOB} FROM jobs JOIN (
    SELECT job_id FROM job_tags WHERE tenant_id = $1 AND tag = $7 AND ($2::uuid IS NULL OR job_id < $2)
) tagged ON id = job_id
WHERE tenant_id = $1 AND {_MATCHES}
ORDER BY job_id DESC LIMIT $6
"""

# The durable events of a job after a seq. $1: job, $2: tenant, $3: after seq, $4: how many
EVENTS = """
SELECT jobs.id, jobs.epoch, events.seq, events.type, events.data
FROM events JOIN jobs ON jobs.id = events.job_id
WHERE jobs.id = $1 AND jobs.tenant_id = $2 AND events.seq > $3 ORDER BY events.seq LIMIT $4
"""

# The artifacts of a job, by name. $1: job, $2: tenant
ARTIFACTS = """
SELECT a.name, a.content_type, a.size, a.sha256, a.key
FROM artifacts a JOIN jobs ON jobs.id = a.job_id
WHERE a.job_id = $1 AND jobs.tenant_id = $2 ORDER BY a.name
"""

# Why the attempts of a job failed, oldest first. $1: job, $2: tenant
FAILURES = """
SELECT f.attempt, f.at, f.error FROM failures f JOIN jobs ON jobs.id = f.job_id
WHERE f.job_id = $1 AND jobs.tenant_id = $2 ORDER BY f.token
"""

# A file as clients see it, and where its bytes are: files that were uploaded before there were parts are one object.
SEEN = "id, tenant_id, name, content_type, size, sha256, created_at, expires_at"
FILE = f"""{SEEN},
    coalesce(parts, jsonb_build_array(jsonb_build_array('files/' || tenant_id || '/' || id, size))) AS parts"""

# A whole file. $1: id, $2: tenant
GET_FILE = f"""
SELECT {FILE} FROM files
WHERE id = $1 AND tenant_id = $2 AND sha256 IS NOT NULL AND (expires_at IS NULL OR expires_at > now())
"""

# The newest whole files of a tenant, before a cursor, without their parts. $1: tenant, $2: before id, $3: how many
LIST_FILES = f"""
SELECT {SEEN} FROM files
WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id < $2) AND sha256 IS NOT NULL
    AND (expires_at IS NULL OR expires_at > now())
ORDER BY id DESC LIMIT $3
"""

# Those of some keys that are neither revoked nor expired. $1: ids
LIVE_KEYS = """
SELECT id, tenant_id, name, digest FROM api_keys
WHERE id = ANY($1::text[]) AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
"""

# Tell everyone which kinds a worker runs. $1: [{name, description, timeout, max_attempts, input_schema, result_schema}]
ANNOUNCE_KINDS = """
INSERT INTO kinds (name, description, timeout, max_attempts, input_schema, result_schema, announced_at)
SELECT name, description, timeout, max_attempts, input_schema, result_schema, now()
FROM jsonb_to_recordset($1::jsonb)
    AS r (name text, description text, timeout float8, max_attempts int, input_schema jsonb, result_schema jsonb)
ON CONFLICT (name) DO UPDATE SET
    description = excluded.description, timeout = excluded.timeout, max_attempts = excluded.max_attempts,
    input_schema = excluded.input_schema, result_schema = excluded.result_schema, announced_at = excluded.announced_at
"""

# Keep kinds announced that a worker runs. $1: names
KEEP_ANNOUNCED = """
UPDATE kinds SET announced_at = now() WHERE name = ANY($1::text[]) AND announced_at < now() - interval '1 minute'
"""

KINDS = f"""
SELECT name, description, timeout, max_attempts, input_schema, result_schema,
    to_char(paused_at AT TIME ZONE 'UTC', {FORM}) AS paused_at
FROM kinds ORDER BY name
"""

# Open jobs by state, and the age in seconds of the queued one that has been due longest.
OPEN = """
SELECT 'scheduled' AS state, count(*) AS jobs, 0::float8 AS oldest FROM jobs WHERE state = 'scheduled'
UNION ALL
SELECT 'queued', count(*), coalesce(extract(epoch FROM now() - min(coalesce(run_at, created_at))), 0)::float8
FROM jobs WHERE state = 'queued'
UNION ALL
SELECT 'running', count(*), 0 FROM jobs WHERE state = 'running'
"""

# Whether the schema is there and the server takes writes.
READY_CHECK = "SELECT NOT pg_is_in_recovery() AND to_regclass('jobs') IS NOT NULL"
