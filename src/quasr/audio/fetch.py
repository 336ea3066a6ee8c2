"""Fetches an http(s) URL into a temporary file: limited in size and time, every hop checked before it is called.

The host name is resolved once a hop, all its addresses are checked, and the connection goes to one of those very
addresses: a name server that answers differently the second time (DNS rebinding) gains nothing. Proxies set in the
environment are not used, since a proxy would do the resolving.
"""

from __future__ import annotations

import http.client
import ipaddress
import math
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, urljoin, urlsplit

from quasr.audio.source import url_name
from quasr.audio.spool import spool, too_large
from quasr.errors import AudioFetchError, AudioTooLargeError, OptionError

if TYPE_CHECKING:
    from types import TracebackType

REDIRECTS = frozenset({301, 302, 303, 307, 308})
PORTS = {"http": 80, "https": 443}
URL_SAFE = "/%:@!$&'()*+,;=~?"


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What a URL (or a file object that cannot seek) may cost. Times in seconds.

    `timeout` bounds the whole fetch, `read_timeout` each wait for the network. Only a name server that does not
    answer can exceed both, by the resolver's own limit. `allow_private` permits private, loopback, link-local and
    reserved addresses.
    """

    max_bytes: int = 2 * 1024**3
    timeout: float = 600.0
    read_timeout: float = 30.0
    max_redirects: int = 5
    allow_private: bool = False

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_redirects < 0:
            raise OptionError("max_bytes must be at least 1 and max_redirects at least 0")
        if not (0 < self.timeout < math.inf and 0 < self.read_timeout < math.inf):
            raise OptionError("timeout and read_timeout must be positive, finite numbers of seconds")


DEFAULT_LIMITS = FetchLimits()


def fetch(url: str, limits: FetchLimits = DEFAULT_LIMITS) -> IO[bytes]:
    """The body at `url` as a temporary file at position 0; closing it deletes it.

    Raises AudioFetchError (refused, failed, too slow, cut short) or AudioTooLargeError.
    """
    with _Deadline(limits.timeout) as deadline:
        try:
            return _follow(url, limits, deadline)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise AudioFetchError(f"{url_name(url)} cannot be fetched: {_reason(error, limits, deadline)}") from error


def _follow(url: str, limits: FetchLimits, deadline: _Deadline) -> IO[bytes]:
    here = url
    for _ in range(limits.max_redirects + 1):
        target = _parse(here)
        connection = _Connection(target, limits, deadline)
        try:
            connection.request("GET", target.path, headers={"User-Agent": "quasr", "Accept-Encoding": "identity"})
            with connection.getresponse() as response:
                location = response.getheader("Location")
                if response.status not in REDIRECTS or not location:
                    return _body(response, target.name, limits, deadline)
        finally:
            connection.close()
        here = _join(here, location)
    raise AudioFetchError(f"{url_name(url)} redirects more than {limits.max_redirects} times")


def _join(here: str, location: str) -> str:
    try:
        return urljoin(here, location)
    except ValueError as error:
        raise AudioFetchError(f"{url_name(here)} redirects to something that is no URL") from error


def _body(response: http.client.HTTPResponse, name: str, limits: FetchLimits, deadline: _Deadline) -> IO[bytes]:
    if response.status != 200:
        phrase = http.client.responses.get(response.status, "")
        raise AudioFetchError(f"{name} answers {response.status} {phrase}".rstrip() + ", not 200 OK")
    if response.length is not None and response.length > limits.max_bytes:
        raise AudioTooLargeError(too_large(name, limits.max_bytes))
    file = spool(response.read, limits.max_bytes, name)
    # A body with a length that ends early leaves the rest in `length`; the watchdog's cut looks like an end as well.
    if deadline.expired or response.length:
        file.close()
        raise TimeoutError if deadline.expired else AudioFetchError(f"{name} stops before the length that it states")
    return file


@dataclass(frozen=True, slots=True)
class _Target:
    """One hop: where to connect and what to ask for; `name` is fit for messages."""

    scheme: str
    host: str
    port: int
    path: str
    name: str


def _parse(url: str) -> _Target:
    name = url_name(url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AudioFetchError(f"{name} is not a valid URL") from error
    if parts.scheme not in PORTS:
        raise AudioFetchError(f"{name} is refused: only http and https URLs are fetched")
    if not parts.hostname:
        raise AudioFetchError(f"{name} is not a valid URL: it has no host")
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode("ascii")
    path = quote(parts.path or "/", safe=URL_SAFE.replace("?", ""))
    query = f"?{quote(parts.query, safe=URL_SAFE)}" if parts.query else ""
    return _Target(parts.scheme, host, PORTS[parts.scheme] if port is None else port, path + query, name)


def _resolve(target: _Target, limits: FetchLimits) -> list[tuple[int, Any]]:
    """(family, socket address) of every address of the host, all of them allowed."""
    found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    for *_, address in found:
        if not (limits.allow_private or _is_public(str(address[0]))):
            raise AudioFetchError(
                f"{target.name} is refused: {address[0]} is not a public address; if you trust it, allow private ones "
                "(--allow-private-urls, or limits=quasr.audio.fetch.FetchLimits(allow_private=True))"
            )
    return [(family, address) for family, *_, address in found]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        # These carry an IPv4 address that a gateway or the kernel would call instead.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return _is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


class _Connection(http.client.HTTPConnection):
    """Connects to a checked address; the certificate is checked against the host's name."""

    def __init__(self, target: _Target, limits: FetchLimits, deadline: _Deadline) -> None:
        self.default_port = PORTS[target.scheme]
        super().__init__(target.host, target.port)
        self._target, self._limits, self._deadline = target, limits, deadline

    def connect(self) -> None:
        sock = self._open()
        self.sock = sock
        if self._target.scheme == "https":
            context = ssl.create_default_context()
            # The handshake comes after guard(), for a server may drip that too.
            self.sock = context.wrap_socket(sock, server_hostname=self._target.host, do_handshake_on_connect=False)
            self._deadline.guard(self.sock)
            self.sock.do_handshake()

    def _open(self) -> socket.socket:
        failure = OSError("the host has no address")
        for family, address in _resolve(self._target, self._limits):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                self._deadline.guard(sock)
                # A connection in the making cannot be shut down from outside, so its own timeout ends with the total.
                sock.settimeout(min(self._limits.read_timeout, self._deadline.remaining()))
                sock.connect(address)
            except OSError as error:
                sock.close()
                failure = error
            else:
                return sock
        raise failure


