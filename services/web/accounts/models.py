"""The schema of Headway's tables. Run-time queries are in `headway.store`; the ORM serves migrations and the admin."""

from typing import ClassVar

from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.indexes import GinIndex
from django.db import models
from django.db.models.functions import Now
from uuid_utils.compat import uuid7

from headway.states import TERMINAL, JobState

OPEN = [state.value for state in JobState if state not in TERMINAL]


class Tenant(models.Model):
    """Whoever owns jobs, files and keys; nothing is seen across tenants."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    name = models.SlugField(unique=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

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
        ]
        indexes: ClassVar = [
            models.Index(fields=["position", "id"], name="jobs_by_position", condition=models.Q(state="queued")),
            models.Index(
                fields=["tenant", "priority", "position"], name="jobs_flows", condition=models.Q(state="queued")
            ),
            models.Index(
                fields=["position", "id"],
                name="jobs_suspects",
                condition=models.Q(state="queued", crashes__gt=1),
            ),
            models.Index(fields=["run_at"], name="jobs_due", condition=models.Q(state="scheduled")),
            # What workers look for. No column of it changes when a lease is renewed or progress is written, so that
            # such an update touches no index.
            models.Index(fields=["state", "id"], name="jobs_open", condition=models.Q(state__in=OPEN)),
            models.Index(fields=["tenant", "-id"], name="jobs_listing"),
            models.Index(fields=["tenant", "state", "-id"], name="jobs_by_state"),
            models.Index(fields=["tenant", "kind", "-id"], name="jobs_by_kind"),
            GinIndex(fields=["tags"], name="jobs_by_tag", condition=~models.Q(tags=[]), fastupdate=False),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"


class Event(models.Model):
    """A durable event of a job: `state` or `log`. Progress is kept on the job only."""

    pk = models.CompositePrimaryKey("job_id", "seq")
    # The row is written in the statement that changes the job, so the constraint would only cost time.
    job = models.ForeignKey(Job, models.DO_NOTHING, db_index=False, db_constraint=False)
    seq = models.BigIntegerField()
    type = models.TextField()
    data = models.JSONField()

    class Meta:
        db_table = "events"


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


class File(models.Model):
    """An uploaded file."""

    id = models.UUIDField(primary_key=True)
    tenant = models.ForeignKey(Tenant, models.PROTECT)
    name = models.TextField()
    content_type = models.TextField()
    size = models.BigIntegerField()
    sha256 = models.CharField(max_length=64)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "files"


class Kind(models.Model):
    """What workers announced of the kinds they run; the web service validates inputs against it."""

    name = models.TextField(primary_key=True)
    description = models.TextField()
    timeout = models.FloatField()
    max_attempts = models.IntegerField(db_default=1)
    input_schema = models.JSONField()
    result_schema = models.JSONField()
    announced_at = models.DateTimeField()

    class Meta:
        db_table = "kinds"
