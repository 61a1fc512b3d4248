"""``run.py`` as an operator types it."""

import json
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
import websockets
from conftest import ExpectedLog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support import ROOT, SECRET, Client, Process, config, serving, settings
from tornado.httpclient import AsyncHTTPClient

from server.history.sqlite import SqliteHistory


def _run(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def _config_file(folder: Path, **sections: Any) -> str:
    file = folder / "some.json"
    file.write_text(json.dumps(config(**sections)))
    return str(file)


def test_help_names_every_command(tmp_path: Path) -> None:
    """--help says what there is, and succeeds."""
    done = _run(tmp_path, "--help")
    assert done.returncode == 0
    for word in ("--host", "--port", "--config", "check", "token"):
        assert word in done.stdout


def test_uvloop_is_missing(tmp_path: Path) -> None:
    """--uvloop where it is not installed says what to install, and starts nothing."""
    done = _run(tmp_path, "--uvloop")
    assert done.returncode == 2
    assert "pip install uvloop" in done.stderr


def test_another_event_loop(tmp_path: Path) -> None:
    """--uvloop takes the event loop of whatever is installed under that name: here one that says that it was asked."""
    (tmp_path / "uvloop.py").write_text(
        "import asyncio\n\ndef new_event_loop():\n    print('asked')\n    return asyncio.new_event_loop()\n"
    )
    busy = socket.create_server(("127.0.0.1", 0))
    with busy:
        port = str(busy.getsockname()[1])
        done = _run(tmp_path, "--uvloop", "--host", "127.0.0.1", "--port", port, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1  # the port is taken, which is the quickest way out
    assert done.stdout == "asked\n"


def test_check_prints_the_settings_without_secrets(tmp_path: Path) -> None:
    """check prints what is in force, later sources winning, and no secret."""
    done = _run(tmp_path, "check", "--config", _config_file(tmp_path), WATERSPOUT_HTTP_SERVER__PORT="8111")
    assert done.returncode == 0
    printed = json.loads(done.stdout)
    assert printed["http_server"]["port"] == 8111
    assert SECRET not in done.stdout
    assert printed["client"]["token"]["hmac_secret_key"] == "***"


def test_check_says_every_fault_at_once(tmp_path: Path) -> None:
    """check names each faulty setting with what was expected, on one line each, and fails."""
    file = _config_file(tmp_path, client={"ping_interval": 25}, channel={"max_length": "long"}, nonsense={"a": 1})
    done = _run(tmp_path, "check", "--config", file)
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3
    for name in ("client.ping_interval", "channel.max_length", "nonsense"):
        assert any(line.startswith(name) and "expected" in line for line in lines), (name, lines)


def test_token(tmp_path: Path) -> None:
    """token signs what the server itself accepts: for a user, for a channel, for so long."""
    done = _run(tmp_path, "token", "--user", "42", "--channel", "$x", "--ttl", "60", "--config", _config_file(tmp_path))
    claims = jwt.decode(done.stdout.strip(), SECRET, algorithms=["HS256"])
    assert claims["sub"] == "42"
    assert claims["channel"] == "$x"
    assert claims["exp"] - claims["iat"] == 60


def test_token_without_a_key_says_which_setting(tmp_path: Path) -> None:
    """With nothing to sign with, token names the setting and fails."""
    done = _run(tmp_path, "token", "--user", "42")
    assert done.returncode != 0
    assert "client.token.hmac_secret_key" in done.stderr


async def test_new_epochs_after_a_restore(tmp_path: Path) -> None:
    """new-epochs gives each channel a new life: who comes back with a position is told that it is gone."""
    sections = config(sqlite={"path": str(tmp_path / "w.db")})
    process = Process(tmp_path, sections)
    with process:
        client = await Client.connected(process.url)
        for channel in ("chat:a", "chat:b"):
            await client.ask("publish", channel=channel, data="before")
        epoch = (await client.ask("history", channel="chat:a"))["epoch"]
        await client.close()
    done = _run(tmp_path, "new-epochs", "--config", str(tmp_path / "config.json"))
    assert done.returncode == 0
    assert done.stderr.endswith("info epochs.renewed count=2\n")
    assert done.stdout.startswith("2 channels")
    with process:
        client = await Client.connected(process.url)
        result = await client.ask("subscribe", channel="chat:a", recover=True, offset=1, epoch=epoch)
        assert "recovered" not in result
        assert result["epoch"] not in ("", epoch)
        await client.close()


def test_new_epochs_beside_a_running_server_is_refused(tmp_path: Path) -> None:
    """The file belongs to the server that has it open: the command says so and changes nothing."""
    with Process(tmp_path, config(sqlite={"path": str(tmp_path / "w.db")})):
        done = _run(tmp_path, "new-epochs", "--config", str(tmp_path / "config.json"))
    assert done.returncode == 1
    assert "w.db" in done.stderr
    assert "Traceback" not in done.stderr


def test_redis_without_mongo_is_refused(tmp_path: Path) -> None:
    """Two processes that share a broker and no history would tell two truths: said at start and by check."""
    file = _config_file(tmp_path, redis={"url": "redis://127.0.0.1:6379"})
    for arguments in (("check", "--config", file), ("--config", file)):
        done = _run(tmp_path, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("redis.url: expected mongo.url beside it")


def test_an_unreadable_redis_url_is_said(tmp_path: Path) -> None:
    """What Redis' driver could not read ends the start with the setting's name, and without the password in it."""
    urls = {"url": "redis://:pass/word@127.0.0.1"}
    file = _config_file(tmp_path, redis=urls, mongo={"url": "mongodb://127.0.0.1"})
    for arguments in (("check", "--config", file), ("--config", file)):
        done = _run(tmp_path, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("redis.url: expected ")
        assert "pass" not in done.stderr.replace("password", "")


def test_open_server_stays_at_home(tmp_path: Path) -> None:
    """With nothing configured any address but the loopback is refused."""
    done = _run(tmp_path, "--host", "0.0.0.0")
    assert done.returncode != 0
    assert done.stderr.startswith("http_server.address")


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    """A port that is in use ends the start with one clear line."""
    with Process(tmp_path, config()) as process:
        done = _run(tmp_path, "--config", _config_file(tmp_path), "--port", str(process.port))
    assert done.returncode == 1
    assert "server.failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_in_use_is_said(tmp_path: Path) -> None:
    """A second server on the same file does not start, and names the file."""
    sections = config(sqlite={"path": str(tmp_path / "one.db")})
    with Process(tmp_path, sections):
        done = _run(
            tmp_path, "--config", _config_file(tmp_path, sqlite={"path": str(tmp_path / "one.db")}), "--port", "0"
        )
    assert done.returncode == 1
    assert "one.db" in done.stderr
    assert "Traceback" not in done.stderr


async def test_unconfigured_server_warns_and_serves(tmp_path: Path) -> None:
    """Nothing configured: a warning names the namespaces, and an anonymous client may use them."""
    with Process(tmp_path) as process:
        assert "server.open" in process.log.read_text()
        client = await Client.connected(process.url)
        await client.ask("subscribe", channel="chat:lobby")
        await client.ask("publish", channel="chat:lobby", data={"n": 1})
        assert (await client.push("pub", "chat:lobby"))["offset"] == 1
        await client.close()
        http = AsyncHTTPClient()
        assert (await http.fetch(process.http + "/health/live")).code == 200
        assert b"Waterspout" in (await http.fetch(process.http + "/")).body


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_goodbye(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and SIGINT send clients away with 3001, keep what was acknowledged, and end with code 0."""
    process = Process(tmp_path, config(sqlite={"path": str(tmp_path / "w.db")})).start()
    client = await Client.connected(process.url)
    await client.ask("publish", channel="chat:a", data="kept")
    process.send(number)
    assert await client.closed() == (3001, "shutdown")
    assert process.wait() == 0
    with process:
        client = await Client.connected(process.url)
        page = await client.ask("history", channel="chat:a", limit=10)
        assert [publication["data"] for publication in page["publications"]] == ["kept"]
        await client.close()
    assert "Traceback" not in process.log.read_text()


def _certificate(folder: Path) -> tuple[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "cert.pem").write_bytes(pem)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem.decode(), secret.decode()


async def test_tls(tmp_path: Path) -> None:
    """With http_server.tls the same port speaks HTTPS and WSS; certificate and key may be given as text."""
    certificate, key = _certificate(tmp_path)
    sections = config(http_server={"tls": {"enabled": True, "cert_pem": certificate, "key_pem": key}})
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    with Process(tmp_path, sections) as process:
        url = f"wss://localhost:{process.port}/connection/websocket"
        connection = await websockets.connect(url, ssl=context)
        client = Client(connection, "json", pongs=True)
        await client.ask("connect")
        await client.ask("subscribe", channel="chat:a")
        for number in range(50):
            await client.ask("publish", channel="chat:a", data="x" * 1000 * (number % 30))
        assert [publication["offset"] for publication in await client.publications("chat:a", 50)] == list(range(1, 51))
        await client.close()


async def test_a_locked_database_costs_publishers_error_100(log: ExpectedLog, tmp_path: Path) -> None:
    """While another program holds the file publishers get 100, the log says so once, and all else goes on."""
    log.expect("history.commit_failed")
    path = tmp_path / "w.db"
    async with serving(settings(), history=SqliteHistory(str(path))) as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:a")
        await client.ask("publish", channel="chat:a", data=1)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        reply = await client.call("publish", channel="chat:a", data=2)
        assert reply["error"] == {"code": 100, "message": "internal server error", "temporary": True}
        await client.ask("publish", channel="live:a", data="passing goes on")
        await client.ask("presence", channel="chat:a")
        other.execute("ROLLBACK")
        other.close()
        await client.ask("publish", channel="chat:a", data=3)
        published = await client.publications("chat:a", 2)
        assert [(publication["offset"], publication["data"]) for publication in published] == [(1, 1), (2, 3)]
        assert len(log.seen("history.commit_failed")) == 1
        await client.close()
