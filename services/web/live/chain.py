"""The envelopes of a job in one subscription: each names the one before it, so that none is lost unseen."""

from services.web.live.lines import News
from services.web.live.writer import Writer


class Chain:
    """What was put in line of a job, and what has left.

    Of progress that waits only the newest is kept: `prev` tells a client that what is missing was passed over.
    """

    __slots__ = ("_pending", "_prompt", "epoch", "sent", "seq")

    def __init__(self, held: int | None = None, epoch: int | None = None) -> None:
        self.epoch = epoch
        # The newest event that was put in line, and the newest that has left.
        self.seq = held
        self.sent = held
        self._pending: Envelope | None = None
        # Whether progress that comes next is sent at once: the first, and the first after a change of state.
        self._prompt = True

    def put(self, writer: Writer, news: News, more: str = "", mark: str | None = None) -> None:
        """Put news in line. `more` are further fields of the envelope, `mark` is the id by which to resume after it."""
        self.seq = news.seq
        if news.type == "progress":
            if self._pending is not None:
                self._pending.news = news
                return
            self._pending = Envelope(self, news, more, None)
            writer.put(self._pending, urgent=self._prompt)
            self._prompt = False
            return
        self._pending = None
        self._prompt = news.type != "log"
        writer.put(Envelope(self, news, more, mark), urgent=news.type != "log")

    def follow(self, envelope: "Envelope") -> int | None:
        """An envelope leaves: the seq of the one before it. Progress that comes now needs a new one."""
        if self._pending is envelope:
            self._pending = None
        prev = None if envelope.type == "snapshot" else self.sent
        self.sent = envelope.news.seq
        return prev


class Envelope:
    """News of a job as the next link of a chain."""

    __slots__ = ("_chain", "_mark", "_more", "news")

    def __init__(self, chain: Chain, news: News, more: str, mark: str | None) -> None:
        self._chain = chain
        self._more = more
        self.news = news
        self._mark = mark

    @property
    def mark(self) -> str | None:
        """By epoch and seq a single job is resumed, by a cursor a set."""
        return self._mark if self._more else f"{self.news.epoch}-{self.news.seq}"

    @property
    def type(self) -> str:
        return self.news.type

    @property
    def durable(self) -> bool:
        return self.news.type != "progress"

    @property
    def size(self) -> int:
        return len(self.news.data) + len(self._more) + 150

    def text(self) -> str:
        text = self.news.text(self._chain.follow(self))
        return f"{text[:-1]}{self._more}}}" if self._more else text
