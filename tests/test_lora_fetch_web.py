"""Where a request may go: public addresses over HTTPS, tokens to their own site, few redirects."""

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from file_server import FileServer, Reply, file_server

from tools.public_web import Patience, Site, is_public, opened, pieces, read_json
from wan.headers import ModelError

SECRET = "hf_verysecret"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


@pytest.fixture
def stranger() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


def site_at(server: FileServer) -> Site:
    return Site("Tiny Hub", server.origin, "TINY_TOKEN", "https://tiny.example/tokens")


def patience(*servers: FileServer) -> Patience:
    return Patience(attempts=2, pause=0, local=frozenset(s.origin for s in servers))


def get(server: FileServer, path: str, *also: FileServer) -> bytes:
    with opened(server.origin + path, site_at(server), {}, patience(server, *also)) as response:
        return b"".join(pieces(response, patience(server)))


def refusal(server: FileServer, path: str, *also: FileServer) -> str:
    with pytest.raises(ModelError) as caught:
        get(server, path, *also)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def to(place: str) -> Reply:
    return Reply(status=302, headers={"Location": place})


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "169.254.169.254",
        "168.63.129.16",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "fe80::1",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "ff02::1",
        "::127.0.0.1",
    ],
)
def test_an_address_within_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "172.32.0.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:{port}", "localhost:{port}", "2130706433:{port}", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_a_redirect_to_this_machine_is_refused(
    server: FileServer, stranger: FileServer, host: str
) -> None:
    port = stranger.origin.rpartition(":")[2]
    server.serve("/file", to(f"https://{host.format(port=port)}/secret?sign={SECRET}"))
    assert "no public address" in refusal(server, "/file")
    assert not stranger.asked


def test_a_redirect_to_the_metadata_of_a_cloud_is_refused(server: FileServer) -> None:
    server.serve("/file", to("https://169.254.169.254/latest/meta-data/"))
    assert "169.254.169.254, no public address" in refusal(server, "/file")


def resolve(monkeypatch: pytest.MonkeyPatch, name: str, *addresses: str) -> None:
    """Let the system find a name at these addresses."""
    real = socket.getaddrinfo

    def found(host: str, port: int, *rest: int, **options: int) -> object:
        if host != name:
            return real(host, port, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)


def test_one_private_address_among_those_of_a_name_is_enough(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, "rebound.example", "1.1.1.1", "10.0.0.7")
    server.serve("/file", to("https://rebound.example/file"))
    assert "rebound.example is at 10.0.0.7" in refusal(server, "/file")


@pytest.mark.parametrize("scheme", ["http", "ftp", "file"])
def test_only_https_is_followed(server: FileServer, stranger: FileServer, scheme: str) -> None:
    server.serve("/file", to(stranger.origin.replace("http:", f"{scheme}:") + "/file"))
    assert "not https" in refusal(server, "/file")
    assert not stranger.asked


@pytest.mark.parametrize("place", ["", "https://", "https://[::1", "https://a:b@c.example/", "//"])
def test_a_redirect_to_nonsense_is_refused(server: FileServer, place: str) -> None:
    server.serve("/file", to(place))
    assert refusal(server, "/file")


def test_five_redirects_are_followed_and_a_loop_is_not(server: FileServer) -> None:
    for hop in range(5):
        server.serve(f"/{hop}", to(f"/{hop + 1}"))
    server.serve("/5", Reply(b"there"))
    assert get(server, "/0") == b"there"
    server.serve("/5", to("/0"))
    server.asked.clear()
    assert "redirects more than 5 times" in refusal(server, "/0")
    assert len(server.asked) == 6


