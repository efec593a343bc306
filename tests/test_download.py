"""Downloads against a server on this machine that does what real ones do, and what they should not."""

import errno
import gc
import hashlib
import http.server
import itertools
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from saltflat.data import cifar
from saltflat.data.download import SOURCES, Progress, Source, fetch

CONTENT = bytes(range(256)) * 4000  # 1 MB: several pieces
LOGIN = b"<html>log in first</html>"  # what a network says instead of what was asked for
PATIENCE = 10.0  # seconds; nothing here takes long, but where something is wrong


@dataclass
class Server:
    """What the server does, and, in `asked`, what was asked of it: path and Range of each request."""

    content: bytes = CONTENT
    ranges: bool = True  # answers a Range with 206
    content_range: str | None = None  # said instead of the true one
    tells_length: bool = True
    at_once: int | None = None  # bytes sent as an answer, which is said to be longer
    ending: str = "close"  # or "reset", once the client has all these bytes, or "silence" until it has given up
    waits: bool = False  # answers a second request only when the client has hung up on the first
    received: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)
    hung_up: threading.Event = field(default_factory=threading.Event)
    redirect: str | None = None  # where /moved leads
    status: int = 200
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    address: str = ""


def handler_of(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            server.asked.append((self.path, wanted))
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", server.redirect or f"{server.address}/file.bin")
                self.end_headers()
            elif server.status != 200:
                self.send_error(server.status)
            else:
                self.send_content(int(wanted[len("bytes=") : -1]) if wanted and server.ranges else None)

        def send_content(self, first: int | None) -> None:
            size = len(server.content)
            if first is not None and first >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.end_headers()
                return
            if server.waits and first is None and not server.hung_up.wait(PATIENCE):
                self.send_error(503)
                return
            body = server.content[first or 0 :]
            if first is None:
                self.send_response(200)
            else:
                self.send_response(206)
                true = f"bytes {first}-{size - 1}/{size}"
                self.send_header("Content-Range", true if server.content_range is None else server.content_range)
            if server.tells_length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if server.waits and first is not None:
                self.send_until_hung_up(body)
                return
            self.wfile.write(body if server.at_once is None else body[: server.at_once])
            if server.ending == "reset":
                self.wfile.flush()
                server.received.wait(PATIENCE)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            elif server.ending == "silence":
                server.given_up.wait(PATIENCE)

        def send_until_hung_up(self, body: bytes) -> None:
            self.connection.settimeout(PATIENCE)
            try:
                self.wfile.write(body)
                self.rfile.read(1)
            except TimeoutError:
                return
            except OSError:  # a reset: not everything was read
                pass
            server.hung_up.set()

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(server))
    listening.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # clients that hang up are meant to
    server.address = f"http://127.0.0.1:{listening.server_address[1]}"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    for event in (server.received, server.given_up, server.hung_up):
        event.set()
    listening.shutdown()
    listening.server_close()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def source_of(server: Server, path: str = "/file.bin", content: bytes = CONTENT) -> Source:
    return Source("test data", server.address + path, "file.bin", hashlib.md5(content).hexdigest())


def receiver(server: Server) -> Progress:
    """Tells the server when all that it sends at once is here."""

    def told(there: int, total: int | None) -> None:
        if there == server.at_once:
            server.received.set()

    return told


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def message(caught: pytest.ExceptionInfo[Exception]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- whole files ---


@pytest.mark.parametrize("tells_length", [True, False])
def test_a_file_comes_whole_and_leaves_nothing_beside_it(server: Server, tmp_path: Path, tells_length: bool) -> None:
    server.tells_length = tells_length
    seen: list[tuple[int, int | None]] = []
    path = fetch(source_of(server), tmp_path / "new" / "folder", progress=lambda *numbers: seen.append(numbers))
    assert path == tmp_path / "new" / "folder" / "file.bin"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.bin"]
    assert server.asked == [("/file.bin", None)]
    there, totals = zip(*seen, strict=True)
    assert set(totals) == {len(CONTENT) if tells_length else None}
    assert (there[0], there[-1]) == (0, len(CONTENT))
    assert all(before < after for before, after in itertools.pairwise(there))


def test_a_file_that_is_there_is_taken_without_a_connection(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert fetch(source_of(server), str(tmp_path)) == tmp_path / "file.bin"
    assert server.asked == []


def test_an_empty_file_is_a_file(server: Server, tmp_path: Path) -> None:
    server.content = b""
    assert fetch(source_of(server, content=b""), tmp_path).read_bytes() == b""


def test_another_file_under_its_name_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"mine")
    source = source_of(server)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "file.bin"))) as caught:
        fetch(source, tmp_path)
    assert source.md5 in message(caught)
    assert hashlib.md5(b"mine").hexdigest() in message(caught)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"
    assert server.asked == []


