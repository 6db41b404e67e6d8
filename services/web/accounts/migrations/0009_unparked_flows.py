from django.db import migrations, models


class Migration(migrations.Migration):
    """Flows without what is parked; nothing asks for the head of all kinds any more. Nothing here holds a lock."""

    atomic = False

    dependencies = [
        ("headway", "0008_job_tags"),
    ]

    operations = [
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.AddIndex(
                    model_name="job",
                    index=models.Index(
                        condition=models.Q(("parked", False), ("state", "queued")),
                        fields=["tenant", "priority", "position"],
                        name="jobs_flows_unparked",
                    ),
                ),
                migrations.RemoveIndex(model_name="job", name="jobs_by_position"),
            ],
            database_operations=[
                migrations.RunSQL(
                    [
                        # One that broke off is left behind invalid.
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_flows_unparked",
                        "CREATE INDEX CONCURRENTLY jobs_flows_unparked ON jobs (tenant_id, priority, position)"
                        " WHERE state = 'queued' AND NOT parked",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_position",
                    ],
                    [
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_by_position",
                        "CREATE INDEX CONCURRENTLY jobs_by_position ON jobs (position, id)"
                        " WHERE state = 'queued' AND NOT parked",
                        "DROP INDEX CONCURRENTLY IF EXISTS jobs_flows_unparked",
                    ],
                ),
            ],
        ),
    ]
