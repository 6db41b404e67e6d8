"""The statements of a release before concurrency keys, groups and pauses, for tests of the time when both run.

Never to be changed: they write and read what that release knew, in tables that have more columns by now.
"""

JOB = """
    id, tenant_id, kind, state, input, tags, priority, timeout, max_attempts, attempt, interruptions, crashes,
    created_at, run_at, started_at, finished_at, cancel_requested_at, progress, result, error, epoch, seq"""
FORM = """'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'"""
AT = f"to_char(now() AT TIME ZONE 'UTC', {FORM})"
RUN_AT = f"to_char(run_at AT TIME ZONE 'UTC', {FORM})"

FLOWS = """
    SELECT tenant_id, priority, greatest(
        (SELECT floor(min(position)) FROM jobs WHERE state = 'queued'),
        (
            SELECT floor(max(position)) + power(4, f.priority) FROM jobs q
            WHERE q.state = 'queued' AND q.tenant_id = f.tenant_id AND q.priority = f.priority
        ),
        0
    ) AS start FROM f"""

PLACE = """start + priority / 4.0
        + power(4, priority) * (row_number() OVER (PARTITION BY tenant_id, priority ORDER BY id) - 1)"""

SUBMIT = f"""
WITH r AS (
    SELECT * FROM jsonb_to_recordset($1::jsonb) AS r (
        id uuid, tenant_id uuid, kind text, input jsonb, tags text[], priority smallint, timeout float8,
        max_attempts int, run_at timestamptz, delay float8, idempotency_key text, digest text
    )
), f AS (
    SELECT DISTINCT tenant_id, priority FROM r
), flows AS ({FLOWS}
), new AS (
    INSERT INTO jobs (
        id, tenant_id, kind, state, input, tags, priority, timeout, max_attempts, run_at, position,
        idempotency_key, request_digest, seq
    )
    SELECT id, tenant_id, kind, CASE WHEN due > now() THEN 'scheduled' ELSE 'queued' END, coalesce(input, 'null'),
        tags, priority, timeout, max_attempts, due, {PLACE}, idempotency_key, digest, 1
    FROM (SELECT *, coalesce(run_at, now() + delay * interval '1 second') AS due FROM r) r
    JOIN flows USING (tenant_id, priority)
    ON CONFLICT DO NOTHING
    RETURNING {JOB}, position
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_build_object('state', state, 'attempt', attempt, 'at', {AT}, 'run_at', {RUN_AT})
    FROM new
)
SELECT {JOB}, position FROM new
"""

PROMOTE = f"""
WITH r AS (
    SELECT id, tenant_id, priority FROM jobs WHERE state = 'scheduled' AND run_at <= now()
    ORDER BY run_at LIMIT $1 FOR UPDATE SKIP LOCKED
), f AS (
    SELECT DISTINCT tenant_id, priority FROM r
), flows AS ({FLOWS}
), placed AS (
    SELECT id, {PLACE} AS position FROM r JOIN flows USING (tenant_id, priority)
), promoted AS (
    UPDATE jobs SET state = 'queued', position = placed.position, seq = seq + 1
    FROM placed WHERE jobs.id = placed.id
    RETURNING jobs.id, jobs.state, jobs.attempt, jobs.epoch, jobs.seq, jobs.position
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_build_object('state', state, 'attempt', attempt, 'at', {AT}) FROM promoted
    RETURNING job_id, data
)
SELECT id, epoch, seq, data, position FROM promoted JOIN told ON told.job_id = promoted.id
"""

SUSPECTED = "SELECT FROM jobs WHERE state = 'running' AND worker = $3 AND crashes > 1"

CLAIM = f"""
WITH queued AS (
    SELECT id, crashes FROM jobs WHERE id = ANY($1::uuid[]) AND state = 'queued' AND kind = ANY($2::text[])
    FOR UPDATE SKIP LOCKED
), ready AS (
    SELECT id FROM (SELECT id, crashes, row_number() OVER (PARTITION BY crashes > 1) AS place FROM queued) queued
    WHERE crashes < 2 OR place = 1 AND NOT EXISTS ({SUSPECTED})
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
SELECT id, tenant_id, kind, input, timeout, max_attempts, attempt, token, checkpoint, epoch, seq, data,
    extract(epoch FROM now() - coalesce(run_at, created_at))::float8 AS waited
FROM claimed JOIN told ON told.job_id = claimed.id
"""

