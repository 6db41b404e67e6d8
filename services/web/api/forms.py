"""multipart/form-data with one file, read as it arrives."""

from collections.abc import AsyncIterator

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from headway.errors import BadRequest, InvalidRequest

ONE_FILE = "The form must have one field, which is a file; `name` and `expires` go into the query."


class FormFile:
    """The file of a form: `name` and `content_type` as the form has them, and its bytes once."""

    def __init__(self, header: MultipartSegment, events: AsyncIterator[MultipartSegment | bytes | None]) -> None:
        self.name = header.filename or "file"
        self.content_type = header.content_type or ""
        self._events = events

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises BadRequest if the form is broken or ends too early, InvalidRequest if it has more than the file."""
        async for event in self._events:
            if event:
                yield bytes(event)


async def open_form(content_type: str, chunks: AsyncIterator[bytes]) -> FormFile:
    """The file of the form that the chunks are. Raises BadRequest, or InvalidRequest if it has none."""
    try:
        boundary = parse_options_header(content_type)[1].get("boundary", "")
        parser = PushMultipartParser(boundary, max_segment_count=1, strict=True)
    except MultipartError as error:
        raise BadRequest(f"The Content-Type of the form cannot be used: {error}.") from None
    events = _events(parser, chunks)
    first = await anext(events, None)
    if not isinstance(first, MultipartSegment) or first.filename is None:
        raise InvalidRequest(ONE_FILE)
    return FormFile(first, events)


async def _events(
    parser: PushMultipartParser, chunks: AsyncIterator[bytes]
) -> AsyncIterator[MultipartSegment | bytes | None]:
    """The field, its bytes, and None at its end, which is the end of the form, since there is no other field."""
    ended = False
    try:
        async for chunk in chunks:
            if not ended:
                for event in parser.parse(chunk):
                    ended = event is None
                    yield event
            elif chunk.strip():
                raise BadRequest("There is more after the end of the form.")
        parser.close()
    except MultipartError as error:
        if ended:
            raise InvalidRequest(ONE_FILE) from None
        raise BadRequest(f"The body is not multipart/form-data: {error}.") from None
