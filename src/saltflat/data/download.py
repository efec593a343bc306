"""A published file on this disk, whole and with the checksum it was published with, or no file at all.

Bytes arrive in FILE.part, and FILE appears by renaming once their MD5 is right, so whoever finds FILE finds all of it.
A transfer that broke off goes on from the last byte, with a range request (RFC 9110, section 14). An answer that begins
at byte 0 instead may be the file from the beginning, or no file at all but a page that asks to log in: it arrives in
FILE.part.new, and takes the place of FILE.part only when it is known to hold all of its bytes. MD5 shows accidents, not
malice; the readers of these files run no code.
"""

import hashlib
import os
import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

Progress = Callable[[int, int | None], None]

PIECE = 2**18  # bytes asked of the connection, or of a file, at once


@dataclass(frozen=True)
class Source:
    """A file that somebody publishes; checked when made.

    Attributes:
        name: of the data set and its part, for people.
        url: http or https.
        file: the name it is kept under, which the readers know.
        md5: of the whole file, 32 lowercase hexadecimal digits.
    """

    name: str
    url: str
    file: str
    md5: str

    def __post_init__(self) -> None:
        if not _on_the_web(self.url):
            raise ValueError(f"url: expected an http or https address, got {self.url!r}")
        if self.file in ("", "..") or Path(self.file).name != self.file:
            raise ValueError(f"file: expected a name without a folder, got {self.file!r}")
        if not re.fullmatch("[0-9a-f]{32}", self.md5):
            raise ValueError(f"md5: expected 32 lowercase hexadecimal digits, got {self.md5!r}")


def _on_the_web(url: str) -> bool:
    return urlsplit(url).scheme in ("http", "https")


def _published(name: str, address: str, file: str, md5: str) -> Source:
    return Source(name, f"{address}/{file}", file, md5)


_CIFAR = "https://www.cs.toronto.edu/~kriz"
_SVHN = "http://ufldl.stanford.edu/housenumbers"

