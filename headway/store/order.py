"""Whose turn it is: the pieces of SQL that give jobs their places in the queue.

Queued jobs are run by position: start-time fair queueing over the flows of each tenant and priority. A new job stands
a step behind the last of its flow, or at the head of the whole queue if its flow is empty; a step is 1 for high, 4
for normal, 16 for low. So tenants take turns, high goes before low, and no flow waits for ever. The fraction lets
high go first among equals. Who has something running has just had a turn, and comes a step behind the head.

Jobs of idle kinds hold nobody up. They are not the head: it would stand still, and whoever comes with an empty flow
go before all who wait; only where nothing else is queued it is theirs. Nor are they the last of a flow, but for jobs
of the same kind. They keep up with the head (FOLLOW), so that they go before nobody once their kind is back.

What is parked is ordered in the same way among those of its key, and is in no flow. When it is let in, another of its
key has had its turn: it stands a step behind the head, or behind the last of its flow that has a key. Those with keys
are a flow of their own, so that neither waits for all of the other.
"""

# The kinds. Those of which no job is begun are idle: they are paused, or no worker has announced them for a while,
# though others were.
KNOWN = """known AS MATERIALIZED (
    SELECT name, moved,
        paused_at IS NOT NULL OR announced_at < max(announced_at) OVER () - interval '5 minutes' AS idle
    FROM kinds
)"""
IDLE = "ARRAY(SELECT name FROM known WHERE idle)"

# Of each kind the first job in the queue, and its place.
FIRSTS = """
    SELECT name, idle, first.position, first.position + moved AS place FROM known CROSS JOIN LATERAL (
        SELECT position FROM jobs WHERE state = 'queued' AND kind = name AND crashes < 2 AND NOT parked
        ORDER BY position, id LIMIT 1
    ) first"""


def _line(keyed: str) -> str:
    """The last place of the flow `f` in the queue, without jobs of idle kinds but its own."""
    return f"""(
            SELECT max(last.position + moved) FROM known CROSS JOIN LATERAL (
                SELECT position FROM jobs WHERE state = 'queued' AND NOT parked AND concurrency_key {keyed}
                    AND tenant_id = f.tenant_id AND priority = f.priority AND kind = name
                ORDER BY position DESC LIMIT 1
            ) last WHERE NOT known.idle OR name = f.idle
        )"""


def first_parked(tenant: str, key: str) -> str:
    """The first place of what is parked for a concurrency key: one look at the index for each priority."""
    return f"""(
            SELECT min(first.position) FROM generate_series(0, 2) p CROSS JOIN LATERAL (
                SELECT position FROM jobs q WHERE q.state = 'queued' AND q.parked AND q.tenant_id = {tenant}
                    AND q.concurrency_key = {key} AND q.priority = p ORDER BY position LIMIT 1
            ) first
        )"""


# Where a job stands in the queue: while its kind was idle, all of that kind were moved on.
PLACE = "position + coalesce((SELECT moved FROM kinds WHERE name = kind), 0) AS position"

# Gives places, `placed`, to the jobs `r`, (id, tenant_id, kind, priority, keyed, key): those with a `key` are parked
# for it, the others stand in the queue. It needs KNOWN before it.
PLACED = f"""queue AS MATERIALIZED (
    SELECT coalesce(min(place) FILTER (WHERE NOT idle), min(place)) AS head FROM ({FIRSTS}) firsts
), waiting AS (
    SELECT r.*, CASE WHEN known.idle THEN kind ELSE '' END AS idle, coalesce(moved, 0) AS moved
    FROM r LEFT JOIN known ON name = kind
), f AS (
    SELECT DISTINCT tenant_id, priority, keyed, key, idle FROM waiting
), flows AS MATERIALIZED (
    SELECT f.*, CASE
        WHEN key <> '' THEN greatest({first_parked("f.tenant_id", "key")}, (
            SELECT max(position) FROM jobs WHERE state = 'queued' AND parked AND tenant_id = f.tenant_id
                AND concurrency_key = key AND priority = f.priority
        ) + step, 0)
        WHEN keyed THEN greatest(head + step, {_line("IS NOT NULL")} + step, 0)
        ELSE greatest(head + CASE WHEN EXISTS (
            SELECT FROM jobs WHERE state = 'running' AND tenant_id = f.tenant_id AND priority = f.priority
        ) THEN step ELSE 0 END, {_line("IS NULL")} + step, 0)
    END AS start
    FROM (SELECT *, power(4, priority) AS step FROM f) f CROSS JOIN queue
), placed AS (
    SELECT id, floor(start) + priority / 4.0
        + step * (row_number() OVER (PARTITION BY tenant_id, priority, keyed, key, idle ORDER BY id) - 1)
        - CASE WHEN key = '' THEN moved ELSE 0 END AS position
    FROM waiting JOIN flows USING (tenant_id, priority, keyed, key, idle)
)"""
