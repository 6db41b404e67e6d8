"""Settings: from variables or files, and a sentence for what is wrong."""

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import ValidationError

from headway.errors import InvalidSettings
from headway.settings import Settings, load

LEAST = {
    "HEADWAY_DATABASE_URL": "postgresql://headway:hunter2@db:5432/headway",
    "HEADWAY_REDIS_URL": "redis://:hunter2@redis:6379/0",
    "HEADWAY_SECRET_KEY": "hunter2-" * 5,
    "HEADWAY_KEY_PEPPER": "hunter2." * 5,
}


def test_four_variables_are_enough_and_the_rest_has_defaults() -> None:
    settings = load(LEAST)
    assert settings.database_url.get_secret_value() == LEAST["HEADWAY_DATABASE_URL"]
    assert (settings.port, settings.host, settings.slots) == (8000, "127.0.0.1", 20)
    assert settings.files_location == (Path(".headway").resolve() / "files").as_uri()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, "port", 1)  # noqa: B010  # a type checker refuses it as well


def test_values_of_every_shape_are_read() -> None:
    settings = load(
        LEAST
        | {
            "HEADWAY_PORT": "8080",
            "HEADWAY_DRAIN": "2.5",
            "HEADWAY_KINDS": "shop.kinds, more.kinds,",
            "HEADWAY_ALLOWED_HOSTS": "",
            "HEADWAY_FETCH_ALLOW": "10.0.0.0/8,::1/128",
            "HEADWAY_SOURCES": '{"default": "postgresql+asyncpg://db/shop"}',
            "HEADWAY_FILES_URL": "file:///var/files",
            "UNRELATED": "x",
        }
    )
    assert (settings.port, settings.drain) == (8080, 2.5)
    assert settings.kinds == ("shop.kinds", "more.kinds")
    assert settings.allowed_hosts == ()
    assert [str(network) for network in settings.fetch_allow] == ["10.0.0.0/8", "::1/128"]
    assert settings.sources["default"].url.get_secret_value().endswith("/shop")
    assert settings.files_location == "file:///var/files"


def test_a_secret_may_be_in_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "pepper"
    secret.write_text("a pepper of more than thirty-two characters\n")
    rest = {name: value for name, value in LEAST.items() if name != "HEADWAY_KEY_PEPPER"}
    settings = load(rest | {"HEADWAY_KEY_PEPPER_FILE": str(secret)})
    assert settings.key_pepper.get_secret_value() == "a pepper of more than thirty-two characters"
    with pytest.raises(InvalidSettings, match="HEADWAY_KEY_PEPPER and HEADWAY_KEY_PEPPER_FILE are both set"):
        load(LEAST | {"HEADWAY_KEY_PEPPER_FILE": str(secret)})
    with pytest.raises(InvalidSettings, match="HEADWAY_KEY_PEPPER_FILE cannot be read"):
        load(rest | {"HEADWAY_KEY_PEPPER_FILE": str(tmp_path / "missing")})
    secret.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSettings, match="HEADWAY_KEY_PEPPER_FILE cannot be read"):
        load(rest | {"HEADWAY_KEY_PEPPER_FILE": str(secret)})


def test_what_is_missing_is_named_in_one_sentence_each() -> None:
    with pytest.raises(InvalidSettings) as caught:
        load({})
    message = str(caught.value)
    for name in LEAST:
        assert message.count(name) == 1
    assert "\n" not in message
    assert "HEADWAY_PORT" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HEADWAY_PORT", "http"),
        ("HEADWAY_PORT", "70000"),
        ("HEADWAY_SLOTS", "0"),
        ("HEADWAY_LOG_FORMAT", "xml"),
        ("HEADWAY_SECRET_KEY", "short"),
        ("HEADWAY_SOURCES", "{"),
        ("HEADWAY_SOURCES", '["postgresql://db/shop"]'),
        ("HEADWAY_FETCH_ALLOW", "10.0.0.0/99"),
        ("HEADWAY_DATABASE_URL", "localhost:5432"),
        ("HEADWAY_DATABASE_URL", "mysql://db/headway"),
        ("HEADWAY_DATABASE_URL", ""),
        ("HEADWAY_REDIS_URL", "localhost"),
        ("HEADWAY_REDIS_URL", "http://redis"),
        ("HEADWAY_FILES_URL", "s3:///prefix"),
        ("HEADWAY_FILES_URL", "gs://bucket"),
        ("HEADWAY_QUOTA", "-1"),
        ("HEADWAY_S3_ENDPOINT", "minio:9000"),
        ("HEADWAY_FILES_URL", "/var/files"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_variable(name: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=name) as caught:
        load(LEAST | {name: value})
    assert "hunter2" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    settings = load(LEAST | {"HEADWAY_SOURCES": '{"default": "postgresql://shop:hunter2@db/shop"}'})
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings)
    assert "hunter2" not in settings.model_dump_json()


