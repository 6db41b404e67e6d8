from django.db import migrations, models


class Migration(migrations.Migration):
    """The order of the queue is apart from that of what is parked. Nothing here holds a lock; what broke off is run again."""

    atomic = False

    dependencies = [
        ("headway", "0009_kind_moved"),
    ]

    operations = [
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.AddIndex(
                    model_name="job",
                    index=models.Index(
                        condition=models.Q(("concurrency_key__isnull", True), ("parked", False), ("state", "queued")),
                        fields=["tenant", "priority", "kind", "position"],
                        name="jobs_line",
                    ),
                ),
                migrations.AddIndex(
                    model_name="job",
                    index=models.Index(
                        condition=models.Q(("concurrency_key__isnull", False), ("parked", False), ("state", "queued")),
                        fields=["tenant", "priority", "kind", "position"],
                        name="jobs_keyed_line",
                    ),
                ),
                migrations.AddIndex(
                    model_name="job",
                    index=models.Index(
                        condition=models.Q(("concurrency_key__isnull", False), ("state", "queued")),
                        fields=["tenant", "concurrency_key", "parked", "priority", "position", "id"],
                        name="jobs_by_key",
                    ),
                ),
                migrations.RemoveIndex(model_name="job", name="jobs_by_position"),
                migrations.RemoveIndex(model_name="job", name="jobs_flows"),
                migrations.RemoveIndex(model_name="job", name="jobs_keyed"),
            ],
            database_operations=[
                migrations.RunSQL(
                    [
                        # One that broke off is left behind invalid.
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_line",
                        "CREATE INDEX CONCURRENTLY jobs_line ON jobs (tenant_id, priority, kind, position)"
                        " WHERE state = 'queued' AND NOT parked AND concurrency_key IS NULL",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_keyed_line",
                        "CREATE INDEX CONCURRENTLY jobs_keyed_line ON jobs (tenant_id, priority, kind, position)"
                        " WHERE state = 'queued' AND NOT parked AND concurrency_key IS NOT NULL",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_key",
                        "CREATE INDEX CONCURRENTLY jobs_by_key"
                        " ON jobs (tenant_id, concurrency_key, parked, priority, position, id)"
                        " WHERE state = 'queued' AND concurrency_key IS NOT NULL",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_position",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_flows",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_keyed",
                    ],
                    [
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_position",
                        "CREATE INDEX CONCURRENTLY jobs_by_position ON jobs (position, id)"
                        " WHERE state = 'queued' AND NOT parked",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_flows",
                        "CREATE INDEX CONCURRENTLY jobs_flows ON jobs (tenant_id, priority, position)"
                        " WHERE state = 'queued'",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_keyed",
                        "CREATE INDEX CONCURRENTLY jobs_keyed ON jobs (tenant_id, concurrency_key, position, id)"
                        " WHERE state = 'queued' AND concurrency_key IS NOT NULL",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_line",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_keyed_line",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_key",
                    ],
                ),
            ],
        ),
    ]