FINISH = f"""
WITH r AS (
    SELECT * FROM jsonb_to_recordset($1::jsonb) AS r (
        id uuid, token bigint, state text, result jsonb, error jsonb, failure jsonb, delay float8, progress jsonb,
        artifacts jsonb
    )
), held AS (
    SELECT jobs.id FROM jobs JOIN r ON r.id = jobs.id AND r.token = jobs.token
    WHERE jobs.state = 'running' ORDER BY jobs.id FOR NO KEY UPDATE OF jobs
), finished AS (
    UPDATE jobs SET
        state = r.state, result = r.result, error = r.error, progress = coalesce(r.progress, jobs.progress),
        seq = seq + 1, lease_expires_at = NULL, worker = NULL,
        run_at = CASE WHEN r.state = 'scheduled' THEN now() + r.delay * interval '1 second' ELSE jobs.run_at END,
        finished_at = CASE WHEN r.state <> 'scheduled' THEN now() END
    FROM held, r WHERE jobs.id = held.id AND r.id = held.id AND r.token = jobs.token
    RETURNING jobs.id, jobs.token, jobs.kind, jobs.state, jobs.attempt, jobs.result, jobs.error, jobs.progress,
        jobs.run_at, jobs.epoch, jobs.seq, r.failure
), failed AS (
    INSERT INTO failures (job_id, token, attempt, at, error)
    SELECT id, token, attempt, now(), failure FROM finished WHERE failure IS NOT NULL
), kept AS (
    INSERT INTO artifacts (job_id, name, content_type, size, sha256, key)
    SELECT finished.id, a.name, a.content_type, a.size, a.sha256, a.key
    FROM finished JOIN r ON r.id = finished.id AND r.token = finished.token
    CROSS JOIN jsonb_to_recordset(r.artifacts)
        AS a (name text, content_type text, size bigint, sha256 text, key text)
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_build_object(
        'state', state, 'attempt', attempt, 'at', {AT}, 'result', result, 'error', error, 'progress', progress,
        'run_at', CASE WHEN state = 'scheduled' THEN {RUN_AT} END
    ) FROM finished
    RETURNING job_id, data
)
SELECT id, token, epoch, seq, data FROM finished JOIN told ON told.job_id = finished.id
"""

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

RESCUE = f"""
WITH dead AS (
    SELECT id, worker, cancel_requested_at IS NOT NULL AS unwanted, crashes + 1 >= $1 AS hopeless
    FROM jobs WHERE state = 'running' AND lease_expires_at < now()
    ORDER BY lease_expires_at LIMIT $3 FOR UPDATE SKIP LOCKED
), rescued AS (
    UPDATE jobs SET
        state = CASE WHEN unwanted THEN 'cancelled' WHEN hopeless THEN 'failed' ELSE 'queued' END,
        error = CASE WHEN hopeless AND NOT unwanted THEN $2::jsonb END,
        finished_at = CASE WHEN hopeless OR unwanted THEN now() END,
        attempt = CASE WHEN hopeless OR unwanted THEN attempt ELSE attempt - 1 END,
        crashes = crashes + 1, token = token + 1, seq = seq + 1, lease_expires_at = NULL, worker = NULL
    FROM dead WHERE jobs.id = dead.id
    RETURNING jobs.id, kind, state, attempt, error, epoch, seq, token, position, dead.worker AS died
), failed AS (
    INSERT INTO failures (job_id, token, attempt, at, error)
    SELECT id, token, attempt, now(), $2::jsonb || jsonb_build_object('message', 'The worker ' || died || ' died.')
    FROM rescued
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_strip_nulls(jsonb_build_object(
        'state', state, 'attempt', attempt, 'at', {AT}, 'reason', 'worker died', 'error', error
    )) FROM rescued
    RETURNING job_id, data
)
SELECT id, kind, epoch, seq, data, position FROM rescued JOIN told ON told.job_id = rescued.id
"""
