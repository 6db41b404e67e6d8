import django.db.models.deletion
from django.db import migrations, models

# Triggers, so that releases before this one write it too while both run.
TRIGGERS = [
    """
    CREATE OR REPLACE FUNCTION job_tagged() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO job_tags (tenant_id, tag, job_id)
        SELECT NEW.tenant_id, tag, NEW.id FROM unnest(NEW.tags) AS t (tag) ON CONFLICT DO NOTHING;
        RETURN NULL;
    END $$
    """,
    """
    CREATE OR REPLACE FUNCTION job_untagged() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        DELETE FROM job_tags WHERE tenant_id = OLD.tenant_id AND tag = ANY(OLD.tags) AND job_id = OLD.id;
        RETURN NULL;
    END $$
    """,
    """
    CREATE OR REPLACE TRIGGER job_tagged AFTER INSERT ON jobs
    FOR EACH ROW WHEN (NEW.tags <> '{}') EXECUTE FUNCTION job_tagged()
    """,
    """
    CREATE OR REPLACE TRIGGER job_untagged AFTER DELETE ON jobs
    FOR EACH ROW WHEN (OLD.tags <> '{}') EXECUTE FUNCTION job_untagged()
    """,
]


class Migration(migrations.Migration):
    """Tags have a table of their own, which is in order: the index of `jobs.tags` has none.

    Submits wait for no more than a moment; what broke off is run again.
    """

    atomic = False

    dependencies = [
        ("headway", "0007_indexes"),
    ]

    operations = [
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.CreateModel(
                    name="JobTag",
                    fields=[
                        (
                            "pk",
                            models.CompositePrimaryKey(
                                "tenant_id",
                                "tag",
                                "job_id",
                                blank=True,
                                editable=False,
                                primary_key=True,
                                serialize=False,
                            ),
                        ),
                        ("tag", models.TextField()),
                        (
                            "job",
                            models.ForeignKey(
                                db_constraint=False,
                                db_index=False,
                                on_delete=django.db.models.deletion.DO_NOTHING,
                                to="headway.job",
                            ),
                        ),
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
                    options={"db_table": "job_tags"},
                ),
            ],
            database_operations=[
                migrations.RunSQL(
                    [
                        "CREATE TABLE IF NOT EXISTS job_tags ("
                        "tenant_id uuid NOT NULL, tag text NOT NULL, job_id uuid NOT NULL, "
                        "PRIMARY KEY (tenant_id, tag, job_id))",
                        *TRIGGERS,
                        "INSERT INTO job_tags (tenant_id, tag, job_id) "
                        "SELECT tenant_id, tag, id FROM jobs, unnest(tags) AS t (tag) WHERE tags <> '{}' "
                        "ON CONFLICT DO NOTHING",
                    ],
                    [
                        "DROP TRIGGER IF EXISTS job_tagged ON jobs",
                        "DROP TRIGGER IF EXISTS job_untagged ON jobs",
                        "DROP FUNCTION IF EXISTS job_tagged, job_untagged",
                        "DROP TABLE IF EXISTS job_tags",
                    ],
                ),
            ],
        ),
    ]
