from django.apps import AppConfig


class WebConfig(AppConfig):
    name = "services.web"
    label = "web"

    def ready(self) -> None:
        from services.web import checks  # noqa: F401, PLC0415  # registers the checks, which need the app registry
