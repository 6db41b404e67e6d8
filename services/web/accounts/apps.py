from django.apps import AppConfig


class AccountsConfig(AppConfig):
    name = "services.web.accounts"
    label = "headway"
    verbose_name = "Headway"
