"""A zip that is written as it is made, from front to back."""

import io
import zipfile


class Archive:
    """Each call answers with the bytes that follow. The same files in the same order make the same zip."""

    def __init__(self) -> None:
        self._sink = _Sink()
        self._zip = zipfile.ZipFile(self._sink, "w")

    def add(self, name: str, data: bytes) -> bytes:
        """A file, stored as it is: images are packed already."""
        self._zip.writestr(zipfile.ZipInfo(name), data)
        return self._sink.take()

    def end(self) -> bytes:
        """The directory, which makes the zip complete."""
        self._zip.close()
        return self._sink.take()


class _Sink(io.BytesIO):
    """The end of a file, of which the rest was taken; zipfile goes back no further than to the file it adds."""

    _taken = 0

    def tell(self) -> int:
        return self._taken + super().tell()

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        return self._taken + super().seek(place - self._taken)

    def take(self) -> bytes:
        data = self.getvalue()
        self._taken += len(data)
        super().seek(0)
        self.truncate()
        return data