class _Deadline:
    """Shuts the guarded socket down when the time is over.

    A timeout on the socket alone starts anew with every byte, so a server that drips could hold the caller for days.
    """

    def __init__(self, seconds: float) -> None:
        self.expired = False
        self._end = time.monotonic() + seconds
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._timer.cancel()

    def guard(self, sock: socket.socket) -> None:
        """Watches `sock` in place of the one before. Raises TimeoutError if the time is already over."""
        with self._lock:
            self._socket = sock
            if self.expired:
                raise TimeoutError

    def remaining(self) -> float:
        """Seconds that are left, a thousandth at least: zero would mean a socket that never blocks."""
        return max(self._end - time.monotonic(), 0.001)

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            if self._socket is not None:
                _shut(self._socket)


def _shut(sock: socket.socket) -> None:
    try:
        # Not sock.shutdown(): an SSLSocket's own would take the TLS state away from under the reading thread.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        return  # already closed, which is all that is wanted


def _reason(error: Exception, limits: FetchLimits, deadline: _Deadline) -> str:
    if deadline.expired:
        return f"it takes longer than {limits.timeout:g} s"
    if isinstance(error, TimeoutError):
        return f"no answer for {limits.read_timeout:g} s"
    if isinstance(error, socket.gaierror):
        return "its host is not known"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid ({error.verify_message})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, http.client.IncompleteRead):
        return "it stops before its end"
    return "the answer is not valid HTTP"
