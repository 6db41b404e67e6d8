"""Django's admin: tenants, users and API keys to manage, jobs to look at."""

from typing import Any

from django.conf import settings
from django.contrib import admin, messages
from django.db.models import QuerySet
from django.forms import ModelForm
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html

from headway import keys
from services.web.accounts.models import ApiKey, Job, Kind, Tenant


@admin.register(Tenant)
class TenantAdmin(admin.ModelAdmin):
    list_display = ("name", "id", "created_at")
    fields = ("name", "id", "created_at")
    readonly_fields = ("id", "created_at")

    def get_fields(self, request: HttpRequest, obj: Tenant | None = None) -> tuple[str, ...]:
        return self.fields if obj else ("name",)


@admin.register(ApiKey)
class ApiKeyAdmin(admin.ModelAdmin):
    """The secret is shown once, when the key is made; revoking takes effect within five seconds."""

    list_display = ("name", "tenant", "id", "created_at", "expires_at", "revoked_at")
    list_filter = ("tenant",)
    fields = ("tenant", "name", "expires_at", "id", "created_at", "revoked_at")
    readonly_fields = ("id", "created_at", "revoked_at")
    actions = ("revoke",)

    def get_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> tuple[str, ...]:
        return self.fields if obj else ("tenant", "name", "expires_at")

    def get_readonly_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> tuple[str, ...]:
        return (*self.readonly_fields, "tenant") if obj else self.readonly_fields

    def save_model(self, request: HttpRequest, obj: ApiKey, form: ModelForm, change: bool) -> None:
        if not change:
            key = keys.new()
            obj.id = key.id
            obj.digest = key.digest(settings.HEADWAY.key_pepper.get_secret_value())
            messages.warning(request, f"Copy the key now, it is not shown again: {key.text}")
        super().save_model(request, obj, form, change)

    def has_delete_permission(self, request: HttpRequest, obj: ApiKey | None = None) -> bool:
        """Keys are revoked, not deleted: what was done with them stays traceable."""
        return False

    @admin.action(description="Revoke the selected keys", permissions=["change"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> None:
        count = queryset.filter(revoked_at=None).update(revoked_at=timezone.now())
        messages.success(request, f"{count} key{'' if count == 1 else 's'} revoked; that takes effect in five seconds.")


@admin.register(Kind)
class KindAdmin(admin.ModelAdmin):
    """Kinds are announced by workers; here they are paused, so that none of their jobs is started, and resumed."""

    list_display = ("name", "description", "timeout", "max_attempts", "announced_at", "paused_at")
    actions = ("pause", "resume")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return obj is None and super().has_change_permission(request)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    @admin.action(description="Pause the selected kinds", permissions=["change"])
    def pause(self, request: HttpRequest, queryset: QuerySet[Kind]) -> None:
        count = queryset.filter(paused_at=None).update(paused_at=timezone.now())
        messages.success(request, f"{count} paused: jobs are accepted and wait; those that run go on.")

    @admin.action(description="Resume the selected kinds", permissions=["change"])
    def resume(self, request: HttpRequest, queryset: QuerySet[Kind]) -> None:
        messages.success(request, f"{queryset.exclude(paused_at=None).update(paused_at=None)} resumed.")


@admin.register(Job)
class JobAdmin(admin.ModelAdmin):
    """Jobs can be looked at; only the lifecycle changes them."""

    list_display = ("whole_id", "kind", "state", "tenant", "attempt", "created", "finished")
    list_filter = ("state", "kind", "tenant")
    search_fields = ("=id",)
    list_select_related = ("tenant",)
    show_full_result_count = False

    @admin.display(description="id", ordering="id")
    def whole_id(self, job: Job) -> str:
        return format_html('<span style="white-space: nowrap">{}</span>', job.id)

    @admin.display(ordering="created_at")
    def created(self, job: Job) -> str:
        return f"{job.created_at:%Y-%m-%d %H:%M:%S}"

    @admin.display(ordering="finished_at")
    def finished(self, job: Job) -> str | None:
        return f"{job.finished_at:%Y-%m-%d %H:%M:%S}" if job.finished_at else None

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False
