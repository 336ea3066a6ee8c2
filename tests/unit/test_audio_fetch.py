"""URLs: what is fetched, and what is refused, cut off or given up."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, cycle
from typing import TYPE_CHECKING

import numpy as np
import pytest
from audio_samples import sample_file

from quasr.audio.decode import load
from quasr.audio.fetch import FetchLimits, fetch
from quasr.errors import AudioError, AudioFetchError, AudioTooLargeError, OptionError

if TYPE_CHECKING:
    from pathlib import Path

BODY = bytes(range(256)) * 400
Answer = Callable[[BaseHTTPRequestHandler], None]


def local(**changes: float) -> FetchLimits:
    """Limits that allow the test server."""
    return FetchLimits(**{"allow_private": True, "timeout": 20.0, "read_timeout": 10.0, **changes})


@contextmanager
def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server on 127.0.0.1 that answers every GET by `answer`; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                answer(self)
            except OSError:
                self.close_connection = True  # the client hung up, as the test wants

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a refused TLS handshake is no failure of the test

    server = Server(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(status: int = 200, body: bytes = BODY, **headers: str) -> Answer:
    """A plain answer."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def drip(data: bytes, again: bytes) -> Answer:
    """The raw bytes one at a time, then `again` over and over."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        for byte in chain(data, cycle(again)):
            handler.wfile.write(bytes([byte]))
            time.sleep(0.003)

    return answer


def refused(url: str, limits: FetchLimits, match: str, kind: type[AudioError] = AudioFetchError) -> None:
    with pytest.raises(kind, match=match) as error:
        fetch(url, limits)
    assert "\n" not in str(error.value)


def test_body_comes_whole() -> None:
    with serving(send()) as url, fetch(f"{url}/some/file.wav?key=1#part", local()) as file:
        assert file.read() == BODY


def test_body_without_a_length_and_chunked() -> None:
    def open_ended(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(BODY)

    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))

    for answer in (open_ended, chunked):
        with serving(answer) as url, fetch(url, local()) as file:
            assert file.read() == BODY


def test_path_and_query_are_quoted_and_no_secret_is_sent_elsewhere() -> None:
    seen: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        seen.extend([handler.path, handler.headers["Host"]])
        send()(handler)

    with serving(answer) as url, fetch(f"{url}/ü ber%20all?q=é b", local()) as file:
        assert file.read() == BODY
    assert seen == ["/%C3%BC%20ber%20all?q=%C3%A9%20b", url.removeprefix("http://")]


def test_sound_by_url_is_the_sound_of_the_file() -> None:
    data = sample_file("mp3")
    with serving(send(body=data)) as url:
        np.testing.assert_array_equal(load(f"{url}/a.mp3", local()), load(data))


# --- refused


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "[::1]",
        "[::]",
        "[fe80::1]",
        "[fec0::1]",
        "[fc00::1]",
        "[ff02::1]",
        "[::ffff:127.0.0.1]",
        "[2002:7f00:1::]",
        "[64:ff9b::7f00:1]",
    ],
)
def test_private_addresses(host: str) -> None:
    refused(f"http://{host}/a.wav", FetchLimits(), "is not a public address|address family|not supported")


def test_public_addresses_pass_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        tried.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", connect)
    for host in ("93.184.216.34", "[2606:2800:220:1::1]"):
        refused(f"http://{host}/a.wav", FetchLimits(), "Connection refused")
    assert [address[:2] for address in tried] == [("93.184.216.34", 80), ("2606:2800:220:1::1", 80)]


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.com/a.wav", "gopher://example.com/", "concat://a|b", "HTTPX://a/"]
)
def test_other_schemes(url: str) -> None:
    refused(url, local(), "only http and https")
    if not url.startswith("file"):
        with pytest.raises(AudioFetchError, match="only http and https"):
            load(url, local())


@pytest.mark.parametrize(
    "url", ["http://", "http:///path", "http://[::1", "http://host:99999/", "http://host:x/", "http://a\x00b/"]
)
def test_invalid_urls(url: str) -> None:
    refused(url, local(), "valid URL|cannot be fetched")


def test_host_is_resolved_once_and_that_address_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def rebinding(host: str, port: int, *args: object, **kwargs: object) -> object:
        asked.append(host)
        return resolve("127.0.0.1" if len(asked) == 1 else "203.0.113.1", port, *args, **kwargs)

    with serving(send()) as url:
        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        with fetch(url.replace("127.0.0.1", "rebind.test"), local()) as file:
            assert file.read() == BODY
    assert asked == ["rebind.test"]


def test_one_private_address_among_public_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    refused("http://mixed.test/a.wav", FetchLimits(), "10.0.0.1 is not a public address; .*--allow-private-urls")


# --- redirects


def redirect(to: str, status: int = 302) -> Answer:
    return send(status, b"", Location=to)


def test_redirects_are_followed() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        step = int(handler.path.strip("/") or 0)
        (send() if step == 3 else redirect(f"/{step + 1}", (301, 307, 308)[step]))(handler)

    with serving(answer) as url:
        with fetch(url, local()) as file:
            assert file.read() == BODY
        refused(url, local(max_redirects=2), "redirects more than 2 times")


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_redirect_to_another_scheme(to: str) -> None:
    with serving(redirect(to)) as url:
        refused(url, local(), "only http and https")


def test_redirect_to_a_private_address(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo
    with serving(redirect("http://169.254.169.254/latest/meta-data")) as url:
        port = int(url.rpartition(":")[2])
        public = "93.184.216.34"
        connect = socket.socket.connect

        def lookup(host: str, *args: object, **kwargs: object) -> object:
            return resolve(public if host == "public.test" else host, *args, **kwargs)

        def dial(self: socket.socket, address: tuple[str, int]) -> None:
            connect(self, ("127.0.0.1", port) if address[0] == public else address)

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        monkeypatch.setattr(socket.socket, "connect", dial)
        refused("http://public.test/a.wav", FetchLimits(timeout=20), "169.254.169.254 is not a public address")


def test_redirect_to_nonsense_and_in_circles() -> None:
    with serving(redirect("http://[::1")) as url:
        refused(url, local(), "no URL|not a valid URL")
    with serving(redirect("/again")) as url:
        refused(url, local(), "redirects more than 5 times")


# --- failing, lying, endless and slow servers


def test_error_statuses() -> None:
    for status, words in (
        (404, "answers 404 Not Found"),
        (500, "answers 500"),
        (206, "answers 206"),
        (304, "answers 304"),
    ):
        with serving(send(status, b"" if status == 304 else BODY)) as url:
            refused(url, local(), words)


def test_secrets_stay_out_of_messages() -> None:
    with serving(send(404)) as url:
        secret = url.replace("http://", "http://user:hunter2@") + "/a.wav?token=hunter2#hunter2"
        with pytest.raises(AudioFetchError) as error:
            fetch(secret, local())
    assert "hunter2" not in str(error.value)
    assert "/a.wav" in str(error.value)


def test_content_length_over_the_limit_is_refused_at_once() -> None:
    with serving(send(Content_Length=str(10**12))) as url:
        refused(url, local(max_bytes=1000), "over the limit of 1000 bytes", AudioTooLargeError)


def test_content_length_that_promises_too_much() -> None:
    def short(handler: BaseHTTPRequestHandler) -> None:
        send(Content_Length=str(len(BODY) + 1000))(handler)
        handler.close_connection = True

    with serving(short) as url:
        refused(url, local(), "stops before the length")


def test_chunks_that_break_off() -> None:
    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%b" % (len(BODY), BODY[:10]))
        handler.close_connection = True

    with serving(cut) as url:
        refused(url, local(), "it stops before its end")


def test_size_is_counted_where_no_length_is_given() -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(BODY)

    with serving(endless) as url:
        refused(url, local(max_bytes=5_000_000), "over the limit", AudioTooLargeError)
        refused(url, local(timeout=0.5, max_bytes=10**12), "takes longer than 0.5 s")


@pytest.mark.parametrize(
    ("data", "again"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 999999\r\n\r\n", b"x"),
        (b"HTTP/1.0 200 OK\r\nX: ", b"y"),
        (b"H", b"T"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "body with length", "header", "status line", "interim"],
)
def test_slow_drip_ends_with_the_total_time(data: bytes, again: bytes) -> None:
    with serving(drip(data, again)) as url:
        begin = time.monotonic()
        refused(url, local(timeout=0.6), "takes longer than 0.6 s")
        assert time.monotonic() - begin < 3


def test_silent_server() -> None:
    with serving(lambda handler: time.sleep(1)) as url:
        refused(url, local(read_timeout=0.2), "no answer for 0.2 s")


def test_not_http_and_nobody_there() -> None:
    with serving(lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")) as url:
        refused(url, local(), "not valid HTTP")
    refused(url, local(), "Connection refused")


def test_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    refused("http://nowhere.test/", local(), "its host is not known")


def test_limits_that_make_no_sense() -> None:
    for changes in ({"max_bytes": 0}, {"timeout": 0.0}, {"read_timeout": float("inf")}, {"max_redirects": -1}):
        with pytest.raises(OptionError):
            FetchLimits(**changes)


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for `localhost` in one file, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    command += [
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        "key.pem",
        "-out",
        "cert.pem",
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return both


def test_https_checks_the_certificate_against_the_name(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    asked: list[str | None] = []
    tls.sni_callback = lambda _sock, name, _context: asked.append(name)
    with serving(send(), tls) as url:
        by_name = url.replace("127.0.0.1", "localhost")
        refused(by_name, local(), "its certificate is not valid")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with fetch(by_name, local()) as file:
            assert file.read() == BODY
        refused(url, local(), "its certificate is not valid")
    assert asked[:2] == ["localhost", "localhost"]
