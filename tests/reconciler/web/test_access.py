"""Who may look and who may change: addresses, names, tokens, other sites' pages, TLS."""

from __future__ import annotations

import datetime
import ssl
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from adapters import Host
from reconciler.web import Access, read_token
from store.errors import BadAddress
from tests.reconciler.web.conftest import BEARER, TOKEN, Start, Worker
from tests.support import story


class TestToken:
    @pytest.mark.parametrize(
        ("header", "status", "error"),
        [
            (None, 401, "token_missing"),
            ("Bearer", 400, "token_malformed"),
            ("Bearer ", 400, "token_malformed"),
            ("Bearer a b", 400, "token_malformed"),
            ("Basic dTpw", 400, "token_malformed"),
            (TOKEN, 400, "token_malformed"),
            ("Bearer wrong", 401, "token_wrong"),
            (f"Bearer {TOKEN}x", 401, "token_wrong"),
            ("Bearer t\u00f6ken", 401, "token_wrong"),
        ],
    )
    async def test_refused_and_nothing_changes(
        self, web: Worker, host: Host, header: str | None, status: int, error: str
    ) -> None:
        """Without the right token a change is refused, says how, and leaves no trace in the log."""
        before = await story(web.reconciler.log)
        headers = {} if header is None else {"Authorization": header}
        answer = await web.post({"dry_run": False}, headers)
        assert (answer.status, answer.body["error"]) == (status, error)
        assert status != 401 or "Bearer" in answer.headers["WWW-Authenticate"]
        assert await story(web.reconciler.log) == before

    async def test_right_token(self, web: Worker, host: Host) -> None:
        """With the token a reconciliation runs."""
        assert (await web.post({})).body["processes"] == [host.process]

    async def test_without_a_token_nothing_can_be_changed(self, start: Start) -> None:
        """A worker that was given no token refuses every change, and says how to allow it."""
        answer = await (await start(token=None)).post({})
        assert (answer.status, answer.body["error"]) == (403, "changes_are_off")
        assert "--token-file" in answer.body["message"]

    def test_file_wins_over_environment(self, tmp_path: Path) -> None:
        """The token is the one line of the file, without its line end."""
        path = tmp_path / "token"
        path.write_text("from-file\n")
        assert read_token(path, "from-env") == "from-file"
        assert read_token(None, "from-env") == "from-env"
        assert read_token(None, None) is None

    @pytest.mark.parametrize("text", ["", "  \n", "two words", "caf\u00e9", "two\nlines"])
    def test_token_that_cannot_stand_in_a_header(self, tmp_path: Path, text: str) -> None:
        """An empty or unusable token is refused at the start, not at the first request."""
        path = tmp_path / "token"
        path.write_text(text)
        with pytest.raises(BadAddress, match="no usable token"):
            read_token(path, None)


class TestAddress:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "worker.internal"])
    def test_open_address_needs_a_token(self, host: str) -> None:
        """It refuses to listen on anything but loopback without a token."""
        with pytest.raises(BadAddress, match="--token-file"):
            Access(host, 9464).check()
        Access(host, 9464, "t").check()

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
    def test_loopback_does_not(self, host: str) -> None:
        """On loopback it listens without one."""
        Access(host, 9464).check()


class TestOtherSites:
    @pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example", "", "192.0.2.7"])
    async def test_other_host_names(self, web: Worker, name: str) -> None:
        """A name that was rebound to this address by DNS gets nothing, not even to read."""
        answer = await web.get("/api/fleet", Host=name)
        assert (answer.status, answer.body["error"]) == (421, "unknown_host")

    @pytest.mark.parametrize("name", ["localhost:1", "[::1]:80", "LOCALHOST", "worker.internal"])
    async def test_own_host_names(self, start: Start, name: str) -> None:
        """Loopback names, and the ones it was given, are answered to."""
        worker = await start(names=frozenset({"worker.internal"}))
        assert (await worker.get("/api/fleet", Host=name)).status == 200

    def test_open_address_answers_to_ip_addresses(self) -> None:
        """Probes ask by address; an address cannot be rebound, a name can."""
        access = Access("0.0.0.0", 9464, "t", names=frozenset({"worker.svc"}))
        assert access.answers_to("10.1.2.3:9464")
        assert access.answers_to("[fd00::1]:9464")
        assert access.answers_to("worker.svc")
        assert not access.answers_to("evil.example")

    async def test_probes_ask_under_any_name(self, web: Worker) -> None:
        """Health, readiness and metrics tell nothing secret, and answer to whoever asks."""
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await web.get(path, Host="worker.svc")).status in {200, 503}

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ],
    )
    async def test_forged_requests(self, web: Worker, headers: dict[str, str]) -> None:
        """A change asked for by another site's page is refused even with the token."""
        answer = await web.post({}, BEARER | headers)
        assert (answer.status, answer.body["error"]) == (403, "foreign_origin")

    async def test_form_posts(self, web: Worker) -> None:
        """What a form can send without asking first, plain text, is not taken."""
        answer = await web.send(
            "POST", "/api/reconcile", data="{}", headers={**BEARER, "Content-Type": "text/plain"}
        )
        assert (answer.status, answer.body["error"]) == (415, "not_json")

    async def test_headers_of_every_answer(self, web: Worker) -> None:
        """The page may load only from the worker, is framed by nobody, and allows no other origin."""
        for path in ("/", "/app.js", "/api/fleet", "/nowhere"):
            headers = (await web.get(path)).headers
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert "Access-Control-Allow-Origin" not in headers


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for localhost, made for this test."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert_path, key_path


class TestTls:
    async def test_https(self, start: Start, certificate: tuple[Path, Path]) -> None:
        """With a certificate it speaks HTTPS, with a chain that a client can check."""
        cert, key = certificate
        worker = await start(cert=cert, key=key)
        trusting = ssl.create_default_context(cafile=str(cert))
        address = worker.address.replace("127.0.0.1", "localhost")
        assert address.startswith("https://")
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting)) as session,
            session.get(address + "/healthz") as answer,
        ):
            assert answer.status == 200

    async def test_files_that_cannot_be_used(
        self, start: Start, certificate: tuple[Path, Path], tmp_path: Path
    ) -> None:
        """Half a pair, a missing file and a file of something else are told at the start."""
        cert, key = certificate
        nonsense = tmp_path / "nonsense"
        nonsense.write_text("nonsense")
        with pytest.raises(BadAddress, match="both"):
            await start(acts=False, cert=cert)
        for bad in (tmp_path / "nowhere", nonsense):
            with pytest.raises(BadAddress, match="cannot be used"):
                await start(acts=False, cert=bad, key=key)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("options", "needle"),
        [
            (["--http", "0.0.0.0:0"], "--token-file"),
            (["--token-file", "/nowhere/token"], "/nowhere/token cannot be read"),
            (["--tls-cert", "/nowhere/cert"], "both --tls-cert and --tls-key"),
        ],
    )
    def test_refused_before_anything_starts(self, options: list[str], needle: str) -> None:
        """What cannot be served safely is one line on standard error, status 2."""
        done = subprocess.run(
            [sys.executable, "-m", "reconciler", "worker", "--url", "redis://127.0.0.1:1", *options],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert needle in done.stderr
        assert done.stderr.count("\n") == 1