@pytest.mark.parametrize("have", [0, 10, 2_000_000])
def test_another_file_that_is_placed_during_the_transfer_is_left_alone(
    server: Server, tmp_path: Path, have: int
) -> None:
    def place(there: int, total: int | None) -> None:
        (tmp_path / "file.bin").write_bytes(b"mine")

    (tmp_path / "file.bin.part").write_bytes(b"x" * have)
    server.ranges = False
    with pytest.raises(ValueError, match="left alone"):
        fetch(source_of(server), tmp_path, progress=place)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT
    assert names(tmp_path) == ["file.bin", "file.bin.part"]


def test_wrong_bytes_are_removed_and_both_checksums_named(server: Server, tmp_path: Path) -> None:
    source = source_of(server)
    server.content = CONTENT[:5] + b"!" + CONTENT[6:]
    with pytest.raises(ValueError, match=r"^file\.bin: expected MD5 ") as caught:
        fetch(source, tmp_path)
    assert source.md5 in message(caught)
    assert hashlib.md5(server.content).hexdigest() in message(caught)
    assert message(caught).endswith("; what was downloaded is removed")
    assert names(tmp_path) == []


# --- transfers that broke off ---


@pytest.mark.parametrize("ending", ["close", "reset", "silence"])
def test_a_transfer_that_broke_off_says_how_much_is_there_and_goes_on(
    server: Server, tmp_path: Path, ending: str
) -> None:
    server.at_once, server.ending = 300_000, ending
    timeout = 1.0 if ending == "silence" else PATIENCE
    with pytest.raises(ConnectionError, match=re.escape(f"{server.address}/file.bin: ")) as caught:
        fetch(source_of(server), tmp_path, progress=receiver(server), timeout=timeout)
    server.given_up.set()
    assert {"close": "closed too early", "reset": "reset by peer", "silence": "timed out"}[ending] in message(caught)
    assert f"300000 of {len(CONTENT)} bytes are in {tmp_path / 'file.bin.part'}" in message(caught)
    assert "calling again goes on" in message(caught)
    assert names(tmp_path) == ["file.bin.part"]
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:300_000]

    server.at_once, server.ending = None, "close"
    seen: list[tuple[int, int | None]] = []
    path = fetch(source_of(server), tmp_path, progress=lambda *numbers: seen.append(numbers))
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["file.bin"]
    assert server.asked == [("/file.bin", None), ("/file.bin", "bytes=300000-")]
    assert (seen[0], seen[-1]) == ((300_000, len(CONTENT)), (len(CONTENT), len(CONTENT)))


def test_a_transfer_of_unknown_length_that_is_reset_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.at_once, server.ending, server.tells_length = 300_000, "reset", False
    with pytest.raises(ConnectionError, match=r"; 300000 bytes are in .*file\.bin\.part"):
        fetch(source_of(server), tmp_path, progress=receiver(server))
    server.at_once, server.ending = None, "close"
    assert fetch(source_of(server), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ("/file.bin", "bytes=300000-")


def test_a_transfer_may_break_off_any_number_of_times(server: Server, tmp_path: Path) -> None:
    server.at_once = 400_000
    for there in (400_000, 800_000):
        with pytest.raises(ConnectionError, match=f"{there} of {len(CONTENT)} bytes"):
            fetch(source_of(server), tmp_path)
        assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:there]
    assert fetch(source_of(server), tmp_path).read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=400000-", "bytes=800000-"]


def test_a_range_that_ends_before_the_file_does_is_not_taken_for_the_rest(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:10])
    server.content, whole = CONTENT[:500], len(CONTENT)
    server.content_range = f"bytes 10-499/{whole}"
    with pytest.raises(ConnectionError, match=f"500 of {whole} bytes are in "):
        fetch(source_of(server), tmp_path)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:500]


