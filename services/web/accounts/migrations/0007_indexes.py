from django.db import migrations, models


class Migration(migrations.Migration):
    """A job is in one index of states, not in two. Nothing here holds a lock; what broke off is run again."""

    atomic = False

    dependencies = [
        ("headway", "0006_uploads"),
    ]

    operations = [
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.AddIndex(
                    model_name="job",
                    index=models.Index(
                        condition=models.Q(("state__in", ["scheduled", "queued", "running"])),
                        fields=["state", "tenant", "-id"],
                        name="jobs_by_open_state",
                    ),
                ),
                migrations.AddIndex(
                    model_name="job",
                    index=models.Index(
                        condition=models.Q(("state__in", ["succeeded", "failed", "cancelled"])),
                        fields=["tenant", "state", "-id"],
                        name="jobs_by_ended_state",
                    ),
                ),
                migrations.RemoveIndex(model_name="job", name="jobs_open"),
                migrations.RemoveIndex(model_name="job", name="jobs_by_state"),
            ],
            database_operations=[
                migrations.RunSQL(
                    [
                        # One that broke off is left behind invalid.
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_open_state",
                        "CREATE INDEX CONCURRENTLY jobs_by_open_state ON jobs (state, tenant_id, id DESC)"
                        " WHERE state IN ('scheduled', 'queued', 'running')",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_ended_state",
                        "CREATE INDEX CONCURRENTLY jobs_by_ended_state ON jobs (tenant_id, state, id DESC)"
                        " WHERE state IN ('succeeded', 'failed', 'cancelled')",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_open",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_state",
                    ],
                    [
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_open",
                        "CREATE INDEX CONCURRENTLY jobs_open ON jobs (state, id)"
                        " WHERE state IN ('scheduled', 'queued', 'running')",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_state",
                        "CREATE INDEX CONCURRENTLY jobs_by_state ON jobs (tenant_id, state, id DESC)",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_open_state",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_ended_state",
                    ],
                ),
            ],
        ),
    ]
