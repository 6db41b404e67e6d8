"""The SQL of the store, named. Every statement that writes a running job is fenced by `token`.

Statements work on many jobs at once: their argument is a JSON array of records, so that what arrives while one
statement runs shares the next. Those that wait for locks on several jobs take them in the order of the ids, so that no
two of them wait for each other.
"""

from headway.store.order import FIRSTS, IDLE, KNOWN, PLACE, PLACED, first_parked

JOB = """
    id, tenant_id, kind, state, input, tags, priority, timeout, max_attempts, concurrency_key, concurrency_limit,
    parent_id, retry_of, attempt, interruptions, crashes, created_at, run_at, started_at, finished_at,
    cancel_requested_at, progress, result, error, epoch, seq"""

OPEN_STATES = "('scheduled', 'queued', 'running')"

# Times in events look as they do everywhere else: RFC 3339 in UTC, milliseconds, Z.
FORM = """'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'"""
# A subquery of its own, so that a statement renders its time once and not for every row.
AT = f"(SELECT to_char(now() AT TIME ZONE 'UTC', {FORM}))"
RUN_AT = f"to_char(run_at AT TIME ZONE 'UTC', {FORM})"

# Insert jobs, each with its first event. One that is there already is left out of the answer: it came with an
# idempotency key that is taken, or it is sent again because the answer was lost.
# One with a concurrency key is parked until UNPARK finds that the key has a place. A child of an attempt that no longer
# holds its job is left out too.
# $1: [{id, tenant_id, kind, input, tags, priority, timeout, max_attempts, run_at, delay, concurrency_key,
# concurrency_limit, parent_id, parent_token, depth, retry_of, idempotency_key, digest}]
SUBMIT = f"""
WITH {KNOWN}, asked AS (
    SELECT *, coalesce(run_at, now() + delay * interval '1 second') AS due FROM jsonb_to_recordset($1::jsonb) AS r (
        id uuid, tenant_id uuid, kind text, input jsonb, tags text[], priority smallint, timeout float8,
        max_attempts int, run_at timestamptz, delay float8, concurrency_key text, concurrency_limit smallint,
        parent_id uuid, parent_token bigint, depth smallint, retry_of uuid, idempotency_key text, digest text
    )
), parents AS (
    SELECT jobs.id FROM jobs
    JOIN (SELECT DISTINCT parent_id, parent_token FROM asked) p
        ON jobs.id = p.parent_id AND jobs.token = p.parent_token
    WHERE jobs.state = 'running' ORDER BY jobs.id FOR SHARE OF jobs
), r AS (
    SELECT id, tenant_id, kind, priority, concurrency_key IS NOT NULL AS keyed, coalesce(concurrency_key, '') AS key
    FROM asked WHERE coalesce(due <= now(), true)
), {PLACED}, new AS (
    INSERT INTO jobs (
        id, tenant_id, kind, state, input, tags, priority, timeout, max_attempts, run_at, position,
        concurrency_key, concurrency_limit, parked, parent_id, depth, retry_of, idempotency_key, request_digest, seq
    )
    SELECT id, tenant_id, kind, CASE WHEN due > now() THEN 'scheduled' ELSE 'queued' END, coalesce(input, 'null'),
        tags, priority, timeout, max_attempts, due, coalesce(position, 0),
        concurrency_key, concurrency_limit, concurrency_key IS NOT NULL, parent_id, depth, retry_of,
        idempotency_key, digest, 1
    FROM asked LEFT JOIN placed USING (id)
    WHERE parent_id IS NULL OR parent_id IN (SELECT id FROM parents)
    ON CONFLICT DO NOTHING
    RETURNING {JOB}, position
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_build_object('state', state, 'attempt', attempt, 'at', {AT}, 'run_at', {RUN_AT})
    FROM new
)
SELECT {JOB}, {PLACE} FROM new
"""

# For each request the job of its id, or else the one that its key was used for. $1: [{id, tenant_id, idempotency_key}]
REPLAY = f"""
SELECT r.id AS asked, j.* FROM jsonb_to_recordset($1::jsonb) AS r (id uuid, tenant_id uuid, idempotency_key text)
CROSS JOIN LATERAL (
    SELECT {JOB}, position, request_digest FROM jobs
    WHERE tenant_id = r.tenant_id AND (id = r.id OR idempotency_key = r.idempotency_key)
    ORDER BY id = r.id DESC LIMIT 1
) j
"""


