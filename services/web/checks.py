"""System checks, run by `make check` and when a deployment migrates: what leaves the event loop is refused."""

from typing import Any

from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.core.checks import Error, register
from django.utils.deprecation import MiddlewareMixin
from django.utils.module_loading import import_string


@register()
def api_middleware_is_async(app_configs: Any, **kwargs: Any) -> list[Error]:
    """Every class of API_MIDDLEWARE must be asynchronous on its own, without Django's thread-hopping adapter."""
    errors = []
    for path in settings.API_MIDDLEWARE:
        middleware = import_string(path)
        stock = isinstance(middleware, type) and issubclass(middleware, MiddlewareMixin)
        if stock or not getattr(middleware, "async_capable", False) or not _stays_on_loop(middleware):
            errors.append(
                Error(
                    f"{path} in API_MIDDLEWARE would run each API request in a thread.",
                    hint="Write it with `async def __call__`, `async_capable = True` and markcoroutinefunction(self), "
                    "without MiddlewareMixin; or put it into MIDDLEWARE, which serves the pages only.",
                    id="headway.E001",
                )
            )
    return errors


def _stays_on_loop(middleware: Any) -> bool:
    async def view(request: Any) -> None: ...

    return iscoroutinefunction(middleware(view))
