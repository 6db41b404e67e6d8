"""Make the first tenant, administrator and API key."""

import json
import os
import secrets
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.conf import settings
from django.contrib.auth.models import User
from django.core.management.base import BaseCommand
from django.db import transaction

from headway import keys
from services.web.accounts.models import ApiKey, Tenant


class Command(BaseCommand):
    help = (
        "Makes tenant `default`, user `admin` and an API key, and writes them as JSON, once: "
        "where there is a tenant already, it writes nothing."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--url", required=True, help="Where clients reach the service.")
        parser.add_argument("--credentials", required=True, help="The file to write, mode 0600; - is standard output.")

    @transaction.atomic
    def handle(self, *args: Any, url: str, credentials: str, **options: Any) -> None:
        if Tenant.objects.exists():
            return
        tenant = Tenant.objects.create(name="default")
        password = secrets.token_urlsafe(18)
        User.objects.create_superuser("admin", password=password)
        key = keys.new()
        digest = key.digest(settings.HEADWAY.key_pepper.get_secret_value())
        ApiKey.objects.create(id=key.id, tenant=tenant, name="first key", digest=digest)
        written = json.dumps(
            {"url": url, "api_key": key.text, "admin_user": "admin", "admin_password": password}, indent=2
        )
        if credentials == "-":
            sys.stdout.write(written + "\n")
        else:
            _write(Path(credentials), written + "\n")


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and never readable by others."""
    part = path.with_suffix(".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(text)
    part.replace(path)
