"""The SQL of the store, named. Every statement that writes a running job is fenced by `token`.

Statements work on many jobs at once: their argument is a JSON array of records, so that what arrives while one
statement runs shares the next. Those that wait for locks on several jobs take them in the order of the ids, so that no
two of them wait for each other.
"""

JOB = """
    id, tenant_id, kind, state, input, tags, timeout, attempt, interruptions, created_at, started_at, finished_at,
    cancel_requested_at, progress, result, error, epoch, seq"""

# Times in events look as they do everywhere else: RFC 3339 in UTC, milliseconds, Z.
FORM = """'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'"""
AT = f"to_char(now() AT TIME ZONE 'UTC', {FORM})"

# Insert jobs, each with its first event. $1: [{id, tenant_id, kind, input, tags, timeout}]
SUBMIT = f"""
WITH new AS (
    INSERT INTO jobs (id, tenant_id, kind, state, input, tags, timeout, seq)
    SELECT id, tenant_id, kind, 'queued', coalesce(input, 'null'), tags, timeout, 1
    FROM jsonb_to_recordset($1::jsonb)
        AS r (id uuid, tenant_id uuid, kind text, input jsonb, tags text[], timeout float8)
    RETURNING {JOB}
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_build_object('state', state, 'attempt', attempt, 'at', {AT}) FROM new
)
SELECT {JOB} FROM new
"""

# Claim those of the jobs $1 that are still queued. Rows that another worker is claiming are passed over.
# $1: ids, $2: kinds this worker knows, $3: worker, $4: lease
CLAIM = f"""
WITH ready AS (
    SELECT id FROM jobs WHERE id = ANY($1::uuid[]) AND state = 'queued' AND kind = ANY($2::text[])
    FOR UPDATE SKIP LOCKED
), claimed AS (
    UPDATE jobs SET
        state = 'running', attempt = attempt + 1, token = token + 1, seq = seq + 1, worker = $3,
        lease_expires_at = now() + $4::interval, started_at = coalesce(started_at, now())
    FROM ready WHERE jobs.id = ready.id
    RETURNING jobs.*
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_build_object('state', state, 'attempt', attempt, 'at', {AT}) FROM claimed
    RETURNING job_id, data
)
SELECT id, tenant_id, kind, input, timeout, attempt, token, checkpoint, epoch, seq, data,
    extract(epoch FROM now() - created_at)::float8 AS waited
FROM claimed JOIN told ON told.job_id = claimed.id
"""

# The oldest jobs that are queued: what Redis lost, or never heard of. $1: kinds, $2: how many
READY = """
SELECT id FROM jobs WHERE state = 'queued' AND kind = ANY($1::text[]) ORDER BY id LIMIT $2
"""

# Write the newest progress of running jobs and hear whether they are to be cancelled. $1: [{id, token, progress}]
REPORT = """
WITH r AS (
    SELECT * FROM jsonb_to_recordset($1::jsonb) AS r (id uuid, token bigint, progress jsonb)
), held AS (
    SELECT jobs.id, r.progress FROM jobs JOIN r ON r.id = jobs.id AND r.token = jobs.token
    WHERE jobs.state = 'running' ORDER BY jobs.id FOR NO KEY UPDATE OF jobs
)
UPDATE jobs SET progress = held.progress, seq = seq + 1
FROM held WHERE jobs.id = held.id
RETURNING jobs.id, jobs.token, jobs.epoch, jobs.seq, jobs.cancel_requested_at IS NOT NULL AS cancel_requested
"""

# Add a log event to a running job. $1: id, $2: token, $3: message, $4: level
LOG = f"""
WITH logged AS (
    UPDATE jobs SET seq = seq + 1 WHERE id = $1 AND token = $2 AND state = 'running' RETURNING id, epoch, seq
)
INSERT INTO events (job_id, seq, type, data)
SELECT id, seq, 'log', jsonb_build_object('message', $3::text, 'level', $4::text, 'at', {AT}) FROM logged
RETURNING (SELECT epoch FROM logged), seq, data
"""

# Keep a checkpoint of a running job. $1: id, $2: token, $3: any JSON
CHECKPOINT = """
UPDATE jobs SET checkpoint = $3::jsonb WHERE id = $1 AND token = $2 AND state = 'running' RETURNING id
"""