def _queue(which: str) -> str:
    """Queue scheduled jobs: those that `which`, a condition and an order, selects."""
    return f"""
WITH {KNOWN}, r AS (
    SELECT id, tenant_id, kind, priority, concurrency_key IS NOT NULL AS keyed, coalesce(concurrency_key, '') AS key
    FROM jobs WHERE state = 'scheduled' AND {which} LIMIT $1 FOR UPDATE SKIP LOCKED
), {PLACED}, queued AS (
    UPDATE jobs SET
        state = 'queued', position = placed.position, seq = seq + 1, parked = concurrency_key IS NOT NULL
    FROM placed WHERE jobs.id = placed.id
    RETURNING jobs.id, jobs.tenant_id, jobs.kind, jobs.concurrency_key, jobs.state, jobs.attempt, jobs.epoch,
        jobs.seq, jobs.position
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_build_object('state', state, 'attempt', attempt, 'at', {AT}) FROM queued
    RETURNING job_id, data
)
SELECT id, tenant_id, concurrency_key, epoch, seq, data, {PLACE} FROM queued JOIN told ON told.job_id = queued.id
"""


# Queue the scheduled jobs that are due. $1: how many
PROMOTE = _queue("run_at <= now() ORDER BY run_at")

# Queue the jobs whose children have all ended: a job that waits for children is scheduled for no time. $1: how many
WAKE = _queue(f"""run_at IS NULL AND NOT EXISTS (
        SELECT FROM jobs c WHERE c.parent_id = jobs.id AND c.state IN {OPEN_STATES}
    ) ORDER BY id""")

# Whether a worker runs a suspect: a job under which workers died twice. It is to run one at most, so that a job that
# kills its worker does not take its neighbours along until all have crashed too often.
SUSPECTED = "SELECT FROM jobs WHERE state = 'running' AND worker = $3 AND crashes > 1"

# Claim those of the jobs $1 that are still queued, one suspect at most. Rows that another worker is claiming are passed
# over. A job with a concurrency key takes one of the key's places, or is parked first in line if none is free. Jobs of
# a key whose places another worker is taking are passed over too: two claims that wait for each other's places would be
# a deadlock.
# One that cannot see yet what was taken a moment ago is told by the unique index `jobs_concurrency`, and is to be run
# again.
# The rows are found by their ids: `state || ''` keeps the planner from walking through the whole queue instead.
# $1: ids, $2: kinds this worker knows, $3: worker, $4: lease
CLAIM = f"""
WITH queued AS (
    SELECT id, tenant_id, position, crashes, concurrency_key, concurrency_limit FROM jobs
    WHERE id = ANY($1::uuid[]) AND state || '' = 'queued' AND kind = ANY(ARRAY(
        SELECT kind FROM unnest($2::text[]) AS k (kind)
        WHERE NOT EXISTS (SELECT FROM kinds WHERE name = k.kind AND paused_at IS NOT NULL)
    ))
    FOR NO KEY UPDATE SKIP LOCKED
), keys AS MATERIALIZED (
    SELECT tenant_id, concurrency_key FROM (
        SELECT DISTINCT tenant_id, concurrency_key FROM queued WHERE concurrency_key IS NOT NULL
    ) k WHERE pg_try_advisory_xact_lock(hashtextextended(tenant_id || concurrency_key, 0))
), placed AS (
    SELECT q.id, free.place FROM (
        SELECT queued.*, row_number() OVER (PARTITION BY tenant_id, concurrency_key ORDER BY id) AS turn
        FROM queued JOIN keys USING (tenant_id, concurrency_key)
    ) q LEFT JOIN LATERAL (
        SELECT place FROM generate_series(1, q.concurrency_limit) place
        WHERE NOT EXISTS (
            SELECT FROM jobs r WHERE r.tenant_id = q.tenant_id AND r.concurrency_key = q.concurrency_key
                AND r.state = 'running' AND r.concurrency_place = place
        ) AND q.turn + (
            SELECT count(*) FROM jobs r
            WHERE r.tenant_id = q.tenant_id AND r.concurrency_key = q.concurrency_key AND r.state = 'running'
        ) <= q.concurrency_limit
        ORDER BY place OFFSET q.turn - 1 LIMIT 1
    ) free ON true
), parked AS (
    UPDATE jobs SET parked = true, position = coalesce({first_parked("jobs.tenant_id", "jobs.concurrency_key")}, 0)
    FROM placed WHERE jobs.id = placed.id AND placed.place IS NULL
    RETURNING jobs.id, jobs.tenant_id, jobs.concurrency_key
), ready AS (
    SELECT id, place FROM (
        SELECT id, crashes, placed.place,
            row_number() OVER (PARTITION BY crashes > 1 ORDER BY position, id) AS suspect
        FROM queued LEFT JOIN placed USING (id) WHERE concurrency_key IS NULL OR placed.place IS NOT NULL
    ) queued
    WHERE crashes < 2 OR suspect = 1 AND NOT EXISTS ({SUSPECTED})
), claimed AS (
    UPDATE jobs SET
        state = 'running', attempt = attempt + 1, token = token + 1, seq = seq + 1, worker = $3,
        lease_expires_at = now() + $4::interval, started_at = coalesce(started_at, now()),
        concurrency_place = ready.place
    FROM ready WHERE jobs.id = ready.id
    RETURNING jobs.id, tenant_id, kind, input, timeout, max_attempts, concurrency_key, depth, attempt, token,
        checkpoint, epoch, seq, jsonb_build_object('state', state, 'attempt', attempt, 'at', {AT}) AS data,
        extract(epoch FROM now() - coalesce(run_at, created_at))::float8 AS waited
), told AS (
    INSERT INTO events (job_id, seq, type, data) SELECT id, seq, 'state', data FROM claimed
)
SELECT * FROM claimed
UNION ALL
SELECT id, tenant_id, NULL, NULL, NULL, NULL, concurrency_key, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
FROM parked
"""

