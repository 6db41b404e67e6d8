from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("headway", "0008_job_tags"),
    ]

    operations = [
        migrations.AddField(model_name="kind", name="moved", field=models.FloatField(db_default=0, editable=False)),
    ]
