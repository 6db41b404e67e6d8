"""The schema of Headway's tables. Run-time queries are in `headway.store`; the ORM serves migrations and the admin."""

from typing import ClassVar

from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.indexes import GinIndex
from django.db import models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models.functions import Now
from uuid_utils.compat import uuid7

from headway.states import TERMINAL, JobState

OPEN = [state.value for state in JobState if state not in TERMINAL]
ENDED = [state.value for state in JobState if state in TERMINAL]


class Tenant(models.Model):
    """Whoever owns jobs, files and keys; nothing is seen across tenants."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    name = models.SlugField(unique=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    # Where a new room begins to count: no lower than any room that is gone, so that no seq comes twice under one name.
    rooms_seq = models.BigIntegerField(db_default=0, editable=False)
    # Bytes of its files, and of its uploads as they were announced.
    stored = models.BigIntegerField(db_default=0, editable=False)

    class Meta:
        db_table = "tenants"
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return str(self.name)


class ApiKey(models.Model):
    """A key of a tenant. `digest` is HMAC-SHA256 under the pepper; the secret is kept nowhere."""

    id = models.CharField(primary_key=True, max_length=16, editable=False)
    tenant = models.ForeignKey(Tenant, models.PROTECT)
    name = models.CharField(max_length=100, help_text="What uses the key, so that you know what stops when it goes.")
    digest = models.BinaryField(editable=False)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, editable=False)

    class Meta:
        db_table = "api_keys"
        verbose_name = "API key"
        ordering: ClassVar = ["tenant", "name"]

    def __str__(self) -> str:
        return f"{self.name} (hw_live_{self.id}_…)"


class Job(models.Model):
    """One job. `token` counts claims and fences the writes of an attempt; `seq` is the number of its newest event."""

    id = models.UUIDField(primary_key=True)
    tenant = models.ForeignKey(Tenant, models.PROTECT, db_index=False)
    kind = models.TextField()
    state = models.TextField()
    input = models.JSONField()
    tags = ArrayField(models.TextField(), db_default=[])
    priority = models.SmallIntegerField(db_default=1)
    position = models.FloatField(db_default=0)
    timeout = models.FloatField()
    max_attempts = models.IntegerField(db_default=1)
    idempotency_key = models.TextField(null=True)
    request_digest = models.CharField(max_length=64, null=True)
    concurrency_key = models.TextField(null=True)
    concurrency_limit = models.SmallIntegerField(db_default=1)
    # Which of the key's `concurrency_limit` places a running job holds; a unique index gives each to one job.
    concurrency_place = models.SmallIntegerField(null=True)
    # Whether a queued job stands aside until its concurrency key has a place.
    parked = models.BooleanField(db_default=False)
    parent_id = models.UUIDField(null=True)
    depth = models.SmallIntegerField(db_default=0)
    retry_of = models.UUIDField(null=True)
    attempt = models.IntegerField(db_default=0)
    interruptions = models.IntegerField(db_default=0)
    crashes = models.IntegerField(db_default=0)
    token = models.BigIntegerField(db_default=0)
    worker = models.TextField(null=True)
    lease_expires_at = models.DateTimeField(null=True)
    created_at = models.DateTimeField(db_default=Now())
    run_at = models.DateTimeField(null=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)
    cancel_requested_at = models.DateTimeField(null=True)
    progress = models.JSONField(null=True)
    checkpoint = models.JSONField(null=True)
    result = models.JSONField(null=True)
    error = models.JSONField(null=True)
    epoch = models.IntegerField(db_default=1)
    seq = models.BigIntegerField(db_default=0)

    class Meta:
        db_table = "jobs"
        ordering: ClassVar = ["-id"]
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=models.Q(state__in=[state.value for state in JobState]), name="jobs_state"
            ),
            models.UniqueConstraint(
                fields=["tenant", "idempotency_key"],
                name="jobs_idempotency",
                condition=models.Q(idempotency_key__isnull=False),
            ),
            models.UniqueConstraint(
                fields=["tenant", "concurrency_key", "concurrency_place"],
                name="jobs_concurrency",
                condition=models.Q(state="running", concurrency_key__isnull=False),
            ),
        ]
        indexes: ClassVar = [
            # The flows of jobs without and with a concurrency key.
            models.Index(
                fields=["tenant", "priority", "kind", "position"],
                name="jobs_line",
                condition=models.Q(state="queued", parked=False, concurrency_key__isnull=True),
            ),
            models.Index(
                fields=["tenant", "priority", "kind", "position"],
                name="jobs_keyed_line",
                condition=models.Q(state="queued", parked=False, concurrency_key__isnull=False),
            ),
            models.Index(
                fields=["kind", "position", "id"],
                name="jobs_ready",
                condition=models.Q(state="queued", parked=False, crashes__lt=2),
            ),
            models.Index(
                fields=["tenant", "concurrency_key", "parked", "priority", "position", "id"],
                name="jobs_by_key",
                condition=models.Q(state="queued", concurrency_key__isnull=False),
            ),
            # Jobs that wait for their children, and the children.
            models.Index(
                fields=["id"], name="jobs_waiting", condition=models.Q(state="scheduled", run_at__isnull=True)
            ),
            models.Index(fields=["parent_id", "id"], name="jobs_children", condition=models.Q(parent_id__isnull=False)),
            models.Index(
                fields=["parent_id", "state"],
                name="jobs_open_children",
                condition=models.Q(parent_id__isnull=False, state__in=OPEN),
            ),
            models.Index(
                fields=["tenant", "finished_at"], name="jobs_ended", condition=models.Q(finished_at__isnull=False)
            ),
            models.Index(
                fields=["position", "id"],
                name="jobs_suspects",
                condition=models.Q(state="queued", crashes__gt=1),
            ),
            models.Index(fields=["run_at"], name="jobs_due", condition=models.Q(state="scheduled")),
            # What workers look for, of all tenants. No column of it changes when a lease is renewed or progress is
            # written, so that such an update touches no index.
            models.Index(
                fields=["state", "tenant", "-id"], name="jobs_by_open_state", condition=models.Q(state__in=OPEN)
            ),
            # Apart from the open ones, so that a change of state touches one of both alone.
            models.Index(
                fields=["tenant", "state", "-id"], name="jobs_by_ended_state", condition=models.Q(state__in=ENDED)
            ),
            models.Index(fields=["tenant", "-id"], name="jobs_listing"),
            models.Index(fields=["tenant", "kind", "-id"], name="jobs_by_kind"),
            GinIndex(fields=["tags"], name="jobs_by_tag", condition=~models.Q(tags=[]), fastupdate=False),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"


class JobTag(models.Model):
    """A tag of a job, so that those with a tag are found newest first. Triggers of `jobs` write and delete it."""

    pk = models.CompositePrimaryKey("tenant_id", "tag", "job_id")
    tenant = models.ForeignKey(Tenant, models.DO_NOTHING, db_index=False, db_constraint=False)
    tag = models.TextField()
    job = models.ForeignKey(Job, models.DO_NOTHING, db_index=False, db_constraint=False)

    class Meta:
        db_table = "job_tags"


class TransactionId(models.Field):
    """A transaction of Postgres."""

    def db_type(self, connection: BaseDatabaseWrapper) -> str:
        return "xid8"


class Event(models.Model):
    """A durable event of a job: `state` or `log`. Progress is kept on the job only.

    `xid` is the transaction that wrote it, by which it is known what was committed since; null for those of long ago.
    """

    pk = models.CompositePrimaryKey("job_id", "seq")
    # The row is written in the statement that changes the job, so the constraint would only cost time.
    job = models.ForeignKey(Job, models.DO_NOTHING, db_index=False, db_constraint=False)
    seq = models.BigIntegerField()
    type = models.TextField()
    data = models.JSONField()
    xid = TransactionId(null=True, db_default=models.Func(function="pg_current_xact_id"))

    class Meta:
        db_table = "events"
        indexes: ClassVar = [
            models.Index(fields=["xid"], name="events_by_transaction", condition=models.Q(xid__isnull=False))
        ]


class Artifact(models.Model):
    """A file that a job made; the row appears in the transaction that finishes the attempt."""

    pk = models.CompositePrimaryKey("job_id", "name")
    job = models.ForeignKey(Job, models.DO_NOTHING, db_index=False)
    name = models.TextField()
    content_type = models.TextField()
    size = models.BigIntegerField()
    sha256 = models.CharField(max_length=64)
    key = models.TextField()

    class Meta:
        db_table = "artifacts"


class Failure(models.Model):
    """Why an attempt of a job failed, with its traceback."""

    pk = models.CompositePrimaryKey("job_id", "token")
    job = models.ForeignKey(Job, models.DO_NOTHING, db_index=False, db_constraint=False)
    token = models.BigIntegerField()
    attempt = models.IntegerField()
    at = models.DateTimeField()
    error = models.JSONField()

    class Meta:
        db_table = "failures"


class Room(models.Model):
    """A room of a tenant. `seq` is the number of its newest message."""

    pk = models.CompositePrimaryKey("tenant_id", "name")
    tenant = models.ForeignKey(Tenant, models.PROTECT, db_index=False)
    name = models.TextField()
    seq = models.BigIntegerField()
    last_at = models.DateTimeField()

    class Meta:
        db_table = "rooms"
        indexes: ClassVar = [
            models.Index(fields=["tenant", "-last_at", "-name"], name="rooms_listing"),
            models.Index(fields=["last_at"], name="rooms_by_age"),
        ]

    def __str__(self) -> str:
        return str(self.name)


class Message(models.Model):
    """What was said in a room. `publish_key` makes a repeat of it known."""

    pk = models.CompositePrimaryKey("tenant_id", "room", "seq")
    # The row is written in the statement that counts the room on, so the constraint would only cost time.
    tenant = models.ForeignKey(Tenant, models.DO_NOTHING, db_index=False, db_constraint=False)
    room = models.TextField()
    seq = models.BigIntegerField()
    id = models.UUIDField()
    author = models.TextField()
    key_id = models.CharField(max_length=16)
    publish_key = models.TextField(null=True)
    text = models.TextField()
    created_at = models.DateTimeField()

    class Meta:
        db_table = "messages"
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["tenant", "room", "key_id", "author", "publish_key"],
                name="messages_once",
                condition=models.Q(publish_key__isnull=False),
            ),
        ]
        indexes: ClassVar = [
            models.Index(fields=["created_at"], name="messages_by_age"),
        ]


class File(models.Model):
    """An uploaded file; without `sha256` an upload that is not whole yet, or one that was given up."""

    id = models.UUIDField(primary_key=True)
    tenant = models.ForeignKey(Tenant, models.PROTECT)
    name = models.TextField()
    content_type = models.TextField()
    size = models.BigIntegerField()
    sha256 = models.CharField(max_length=64, null=True)
    created_at = models.DateTimeField(db_default=Now())
    # When it is to go: a file that is kept no longer, an upload that got no more bytes.
    expires_at = models.DateTimeField(null=True)
    keep_until = models.DateTimeField(null=True)
    received = models.BigIntegerField(db_default=0)
    # `[[key, bytes], …]`; null is one object, as all files were once.
    parts = models.JSONField(null=True)
    metadata = models.TextField(db_default="")
    # Whether nothing but its parts can be left in its folder.
    tidied = models.BooleanField(db_default=True)

    class Meta:
        db_table = "files"
        indexes: ClassVar = [
            models.Index(fields=["tenant", "-id"], name="files_listing", condition=models.Q(sha256__isnull=False)),
            models.Index(fields=["expires_at"], name="files_expiring", condition=models.Q(expires_at__isnull=False)),
            models.Index(fields=["id"], name="files_untidy", condition=models.Q(tidied=False)),
        ]


class Kind(models.Model):
    """What workers announced of the kinds they run; the web service validates inputs against it."""

    name = models.TextField(primary_key=True)
    description = models.TextField()
    timeout = models.FloatField()
    max_attempts = models.IntegerField(db_default=1)
    input_schema = models.JSONField()
    result_schema = models.JSONField()
    announced_at = models.DateTimeField()
    # How far its queued jobs were moved on in the queue while no job of it was begun.
    moved = models.FloatField(db_default=0, editable=False)
    paused_at = models.DateTimeField(null=True, editable=False)

    class Meta:
        db_table = "kinds"
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return str(self.name)


class Schedule(models.Model):
    """Submits a job at every time of a cron expression. `next_at` is the next slot that has not been submitted."""

    id = models.UUIDField(primary_key=True)
    tenant = models.ForeignKey(Tenant, models.PROTECT, db_index=False)
    name = models.TextField()
    cron = models.TextField()
    timezone = models.TextField(db_default="UTC")
    catch_up = models.TextField(db_default="one")
    # What a submission says: kind, input, tags, priority, timeout, max_attempts, concurrency key.
    job = models.JSONField()
    next_at = models.DateTimeField()
    paused_at = models.DateTimeField(null=True)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "schedules"
        ordering: ClassVar = ["name"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["tenant", "name"], name="schedules_name"),
        ]
        indexes: ClassVar = [
            models.Index(fields=["next_at"], name="schedules_due", condition=models.Q(paused_at__isnull=True)),
        ]

    def __str__(self) -> str:
        return str(self.name)
