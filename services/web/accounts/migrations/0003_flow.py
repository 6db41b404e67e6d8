import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("headway", "0002_engine"),
    ]

    operations = [
        migrations.CreateModel(
            name="Schedule",
            fields=[
                ("id", models.UUIDField(primary_key=True, serialize=False)),
                (
                    "tenant",
                    models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.PROTECT, to="headway.tenant"),
                ),
                ("name", models.TextField()),
                ("cron", models.TextField()),
                ("timezone", models.TextField(db_default="UTC")),
                ("catch_up", models.TextField(db_default="one")),
                ("job", models.JSONField()),
                ("next_at", models.DateTimeField()),
                ("paused_at", models.DateTimeField(null=True)),
                ("created_at", models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
            ],
            options={
                "db_table": "schedules",
                "ordering": ["name"],
            },
        ),
        migrations.AlterModelOptions(
            name="kind",
            options={"ordering": ["name"]},
        ),
        migrations.AddField(
            model_name="job",
            name="concurrency_key",
            field=models.TextField(null=True),
        ),
        migrations.AddField(
            model_name="job",
            name="concurrency_limit",
            field=models.SmallIntegerField(db_default=1),
        ),
        migrations.AddField(
            model_name="job",
            name="concurrency_place",
            field=models.SmallIntegerField(null=True),
        ),
        migrations.AddField(
            model_name="job",
            name="depth",
            field=models.SmallIntegerField(db_default=0),
        ),
        migrations.AddField(
            model_name="job",
            name="parent_id",
            field=models.UUIDField(null=True),
        ),
        migrations.AddField(
            model_name="job",
            name="parked",
            field=models.BooleanField(db_default=False),
        ),
        migrations.AddField(
            model_name="job",
            name="retry_of",
            field=models.UUIDField(null=True),
        ),
        migrations.AddField(
            model_name="kind",
            name="paused_at",
            field=models.DateTimeField(editable=False, null=True),
        ),
        migrations.RemoveIndex(model_name="job", name="jobs_by_position"),
        migrations.AddIndex(
            model_name="job",
            index=models.Index(
                condition=models.Q(("parked", False), ("state", "queued")),
                fields=["position", "id"],
                name="jobs_by_position",
            ),
        ),
        migrations.AddIndex(
            model_name="job",
            index=models.Index(
                condition=models.Q(("crashes__lt", 2), ("parked", False), ("state", "queued")),
                fields=["kind", "position", "id"],
                name="jobs_ready",
            ),
        ),
        migrations.AddIndex(
            model_name="job",
            index=models.Index(
                condition=models.Q(("concurrency_key__isnull", False), ("state", "queued")),
                fields=["tenant", "concurrency_key", "position", "id"],
                name="jobs_keyed",
            ),
        ),
        migrations.AddIndex(
            model_name="job",
            index=models.Index(
                condition=models.Q(("run_at__isnull", True), ("state", "scheduled")), fields=["id"], name="jobs_waiting"
            ),
        ),
        migrations.AddIndex(
            model_name="job",
            index=models.Index(
                condition=models.Q(("parent_id__isnull", False)), fields=["parent_id", "id"], name="jobs_children"
            ),
        ),
        migrations.AddIndex(
            model_name="job",
            index=models.Index(
                condition=models.Q(("parent_id__isnull", False), ("state__in", ["scheduled", "queued", "running"])),
                fields=["parent_id", "state"],
                name="jobs_open_children",
            ),
        ),
        migrations.AddIndex(
            model_name="job",
            index=models.Index(
                condition=models.Q(("finished_at__isnull", False)), fields=["tenant", "finished_at"], name="jobs_ended"
            ),
        ),
        migrations.AddConstraint(
            model_name="job",
            constraint=models.UniqueConstraint(
                condition=models.Q(("concurrency_key__isnull", False), ("state", "running")),
                fields=("tenant", "concurrency_key", "concurrency_place"),
                name="jobs_concurrency",
            ),
        ),
        migrations.AddIndex(
            model_name="schedule",
            index=models.Index(
                condition=models.Q(("paused_at__isnull", True)), fields=["next_at"], name="schedules_due"
            ),
        ),
        migrations.AddConstraint(
            model_name="schedule",
            constraint=models.UniqueConstraint(fields=("tenant", "name"), name="schedules_name"),
        ),
    ]
