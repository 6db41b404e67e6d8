"""Django's management commands: `python -m services.web.manage migrate`."""

import os
import sys

from django.core.management import execute_from_command_line
from django.db import OperationalError

from headway.errors import HeadwayError


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "services.web.settings")
    try:
        execute_from_command_line(sys.argv)
    except HeadwayError as error:
        sys.exit(str(error))
    except OperationalError as error:
        sys.exit(f"The database of HEADWAY_DATABASE_URL cannot be used: {error}")


if __name__ == "__main__":
    main()
