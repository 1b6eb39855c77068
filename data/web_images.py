"""Images on the web: fetched once, into a cache, from public addresses alone.

A row comes from strangers, so where its URL leads is checked after the name is resolved, at each redirect, and the
connection goes to the very address that was checked. Proxies of the environment are not used: what they would connect
to cannot be checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

NOT_FETCHED = "image is a URL, which --fetch_images fetches"
NOT_REACHED = "image cannot be fetched"
# Why an image cannot be fetched: what more than one place asks for.
NOT_WRITTEN, NO_URL, NO_HOST, TOO_LARGE = "cannot be written", "no URL", "no such host", "too large"
SILENT, SLOW = "no answer in time", "no whole answer in time"
NO_CONNECTION, BROKEN_OFF = "no connection", "connection breaks off"
SCHEMES = ("http", "https")
SILENCE_S = 10.0  # a connection, and each wait for more of an answer
TOTAL_S = 60.0  # one answer in all
WAITS_S = (1.0, 4.0)  # before the second try and the third
LONGEST_WAIT_S = 60.0  # that a busy server may ask for
REDIRECTS = 5
MAX_BYTES = 64 * 2**20  # of one image
CHUNK_BYTES = 2**16
HEADERS = {"User-Agent": "nanovlm-grades", "Accept": "image/*", "Accept-Encoding": "identity"}
ALLOWED = "/%:=&~+!$,;'@()*[]?"  # letters of a path and a query that stay as they are
# How JPEG, PNG, GIF, WebP, BMP, TIFF and JPEG 2000 begin. HEIC and AVIF have `ftyp` behind four bytes.
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")


@dataclass(frozen=True)
class WebImage:
    """An image that is not here yet."""

    url: str  # http or https


class FetchError(Exception):
    """An image cannot be fetched. kind: the reason that rows are counted by."""

    def __init__(self, found: str, reason: str, again: bool = False, wait_s: float = 0.0):
        """reason: one of few, by which failures are counted. again: whether another try may help, after wait_s."""
        super().__init__(found)
        self.kind, self.reason, self.again, self.wait_s = NOT_REACHED, reason, again, wait_s


# By URL (text, reason): a process tries each in vain once. Not the errors: their tracebacks hold what the server sent.
FAILED: dict[str, tuple[str, str]] = {}


def cache_folder() -> Path:
    """`fetched` in the cache of `datasets`."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "fetched"


def fetched(url: str) -> Path:
    """The file in the cache that holds the image; it is fetched where there is none. Raises FetchError."""
    path = place_of(cache_folder(), url)
    if path.exists():
        return path
    if url in FAILED:
        raise FetchError(*FAILED[url])
    try:
        return fetch_into(cache_folder(), url)
    except FetchError as error:
        FAILED[url] = (str(error), error.reason)
        raise


def place_of(folder: Path, url: str) -> Path:
    """The file in a folder of fetched images that holds the one of this URL, or would."""
    key = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    return folder / key[:2] / key


