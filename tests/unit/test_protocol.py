"""The frames that the web service makes by itself are those of RFC 6455, as another implementation reads them."""

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.uri import parse_uri

from services.web.protocol import frame


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 1_000_000])
@pytest.mark.parametrize("character", ["a", "ü", "😀"])
def test_a_frame_is_read_as_what_was_said(size: int, character: str) -> None:
    text = (character * size)[: size // len(character.encode())].ljust(size - size % len(character.encode()), "-")
    client = ClientProtocol(parse_uri("ws://localhost/"), max_size=None)
    client.state = OPEN
    client.reader.feed_data(frame(text))
    client.parser = client.parse()
    next(client.parser)
    assert client.events_received() == [Frame(Opcode.TEXT, text.encode())]
