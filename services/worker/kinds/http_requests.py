"""The requests of a job: one for each URL of its input, or for each row of its file."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from pydantic_core import to_json

from headway import Fatal, JobContext
from headway.fetching.failures import FetchError
from headway.fetching.requests import LONGEST_URL, Request, unsendable
from services.worker.kinds.http_rows import Row, Rows
from services.worker.kinds.http_templates import JsonTemplate, Template, url_template

if TYPE_CHECKING:
    from services.worker.kinds.http_fetch import FetchInput

# Of the body of a request, once it is filled with a row's values.
LONGEST_DATA = 1 << 20


class Requests:
    """`total` of them, each made when its turn comes."""

    def __init__(self, input: "FetchInput", total: int, rows: Rows | None = None) -> None:
        self.total = total
        self._input = input
        self._rows = rows
        self._headers, self._sent = input.sent_headers, input.sent
        self._url = url_template(input.url)
        self._filled_headers = {name: Template(value) for name, value in self._headers.items()}
        self._data = Template(input.data) if input.data is not None else None
        self._json = JsonTemplate(input.payload) if input.payload is not None else None

    @classmethod
    async def open(cls, job: JobContext, input: "FetchInput") -> "Requests":
        """Reads the file once, to count its rows. Raises Fatal if it cannot be what the input says."""
        if input.file is None:
            return cls(input, len(input.urls))
        rows = await Rows.open(await job.open_file(input.file), input.format)
        requests = cls(input, 0, rows)
        requests._require(rows.columns)
        requests.total = await rows.count()
        return requests

    async def read(self) -> AsyncGenerator[tuple[Request, FetchError | None]]:
        """Each request, in order; with one that cannot be made comes the reason."""
        if self._rows is None:
            for index, url in enumerate(self._input.urls):
                yield Request(index, url, self._input.method, self._headers, self._sent), None
            return
        index = 0
        async with aclosing(self._rows.read()) as rows:
            async for row in rows:
                try:
                    yield self._request(index, row), None
                except FetchError as error:
                    yield Request(index, ""), error
                index += 1

    def _request(self, index: int, row: Row | str) -> Request:
        if isinstance(row, str):
            raise FetchError("bad-row", row)
        try:
            url = self._url.fill(row)
            headers = {name: template.fill(row) for name, template in self._filled_headers.items()} or None
            sent = self._body(row)
        except KeyError as error:
            raise FetchError("bad-row", f"The row has no {error.args[0]!r}.") from None
        for name, value in headers.items() if headers else ():
            if why := unsendable(name, value):
                raise FetchError("bad-row", f"With the row's values, {why}.")
        if len(url) > LONGEST_URL:
            raise FetchError("bad-row", f"The URL is over {LONGEST_URL:,} characters.")
        if sent is not None and len(sent) > LONGEST_DATA:
            raise FetchError("bad-row", f"The body is over {LONGEST_DATA:,} bytes.")
        return Request(index, url, self._input.method, headers, sent)

    def _body(self, row: Row) -> bytes | None:
        if self._json is not None:
            return to_json(self._json.fill(row))
        return None if self._data is None else self._data.fill(row).encode()

    def _require(self, columns: list[str] | None) -> None:
        """Raises Fatal, naming the columns that there are, if a template needs another."""
        needed = [*self._url.names]
        for template in (*self._filled_headers.values(), self._data, self._json):
            needed += template.names if template else []
        missing = [name for name in needed if columns is not None and name not in columns]
        if missing:
            there = ", ".join(name[:100] for name in (columns or [])[:50])
            raise Fatal(f"The file has no column {missing[0]!r}; there are: {there}. Write another name in the input.")