# Let those parked jobs stand in the queue that are next in line for the free places of their keys. Those of idle kinds
# take no place from the others.
# $1: tenants, $2: the concurrency key of each
UNPARK = f"""
WITH {KNOWN}, k AS (
    SELECT k.tenant_id, k.key, (
        SELECT count(*) FROM jobs
        WHERE tenant_id = k.tenant_id AND concurrency_key = k.key AND state = 'running'
    ) AS running, (
        SELECT concurrency_limit FROM jobs
        WHERE tenant_id = k.tenant_id AND concurrency_key = k.key AND state = 'queued' AND parked
        ORDER BY priority, position LIMIT 1
    ) AS places, standing.*
    FROM unnest($1::uuid[], $2::text[]) AS k (tenant_id, key) CROSS JOIN LATERAL (
        SELECT count(*) AS standing, count(*) FILTER (WHERE kind <> ALL ({IDLE})) AS ready FROM jobs
        WHERE tenant_id = k.tenant_id AND concurrency_key = k.key AND state = 'queued' AND NOT parked
    ) standing
), next AS (
    SELECT q.id FROM k CROSS JOIN LATERAL (
        SELECT id, idle, concurrency_limit, row_number() OVER (ORDER BY idle, position, id) AS turn
        FROM generate_series(0, 2) p CROSS JOIN LATERAL (
            (
                SELECT id, position, concurrency_limit, kind = ANY ({IDLE}) AS idle FROM jobs
                WHERE tenant_id = k.tenant_id AND concurrency_key = k.key AND state = 'queued' AND parked
                    AND priority = p
                ORDER BY position, id LIMIT k.places
            ) UNION (
                SELECT id, position, concurrency_limit, false FROM jobs
                WHERE tenant_id = k.tenant_id AND concurrency_key = k.key AND state = 'queued' AND parked
                    AND priority = p AND kind <> ALL ({IDLE})
                ORDER BY position, id LIMIT k.places
            )
        ) first
    ) q WHERE q.turn <= q.concurrency_limit - k.running - CASE WHEN q.idle THEN k.standing ELSE k.ready END
), r AS (
    SELECT id, tenant_id, kind, priority, true AS keyed, '' AS key FROM jobs
    WHERE id IN (SELECT id FROM next) AND state = 'queued' AND parked
    ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
), {PLACED}, let_in AS (
    UPDATE jobs SET parked = false, position = placed.position
    FROM placed WHERE jobs.id = placed.id RETURNING jobs.id, jobs.kind, jobs.position
)
SELECT id, {PLACE} FROM let_in
"""