@pytest.mark.parametrize(
    "source",
    [
        "postgresql+asyncpg://other:x@db:5432/headway",
        "postgresql+asyncpg://db/headway",
        "postgresql://DB:5432/headway?ssl=require",
        "postgres://db:5432/headway",
    ],
)
def test_headways_own_database_is_no_source(source: str) -> None:
    with pytest.raises(InvalidSettings, match=r"HEADWAY_SOURCES.*'mine'"):
        load(LEAST | {"HEADWAY_SOURCES": f'{{"other": "postgresql://db/shop", "mine": "{source}"}}'})


SHOP, BANK = UUID("0190a0b0-0000-7000-8000-000000000001"), UUID("0190a0b0-0000-7000-8000-000000000002")


def granting(tenants: Any) -> dict[str, str]:
    source = {"url": "postgresql://payroll:hunter2@db/payroll", "tenants": tenants}
    return LEAST | {"HEADWAY_SOURCES": json.dumps({"default": "postgresql://db/shop", "payroll": source})}


@pytest.mark.parametrize(
    ("tenants", "shop", "bank"),
    [
        (None, ["default", "payroll"], ["default", "payroll"]),
        ([], ["default"], ["default"]),
        ([str(SHOP)], ["default", "payroll"], ["default"]),
        ([str(SHOP).upper(), str(BANK), str(BANK)], ["default", "payroll"], ["default", "payroll"]),
    ],
)
def test_a_source_is_granted_to_all_tenants_or_to_those_it_names(
    tenants: list[str] | None, shop: list[str], bank: list[str]
) -> None:
    settings = load(granting(tenants))
    assert (list(settings.sources_of(SHOP)), list(settings.sources_of(BANK))) == (shop, bank)


@pytest.mark.parametrize("tenants", ["acme", ["acme"], str(SHOP), [str(SHOP), ""], [1], [None], {str(SHOP): 1}, True])
def test_tenants_that_are_no_ids_are_refused_with_a_sentence(tenants: Any) -> None:
    with pytest.raises(InvalidSettings, match=r"HEADWAY_SOURCES: .*tenants must be a list of tenants' ids") as caught:
        load(granting(tenants))
    assert "hunter2" not in str(caught.value)


def test_another_database_of_the_same_server_is_a_source() -> None:
    for source in ("postgresql://db:5432/shop", "postgresql://db:5433/headway", "sqlite+aiosqlite:///headway"):
        assert isinstance(load(LEAST | {"HEADWAY_SOURCES": f'{{"default": "{source}"}}'}), Settings)


def test_the_loopback_has_several_names() -> None:
    own = LEAST | {"HEADWAY_DATABASE_URL": "postgresql://localhost/headway"}
    for host in ("127.0.0.1", "localhost:5432", "[::1]"):
        with pytest.raises(InvalidSettings, match="HEADWAY_SOURCES"):
            load(own | {"HEADWAY_SOURCES": f'{{"default": "postgresql://{host}/headway"}}'})


def test_credentials_belong_to_an_origin_and_are_not_shown() -> None:
    def given(value: str) -> dict[str, str]:
        return LEAST | {"HEADWAY_FETCH_CREDENTIALS": value}

    settings = load(given('{"https://api.example": {"Authorization": "Bearer hunter2", "X-Api-Key": "hunter2"}}'))
    assert settings.credentials["https://api.example"]["Authorization"] == "Bearer hunter2"
    assert "hunter2" not in repr(settings)
    assert load(given("")).credentials == {}
    for wrong in (
        '{"api.example": {"X-Api-Key": "hunter2"}}',
        '{"https://api.example/": {"X-Api-Key": "hunter2"}}',
        '{"https://API.example": {"X-Api-Key": "hunter2"}}',
        '{"https://api.example": {"X-Api-Key": "hunter2\\n"}}',
        '{"https://api.example": {"Host": "hunter2"}}',
        '{"https://api.example": {"": "hunter2"}}',
        '{"https://api.example": "hunter2"}',
        '{"https://api.example": {"X-Api-Key": "hunter2"}',
    ):
        with pytest.raises(InvalidSettings, match="HEADWAY_FETCH_CREDENTIALS") as error:
            load(given(wrong))
        assert "hunter2" not in str(error.value)