# End attempts for good, each with its event and its artifacts. Result, error and artifacts become visible together.
# $1: [{id, token, state, result, error, progress, artifacts: [{name, content_type, size, sha256, key}]}]
FINISH = f"""
WITH r AS (
    SELECT * FROM jsonb_to_recordset($1::jsonb) AS r (
        id uuid, token bigint, state text, result jsonb, error jsonb, progress jsonb, artifacts jsonb
    )
), held AS (
    SELECT jobs.id FROM jobs JOIN r ON r.id = jobs.id AND r.token = jobs.token
    WHERE jobs.state = 'running' ORDER BY jobs.id FOR NO KEY UPDATE OF jobs
), finished AS (
    UPDATE jobs SET
        state = r.state, result = r.result, error = r.error, progress = coalesce(r.progress, jobs.progress),
        seq = seq + 1, finished_at = now(), lease_expires_at = NULL, worker = NULL
    FROM held, r WHERE jobs.id = held.id AND r.id = held.id AND r.token = jobs.token
    RETURNING jobs.id, jobs.token, jobs.kind, jobs.state, jobs.attempt, jobs.result, jobs.error, jobs.progress,
        jobs.epoch, jobs.seq
), kept AS (
    INSERT INTO artifacts (job_id, name, content_type, size, sha256, key)
    SELECT finished.id, a.name, a.content_type, a.size, a.sha256, a.key
    FROM finished JOIN r ON r.id = finished.id AND r.token = finished.token
    CROSS JOIN jsonb_to_recordset(r.artifacts)
        AS a (name text, content_type text, size bigint, sha256 text, key text)
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_build_object(
        'state', state, 'attempt', attempt, 'at', {AT}, 'result', result, 'error', error, 'progress', progress
    ) FROM finished
    RETURNING job_id, data
)
SELECT id, token, epoch, seq, data FROM finished JOIN told ON told.job_id = finished.id
"""

# The event by which an attempt ended its job, if it did: for a FINISH whose answer was lost. $1: id, $2: token
ENDED_BY = """
SELECT jobs.id, jobs.epoch, events.seq, events.data
FROM jobs JOIN events ON events.job_id = jobs.id AND events.seq = jobs.seq
WHERE jobs.id = $1 AND jobs.token = $2 AND jobs.finished_at IS NOT NULL
"""

# Give a running job back to the queue without counting the attempt; one that was to be cancelled is cancelled.
# $1: id, $2: token
RELEASE = f"""
WITH released AS (
    UPDATE jobs SET
        state = CASE WHEN cancel_requested_at IS NULL THEN 'queued' ELSE 'cancelled' END,
        attempt = CASE WHEN cancel_requested_at IS NULL THEN attempt - 1 ELSE attempt END,
        finished_at = CASE WHEN cancel_requested_at IS NOT NULL THEN now() END,
        interruptions = interruptions + 1, seq = seq + 1, lease_expires_at = NULL, worker = NULL
    WHERE id = $1 AND token = $2 AND state = 'running'
    RETURNING id, kind, state, attempt, epoch, seq
)
INSERT INTO events (job_id, seq, type, data)
SELECT id, seq, 'state', jsonb_build_object('state', state, 'attempt', attempt, 'at', {AT}, 'reason', 'interrupted')
FROM released
RETURNING job_id AS id, (SELECT epoch FROM released) AS epoch, seq, data
"""

# Take back jobs whose lease ran out. The crash is counted apart from attempts; at $1 crashes the job fails.
# A job that was to be cancelled is cancelled. $1: crashes allowed, $2: the error, $3: how many at a time
RESCUE = f"""
WITH dead AS (
    SELECT id FROM jobs WHERE state = 'running' AND lease_expires_at < now()
    ORDER BY lease_expires_at LIMIT $3 FOR UPDATE SKIP LOCKED
), rescued AS (
    UPDATE jobs SET
        state = CASE WHEN cancel_requested_at IS NOT NULL THEN 'cancelled'
                     WHEN crashes + 1 >= $1 THEN 'failed' ELSE 'queued' END,
        error = CASE WHEN cancel_requested_at IS NULL AND crashes + 1 >= $1 THEN $2::jsonb END,
        finished_at = CASE WHEN cancel_requested_at IS NOT NULL OR crashes + 1 >= $1 THEN now() END,
        attempt = CASE WHEN cancel_requested_at IS NOT NULL OR crashes + 1 >= $1 THEN attempt ELSE attempt - 1 END,
        crashes = crashes + 1, token = token + 1, seq = seq + 1, lease_expires_at = NULL, worker = NULL
    FROM dead WHERE jobs.id = dead.id
    RETURNING jobs.id, kind, state, attempt, error, epoch, seq
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_strip_nulls(jsonb_build_object(
        'state', state, 'attempt', attempt, 'at', {AT}, 'reason', 'worker died', 'error', error
    )) FROM rescued
    RETURNING job_id, data
)
SELECT id, kind, epoch, seq, data FROM rescued JOIN told ON told.job_id = rescued.id
"""