# Let the jobs of idle kinds keep up with the head of the queue.
FOLLOW = f"""
WITH {KNOWN}, firsts AS ({FIRSTS}
)
UPDATE kinds SET moved = head - firsts.position
FROM firsts, (SELECT min(place) AS head FROM firsts WHERE NOT idle) queue
WHERE kinds.name = firsts.name AND idle AND place < head
"""

# The concurrency keys of queued jobs, in order, one row of the index for each. $1: tenant and $2: key after which to
# begin, $3: how many
KEYS = """
WITH RECURSIVE k AS (
    (
        SELECT tenant_id, concurrency_key FROM jobs
        WHERE state = 'queued' AND concurrency_key IS NOT NULL AND (tenant_id, concurrency_key) > ($1::uuid, $2::text)
        ORDER BY tenant_id, concurrency_key LIMIT 1
    ) UNION ALL
    SELECT following.* FROM k CROSS JOIN LATERAL (
        SELECT tenant_id, concurrency_key FROM jobs
        WHERE state = 'queued' AND concurrency_key IS NOT NULL
            AND (tenant_id, concurrency_key) > (k.tenant_id, k.concurrency_key)
        ORDER BY tenant_id, concurrency_key LIMIT 1
    ) following
)
SELECT tenant_id, concurrency_key FROM k LIMIT $3
"""

# The queued jobs whose turn is next: what Redis lost, or never heard of. Each kind is asked for its own, so that no
# backlog of another kind is walked through. $1: kinds, $2: how many, $3: worker
READY = f"""
WITH k AS (
    SELECT kind, coalesce(moved, 0) AS moved FROM unnest($1::text[]) AS k (kind) LEFT JOIN kinds ON name = kind
    WHERE paused_at IS NULL
)
(
    SELECT id FROM jobs
    WHERE state = 'queued' AND kind IN (SELECT kind FROM k) AND crashes > 1 AND NOT parked
        AND NOT EXISTS ({SUSPECTED})
    ORDER BY position, id LIMIT 1
) UNION ALL (
    SELECT q.id FROM k CROSS JOIN LATERAL (
        SELECT id, position FROM jobs WHERE state = 'queued' AND kind = k.kind AND crashes < 2 AND NOT parked
        ORDER BY position, id LIMIT $2
    ) q ORDER BY q.position + k.moved, q.id LIMIT $2
)
LIMIT $2
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

# End attempts, each with its event: for good with their artifacts, or, if they failed and `delay` is given, until they
# are due again, unless the job is to be cancelled. Result, error and artifacts become visible together; `failure` is
# kept for each attempt.
# $1: [{id, token, state, result?, error?, failure?, delay?, progress?, artifacts?}]; an artifact is
# {name, content_type, size, sha256, key}
FINISH = f"""
WITH held AS (
    SELECT jobs.id, r.state, r.result, r.error, r.failure, r.delay, r.progress, r.artifacts,
        r.state = 'scheduled' AND jobs.cancel_requested_at IS NOT NULL AS unwanted
    FROM jsonb_to_recordset($1::jsonb) AS r (
        id uuid, token bigint, state text, result jsonb, error jsonb, failure jsonb, delay float8, progress jsonb,
        artifacts jsonb
    ) JOIN jobs ON jobs.id = r.id AND jobs.token = r.token
    WHERE jobs.state || '' = 'running' ORDER BY jobs.id FOR NO KEY UPDATE OF jobs
), finished AS (
    UPDATE jobs SET
        state = CASE WHEN unwanted THEN 'cancelled' ELSE held.state END,
        result = held.result, error = CASE WHEN unwanted THEN NULL ELSE held.error END,
        progress = coalesce(held.progress, jobs.progress),
        seq = seq + 1, lease_expires_at = NULL, worker = NULL, concurrency_place = NULL,
        run_at = CASE
            WHEN held.state = 'scheduled' AND NOT unwanted THEN now() + delay * interval '1 second' ELSE jobs.run_at
        END,
        finished_at = CASE WHEN held.state <> 'scheduled' OR unwanted THEN now() END
    FROM held WHERE jobs.id = held.id
    RETURNING jobs.id, token, attempt, epoch, seq, failure, artifacts, jsonb_build_object(
        'state', jobs.state, 'attempt', attempt, 'at', {AT}, 'result', jobs.result, 'error', jobs.error,
        'progress', jobs.progress, 'run_at', CASE WHEN jobs.state = 'scheduled' THEN {RUN_AT} END
    ) AS data
), failed AS (
    INSERT INTO failures (job_id, token, attempt, at, error)
    SELECT id, token, attempt, now(), failure FROM finished WHERE failure IS NOT NULL
), kept AS (
    INSERT INTO artifacts (job_id, name, content_type, size, sha256, key)
    SELECT id, a.name, a.content_type, a.size, a.sha256, a.key
    FROM finished CROSS JOIN jsonb_to_recordset(artifacts)
        AS a (name text, content_type text, size bigint, sha256 text, key text)
    WHERE artifacts IS NOT NULL
), told AS (
    INSERT INTO events (job_id, seq, type, data) SELECT id, seq, 'state', data FROM finished
)
SELECT id, token, epoch, seq, data FROM finished
"""

# The event by which an attempt ended in a state, if it did: for a FINISH whose answer was lost. It is the first to
# follow the attempt's beginning; a job that was given back and cancelled later was not ended by the attempt.
# $1: id, $2: token, $3: state
ENDED_BY = """
SELECT jobs.id, jobs.epoch, ended.seq, ended.data
FROM jobs CROSS JOIN LATERAL (
    SELECT seq, data FROM events
    WHERE job_id = jobs.id AND type = 'state' AND seq > (
        SELECT max(seq) FROM events WHERE job_id = jobs.id AND type = 'state' AND data ->> 'state' = 'running'
    )
    ORDER BY seq LIMIT 1
) ended
WHERE jobs.id = $1 AND jobs.token = $2
    AND (ended.data ->> 'state' = $3 OR $3 = 'scheduled' AND ended.data ->> 'state' = 'cancelled')
