"""What stands in ``deploy/`` fits the server: ports, paths, patience, users and names, and commands that really run.

Docker, Kubernetes and systemd are not here.  What they would do with these files
is done by hand as far as it goes: the image's commands run in a virtual
environment, probes are sent, settings are read from the environment that each
file makes.
"""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from front import CONFIG as NGINX
from front import SERVERS, program, replaced
from hopper import ask
from ports import free_port
from support import PATIENCE_S, ROOT

from server.configuration import SettingsError, load
from server.settings import Settings

DEPLOY = ROOT / "deploy"
CONFIG = DEPLOY / "waterspout.toml"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OBJECTS = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
UNIT = (DEPLOY / "waterspout.service").read_text()
DEFAULTS = Settings()
NEEDED_S = DEFAULTS.shutdown.grace + DEFAULTS.shutdown.timeout + DEFAULTS.mongo.publish_timeout
"""How long a process may take to go: whoever kills it earlier loses what it was about to store."""


def secrets() -> dict[str, str]:
    """The variables of ``secrets.example``."""
    lines = (DEPLOY / "secrets.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def settings(environ: Mapping[str, str]) -> Settings:
    """What the server makes of the shipped file and of these variables."""
    return load(config=CONFIG, environ=environ, flags={})


def kubernetes(kind: str, name: str = "waterspout") -> dict[str, Any]:
    """One object of kubernetes.yaml."""
    (found,) = [one for one in OBJECTS if one["kind"] == kind and one["metadata"]["name"] == name]
    return dict(found)


def pod() -> dict[str, Any]:
    """What one process of the Deployment is."""
    return dict(kubernetes("Deployment")["spec"]["template"]["spec"])


# --- the settings ----------------------------------------------------------------------
def test_the_file_is_closed_but_for_what_it_names() -> None:
    """Alone it lets nobody in; with the two secrets, users with tokens and back ends with the key, and no one else."""
    alone = settings({})
    assert alone.configured
    ways_in = (alone.client.insecure, alone.client.allow_anonymous_connect_without_token, alone.guests.enabled)
    keys = (alone.http_api.insecure, alone.http_api.key, alone.client.token.hmac_secret_key)
    assert not any((*ways_in, *keys, alone.admin.enabled))
    with_secrets = settings(secrets())
    assert with_secrets.http_api.key
    assert len(with_secrets.client.token.hmac_secret_key) >= 32
    (chat,) = with_secrets.channel.namespaces
    assert not any(getattr(chat, name) for name in type(chat).model_fields if name.endswith("_for_anonymous"))


def test_secrets_are_kept_out_of_the_repository() -> None:
    """The file that compose reads them from is ignored by git, and the image gets neither it nor anything like it."""
    assert "/deploy/secrets" in (ROOT / ".gitignore").read_text().splitlines()
    assert COMPOSE["x-waterspout"]["env_file"] == "secrets"
    assert not any("secret" in source for _, sources in copies() for source in sources)


# --- compose -----------------------------------------------------------------------------
def test_compose_runs_what_nginx_looks_for() -> None:
    """The processes have the names and the port that nginx.conf has, and believe nginx what it says about addresses."""
    ours = {name: one for name, one in COMPOSE["services"].items() if one.get("image") == "waterspout"}
    chosen = settings(environment())
    assert {f"{name}:{chosen.http_server.port}" for name in ours} == set(SERVERS)
    (subnet,) = COMPOSE["networks"]["default"]["ipam"]["config"]
    nginx = COMPOSE["services"]["nginx"]
    fixed = [one["networks"]["default"]["ipv4_address"] for one in (*ours.values(), nginx)]
    assert len(set(fixed)) == len(SERVERS) + 1
    assert all(ip_address(one) in ip_network(subnet["subnet"]) for one in fixed)
    assert chosen.http_server.trusted_proxies == (fixed[-1],)
    (published,) = nginx["ports"]
    assert f"listen {published.split(':')[1]};" in NGINX.read_text()
    assert all("ports" not in one for name, one in COMPOSE["services"].items() if name != "nginx")


def environment() -> dict[str, str]:
    """The variables of a process under compose."""
    return {**COMPOSE["x-waterspout"]["environment"], **secrets()}


def test_compose_names_its_own_stores() -> None:
    """The replica set has the members that the URL and its making name, and Redis is where the URL says."""
    chosen = settings(environment())
    members = [name for name, one in COMPOSE["services"].items() if one["image"].startswith("mongo:")]
    assert chosen.mongo.url == f"mongodb://{','.join(members)}/?replicaSet={COMPOSE['x-mongo']['command'][1]}"
    made = " ".join(COMPOSE["services"]["mongo-1"]["healthcheck"]["test"])
    assert re.findall(r'host: "([^"]+)"', made) == members
    assert f'_id: "{COMPOSE["x-mongo"]["command"][1]}"' in made
    assert chosen.redis.url.split("/")[2].split(":")[0] in COMPOSE["services"]
    volumes = {volume.split(":")[0] for name in members for volume in COMPOSE["services"][name]["volumes"]}
    assert volumes == set(COMPOSE["volumes"])


def test_compose_mounts_what_is_there() -> None:
    """Each file that a service mounts exists, and the image's build has its Dockerfile."""
    build = COMPOSE["x-waterspout"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    mounts = [mount for one in COMPOSE["services"].values() for mount in one.get("volumes", ()) if mount[0] == "."]
    assert len(mounts) == 3
    for mount in mounts:
        assert (DEPLOY / mount.split(":")[0]).is_file(), mount


# --- everybody's patience, and nobody's privileges ----------------------------------------
def test_everybody_waits_long_enough() -> None:
    """Compose, Kubernetes and systemd give a process the time that the settings' defaults let it take to leave."""
    assert Settings().shutdown == settings(environment()).shutdown
    assert float(COMPOSE["x-waterspout"]["stop_grace_period"].removesuffix("s")) >= NEEDED_S
    assert pod()["terminationGracePeriodSeconds"] >= NEEDED_S
    assert float(directive("TimeoutStopSec")) >= NEEDED_S


def test_nobody_is_root() -> None:
    """The image's user is a number other than 0, Kubernetes runs that one, and nothing may be gained or written."""
    (user,) = {" ".join(words) for name, words in instructions() if name == "USER"}
    uid, gid = map(int, user.split(":"))
    assert uid > 0 < gid
    rules = pod()["securityContext"]
    assert (rules["runAsNonRoot"], rules["runAsUser"], rules["runAsGroup"]) == (True, uid, gid)
    (container,) = pod()["containers"]
    rules = container["securityContext"]
    assert (rules["allowPrivilegeEscalation"], rules["readOnlyRootFilesystem"]) == (False, True)
    assert rules["capabilities"] == {"drop": ["ALL"]}
    for name in ("x-waterspout", "nginx"):
        one = COMPOSE.get(name) or COMPOSE["services"][name]
        assert (one["read_only"], one["cap_drop"]) == (True, ["ALL"])
        assert one["security_opt"] == ["no-new-privileges:true"]
    assert COMPOSE["services"]["nginx"]["user"].split(":")[0] != "0"
    assert (directive("DynamicUser"), directive("NoNewPrivileges")) == ("yes", "yes")


# --- Kubernetes ------------------------------------------------------------------------------
def test_kubernetes_has_the_ports_of_the_settings() -> None:
    """Clients reach the public port only; the internal one has a Service that nothing outside leads to."""
    (container,) = pod()["containers"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    server = settings(secrets()).http_server
    assert ports == {"clients": server.port, "internal": server.internal_port}
    assert [one["targetPort"] for one in kubernetes("Service")["spec"]["ports"]] == ["clients"]
    internal = kubernetes("Service", "waterspout-internal")["spec"]["ports"]
    assert [(one["targetPort"], one["port"]) for one in internal] == [("internal", server.internal_port)]
    annotations = kubernetes("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(server.internal_port)


def test_kubernetes_notices_within_the_grace() -> None:
    """A process that is not ready is found out before it stops listening, so that no preStop has to wait for that."""
    (container,) = pod()["containers"]
    probe = container["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] + 1 < DEFAULTS.shutdown.grace
    assert "lifecycle" not in container


def test_kubernetes_makes_only_variables_that_are_settings() -> None:
    """Names of the secret, as the file's head makes it, are settings; a Service's own variables would be faults."""
    head = (DEPLOY / "kubernetes.yaml").read_text()
    named = re.findall(r"--from-literal=(\w+)=", head)
    (container,) = pod()["containers"]
    environ = {one["name"]: one["value"] for one in container["env"]}
    values = {name: "mongodb://m/?replicaSet=rs0" if "MONGO" in name else "redis://r:6379/0" for name in named[2:]}
    chosen = settings({**environ, **values, **secrets()})
    assert set(named[:2]) == set(secrets())
    assert (bool(chosen.mongo.url), bool(chosen.redis.url)) == (True, True)
    assert pod()["enableServiceLinks"] is False
    with pytest.raises(SettingsError, match="WATERSPOUT_SERVICE_HOST"):
        settings({"WATERSPOUT_SERVICE_HOST": "10.0.0.1"})


def test_the_route_cuts_no_stream() -> None:
    """The way in leads to the public Service at the port that it has, and has no time limit for a response."""
    (rule,) = kubernetes("HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s"}
    (backend,) = rule["backendRefs"]
    service = kubernetes("Service", backend["name"])
    assert [one["port"] for one in service["spec"]["ports"]] == [backend["port"]]
    for one in OBJECTS:
        if one["kind"] in ("Service", "PodDisruptionBudget"):
            wanted = one["spec"]["selector"].get("matchLabels", one["spec"]["selector"])
            assert wanted == kubernetes("Deployment")["spec"]["template"]["metadata"]["labels"], one["metadata"]


# --- systemd ---------------------------------------------------------------------------------
def directive(name: str) -> str:
    """The value of a directive of the unit, which must be there once."""
    (found,) = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    return str(found)


def test_the_unit_is_understood(tmp_path: Path) -> None:
    """systemd itself has no complaint about it, with our own executable in place of the installed one."""
    analyze = program("systemd-analyze", "systemd")
    unit = tmp_path / "waterspout.service"
    unit.write_text(replaced(UNIT, {"/opt/waterspout/bin/waterspout": sys.executable}))
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_has_its_folder_and_its_files() -> None:
    """History lies where the unit may write; what its head tells to install is there, and its secrets are optional."""
    assert directive("WorkingDirectory") == f"%S/{directive('StateDirectory')}"
    assert not Path(settings(secrets()).sqlite.path).is_absolute()
    for name in re.findall(r"deploy/([\w.]+)", UNIT):
        assert (DEPLOY / name).is_file(), name


# --- the image ---------------------------------------------------------------------------------
def instructions() -> list[tuple[str, list[str]]]:
    """The Dockerfile's instructions, each with its words."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split()[1:]) for line in lines if line.strip()]


def copies() -> list[tuple[str, list[str]]]:
    """What is copied out of the source: the target and the sources of each COPY."""
    found = [words for name, words in instructions() if name == "COPY" and not words[0].startswith("--from")]
    return [(words[-1], words[:-1]) for words in found]


def array(name: str) -> list[str]:
    """The command of an instruction in exec form."""
    (words,) = [words for instruction, words in instructions() if instruction == name]
    text = " ".join(words)
    return list(map(str, json.loads(text[text.index("[") :])))


def test_the_image_copies_what_is_there_and_visible() -> None:
    """Each source of a COPY exists, and the ignore file lets the build see it."""
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    shown = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    sources = [source for _, found in copies() for source in found]
    assert sorted(sources) == sorted(shown)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch(source, line) for line in ignored if not line.startswith(("!", "#")) and line != "*")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the build makes: the Dockerfile's own command, run on what it copies, in a folder instead of /opt."""
    folder = tmp_path_factory.mktemp("image")
    source = folder / "source"
    for target, names in copies():
        if target.startswith("/"):
            continue
        for name in names:
            place = source / target / (Path(name).name if (ROOT / name).is_file() else "")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, place)
    (build, _) = [" ".join(words) for name, words in instructions() if name == "RUN"]
    here = {"/opt/waterspout": f"{folder}/opt", "--no-cache-dir ": "", "python -m": f"{sys.executable} -m"}
    command = replaced(build, here)
    done = subprocess.run(["sh", "-c", command], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "opt"


@contextmanager
def running(image: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """What the image starts, with ports of its own; gives the process and its environment."""
    server = settings(secrets()).http_server
    ports = {name: str(free_port()) for name in ("port", "internal_port")}
    environ = {f"WATERSPOUT_HTTP_SERVER__{name.upper()}": port for name, port in ports.items()}
    (entry,) = array("ENTRYPOINT")
    command = [entry, *replaced(shlex.join(array("CMD")), {"/etc/waterspout/waterspout.toml": str(CONFIG)}).split()]
    environ |= {**secrets(), "PATH": f"{image}/bin:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    assert (server.address, server.internal_address) == ("", ""), "inside a container, from everywhere"
    log = folder / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [str(image / "bin" / command[0]), *command[1:]],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            assert "listening" in process.stdout.readline(), log.read_text()
            yield process, environ
        finally:
            process.kill()


async def test_the_image_runs_and_is_healthy(image: Path, tmp_path: Path) -> None:
    """Its command serves clients outside, probes and back ends inside; its health check fails once it is gone."""
    with running(image, tmp_path) as (process, environ):
        outside, inside = (int(environ[f"WATERSPOUT_HTTP_SERVER__{name}"]) for name in ("PORT", "INTERNAL_PORT"))
        assert (await ask(outside, "/v1/status")).json["configured"] is True
        (container,) = pod()["containers"]
        annotations = kubernetes("Deployment")["spec"]["template"]["metadata"]["annotations"]
        probes = [container[name]["httpGet"]["path"] for name in ("livenessProbe", "readinessProbe")]
        for path in (*probes, annotations["prometheus.io/path"]):
            assert [(await ask(port, path)).status for port in (inside, outside)] == [200, 404], path
        key = {"X-API-Key": secrets()["WATERSPOUT_HTTP_API__KEY"]}
        said = {"channel": "chat:1", "data": {}}
        answers = [await ask(port, "/api/publish", headers=key, body=said) for port in (inside, outside)]
        assert [answer.status for answer in answers] == [200, 404]

        check = [word.replace(":9000/", f":{inside}/") for word in array("HEALTHCHECK")]
        assert check != array("HEALTHCHECK")
        check[0] = str(image / "bin" / check[0])

        def health() -> int:
            return subprocess.run(check, env=environ, check=False, capture_output=True, timeout=PATIENCE_S).returncode

        assert await asyncio.to_thread(health) == 0
        process.kill()
        process.wait()
        assert await asyncio.to_thread(health) != 0


def test_the_installed_command_checks_the_shipped_file(image: Path, tmp_path: Path) -> None:
    """What the unit runs before the start finds no fault in the shipped file."""
    command = replaced(
        directive("ExecStartPre"),
        {"/opt/waterspout": str(image), "/etc/waterspout/waterspout.toml": str(CONFIG)},
    )
    done = subprocess.run(
        shlex.split(command), cwd=tmp_path, env=secrets(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
