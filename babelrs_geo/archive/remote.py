"""Files on HTTP servers that are no rasters, and what a server says of those that are: in few requests, with retries,
and without what is secret in any message.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from typing import Any, BinaryIO, cast
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from babelrs_geo.archive.addresses import bare
from babelrs_geo.errors import SceneError

_TRIES, _PAUSE, _SECONDS = 5, 1.0, 60.0  # as rasters are read: again four times, and no longer than a minute
_BUFFER = 1 << 16
_PASSING = (408, 425, 429, 500, 502, 503, 504)


def web_address(path: str) -> str | None:
    """The address on a web server that a path means, None for any other path."""
    text = path.removeprefix("/vsicurl/")
    return text if text.lower().startswith(("http://", "https://")) else None


def beside(address: str, name: str) -> str:
    """The address of a file below another, with the same query."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def read(address: str) -> bytes:
    """A small file as a whole. Raises SceneError."""
    with _asked(address) as answer:
        return answer.read()


def state_of(address: str) -> dict[str, Any]:
    """Size in bytes, and what changes with the file (`stamp`: its ETag, else its time), as far as the server tells: one
    request for one byte. Empty where it does not.
    """
    told: dict[str, Any] = {}
    if urlsplit(address).path.rstrip("/").upper().endswith(".SAFE"):
        address = beside(address, "manifest.safe")
    with suppress(SceneError, ValueError), _asked(address, "bytes=0-0", tries=1) as answer:
        whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
        size = whole or (answer.headers.get("Content-Length") if answer.status == 200 else None)
        stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        told = {"size": int(size) if size else None, "stamp": stamp}
    return {name: value for name, value in told.items() if value is not None}


def seekable(address: str) -> BinaryIO:
    """A file that is read by ranges, 64 KiB at least. Raises SceneError where there is none or it has no ranges."""
    return cast(BinaryIO, io.BufferedReader(_Ranges(address), _BUFFER))


class _Ranges(io.RawIOBase):
    """The bytes behind an address."""

    def __init__(self, address: str) -> None:
        self._address, self._at = address, 0
        with _asked(address, "bytes=0-0") as answer:
            if answer.status != 206:
                raise SceneError(
                    f"{bare(address)} cannot be read in parts: its server knows no ranges; fetch it"
                )
            self._size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        with _asked(self._address, f"bytes={self._at}-{self._at + wanted - 1}") as answer:
            data = answer.read()
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def _asked(address: str, span: str = "", tries: int = _TRIES) -> Iterator[HTTPResponse]:
    """An answer to a request; SceneError, which names no secret, where there is none in the end."""
    for left in reversed(range(tries)):
        try:
            answer = urlopen(_request(address, span), timeout=_SECONDS)
            break
        except HTTPError as error:
            error.close()
            reason, passing = f"HTTP {error.code}", error.code in _PASSING
        except (OSError, HTTPException, ValueError) as error:
            reason, passing = (
                type(getattr(error, "reason", error)).__name__,
                not isinstance(error, ValueError),
            )
        if not (passing and left):
            raise SceneError(f"{bare(address)} cannot be fetched ({reason}); check address and access")
        time.sleep(_PAUSE * (tries - left))
    with answer:
        yield answer


def _request(address: str, span: str) -> Request:
    """User and password, if the address has some, belong into a header, which is not sent on to other hosts."""
    parts = urlsplit(address)
    request = Request(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
    if span:
        request.add_header("Range", span)
    return request
