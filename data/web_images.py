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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import SplitResult, quote, urljoin, urlsplit

NOT_FETCHED = "image is a URL, which --fetch_images fetches"
NOT_REACHED = "image cannot be fetched"
SCHEMES = ("http", "https")
SILENCE_S = 10.0  # a connection, and each wait for more of an answer
TOTAL_S = 60.0  # one answer in all
WAITS_S = (1.0, 4.0)  # before the second try and the third
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

    def __init__(self, found: str, kind: str = NOT_REACHED, again: bool = False):
        """again: whether another try may help."""
        super().__init__(found)
        self.kind, self.again = kind, again


FAILED: dict[str, FetchError] = {}  # by URL: a process tries each in vain once


def cache_folder() -> Path:
    """`fetched` in the cache of `datasets`."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "fetched"


def fetched(url: str) -> Path:
    """The file in the cache that holds the image; it is fetched where there is none. Raises FetchError."""
    key = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    path = cache_folder() / key[:2] / key
    if path.exists():
        return path
    if url in FAILED:
        raise FAILED[url]
    try:
        data = _fetch_repeatedly(url)
    except FetchError as error:
        FAILED[url] = error
        raise
    part = path.with_name(f"{key}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:  # a full disk
        with contextlib.suppress(OSError):
            part.unlink()
        raise FetchError(f"{url}: cannot be written to {path.parent}: {error.strerror}") from None
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


def _fetch_repeatedly(url: str) -> bytes:
    for wait_s in WAITS_S:
        try:
            return _fetch(url)
        except FetchError as error:
            if not error.again:
                raise
        time.sleep(wait_s)
    return _fetch(url)


def _fetch(url: str) -> bytes:
    """The image, after redirects. Raises FetchError."""
    at = url
    for _ in range(REDIRECTS + 1):
        try:
            answer = _answer(at)
        except FetchError as error:
            way = "" if at == url else f" (redirected to {at})"
            raise FetchError(f"{url}{way}: {error}", error.kind, error.again) from None
        if isinstance(answer, bytes):
            return answer
        at = urljoin(at, answer)
    raise FetchError(f"{url}: more than {REDIRECTS} redirects")


def _answer(url: str) -> bytes | str:
    """An image, or where to look instead. Raises FetchError."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError as error:  # UnicodeError too
        raise FetchError(f"is no URL ({error})") from None
    if parts.scheme.lower() not in SCHEMES or not host:
        raise FetchError("is no http or https URL of a host")
    secure = parts.scheme.lower() == "https"
    port = port or (443 if secure else 80)
    make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = make(host, port)
    timed_out = threading.Event()
    link = _connected(_public_addresses(host, port))

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
        connection.request("GET", _target(parts), headers=HEADERS)
        with connection.getresponse() as response:
            return _read(response)
    except TimeoutError:
        raise FetchError(f"no answer in {SILENCE_S:g} s", again=True) from None
    except (OSError, http.client.HTTPException) as error:
        said = f"no whole answer in {TOTAL_S:g} s" if timed_out.is_set() else f"{type(error).__name__}: {error}"
        raise FetchError(said, again=not isinstance(error, ssl.SSLCertVerificationError)) from None
    except FetchError as error:
        if timed_out.is_set():  # it looked like the end of the answer
            raise FetchError(f"no whole answer in {TOTAL_S:g} s", again=True) from None
        raise error
    finally:
        timer.cancel()
        link.close()


def _target(parts: SplitResult) -> str:
    """The path and query to ask for, in the letters that HTTP allows."""
    query = f"?{quote(parts.query, safe=ALLOWED)}" if parts.query else ""
    return quote(parts.path or "/", safe=ALLOWED) + query


def _read(response: http.client.HTTPResponse) -> bytes | str:
    """What an answer holds: the image, or the place that it redirects to. Raises FetchError."""
    status = response.status
    if status in (301, 302, 303, 307, 308) and (place := response.headers.get("Location")):
        return place
    if status != 200:
        raise FetchError(f"HTTP {status} {response.reason}", again=status == 429 or status >= 500)
    length = response.headers.get("Content-Length", "")
    promised, parts, size = int(length) if length.isdecimal() else 0, [], 0
    while max(promised, size) <= MAX_BYTES and (data := response.read1(CHUNK_BYTES)):
        parts.append(data)
        size += len(data)
    if max(promised, size) > MAX_BYTES:
        raise FetchError(f"more than {MAX_BYTES:,} bytes")
    if size < promised:
        raise FetchError(f"the answer breaks off after {size:,} of {promised:,} bytes", again=True)
    data = b"".join(parts)
    if not data.startswith(BEGINNINGS) and data[4:8] != b"ftyp":
        kind = response.headers.get("Content-Type", "no type")
        raise FetchError(f"the answer is no image: {kind}, it begins with {data[:20]!r}")
    return data


def _public_addresses(host: str, port: int) -> Sequence[tuple]:
    """What the host's name stands for. Raises FetchError where one of it is not of the internet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise FetchError(f"no such host ({error})", again=error.errno == socket.EAI_AGAIN) from None
    for *_, address in found:
        if not is_public(str(address[0])):
            raise FetchError(f"{host} is {address[0]}, which is no public address")
    return [address for *_, address in found]


def _connected(addresses: Sequence[tuple]) -> socket.socket:
    """A connection to the first of the addresses that takes one. Raises FetchError."""
    problem: OSError | None = None
    for address in addresses:
        try:
            return socket.create_connection(address[:2], SILENCE_S)
        except OSError as error:
            problem = error
    raise FetchError(f"no connection ({problem})", again=True)


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