def test_a_server_without_ranges_is_listened_to_from_the_beginning(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"x" * 2_000_000)  # longer than the file, and wrong
    server.ranges = False
    seen: list[tuple[int, int | None]] = []
    path = fetch(source_of(server), tmp_path, progress=lambda *numbers: seen.append(numbers))
    assert path.read_bytes() == CONTENT
    assert server.asked == [("/file.bin", "bytes=2000000-")]
    assert seen[0] == (0, len(CONTENT))
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("tells_length", [True, False])
@pytest.mark.parametrize("content_range", [None, "bytes 0-24/25"])
def test_a_wrong_answer_to_a_range_costs_no_byte_of_the_part(
    server: Server, tmp_path: Path, content_range: str | None, tells_length: bool
) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:20])
    server.content, server.tells_length = LOGIN, tells_length
    server.ranges, server.content_range = content_range is not None, content_range
    with pytest.raises(ValueError, match=r"^file\.bin: expected MD5 ") as caught:
        fetch(source_of(server), tmp_path)
    assert hashlib.md5(LOGIN).hexdigest() in message(caught)
    kept = f"the 20 bytes in {tmp_path / 'file.bin.part'} are kept"
    assert message(caught).endswith(f"from {server.address}/file.bin; what was downloaded is removed, {kept}")
    assert names(tmp_path) == ["file.bin.part"]
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:20]

    server.content, server.ranges, server.content_range = CONTENT, True, None
    assert fetch(source_of(server), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ("/file.bin", "bytes=20-")


@pytest.mark.parametrize(
    ("content", "before", "kept"),
    [
        (CONTENT, CONTENT[:20], CONTENT[:300_000]),  # the same bytes, and more
        (CONTENT, CONTENT[:800_000], CONTENT[:800_000]),
        (CONTENT[1:], CONTENT[:20], CONTENT[:20]),  # other bytes, however many
        (CONTENT[:299_000] + CONTENT, CONTENT[:299_500], CONTENT[:299_500]),
        (CONTENT[:400_000], CONTENT[:800_000], CONTENT[:800_000]),
    ],
    ids=["further", "less far", "other bytes at once", "other bytes late", "less than there is"],
)
@pytest.mark.parametrize("how", ["the server", "progress"])
def test_a_beginning_anew_that_broke_off_replaces_only_what_it_goes_on_from(
    server: Server, tmp_path: Path, content: bytes, before: bytes, kept: bytes, how: str
) -> None:
    def end(there: int, total: int | None) -> None:
        if how == "progress" and there == 300_000:
            raise RuntimeError

    (tmp_path / "file.bin.part").write_bytes(before)
    server.content, server.ranges, server.at_once = content, False, 300_000
    with pytest.raises((ConnectionError, RuntimeError)) as caught:
        fetch(source_of(server), tmp_path, progress=end)
    assert (tmp_path / "file.bin.part").read_bytes() == kept
    assert names(tmp_path) == ["file.bin.part"]
    if how == "the server":
        of = f" of {len(content)}" if len(content) >= len(kept) else ""
        assert f"; {len(kept)}{of} bytes are in {tmp_path / 'file.bin.part'}" in message(caught)


@pytest.mark.parametrize("before", [b"", CONTENT[:20]], ids=["alone", "beside a part"])
def test_what_a_killed_beginning_anew_left_is_gone_on_from(server: Server, tmp_path: Path, before: bytes) -> None:
    (tmp_path / "file.bin.part").write_bytes(before)
    (tmp_path / "file.bin.part.new").write_bytes(CONTENT[:500])
    assert fetch(source_of(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/file.bin", "bytes=500-")]
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("said", ["bytes 0-1023999/1024000", "bytes 9-1023999/1024000", "bytes */1024000", "", "10-"])
def test_a_range_that_was_not_asked_for_is_not_appended(server: Server, tmp_path: Path, said: str) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:10])
    server.content_range = said
    assert fetch(source_of(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/file.bin", "bytes=10-"), ("/file.bin", None)]
    assert names(tmp_path) == ["file.bin"]


def test_a_range_that_was_not_asked_for_is_hung_up_on_before_asking_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:10])
    server.content_range, server.waits = "bytes 9-1023999/1024000", True
    assert fetch(source_of(server), tmp_path).read_bytes() == CONTENT


def test_a_part_that_is_whole_needs_no_byte_more(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch(source_of(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/file.bin", f"bytes={len(CONTENT)}-")], "answered by 416"
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("part", [b"x" * len(CONTENT), CONTENT + b"x", b"x" * 100])
def test_a_part_that_is_no_beginning_of_the_file_is_removed(server: Server, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "file.bin.part").write_bytes(part)
    with pytest.raises(ValueError, match="expected MD5"):
        fetch(source_of(server), tmp_path)
    assert names(tmp_path) == []
    assert fetch(source_of(server), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, ConnectionError, BrokenPipeError])
def test_what_interrupts_keeps_the_part(server: Server, tmp_path: Path, kind: type[BaseException]) -> None:
    def interrupt(there: int, total: int | None) -> None:
        if there > 0:
            raise kind("mine")

    with pytest.raises(kind) as caught:
        fetch(source_of(server), tmp_path, progress=interrupt)
    assert caught.value.args == ("mine",)
    part = (tmp_path / "file.bin.part").read_bytes()
    assert 0 < len(part) < len(CONTENT)
    assert part == CONTENT[: len(part)]
    assert fetch(source_of(server), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == ("/file.bin", f"bytes={len(part)}-")


# --- no file ---


def test_offline_names_the_address_and_the_folder(server: Server, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.bin"
        with pytest.raises(ConnectionError, match=re.escape(url)) as caught:
            fetch(replace(source_of(server), url=url), tmp_path)
    assert "Connection refused" in message(caught)
    assert f"place file.bin in {tmp_path} by hand" in message(caught)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("status", "have"), [(404, 0), (404, 10), (503, 0), (503, 10), (416, 0)])
def test_an_error_of_the_server_is_named_and_keeps_the_part(
    server: Server, tmp_path: Path, status: int, have: int
) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:have])
    server.status = status
    with pytest.raises(
        ConnectionError, match=rf"/file\.bin: cannot be downloaded \(.*{status}.*\); .* by hand$"
    ) as caught:
        fetch(source_of(server), tmp_path)
    message(caught)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:have]


def test_a_server_that_is_no_web_server_is_a_connection_error(server: Server, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(PATIENCE)

        def talk() -> None:
            connection, _ = listening.accept()
            connection.settimeout(PATIENCE)
            with connection:
                connection.recv(10_000)
                connection.sendall(b"220 ready\r\n\r\n")

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/file.bin"
        with pytest.raises(ConnectionError, match="cannot be downloaded") as caught:
            fetch(replace(source_of(server), url=url), tmp_path)
        thread.join(PATIENCE)
        assert not thread.is_alive()
    message(caught)


def test_redirects_are_followed_and_carry_the_range(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:10])
    assert fetch(source_of(server, "/moved"), tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/moved", "bytes=10-"), ("/file.bin", "bytes=10-")]


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/file.bin", "data:,hello"])
def test_redirects_lead_nowhere_but_to_the_web(server: Server, tmp_path: Path, target: str) -> None:
    server.redirect = target
    with pytest.raises(ConnectionError, match=re.escape(f"{server.address}/moved: cannot be downloaded (")) as caught:
        fetch(source_of(server, "/moved"), tmp_path)
    assert f"Redirection to url '{target}' is not allowed" in message(caught)
    assert names(tmp_path) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # urllib forgets to close the answer
def test_a_redirect_to_what_is_no_address_is_a_connection_error(server: Server, tmp_path: Path) -> None:
    server.redirect = "http://[1"
    with pytest.raises(ConnectionError, match="cannot be downloaded"):
        fetch(source_of(server, "/moved"), tmp_path)
    gc.collect()


def test_a_circle_of_redirects_ends_in_one_line(server: Server, tmp_path: Path) -> None:
    server.redirect = f"{server.address}/moved"
    with pytest.raises(ConnectionError, match="cannot be downloaded") as caught:
        fetch(source_of(server, "/moved"), tmp_path)
    message(caught)


def test_the_proxy_of_the_environment_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.address)
    source = replace(source_of(server), url="http://data.invalid/file.bin")
    assert fetch(source, tmp_path).read_bytes() == CONTENT
    assert server.asked == [("http://data.invalid/file.bin", None)]


# --- two calls at once ---


def test_a_second_call_for_the_same_file_is_refused_and_disturbs_nothing(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    refused = []

    def again(there: int, total: int | None) -> None:
        with pytest.raises(BlockingIOError) as caught:
            fetch(source_of(server), tmp_path)
        refused.append(message(caught))

    assert fetch(source_of(server), tmp_path, progress=again).read_bytes() == CONTENT
    assert set(refused) == {f"{tmp_path / 'file.bin'}: another call is downloading it"}
    assert names(tmp_path) == ["file.bin"]
    assert len(server.asked) == 1


def test_two_files_may_come_into_a_folder_at_once(server: Server, tmp_path: Path) -> None:
    other = replace(source_of(server), file="other.bin")
    fetch(source_of(server), tmp_path, progress=lambda *numbers: fetch(other, tmp_path) and None)
    assert names(tmp_path) == ["file.bin", "other.bin"]


def test_what_another_call_has_just_finished_is_taken(server: Server, tmp_path: Path) -> None:
    """Between the first look for the file and the lock."""
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock

    def late(*arguments: Any) -> None:
        (tmp_path / "file.bin").write_bytes(CONTENT)
        flock(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        assert fetch(source_of(server), tmp_path) == tmp_path / "file.bin"
    assert server.asked == []
    assert names(tmp_path) == ["file.bin"]


def test_a_lock_that_was_just_left_is_none(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call makes a lock of that name, and would not see ours."""
    fcntl = pytest.importorskip("fcntl")

    def late(*arguments: Any) -> None:
        (tmp_path / "file.bin.part.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BlockingIOError, match="another call is downloading it"):
        fetch(source_of(server), tmp_path)
    assert server.asked == []


def test_without_locks_nobody_is_kept_out(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert fetch(source_of(server), tmp_path / "by the disk").read_bytes() == CONTENT
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert fetch(source_of(server), tmp_path / "by the system").read_bytes() == CONTENT
    assert names(tmp_path / "by the disk") == names(tmp_path / "by the system") == ["file.bin"]


# --- the disk ---


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_an_error_of_the_disk(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        fetch(source_of(server), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert not isinstance(caught.value, ConnectionError)


def test_a_folder_that_cannot_be_is_an_error_of_the_disk(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        fetch(source_of(server), tmp_path / "file" / "folder")
    assert server.asked == []


# --- sources ---


def test_published_files_have_the_names_that_the_readers_know() -> None:
    assert {key: [source.file for source in sources] for key, sources in SOURCES.items()} == {
        "cifar10": ["cifar-10-python.tar.gz"],
        "cifar100": ["cifar-100-python.tar.gz"],
        "svhn": ["train_32x32.mat", "test_32x32.mat"],
        "svhn-extra": ["extra_32x32.mat"],
    }
    assert SOURCES["cifar10"][0].file in (cifar.cifar10.__doc__ or "")
    assert SOURCES["cifar100"][0].file in (cifar.cifar100.__doc__ or "")
    published = [source for sources in SOURCES.values() for source in sources]
    assert len({source.md5 for source in published}) == len({source.name for source in published}) == 5
    assert all(source.url.endswith(f"/{source.file}") for source in published)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"url": "file:///etc/hostname"}, "^url: expected an http or https address, got 'file:///etc/hostname'$"),
        ({"url": "ftp://example.org/a"}, "^url: "),
        ({"url": "example.org/a"}, "^url: "),
        ({"file": "../a"}, r"^file: expected a name without a folder, got '\.\./a'$"),
        ({"file": "/a"}, "^file: "),
        ({"file": ".."}, "^file: "),
        ({"file": "."}, "^file: "),
        ({"file": ""}, "^file: "),
        ({"md5": "C58F30108F718F92721AF3B95E74349A"}, "^md5: expected 32 lowercase hexadecimal digits, got "),
        ({"md5": "c58f"}, "^md5: "),
    ],
)
def test_a_source_refuses_what_is_no_source(wrong: dict[str, str], expected: str) -> None:
    right = {"name": "a", "url": "https://example.org/a", "file": "a", "md5": "0" * 32}
    with pytest.raises(ValueError, match=expected):
        Source(**(right | wrong))
