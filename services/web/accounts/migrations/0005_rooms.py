import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("headway", "0004_stream"),
    ]

    operations = [
        migrations.AddField(
            model_name="tenant",
            name="rooms_seq",
            field=models.BigIntegerField(db_default=0, editable=False),
        ),
        migrations.CreateModel(
            name="Message",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "tenant_id", "room", "seq", blank=True, editable=False, primary_key=True, serialize=False
                    ),
                ),
                ("room", models.TextField()),
                ("seq", models.BigIntegerField()),
                ("id", models.UUIDField()),
                ("author", models.TextField()),
                ("key_id", models.CharField(max_length=16)),
                ("publish_key", models.TextField(null=True)),
                ("text", models.TextField()),
                ("created_at", models.DateTimeField()),
                (
                    "tenant",
                    models.ForeignKey(
                        db_constraint=False,
                        db_index=False,
                        on_delete=django.db.models.deletion.DO_NOTHING,
                        to="headway.tenant",
                    ),
                ),
            ],
            options={
                "db_table": "messages",
                "indexes": [models.Index(fields=["created_at"], name="messages_by_age")],
                "constraints": [
                    models.UniqueConstraint(
                        condition=models.Q(("publish_key__isnull", False)),
                        fields=("tenant", "room", "key_id", "author", "publish_key"),
                        name="messages_once",
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="Room",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "tenant_id", "name", blank=True, editable=False, primary_key=True, serialize=False
                    ),
                ),
                ("name", models.TextField()),
                ("seq", models.BigIntegerField()),
                ("last_at", models.DateTimeField()),
                (
                    "tenant",
                    models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.PROTECT, to="headway.tenant"),
                ),
            ],
            options={
                "db_table": "rooms",
                "indexes": [
                    models.Index(fields=["tenant", "-last_at", "-name"], name="rooms_listing"),
                    models.Index(fields=["last_at"], name="rooms_by_age"),
                ],
            },
        ),
    ]