"""


def _release(which: str) -> str:
    """Give running jobs back to the queue without counting the attempt; one that was to be cancelled is cancelled."""
    return f"""
WITH held AS (
    SELECT id FROM jobs WHERE state = 'running' AND {which} ORDER BY id FOR NO KEY UPDATE
), released AS (
    UPDATE jobs SET
        state = CASE WHEN cancel_requested_at IS NULL THEN 'queued' ELSE 'cancelled' END,
        attempt = CASE WHEN cancel_requested_at IS NULL THEN attempt - 1 ELSE attempt END,
        finished_at = CASE WHEN cancel_requested_at IS NOT NULL THEN now() END,
        interruptions = interruptions + 1, seq = seq + 1,
        lease_expires_at = NULL, worker = NULL, concurrency_place = NULL
    FROM held WHERE jobs.id = held.id
    RETURNING jobs.id, tenant_id, concurrency_key, kind, state, attempt, epoch, seq, position
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_build_object('state', state, 'attempt', attempt, 'at', {AT}, 'reason', 'interrupted')
    FROM released
    RETURNING job_id, data
)
SELECT id, tenant_id, concurrency_key, kind, epoch, seq, data, {PLACE}
FROM released JOIN told ON told.job_id = released.id
"""


# $1: id, $2: token
RELEASE = _release("id = $1 AND token = $2")

# What a worker has by a claim whose answer it never got. $1: worker, $2: ids that it holds, $3: their tokens
RELEASE_UNHELD = _release("""worker = $1 AND NOT EXISTS (
        SELECT FROM unnest($2::uuid[], $3::bigint[]) AS held (id, token)
        WHERE held.id = jobs.id AND held.token = jobs.token
    )""")

# Let a running job wait for its children without a slot; one that was to be cancelled is cancelled.
# $1: id, $2: token, $3: progress
WAIT = f"""
WITH waiting AS (
    UPDATE jobs SET
        state = CASE WHEN cancel_requested_at IS NULL THEN 'scheduled' ELSE 'cancelled' END,
        attempt = CASE WHEN cancel_requested_at IS NULL THEN attempt - 1 ELSE attempt END,
        finished_at = CASE WHEN cancel_requested_at IS NOT NULL THEN now() END,
        run_at = NULL, progress = $3::jsonb, seq = seq + 1,
        lease_expires_at = NULL, worker = NULL, concurrency_place = NULL
    WHERE id = $1 AND token = $2 AND state = 'running'
    RETURNING id, state, attempt, progress, epoch, seq
)
INSERT INTO events (job_id, seq, type, data)
SELECT id, seq, 'state', jsonb_build_object(
    'state', state, 'attempt', attempt, 'at', {AT}, 'progress', progress, 'reason', 'waits for its children'
)
FROM waiting
RETURNING job_id AS id, (SELECT epoch FROM waiting) AS epoch, seq, data
"""

# Bring the progress of jobs that wait for their children up to date. $1: ids
TALLY = f"""
WITH waiting AS (
    SELECT id, (
        SELECT count(*) FROM jobs c WHERE c.parent_id = jobs.id AND c.state IN {OPEN_STATES}
    ) AS open
    FROM jobs WHERE id = ANY ($1::uuid[]) AND state = 'scheduled' AND run_at IS NULL
    ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE jobs SET
    progress = jsonb_set(progress, '{{done}}', to_jsonb((progress ->> 'total')::bigint - waiting.open)), seq = seq + 1
FROM waiting
WHERE jobs.id = waiting.id AND (progress ->> 'done')::bigint <> (progress ->> 'total')::bigint - waiting.open
RETURNING jobs.id, jobs.tenant_id, jobs.epoch, jobs.seq, jobs.progress
"""

# Take back jobs whose lease ran out. The crash is counted apart from attempts; at $1 crashes the job fails.
# A job that was to be cancelled is cancelled. $1: crashes allowed, $2: the error, $3: how many at a time
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
        crashes = crashes + 1, token = token + 1, seq = seq + 1,
        lease_expires_at = NULL, worker = NULL, concurrency_place = NULL
    FROM dead WHERE jobs.id = dead.id
    RETURNING jobs.id, tenant_id, concurrency_key, kind, state, attempt, error, epoch, seq, token, position,
        dead.worker AS died
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
SELECT id, tenant_id, concurrency_key, kind, epoch, seq, data, {PLACE}
FROM rescued JOIN told ON told.job_id = rescued.id
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

# Hold on to what a worker has got by a claim whose answer it has not read.
# $1: worker, $2: ids that it knows of, $3: lease
RENEW_CLAIMED = """
WITH held AS (
    SELECT id FROM jobs
    WHERE state = 'running' AND worker = $1 AND id <> ALL ($2::uuid[]) AND lease_expires_at > now()
    ORDER BY id FOR NO KEY UPDATE
)
UPDATE jobs SET lease_expires_at = now() + $3::interval FROM held WHERE jobs.id = held.id RETURNING jobs.id, jobs.token
"""

# Which of these running jobs are to be cancelled. $1: ids
CANCEL_REQUESTED = """
SELECT id, token FROM jobs WHERE id = ANY($1::uuid[]) AND state = 'running' AND cancel_requested_at IS NOT NULL
"""

# Cancel jobs: at once those that wait, by request those that run. Terminal jobs and repeated requests match no row.
# $1: ids, $2: tenant
CANCEL = f"""
WITH held AS (
    SELECT id FROM jobs
    WHERE id = ANY($1::uuid[]) AND tenant_id = $2
        AND state IN {OPEN_STATES} AND cancel_requested_at IS NULL
    ORDER BY id FOR NO KEY UPDATE
), cancelled AS (
    UPDATE jobs SET
        cancel_requested_at = now(), seq = seq + 1,
        state = CASE WHEN state = 'running' THEN state ELSE 'cancelled' END,
        finished_at = CASE WHEN state = 'running' THEN NULL ELSE now() END
    FROM held WHERE jobs.id = held.id
    RETURNING jobs.*
), told AS (
    INSERT INTO events (job_id, seq, type, data)
    SELECT id, seq, 'state', jsonb_build_object(
        'state', state, 'attempt', attempt, 'at', {AT}, 'cancel_requested_at', {AT}
    ) FROM cancelled
    RETURNING job_id, data
)
SELECT {JOB}, data FROM cancelled JOIN told ON told.job_id = cancelled.id
"""
