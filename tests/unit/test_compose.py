"""docker-compose.yml, the Dockerfile and .env.example agree with what the code reads, and with one another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from typer.main import get_command

from headrace import cli, plugins, settings
from headrace.log import kafka
from headrace.settings import Settings
from headrace_ops import ALL, artifacts

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "ops/Dockerfile").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()


def filled(text: str) -> str:
    """Fill in variables as compose does: the default where there is one, else a secret."""
    return re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", lambda m: m[3] if m[2] == "-" else "secret", text)


COMPOSE: dict[str, Any] = yaml.safe_load(filled(TEXT))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("headrace:")}
IMAGE_ENV = dict(re.findall(r"(HEADRACE_\w+)=(\S+)", DOCKERFILE))


def environment(service: dict[str, Any]) -> dict[str, str]:
    return IMAGE_ENV | {name: str(value) for name, value in service.get("environment", {}).items()}


@pytest.mark.parametrize("name", OURS)
def test_our_services_are_given_only_settings_that_exist(name: str) -> None:
    found = settings.load({k: v for k, v in environment(OURS[name]).items() if k.startswith("HEADRACE_")})
    assert found.source == "shop"
    assert found.state == found.warehouse.rpartition("/")[0] == "/var/lib/headrace"


def test_everyone_is_sent_to_services_and_ports_that_are_there() -> None:
    found = settings.load({k: v for k, v in environment(OURS["capture"]).items() if k.startswith("HEADRACE_")})
    inside = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(",")[0]
    assert (urlsplit(found.dsn).hostname, urlsplit(found.dsn).port) == ("postgres", 5432)
    assert found.kafka == inside.removeprefix("INSIDE://") == "kafka:19092"
    assert (urlsplit(found.elasticsearch).hostname, urlsplit(found.elasticsearch).port) == ("elasticsearch", 9200)
    assert (urlsplit(found.redis).hostname, urlsplit(found.redis).port) == ("redis", 6379)
    registry = urlsplit(found.schema_registry)
    assert (registry.hostname, registry.port) == ("registry", SERVICES["registry"]["environment"]["QUARKUS_HTTP_PORT"])
    assert registry.path == urlsplit(Settings().schema_registry).path
    assert found.warehouse_listen.rpartition(":")[0] in SERVICES


def test_all_of_ours_agree_on_the_settings_but_for_the_administrator() -> None:
    same = [
        {k: v for k, v in environment(service).items() if k.startswith("HEADRACE_") and k != "HEADRACE_DSN"}
        for service in OURS.values()
    ]
    assert all(settings == same[0] for settings in same)
    assert {urlsplit(environment(s)["HEADRACE_DSN"]).username for n, s in OURS.items() if n != "setup"} == {"headrace"}
    assert urlsplit(environment(SERVICES["setup"])["HEADRACE_DSN"]).username == "shop"


def test_the_servers_are_reached_from_the_host_where_the_defaults_look() -> None:
    default = Settings()
    outside = {
        "postgres": urlsplit(default.dsn).port,
        "kafka": int(default.kafka.rpartition(":")[2]),
        "elasticsearch": urlsplit(default.elasticsearch).port,
        "redis": urlsplit(default.redis).port,
        "registry": urlsplit(default.schema_registry).port,
    }
    for name in ALL:
        (published,) = SERVICES[name]["ports"]
        assert published == f"127.0.0.1:{outside[name]}:{outside[name]}"
    assert SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"].endswith(f"OUTSIDE://{default.kafka}")


def test_ports_are_published_on_loopback_only_and_never_the_warehouse() -> None:
    published = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert {name for name, ports in published.items() if ports} == {*ALL, "shop"}


def test_every_installed_consumer_has_its_service_and_its_own_folder() -> None:
    consumers = {name.removeprefix("consumer-"): s for name, s in SERVICES.items() if name.startswith("consumer-")}
    assert set(consumers) == set(plugins.installed())
    assert all(service["command"] == ["run", name] for name, service in consumers.items())
    folders = {service["volumes"][0] for service in consumers.values()}
    assert folders == {f"{name}:/var/lib/headrace" for name in consumers}


@pytest.mark.parametrize("name", OURS)
def test_each_command_is_one_that_headrace_has(name: str) -> None:
    words = list(OURS[name]["command"])
    command = commands()[words.pop(0)]
    if hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


@cache
def commands() -> dict[str, Any]:
    cli.add_commands(None)
    found: dict[str, Any] = vars(get_command(cli.app))["commands"]
    return found


def test_health_checks_ask_status_for_each_ones_own_lag() -> None:
    for name in OURS:
        if name in {"shop", "shop-load", "setup"}:
            continue
        asked = name.removeprefix("consumer-")
        assert OURS[name]["healthcheck"]["test"] == f"CMD headrace status --check {asked} --max-lag 60s".split()


def test_a_health_check_is_given_the_time_to_say_that_kafka_is_away() -> None:
    for service in OURS.values():
        if check := service.get("healthcheck"):
            assert int(check["timeout"].removesuffix("s")) > kafka.TIMEOUT + 5


def test_what_is_said_of_health_checks_shows_the_newest_of_them() -> None:
    """Docker keeps five, the oldest first."""
    (told,) = re.findall(r"docker inspect --format .*", (ROOT / "docs/operating.md").read_text())
    assert "{{range .State.Health.Log}}" in told


def test_what_starts_waits_for_health_and_for_setups_success() -> None:
    for service in SERVICES.values():
        for needed, how in service.get("depends_on", {}).items():
            once = SERVICES[needed]["restart"] == "no"
            if once:
                assert how["condition"] == "service_completed_successfully"
            elif how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[needed]
    assert "setup" in SERVICES["capture"]["depends_on"]
    assert "shop-load" in SERVICES["setup"]["depends_on"]


def test_whatever_runs_on_comes_back_and_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        if service["restart"] != "no":
            assert service["restart"] == "unless-stopped"
            assert "healthcheck" in service, name
    assert all(service["init"] for service in OURS.values())


def test_what_a_container_says_does_not_fill_the_disk() -> None:
    for name, service in SERVICES.items():
        assert {"max-size", "max-file"} <= service.get("logging", {}).get("options", {}).keys(), name


def test_images_are_pinned_to_the_versions_that_are_tested() -> None:
    def version(artifact: artifacts.Artifact) -> str:
        return artifact.coordinates[0].split(":")[2]

    assert SERVICES["postgres"]["image"] == f"postgres:{version(artifacts.POSTGRES).removesuffix('.0')}"
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{version(artifacts.KAFKA)}"
    assert SERVICES["elasticsearch"]["image"] == f"elasticsearch:{version(artifacts.ELASTICSEARCH)}"
    assert SERVICES["registry"]["image"] == f"apicurio/apicurio-registry:{version(artifacts.REGISTRY)}"
    assert re.fullmatch(r"redis:[78]\.\d+\.\d+", SERVICES["redis"]["image"])
    ours = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert ours
    assert {service["image"] for service in OURS.values()} == {f"headrace:{ours[1]}"}


def test_no_registry_is_named() -> None:
    images = [service["image"] for service in SERVICES.values()] + re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert not [image for image in images if "." in image.partition("/")[0].partition(":")[0]]
    assert "# syntax=" not in DOCKERFILE


def test_the_registry_is_optional_and_values_are_json_without_it() -> None:
    assert {name for name, service in SERVICES.items() if "profiles" in service} == {"registry"}
    assert environment(OURS["capture"])["HEADRACE_CODEC"] == "json"
    assert not [name for name, service in SERVICES.items() if "registry" in service.get("depends_on", {})]


def test_the_source_decodes_logically_and_kafka_takes_the_largest_record() -> None:
    assert SERVICES["postgres"]["command"] == ["postgres", "-c", "wal_level=logical"]
    kafka = SERVICES["kafka"]["environment"]
    assert kafka["KAFKA_MESSAGE_MAX_BYTES"] > Settings().message_max_bytes
    assert kafka["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


def test_every_secret_is_demanded_and_listed_in_the_example_without_a_value() -> None:
    demanded = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert demanded == set(re.findall(r"^(\w+)=$", EXAMPLE, re.MULTILINE))
    assert not re.findall(r"\$\{(?:\w+)\}", TEXT)
    optional = dict(re.findall(r"\$\{(\w+_PORT):-(\d+)\}", TEXT))
    assert optional == dict(re.findall(r"^#(\w+)=(\d+)$", EXAMPLE, re.MULTILINE))
    assert not [name for name in (*demanded, *optional) if name.startswith("HEADRACE_")], "would be an unknown setting"


def test_volumes_are_declared_and_mounted_files_are_there() -> None:
    mounts = [mount.split(":") for service in SERVICES.values() for mount in service.get("volumes", [])]
    named = {source for source, *_ in mounts if not source.startswith(".")}
    assert named == set(COMPOSE["volumes"])
    for source, *_ in mounts:
        assert not source.startswith(".") or (ROOT / source).is_file()


def test_the_image_is_built_of_folders_that_are_there_and_runs_as_nobody_special() -> None:
    stage = DOCKERFILE.rpartition("FROM ")[2]
    assert re.search(r"^USER headrace$", stage, re.MULTILINE)
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    ]
    ignored = (ROOT / ".dockerignore").read_text()
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}\n" in ignored
    assert "HEADRACE_TEMPLATES" in IMAGE_ENV


def test_a_killed_broker_is_started_as_the_other_backend_starts_it() -> None:
    script = (ROOT / "ops/kafka/start.sh").read_text()
    kafka = (ROOT / "ops/headrace_ops/kafka.py").read_text()
    for said in (
        "logger.controller.level=DEBUG",
        "Read-write operation",
        "maybeFenceStaleBroker generated 0 records",
        "broker.session.timeout.ms=100",
        ".kafka_cleanshutdown",
    ):
        assert said in script
        assert said in kafka
    assert SERVICES["kafka"]["environment"]["KAFKA_BROKER_SESSION_TIMEOUT_MS"] == 600000
    assert "broker.session.timeout.ms=600000" in kafka


FENCED = """
Read-write operation maybeFenceStaleBroker(7)
Fencing broker 1 because it is stale
Processed maybeFenceStaleBroker(7) in 3 us
"""


@pytest.mark.parametrize(("said", "code", "out"), [("", 1, "starting again"), (FENCED, 0, "the broker runs")])
def test_a_killed_broker_is_started_only_when_its_old_session_has_ended(
    tmp_path: Path, said: str, code: int, out: str
) -> None:
    script = (ROOT / "ops/kafka/start.sh").read_text().replace("seq 600", "seq 10")
    for place, name, does in (
        ("/opt/kafka/bin", "kafka-server-start.sh", f"echo '{said}'; exec sleep 30"),
        ("/etc/kafka/docker", "run", "echo the broker runs"),
        ("/tmp/headrace-controller", "", ""),  # noqa: S108 -- it is replaced
    ):
        script = script.replace(place, f"{tmp_path}{place}")
        (tmp_path / place[1:]).mkdir(parents=True)
        if name:
            (tmp_path / place[1:] / name).write_text(f"#!/bin/bash\n{does}\n")
            (tmp_path / place[1:] / name).chmod(0o755)
    (tmp_path / "meta.properties").touch()
    environ = {"KAFKA_LOG_DIRS": str(tmp_path), "KAFKA_NODE_ID": "1", "PATH": os.environ["PATH"]}
    environ |= {"KAFKA_CONTROLLER_QUORUM_VOTERS": "1@kafka:9093", "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER"}
    done = subprocess.run(["/bin/bash", "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, out in done.stdout) == (code, True), done.stdout + done.stderr
    assert ("the broker runs" in done.stdout) == (code == 0)


def test_compose_itself_accepts_the_file(tmp_path: Path) -> None:
    example = tmp_path / "env"
    example.write_text(re.sub(r"=$", "=secret", EXAMPLE, flags=re.MULTILINE))
    docker = shutil.which("docker") or "none"
    if subprocess.run(["/bin/sh", "-c", f"{docker} compose version"], capture_output=True, check=False).returncode:
        pytest.skip("there is no docker compose on this machine")
    command = [docker, "compose", "--env-file", str(example), "config", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    nothing = tmp_path / "nothing"
    nothing.touch()
    command[3] = str(nothing)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "see .env.example" in done.stderr


@pytest.mark.parametrize("file", ["docker-compose.yml", "docker-compose.own.yml"])
def test_a_file_that_is_put_in_as_told_is_in_all_of_our_containers(file: str) -> None:
    """A list in `x-headrace` gives way to that of a service: volumes there came to no consumer."""
    told = (ROOT / "docs/operating.md").read_text()
    found = re.search(r"^ +(x-headrace: &headrace\n) +(.*\n)\n +(secrets:\n) +(ca.pem: .*\n)", told, re.MULTILINE)
    assert found
    begins, item, ends, named = found.groups()
    text = (ROOT / file).read_text().replace(begins, f"{begins}  {item}") + f"\n{ends}  {named}"
    whole = yaml.safe_load(filled(text))
    ours = {name: one for name, one in whole["services"].items() if one["image"].startswith("headrace:")}
    assert {name for name, service in ours.items() if "ca.pem" not in str(service)} == set()
    assert {secret for service in ours.values() for secret in service["secrets"]} == set(whole["secrets"])
    assert "/run/secrets/ca.pem" in told


def test_a_consumer_beside_a_database_of_ones_own_has_nothing_of_the_one_that_it_extends() -> None:
    """With the healthcheck of the warehouse it was healthy as long as that was, whatever became of it."""
    told = (ROOT / "docs/operating.md").read_text()
    own = re.findall(r"### Your own database\n.*?\n### ", told, re.DOTALL)[0]
    (example,) = (yaml.safe_load(one) for one in re.findall(r"```yaml\n(.*?)```", told, re.DOTALL))
    (service,) = example["services"].values()
    copied = yaml.safe_load(filled((ROOT / "docker-compose.own.yml").read_text()))["services"]["consumer-warehouse"]
    named = {name for name in copied if "warehouse" in str(copied[name])} - {"environment"}
    assert named == {"command", "volumes", "healthcheck"} == service.keys() & named
    assert all(f"`{name}`" in own for name in named)
    assert "extends: {file: docker-compose.own.yml" in own


def test_the_file_for_a_database_of_ones_own_is_whole_and_as_the_other_but_for_the_source() -> None:
    text = (ROOT / "docker-compose.own.yml").read_text()
    own = yaml.safe_load(filled(text))["services"]
    assert own["kafka"] == SERVICES["kafka"]
    for name in ("capture", "consumer-warehouse"):
        same = [{k: v for k, v in service.items() if k != "environment"} for service in (own[name], SERVICES[name])]
        assert same[0] == same[1]
        settings.load({k: v for k, v in own[name]["environment"].items() if k.startswith("HEADRACE_")})
    assert {needed for service in own.values() for needed in service.get("depends_on", {})} <= own.keys()
    told = (ROOT / "docs/operating.md").read_text()
    wanted = set(re.findall(r"\$\{(\w+):\?", text))
    assert wanted == {"OWN_SOURCE", "OWN_DSN", "OWN_SETUP_DSN", "OWN_TABLES"}, "nothing is captured that nobody named"
    assert all(f"    {name}=" in told for name in wanted)