SOURCES: dict[str, tuple[Source, ...]] = {
    "cifar10": (_published("CIFAR-10", _CIFAR, "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),),
    "cifar100": (_published("CIFAR-100", _CIFAR, "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),),
    "svhn": (
        _published("SVHN train", _SVHN, "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
        _published("SVHN test", _SVHN, "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    ),
    "svhn-extra": (_published("SVHN extra", _SVHN, "extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7"),),
}


def fetch(
    source: Source,
    folder: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    timeout: float = 30.0,
) -> Path:
    """The path of `source.file` in `folder`, after downloading what of it is not there yet.

    Args:
        source: one of `SOURCES`, or any other.
        folder: made if it does not exist. A file in it that has the checksum is returned without a connection; one that
            has another checksum is never overwritten.
        progress: called with the bytes that are there and their final number, or None where the server does not tell
            it: once before the first piece, and after every piece. What it raises ends the transfer.
        timeout: seconds without a byte, after which the connection counts as broken.

    Connections go through the proxies that the environment names, as urllib's always do. Whatever ends a transfer (an
    exception from `progress` and KeyboardInterrupt included), the bytes that arrived stay in `source.file`.part, and
    calling again asks for the rest. A server that sends no parts of files is listened to from the beginning, and what
    was there stays until all of the file is, or the same bytes and more.

    Raises, in one line: ConnectionError for a server that is not reached, that has no such file, or that redirects to
    anything but http and https (what to do by hand is said), and for a transfer that broke off (how much is there is
    said); ValueError for a checksum that is wrong, of what arrived (its bytes are removed, and what they were appended
    to) or of a file that was there (it is left alone); BlockingIOError while another call downloads the same file into
    the same folder (where the system has no locks, nobody is kept out). What `progress` raises, and OSErrors of the
    disk, come as they are.

    >>> import tempfile
    >>> greeting = Source("greeting", "https://example.org/hello", "hello.txt", "5d41402abc4b2a76b9719d911017c592")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "hello.txt").write_text("hello")
    ...     fetch(greeting, folder).name
    'hello.txt'
    """
    file = Path(folder) / source.file
    if _is_there(file, source):
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file):
        if not _is_there(file, source):  # nor did another call just finish
            _download(file, source, progress, timeout)
    return file


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """A block that one call at a time is in for `file`: BlockingIOError, in one line, for every other."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    path = file.with_name(f"{file.name}.part.lock")
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = os.path.samefile(path, lock.fileno())  # else it was that of somebody who has just left
        except (BlockingIOError, FileNotFoundError):
            alone = False
        except OSError:  # no such locks on this disk
            alone = True
        if not alone:
            raise BlockingIOError(f"{file}: another call is downloading it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock goes, or it would be the next one's


def _download(file: Path, source: Source, progress: Progress | None, timeout: float) -> None:
    part, anew = (file.with_name(f"{file.name}.{ending}") for ending in ("part", "part.new"))
    _keep_what_goes_on(part, anew)  # of a call that was killed
    whole = part
    if answer := _asked(part, source, timeout):
        response, first, total = answer
        whole = part if first == _size(part) else anew
        try:
            with response, whole.open("ab") as content:
                _receive(response, content, first, total, progress)
        except BaseException as error:
            _keep_what_goes_on(part, anew)
            if not isinstance(error, _BrokenOffError):
                raise
            there = _size(part)
            number = f"{there} bytes" if total is None or total < there else f"{there} of {total} bytes"
            raise ConnectionError(
                f"{source.url}: the transfer broke off ({error}); {number} are in {part}, and calling again goes on"
            ) from error
    found = _md5(whole)
    if found != source.md5:
        whole.unlink()
        kept = f", the {_size(part)} bytes in {part} are kept" if whole == anew else ""
        raise ValueError(
            f"{file.name}: expected MD5 {source.md5}, got {found} from {source.url}; what was downloaded is removed"
            f"{kept}"
        )
    whole.replace(part)
    _is_there(file, source)  # refuses a file that somebody placed there meanwhile, unless it is the same
    part.replace(file)


def _is_there(file: Path, source: Source) -> bool:
    """Whether the file is; an error if another one is, under its name."""
    if not file.exists():
        return False
    found = _md5(file)
    if found != source.md5:
        raise ValueError(
            f"{file}: expected MD5 {source.md5}, got {found}; it is left alone, move it away to download {source.name}"
        )
    return True


def _md5(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _keep_what_goes_on(part: Path, anew: Path) -> None:
    """`anew` becomes the part if it begins with all of its bytes, and is removed if not."""
    if anew.exists():
        if not part.exists() or _begins_with(anew, part):
            anew.replace(part)
        else:
            anew.unlink()


def _begins_with(file: Path, beginning: Path) -> bool:
    with file.open("rb") as longer, beginning.open("rb") as shorter:
        return all(longer.read(len(piece)) == piece for piece in iter(lambda: shorter.read(PIECE), b""))


Answer = tuple[HTTPResponse, int, int | None]  # from which byte on, and the size of the whole file as far as it is told


def _asked(part: Path, source: Source, timeout: float) -> Answer | None:
    """The answer to a request for what the part lacks, or None if that is nothing."""
    have = _size(part)
    try:
        return _answer(source.url, have, timeout)
    except (OSError, HTTPException, ValueError) as error:  # the last for a redirect to what is no address
        if isinstance(error, HTTPError):
            error.close()
            if error.code == 416 and have > 0:
                return None  # nothing lies behind these bytes: they are all, and their checksum has the word
        raise ConnectionError(
            f"{source.url}: cannot be downloaded ({_reason(error)}); try again later, or place {source.file} "
            f"in {part.parent} by hand"
        ) from error


class _BrokenOffError(Exception):
    """The connection ended before the file did."""


def _receive(
    response: HTTPResponse, content: IO[bytes], have: int, total: int | None, progress: Progress | None
) -> None:
    if progress is not None:
        progress(have, total)
    for piece in _pieces(response):
        content.write(piece)
        have += len(piece)
        if progress is not None:
            progress(have, total)
    if total is not None and have < total:
        raise _BrokenOffError("closed too early")


def _answer(url: str, have: int, timeout: float) -> Answer:
    """To a request for all bytes from number `have` on, which it may not begin with."""
    opener = urllib.request.build_opener(_WebRedirects)
    response: HTTPResponse
    if have > 0:
        response = opener.open(urllib.request.Request(url, headers={"Range": f"bytes={have}-"}), timeout=timeout)
        if response.status != 206:
            return response, 0, response.length
        sent = re.fullmatch(rf"bytes {have}-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if sent:
            return response, have, int(sent[1])
        response.close()  # not what was asked for, or not said to be
    response = opener.open(url, timeout=timeout)
    return response, 0, response.length


def _pieces(response: HTTPResponse) -> Iterator[bytes]:
    """The body as it arrives; errors of the connection, and no others, become _BrokenOffErrors."""
    try:
        while piece := response.read1(PIECE):
            yield piece
    except (OSError, HTTPException) as error:
        raise _BrokenOffError(_reason(error)) from error


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """urllib refuses to be redirected to files, but would follow to ftp."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if not _on_the_web(newurl):
            raise HTTPError(req.full_url, code, f"{msg} - Redirection to url '{newurl}' is not allowed", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    return " ".join(str(error).split()) or type(error).__name__