# Hold on to what a worker runs. A lease that ran out is not taken up again. $1: ids, $2: tokens, $3: lease
RENEW = """
WITH held AS (
    SELECT jobs.id FROM jobs
    JOIN unnest($1::uuid[], $2::bigint[]) AS r (id, token) ON r.id = jobs.id AND r.token = jobs.token
    WHERE jobs.state = 'running' AND jobs.lease_expires_at > now() ORDER BY jobs.id FOR NO KEY UPDATE OF jobs
)
UPDATE jobs SET lease_expires_at = now() + $3::interval
FROM held WHERE jobs.id = held.id
RETURNING jobs.id, jobs.token
"""

# Which of these running jobs are to be cancelled. $1: ids
CANCEL_REQUESTED = """
SELECT id, token FROM jobs WHERE id = ANY($1::uuid[]) AND state = 'running' AND cancel_requested_at IS NOT NULL
"""

# Cancel a job: at once if it waits, by request if it runs. Terminal jobs and repeated requests match no row.
# $1: id, $2: tenant
CANCEL = f"""
WITH cancelled AS (
    UPDATE jobs SET
        cancel_requested_at = now(), seq = seq + 1,
        state = CASE WHEN state = 'running' THEN state ELSE 'cancelled' END,
        finished_at = CASE WHEN state = 'running' THEN NULL ELSE now() END
    WHERE id = $1 AND tenant_id = $2
        AND state IN ('scheduled', 'queued', 'running') AND cancel_requested_at IS NULL
    RETURNING {JOB}
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_build_object(
        'state', state, 'attempt', attempt, 'at', {AT}, 'cancel_requested_at', {AT}
    ) FROM cancelled
    RETURNING data
)
SELECT {JOB}, data FROM cancelled, told
"""

# One job of a tenant. $1: id, $2: tenant
GET = f"SELECT {JOB} FROM jobs WHERE id = $1 AND tenant_id = $2"

# The newest jobs of a tenant, before a cursor. $1: tenant, $2: before id, $3: state, $4: kind, $5: tag, $6: how many
# With the values known, what is NULL falls away and an index of its own serves each filter.
LIST = f"""
SELECT {JOB} FROM jobs
WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id < $2) AND ($3::text IS NULL OR state = $3)
    AND ($4::text IS NULL OR kind = $4) AND ($5::text IS NULL OR (tags @> ARRAY[$5] AND tags <> '{{}}'))
ORDER BY id DESC LIMIT $6
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

# $1: id, $2: tenant, $3: name, $4: content type, $5: size, $6: sha256
ADD_FILE = """
INSERT INTO files (id, tenant_id, name, content_type, size, sha256) VALUES ($1, $2, $3, $4, $5, $6)
RETURNING id, tenant_id, name, content_type, size, sha256, created_at
"""

# $1: id, $2: tenant
GET_FILE = """
SELECT id, tenant_id, name, content_type, size, sha256, created_at FROM files WHERE id = $1 AND tenant_id = $2
"""

# The tenant and the digest of a key that is neither revoked nor expired. $1: id
GET_KEY = """
SELECT tenant_id, digest FROM api_keys
WHERE id = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
"""

# Tell everyone which kinds a worker runs. $1: [{name, description, timeout, input_schema, result_schema}]
ANNOUNCE_KINDS = """
INSERT INTO kinds (name, description, timeout, input_schema, result_schema, announced_at)
SELECT name, description, timeout, input_schema, result_schema, now()
FROM jsonb_to_recordset($1::jsonb)
    AS r (name text, description text, timeout float8, input_schema jsonb, result_schema jsonb)
ON CONFLICT (name) DO UPDATE SET
    description = excluded.description, timeout = excluded.timeout, input_schema = excluded.input_schema,
    result_schema = excluded.result_schema, announced_at = excluded.announced_at
"""

KINDS = "SELECT name, description, timeout, input_schema, result_schema FROM kinds ORDER BY name"

# Open jobs by state, and the age in seconds of the oldest that is queued.
OPEN = """
SELECT state, count(*) AS jobs, coalesce(extract(epoch FROM now() - (
    SELECT created_at FROM jobs WHERE state = 'queued' ORDER BY id LIMIT 1
)), 0)::float8 AS oldest
FROM jobs WHERE state IN ('scheduled', 'queued', 'running') GROUP BY state
"""

# Whether the schema is there and the server takes writes.
READY_CHECK = "SELECT NOT pg_is_in_recovery() AND to_regclass('jobs') IS NOT NULL"
