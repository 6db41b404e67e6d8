"""How far an import has come: kept in the transaction that writes the rows."""

from datetime import UTC, datetime
from typing import Literal, Self
from uuid import UUID

from pydantic import BaseModel, Field, ValidationError

from services.worker.kinds.csv_types import ColumnType

# A position is for the rules that it was written by: count up when rows are read, typed or rejected differently.
VERSION = 2


class Position(BaseModel):
    """The first `rows` rows are in the table; the next begins at byte `offset` of the file, after `lines` lines.

    `types` are those of the values so far. `rejected` says of each row that was left out so far at which byte and on
    which line it begins; in a second pass, of those of the whole file. All fields are numbers and words of our own:
    their JSON has nothing that a literal of SQL would have to escape.
    """

    kind: Literal["csv.import"] = "csv.import"
    version: int = VERSION
    job: UUID
    # Chosen anew by whoever takes the import over, so that the one before notices.
    writer: UUID
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    offset: int
    lines: int
    rows: int
    passes: int
    types: list[ColumnType]
    rejected: list[tuple[int, int]]
    seconds: float

    @classmethod
    def of(cls, text: str | None) -> Self | None:
        """The position in what was kept, such as a table's comment, if it is one."""
        try:
            return cls.model_validate_json(text or "")
        except ValidationError:
            return None
