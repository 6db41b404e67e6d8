from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("headway", "0005_rooms"),
    ]

    operations = [
        migrations.AddField(
            model_name="file",
            name="expires_at",
            field=models.DateTimeField(null=True),
        ),
        migrations.AddField(
            model_name="file",
            name="keep_until",
            field=models.DateTimeField(null=True),
        ),
        migrations.AddField(
            model_name="file",
            name="metadata",
            field=models.TextField(db_default=""),
        ),
        migrations.AddField(
            model_name="file",
            name="parts",
            field=models.JSONField(null=True),
        ),
        migrations.AddField(
            model_name="file",
            name="received",
            field=models.BigIntegerField(db_default=0),
        ),
        migrations.AddField(
            model_name="file",
            name="tidied",
            field=models.BooleanField(db_default=True),
        ),
        migrations.AddField(
            model_name="tenant",
            name="stored",
            field=models.BigIntegerField(db_default=0, editable=False),
        ),
        migrations.AlterField(
            model_name="file",
            name="sha256",
            field=models.CharField(max_length=64, null=True),
        ),
        migrations.AddIndex(
            model_name="file",
            index=models.Index(
                condition=models.Q(("sha256__isnull", False)), fields=["tenant", "-id"], name="files_listing"
            ),
        ),
        migrations.AddIndex(
            model_name="file",
            index=models.Index(
                condition=models.Q(("expires_at__isnull", False)), fields=["expires_at"], name="files_expiring"
            ),
        ),
        migrations.AddIndex(
            model_name="file",
            index=models.Index(condition=models.Q(("tidied", False)), fields=["id"], name="files_untidy"),
        ),
        migrations.RunSQL(
            "UPDATE tenants SET stored = (SELECT coalesce(sum(size), 0) FROM files WHERE tenant_id = tenants.id)",
            migrations.RunSQL.noop,
        ),
    ]
