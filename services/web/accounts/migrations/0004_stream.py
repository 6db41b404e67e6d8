from django.db import migrations, models

import services.web.accounts.models


class Migration(migrations.Migration):
    """Which transaction wrote an event. Nothing here rewrites a table or holds a lock; what broke off is run again."""

    atomic = False

    dependencies = [
        ("headway", "0003_flow"),
    ]

    operations = [
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.AddField(
                    model_name="event",
                    name="xid",
                    field=services.web.accounts.models.TransactionId(
                        db_default=models.Func(function="pg_current_xact_id"), null=True
                    ),
                ),
                migrations.AddIndex(
                    model_name="event",
                    index=models.Index(
                        condition=models.Q(("xid__isnull", False)), fields=["xid"], name="events_by_transaction"
                    ),
                ),
            ],
            database_operations=[
                # The default comes after the column: events that are there already stay as they are.
                migrations.RunSQL(
                    [
                        "ALTER TABLE events ADD COLUMN IF NOT EXISTS xid xid8",
                        "ALTER TABLE events ALTER COLUMN xid SET DEFAULT pg_current_xact_id()",
                    ],
                    "ALTER TABLE events DROP COLUMN xid",
                ),
                migrations.RunSQL(
                    [
                        # One that broke off is left behind invalid.
                        "DROP INDEX CONCURRENTLY IF EXISTS events_by_transaction",
                        "CREATE INDEX CONCURRENTLY events_by_transaction ON events (xid) WHERE xid IS NOT NULL",
                    ],
                    migrations.RunSQL.noop,
                ),
            ],
        ),
    ]
