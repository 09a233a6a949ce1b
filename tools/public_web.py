"""Requests to public addresses over HTTPS, for what a stranger's redirect may lead to.

Each hop is checked anew: its name is looked up once, every address behind it must be public, and
the connection goes to an address that was checked. A site's token goes to that site alone.
Proxies of the environment are not used: behind one nobody knows which address is asked.
"""

import http.client
import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import TypeVar
from urllib.parse import quote, urldefrag, urljoin, urlsplit

from wan.headers import ModelError

MOST_REDIRECTS = 5
MOST_JSON = 32 << 20  # bytes of an answer about files
PIECE = 1 << 20  # bytes
SLOWEST = 1024  # bytes per second: a slower connection counts as broken
URL_LETTERS = "!#$%&'()*+,/:;=?@[]~"  # that have a meaning in an address
REDIRECTS = (301, 302, 303, 307, 308)
USABLE = (200, 206, 416)
NAT64 = IPv6Network("64:ff9b::/96")  # IPv4 as networks of IPv6 alone see it
AZURE_METADATA = IPv4Address("168.63.129.16")  # of every virtual machine, at a public address
Result = TypeVar("Result")


class BrokenTransferError(Exception):
    """A connection that failed in a way that may pass: worth another attempt."""


@dataclass(frozen=True)
class Site:
    """A site that holds files."""

    name: str
    origin: str  # "https://civitai.com": where its token may go
    token_variable: str  # of the environment
    token_page: str  # where a user makes a token


@dataclass(frozen=True)
class Patience:
    """How long to wait and how often to try; tests have servers of their own at `local` origins."""

    timeout: float = 30.0  # seconds without a byte, or at less than SLOWEST
    attempts: int = 5
    pause: float = 1.0  # seconds before the second attempt, twice as long before each other
    local: frozenset[str] = frozenset()  # may be plain HTTP at a private address


def retried(action: Callable[[], Result], patience: Patience) -> Result:
    """What the action gives, tried again while connections break; `ModelError` in the end."""
    failure = ""
    for attempt in range(patience.attempts):
        if attempt:
            time.sleep(patience.pause * 2 ** (attempt - 1))
        try:
            return action()
        except BrokenTransferError as error:
            failure = str(error)
    raise ModelError(
        f"{failure} ({patience.attempts} attempts): check the connection and run the command "
        "again; it goes on from where it stopped"
    )


def read_json(url: str, site: Site, patience: Patience) -> object:
    """What a site's interface answers; `ModelError` if that is no JSON, or too much of it."""

    def ask() -> bytes:
        with opened(url, site, {"Accept": "application/json"}, patience) as response:
            arrived = bytearray()
            for piece in pieces(response, patience):
                arrived += piece
                if len(arrived) > MOST_JSON:
                    raise ModelError(f"{site.name} answered with more than {MOST_JSON:,} bytes")
            return bytes(arrived)

    text = retried(ask, patience)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ModelError(f"{site.name} answered with something else than JSON: try later") from None