def test_a_token_goes_to_its_site_alone_and_stays_away_after_a_stranger(
    server: FileServer, stranger: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_TOKEN", f" {SECRET}\n")
    server.serve("/renamed", to("/file"))
    server.serve("/file", to(f"{stranger.origin}/cdn?signature=abc"))
    stranger.serve("/cdn", to(f"{server.origin}/back"))
    server.serve("/back", Reply(b"content"))
    assert get(server, "/renamed", stranger) == b"content"
    for path in ("/renamed", "/file"):
        assert [asked["authorization"] for asked in server.headers_of(path)] == [f"Bearer {SECRET}"]
    everything = str([*stranger.asked, *server.headers_of("/back")])
    assert stranger.headers_of("/cdn")
    assert SECRET not in everything
    assert "authorization" not in everything.lower()


def test_a_token_with_a_line_break_is_refused_unseen(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_TOKEN", f"{SECRET}\r\nHost: evil")
    assert "TINY_TOKEN holds a space" in refusal(server, "/file")
    assert not server.asked


@pytest.mark.parametrize(
    ("status", "token", "told"),
    [
        (401, False, "make a token at https://tiny.example/tokens and set it as TINY_TOKEN"),
        (401, True, "does not accept the token in TINY_TOKEN"),
        (403, True, "accept its terms"),
        (404, False, "removed, renamed or made private"),
        (429, False, "wait 17 seconds"),
        (451, False, "where you are"),
        (418, False, "status 418"),
    ],
)
def test_a_refusal_says_what_to_do(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, status: int, token: bool, told: str
) -> None:
    if token:
        monkeypatch.setenv("TINY_TOKEN", SECRET)
    server.serve("/file", Reply(status=status, headers={"Retry-After": "17"}))
    assert told in refusal(server, "/file")
    assert len(server.asked) == 1


def test_a_login_page_is_told_as_such(server: FileServer) -> None:
    server.serve("/file", to("/login?returnUrl=%2Ffile&reason=download-auth"))
    server.serve("/login", Reply(b"<html>", headers={"Content-Type": "text/html"}))
    assert "set it as TINY_TOKEN" in refusal(server, "/file")


def test_the_next_address_of_a_name_is_tried(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, "localhost", "127.0.0.2", "127.0.0.1")  # nobody listens at the first
    named = replace(server, origin=server.origin.replace("127.0.0.1", "localhost"))
    server.serve("/file", Reply(b"here"))
    assert get(named, "/file") == b"here"


def test_json_is_asked_again_after_a_fault_and_limited(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> object:
        return read_json(f"{server.origin}/api", site_at(server), patience(server))

    server.serve("/api", Reply(status=503), Reply(b'{"a": 1}'))
    assert ask() == {"a": 1}
    server.serve("/api", Reply(b'{"a": 1}', cut=3), Reply(b'{"a": 2}', chunked=True))
    assert ask() == {"a": 2}
    server.serve("/api", Reply(status=500))
    with pytest.raises(ModelError, match=r"status 500 \(2 attempts\)"):
        ask()
    server.serve("/api", Reply(b"<html>"))
    with pytest.raises(ModelError, match="something else than JSON"):
        ask()
    server.serve("/api", Reply(b"[" * 100_000))
    with pytest.raises(ModelError, match="something else than JSON"):
        ask()
    monkeypatch.setattr("tools.public_web.MOST_JSON", 1000)
    server.serve("/api", Reply(b" " * 2000, length=False))
    with pytest.raises(ModelError, match="more than 1,000 bytes"):
        ask()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that nobody vouches for, with its key."""
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=tiny"
    added = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(file), "-out", str(file)]
    try:
        subprocess.run([*command.split(), *added], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl makes no certificate here")
    if file.read_text().count("BEGIN") < 2:
        pytest.skip("this openssl does not write key and certificate into one file")
    return file


def test_a_certificate_must_be_vouched_for(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with file_server(certificate) as server:
        server.serve("/file", Reply(b"sealed"))
        assert "the certificate of 127.0.0.1 is not valid" in refusal(server, "/file")
        assert not server.asked
        monkeypatch.setitem(os.environ, "SSL_CERT_FILE", str(certificate))
        assert get(server, "/file") == b"sealed"
