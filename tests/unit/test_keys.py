"""API keys: their form, their checksum, and what is kept of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway import keys


def test_a_key_is_read_as_it_was_written() -> None:
    key = keys.new()
    assert keys.parse(key.text) == key
    assert key.text.startswith(f"hw_live_{key.id}_{key.secret}_")
    assert len({keys.new().text for _ in range(100)}) == 100


@given(st.data())
def test_a_mistyped_key_is_none(data: st.DataObject) -> None:
    text = keys.new().text
    place = data.draw(st.integers(0, len(text) - 1))
    typed = data.draw(st.characters().filter(lambda character: character != text[place]))
    assert keys.parse(text[:place] + typed + text[place + 1 :]) is None


WELL_FORMED = keys.ApiKey("a" * 16, "b" * 40).text


@pytest.mark.parametrize("text", ["", "hw_live___", "x" * 10_000, "hw_live_a_b_00000000", f" {WELL_FORMED}"])
def test_what_is_no_key_is_none(text: str) -> None:
    assert keys.parse(text) is None


@given(st.text())
def test_any_text_can_be_asked_about(text: str) -> None:
    assert keys.parse(text) is None


def test_the_digest_depends_on_id_secret_and_pepper_and_tells_none_of_them() -> None:
    key, other = keys.new(), keys.new()
    digest = key.digest("pepper")
    assert len(digest) == 32
    assert digest == keys.ApiKey(key.id, key.secret).digest("pepper")
    assert len({digest, key.digest("other"), keys.ApiKey(other.id, key.secret).digest("pepper")}) == 3
    assert key.secret.encode() not in digest