def fetch_into(
    folder: Path,
    url: str,
    sha256: str = "",
    check: Callable[[bytes], None] | None = None,
    is_allowed: Callable[[str], bool] | None = None,
) -> Path:
    """Fetch an image into its place in the folder, whatever is there, and return that. Raises FetchError.

    sha256: of the bytes that are wanted; "": any. check: raises FetchError for bytes that are not to be kept.
    is_allowed: of an IP address as text, in place of is_public.
    """
    data = _fetch_repeatedly(url, is_allowed or is_public)
    if sha256 and (found := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise FetchError(f"{url}: has the SHA-256 {found}, not {sha256}", "another image than the row's")
    if check is not None:
        check(data)
    path = place_of(folder, url)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:  # a full disk
        with contextlib.suppress(OSError):
            part.unlink()
        found = f"{url}: cannot be written to {path.parent}: {error.strerror}"
        raise FetchError(found, NOT_WRITTEN, again=True) from None
    return path


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not of a private network, of this machine, of a link, reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _fetch_repeatedly(url: str, is_allowed: Callable[[str], bool]) -> bytes:
    for wait_s in WAITS_S:
        try:
            return _fetch(url, is_allowed)
        except FetchError as error:
            if not error.again:
                raise
            time.sleep(max(wait_s, error.wait_s))
    return _fetch(url, is_allowed)


def _fetch(url: str, is_allowed: Callable[[str], bool]) -> bytes:
    """The image, after redirects. Raises FetchError."""
    at = url
    for _ in range(REDIRECTS + 1):
        try:
            answer = _answer(at, is_allowed)
        except FetchError as error:
            way = "" if at == url else f" (redirected to {at})"
            raise FetchError(f"{url}{way}: {error}", error.reason, error.again, error.wait_s) from None
        if isinstance(answer, bytes):
            return answer
        try:
            at = urljoin(at, answer)
        except ValueError as error:
            raise FetchError(f"{url}: redirected to {answer!r}, which is no URL ({error})", NO_URL) from None
    raise FetchError(f"{url}: more than {REDIRECTS} redirects", "too many redirects")


def _answer(url: str, is_allowed: Callable[[str], bool]) -> bytes | str:
    """An image, or where to look instead. Raises FetchError."""
    connection, target = _request_of(url)
    host, port, secure = connection.host, connection.port, isinstance(connection, http.client.HTTPSConnection)
    timed_out = threading.Event()
    link = _connected(_allowed_addresses(host, port, is_allowed))

    def give_up() -> None:
        timed_out.set()
        with contextlib.suppress(OSError):  # it is closed already
            link.shutdown(socket.SHUT_RDWR)  # wakes whoever reads, however slowly the server sends

    timer = threading.Timer(TOTAL_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        if secure:
            link = _tls().wrap_socket(link, server_hostname=host, do_handshake_on_connect=False)
            link.do_handshake()
        connection.sock = link
        connection.request("GET", target, headers=HEADERS)
        with connection.getresponse() as response:
            return _read(response)
    except TimeoutError:
        raise FetchError(f"no answer in {SILENCE_S:g} s", SILENT, again=True) from None
    except (OSError, http.client.HTTPException) as error:
        if timed_out.is_set():
            raise FetchError(f"no whole answer in {TOTAL_S:g} s", SLOW, again=True) from None
        is_certificate = isinstance(error, ssl.SSLCertVerificationError)
        reason = "certificate not valid" if is_certificate else BROKEN_OFF
        raise FetchError(f"{type(error).__name__}: {error}", reason, again=not is_certificate) from None
    except ValueError as error:  # a number of thousands of digits
        raise FetchError(f"the answer cannot be read: {error}", "answer cannot be read") from None
    except FetchError as error:
        if timed_out.is_set():  # it looked like the end of the answer
            raise FetchError(f"no whole answer in {TOTAL_S:g} s", SLOW, again=True) from None
        raise error
    finally:
        timer.cancel()
        link.close()


def _request_of(url: str) -> tuple[http.client.HTTPConnection, str]:
    """(a connection that is not made yet, the path and query to ask for in the letters that HTTP allows).

    Raises FetchError.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
        target = quote(parts.path or "/", safe=ALLOWED) + (
            f"?{quote(parts.query, safe=ALLOWED)}" if parts.query else ""
        )
        if parts.scheme.lower() not in SCHEMES or not host:
            raise FetchError("is no http or https URL of a host", NO_URL)
        if parts.scheme.lower() == "https":
            return http.client.HTTPSConnection(host, port or 443), target
        return http.client.HTTPConnection(host, port or 80), target
    except (ValueError, http.client.InvalidURL) as error:  # UnicodeError too
        raise FetchError(f"is no URL ({error})", NO_URL) from None


def _as_utf8(place: str) -> str:
    """A header, which http.client reads as Latin-1; most servers that write other letters than ASCII write UTF-8."""
    try:
        return place.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return place


def _read(response: http.client.HTTPResponse) -> bytes | str:
    """What an answer holds: the image, or the place that it redirects to. Raises FetchError."""
    status = response.status
    if status in (301, 302, 303, 307, 308) and (place := response.headers.get("Location")):
        return _as_utf8(place)
    if status != 200:
        said, wait = f"HTTP {status} {response.reason}", response.headers.get("Retry-After", "")
        wait_s = min(float(wait) if wait.isdecimal() else 0.0, LONGEST_WAIT_S)
        raise FetchError(said, f"HTTP {status}", status == 429 or status >= 500, wait_s)
    length = response.headers.get("Content-Length", "")
    promised, parts, size = int(length) if length.isdecimal() else 0, [], 0
    while max(promised, size) <= MAX_BYTES and (data := response.read1(CHUNK_BYTES)):
        parts.append(data)
        size += len(data)
    if max(promised, size) > MAX_BYTES:
        raise FetchError(f"more than {MAX_BYTES:,} bytes", TOO_LARGE)
    if size < promised:
        said = f"the answer breaks off after {size:,} of {promised:,} bytes"
        raise FetchError(said, "answer breaks off", again=True)
    data = b"".join(parts)
    if not data.startswith(BEGINNINGS) and data[4:8] != b"ftyp":
        kind = response.headers.get("Content-Type", "no type")
        raise FetchError(f"the answer is no image: {kind}, it begins with {data[:20]!r}", "no image")
    return data


def _allowed_addresses(host: str, port: int, is_allowed: Callable[[str], bool]) -> Sequence[tuple]:
    """What the host's name stands for. Raises FetchError where one of it is not allowed."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise FetchError(f"no such host ({error})", NO_HOST, again=error.errno == socket.EAI_AGAIN) from None
    for *_, address in found:
        if not is_allowed(str(address[0])):
            raise FetchError(f"{host} is {address[0]}, which is no public address", "no public address")
    return [address for *_, address in found]


def _connected(addresses: Sequence[tuple]) -> socket.socket:
    """A connection to the first of the addresses that takes one. Raises FetchError."""
    problem: OSError | None = None
    for address in addresses:
        try:
            return socket.create_connection(address[:2], SILENCE_S)
        except OSError as error:
            problem = error
    raise FetchError(f"no connection ({problem})", NO_CONNECTION, again=True)


@cache
def _tls() -> ssl.SSLContext:
    """Certificates of the system, and those that come with certifi where it is there."""
    context = ssl.create_default_context()
    try:
        import certifi
    except ImportError:
        return context
    context.load_verify_locations(certifi.where())
    return context
