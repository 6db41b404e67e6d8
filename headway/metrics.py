"""Every metric, declared once. No job id, URL or tenant in a label. `docs/reference/metrics.md` is made from this."""

from functools import lru_cache
from typing import TypeVar

from prometheus_client import Counter, Gauge, Histogram

Metric = TypeVar("Metric", Counter, Gauge, Histogram)

jobs_submitted = Counter("headway_jobs_submitted_total", "Jobs accepted and committed.", ["kind"])
jobs_finished = Counter("headway_jobs_finished_total", "Jobs that reached a terminal state.", ["kind", "outcome"])
queue_wait = Histogram(
    "headway_job_queue_wait_seconds",
    "Time from submission to the first claim.",
    ["kind"],
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 30, 120, 600, 3600),
)
run_time = Histogram(
    "headway_job_run_seconds",
    "Time an attempt ran.",
    ["kind"],
    buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 30, 120, 600, 3600, 14400),
)
jobs_open = Gauge("headway_jobs", "Jobs that are not yet terminal, by state; every worker tells the same.", ["state"])
oldest_ready_age = Gauge(
    "headway_job_oldest_ready_age_seconds", "Age of the oldest queued job; every worker tells the same."
)
lease_lost = Counter("headway_lease_lost_total", "Writes refused because the attempt was no longer the job's.")
rescued = Counter("headway_rescued_total", "Jobs taken back from workers that died.", ["outcome"])
interrupted = Counter(
    "headway_jobs_interrupted_total",
    "Jobs given back by a worker that was told to stop, or never heard that it had them.",
    ["kind"],
)
schedule_slots = Counter(
    "headway_schedule_slots_total", "Slots of schedules that were submitted, or missed and passed over.", ["outcome"]
)
retried = Counter("headway_jobs_retried_total", "Attempts that failed and are to be run again.", ["kind"])
claims_repeated = Counter(
    "headway_claims_repeated_total", "Claims run again because another worker took the same place of a concurrency key."
)
jobs_deleted = Counter("headway_jobs_deleted_total", "Ended jobs that were kept long enough and are deleted.")
messages = Counter("headway_messages_total", "Messages that were said in rooms.")
messages_deleted = Counter("headway_messages_deleted_total", "Messages that were kept long enough and are deleted.")
files_deleted = Counter(
    "headway_files_deleted_total", "Files whose time was over, uploads that were given up, and files that were deleted."
)
slots_busy = Gauge("headway_worker_slots_busy", "Jobs that this worker runs now.")
slots = Gauge("headway_worker_slots", "Jobs that this worker can run at a time.")
wakeups_failed = Counter("headway_wakeups_failed_total", "Wake-ups that Redis did not take; a scan finds the jobs.")
events_dropped = Counter("headway_events_dropped_total", "Live events that Redis did not take; readers re-read them.")
ws_connections = Gauge("headway_ws_connections", "Open WebSockets.")
ws_frames = Counter("headway_ws_frames_total", "Frames sent to WebSockets.", ["type"])
sse_streams = Gauge("headway_sse_streams", "Open streams of server-sent events.")
sse_events = Counter("headway_sse_events_total", "Events sent over SSE.", ["type"])
live_topics = Gauge("headway_live_topics", "Topics that this process listens to in Redis.")
live_losses = Counter("headway_live_losses_total", "Times that the connection for live events was lost.")
live_rechecks = Counter("headway_live_rechecks_total", "Times that all sessions were compared with the record.")
live_repairs = Counter("headway_live_repairs_total", "Events that Redis lost, read from the record for a session.")
feed_rounds = Counter("headway_feed_rounds_total", "Times that the events of live sets were read.")
set_catch_ups = Counter("headway_set_catch_ups_total", "Times that a live set fell behind and read for itself.")
live_slow = Counter("headway_live_slow_total", "Sessions that were closed because their client did not keep up.")
presence_failures = Counter("headway_presence_failures_total", "Times that Redis did not take who is in rooms.")
http_requests = Counter("headway_http_requests_total", "Requests to the API.", ["method", "route", "status"])
http_waits = Gauge("headway_http_waits", "Requests that are held until their job ends.")
http_time = Histogram(
    "headway_http_request_seconds",
    "Time from a request's head until its answer is ready to be sent.",
    ["route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 30),
)
ssrf_blocked = Counter("headway_ssrf_blocked_total", "Connections refused because of the address they would reach.")
database_failures = Counter("headway_database_failures_total", "Statements that failed for want of a database.")
errors_caught = Counter(
    "headway_errors_caught_total",
    "Errors that nobody foresaw, caught so that the rest goes on; the log has each.",
    ["place"],
)
loop_lag = Gauge("headway_event_loop_lag_seconds", "How late the event loop ran its last tick.")


@lru_cache(maxsize=4096)
def series(metric: Metric, *labels: str) -> Metric:
    """The metric with these labels. To look it up anew each time would cost more than to count."""
    return metric.labels(*labels)