@contextmanager
def opened(
    url: str, site: Site, headers: Mapping[str, str], patience: Patience
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET, of status 200, 206 or 416, its body unread.

    `BrokenTransferError` if it is worth another attempt, `ModelError` if not.
    """
    token, url = _token(site), quote(url, safe=URL_LETTERS)
    for _ in range(MOST_REDIRECTS + 1):
        if origin_of(url) != site.origin:
            token = ""  # and it stays away, should the stranger lead back
        sent = {"Connection": "close", "User-Agent": "wan-lora", **headers}
        sent |= {"Authorization": f"Bearer {token}"} if token else {}
        with closing(_connect(url, patience)) as connection, _ask(connection, url, sent) as answer:
            if answer.status not in REDIRECTS:
                _check_status(answer, site, url)
                yield answer
                return
            url = _next(url, answer, site)
    raise ModelError(f"{site.name} redirects more than {MOST_REDIRECTS} times: it is given up")


def pieces(response: http.client.HTTPResponse, patience: Patience) -> Iterator[bytes]:
    """The body as it arrives; `BrokenTransferError` if it stalls, trickles or ends early."""
    left = response.length  # read1 does not count in every version of Python
    since, arrived = time.monotonic(), 0
    try:
        while left is None or left > 0:
            piece = response.read1(PIECE if left is None else min(PIECE, left))
            if not piece:
                break
            yield piece
            left = None if left is None else left - len(piece)
            arrived += len(piece)
            if (passed := time.monotonic() - since) > patience.timeout:
                if arrived < SLOWEST * passed:
                    raise BrokenTransferError(f"only {arrived:,} bytes came in {passed:.0f} s")
                since, arrived = time.monotonic(), 0
    except (OSError, http.client.HTTPException) as error:
        raise BrokenTransferError(f"the connection broke off ({_reason(error)})") from None
    if left:
        raise BrokenTransferError(f"the connection ended {left:,} bytes early")


def origin_of(url: str) -> str:
    """ "https://huggingface.co" of any address there; `ModelError` if it is none."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        parts, port, host = urlsplit(""), None, None
    if not host or parts.username is not None:
        raise ModelError("an address on the way is none that can be asked: nothing was fetched")
    ports = {"https": 443, "http": 80}
    host = f"[{host}]" if ":" in host else host
    end = f":{port}" if port not in (None, ports.get(parts.scheme)) else ""
    return f"{parts.scheme}://{host}{end}"


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet: not private, loopback, metadata and so on.

    An IPv6 address that stands for one of IPv4 counts as that.
    """
    ip = ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour
        inner = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else inner
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved) and ip != AZURE_METADATA


def _connect(url: str, patience: Patience) -> http.client.HTTPConnection:
    origin, parts = origin_of(url), urlsplit(url)
    is_local = origin in patience.local
    secure = parts.scheme == "https"
    host = parts.hostname or ""
    if not secure and not is_local:
        raise ModelError(f"{host} was to be asked by {parts.scheme}, not https: it is refused")
    port = parts.port or (443 if secure else 80)
    context = ssl.create_default_context()
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not is_local and (private := [a for a in addresses if not is_public(a)]):
            raise ModelError(f"{host} is at {private[0]}, no public address: it is refused")
        plain = _connected(addresses, port, patience.timeout)
        if not secure:
            connection = http.client.HTTPConnection(host, port, timeout=patience.timeout)
            connection.sock = plain
            return connection
        connection = http.client.HTTPSConnection(
            host, port, timeout=patience.timeout, context=context
        )
        connection.sock = context.wrap_socket(plain, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise ModelError(
            f"the certificate of {host} is not valid ({error.verify_message}): it is refused. "
            "Check this machine's clock and its certificates (SSL_CERT_FILE)"
        ) from None
    except (OSError, UnicodeError) as error:
        raise BrokenTransferError(f"{host} cannot be reached ({_reason(error)})") from None
    return connection


def _connected(addresses: list[str], port: int, timeout: float) -> socket.socket:
    """A connection to the first address that answers."""
    for address in addresses[:-1]:
        try:
            return socket.create_connection((address, port), timeout)
        except OSError:
            continue
    return socket.create_connection((addresses[-1], port), timeout)


def _ask(
    connection: http.client.HTTPConnection, url: str, headers: Mapping[str, str]
) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request("GET", path, headers=dict(headers))
        return connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        raise BrokenTransferError(f"{parts.hostname} gave no answer ({_reason(error)})") from None


def _next(url: str, answer: http.client.HTTPResponse, site: Site) -> str:
    """Where a redirect leads. What stands there may be signed: no message shows it."""
    place = quote(answer.headers.get("Location", ""), safe=URL_LETTERS)
    try:
        target = urldefrag(urljoin(url, place)).url if place else ""
    except ValueError:
        target = ""
    if not target:
        raise ModelError(f"{site.name} redirects to nowhere: try later")
    if origin_of(target) == site.origin and urlsplit(target).path.startswith("/login"):
        raise _not_signed_in(site)
    return target


def _token(site: Site) -> str:
    token = os.environ.get(site.token_variable, "").strip()
    if not all("!" <= letter <= "~" for letter in token):
        raise ModelError(
            f"{site.token_variable} holds a space or a letter that no token has (it is not shown "
            "here): copy the token again"
        )
    return token


def _check_status(answer: http.client.HTTPResponse, site: Site, url: str) -> None:
    status, at_site = answer.status, origin_of(url) == site.origin
    if status in USABLE:
        return
    where = site.name if at_site else urlsplit(url).hostname
    if status in (408, 425) or status >= 500 or (status == 403 and not at_site):
        # 403 of another host: an address signed for a while, and the while is over.
        raise BrokenTransferError(f"{where} answered with status {status}")
    if status == 401:
        raise _not_signed_in(site)
    if status == 429:
        wait = answer.headers.get("Retry-After", "")
        text = f"{wait} seconds" if wait.isdigit() else "some minutes"
        raise ModelError(f"{where} has had too many requests (429): wait {text} and try again")
    reasons = {
        403: "does not let you have it (403): open its page in a browser and accept its terms, or "
        f"see whether it is paid or early access; then set {site.token_variable} to the token of "
        "that account",
        404: "has no such file (404): it was removed, renamed or made private; check the address",
        451: "may not give it out where you are (451)",
    }
    raise ModelError(f"{where} {reasons.get(status, f'answered with status {status}: try later')}")


def _not_signed_in(site: Site) -> ModelError:
    if _token(site):
        return ModelError(
            f"{site.name} does not accept the token in {site.token_variable} (401), or has no such "
            f"file for you: check the address, or make a new token at {site.token_page}"
        )
    return ModelError(
        f"{site.name} gives this to signed-in users only, or has no such file (401): check the "
        f"address, make a token at {site.token_page} and set it as {site.token_variable}"
    )


def _reason(error: Exception) -> str:
    """Why a connection failed, without what a server wrote."""
    if isinstance(error, TimeoutError):
        return "timed out"
    told = error.strerror if isinstance(error, OSError) else None
    return told or type(error).__name__
