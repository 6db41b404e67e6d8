"""The request as the API's views see it."""

from typing import TYPE_CHECKING, Any

from django.core.handlers.asgi import ASGIRequest
from pydantic import BaseModel

from headway.errors import InvalidRequest
from services.web.api.auth import Principal
from services.web.api.bodies import Body, Receive

if TYPE_CHECKING:
    from services.web.app import App


class ApiRequest(ASGIRequest):
    """Django's request, with the App, the body as a stream, and once authenticated the Principal."""

    auth: Principal

    def __init__(self, scope: Any, receive: Receive) -> None:
        super().__init__(scope, None)  # type: ignore[arg-type]  # the body is read elsewhere
        self.app: App = scope["headway"]
        given = self.META.get("CONTENT_LENGTH", "")
        self.incoming = Body(receive, int(given) if given.isdecimal() else None)

    def only(self, model: type[BaseModel]) -> None:
        """Raises InvalidRequest if the query has a name that `model` does not know; django-ninja passes those over."""
        if unknown := sorted(self.GET.keys() - model.model_fields.keys()):
            errors = [{"field": name[:100], "message": "There is no such parameter."} for name in unknown[:20]]
            raise InvalidRequest(f"Unknown parameter; there are: {', '.join(model.model_fields)}.", errors=errors)

    async def load(self) -> None:
        """Read the body into memory, where django-ninja looks for it. Raises TooLarge or Disconnected."""
        self._body = await self.incoming.whole(self.app.settings.max_body)
