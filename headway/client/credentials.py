"""Where the server is, and with which key: arguments, then the environment, then a file of `make run` or `make up`."""

import json
import os
from pathlib import Path
from urllib.parse import urlsplit

from headway.client.errors import NotConfigured

FILES = ("credentials.json", "compose-credentials.json")


def find(url: str | None = None, api_key: str | None = None) -> tuple[str, str]:
    """URL and API key. Raises NotConfigured.

    The key in a file is only ever sent to the URL beside it.
    """
    url = url or os.environ.get("HEADWAY_URL")
    api_key = api_key or os.environ.get("HEADWAY_API_KEY")
    if url and api_key:
        return url, api_key
    home = Path(os.environ.get("HEADWAY_HOME") or ".headway")
    path = next((home / name for name in FILES if (home / name).exists()), None)
    if path is None:
        raise NotConfigured(
            f"No server is known: set HEADWAY_URL and HEADWAY_API_KEY, or go to the folder of `make run` "
            f"({home / FILES[0]} does not exist)."
        )
    kept_url, kept_key = _read(path)
    if url and _place(url) != _place(kept_url):
        raise NotConfigured(f"Set HEADWAY_API_KEY for {url}: the key in {path} is for {kept_url}.")
    return url or kept_url, api_key or kept_key


def check_url(url: str) -> str:
    """The URL without a slash at its end. Raises NotConfigured if it is not http or https, or holds a password."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and parts.username is None
    except ValueError:
        fits = False
    if not fits or parts.query or parts.fragment:
        raise NotConfigured("The URL must look like http://127.0.0.1:8000 or https://jobs.example.com.")
    return url.rstrip("/")


def check_key(api_key: str) -> str:
    """Raises NotConfigured if the key cannot stand in a header."""
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise NotConfigured("The API key holds a character that no key has; copy it again, without spaces around it.")
    return api_key


def _read(path: Path) -> tuple[str, str]:
    try:
        kept = json.loads(path.read_text())
        return str(kept["url"]), str(kept["api_key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotConfigured(
            f"{path} cannot be used ({type(error).__name__}: {error}); set HEADWAY_URL and HEADWAY_API_KEY instead."
        ) from None


def _place(url: str) -> str:
    return url.rstrip("/").lower()
