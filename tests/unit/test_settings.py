"""Settings: the environment wins over the file, and what is not known is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.cli import app
from headrace.errors import Misconfigured
from headrace.log import kafka
from headrace.log.registry import Registry
from headrace.settings import Settings, environment, load, table
from headrace.stores.elasticsearch.client import client as elasticsearch
from headrace.stores.redis.client import client as redis


def test_a_record_may_not_be_larger_than_librdkafka_sends() -> None:
    most = 1_000_000_000 - 1024 * 1024
    kafka.producer(load({"HEADRACE_MESSAGE_MAX_BYTES": str(most)}))
    with pytest.raises(Misconfigured, match=str(most)) as caught:
        load({"HEADRACE_MESSAGE_MAX_BYTES": str(most + 1)})
    assert caught.value.code == "bad-setting"


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text('source = "file"\npartitions = 3\n')
    settings = load({"HEADRACE_SOURCE": "shop"}, config=file)
    assert (settings.source, settings.partitions, settings.slot) == ("shop", 3, "headrace")


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text("cut_ms = 7")
    assert load({"HEADRACE_CONFIG": str(file)}).cut_ms == 7


@pytest.mark.parametrize(
    ("environ", "code", "said"),
    [
        ({"HEADRACE_PARTITION": "1"}, "unknown-setting", "HEADRACE_PARTITIONS"),
        ({"HEADRACE_NONSENSE": "1"}, "unknown-setting", "headrace settings"),
        ({"HEADRACE_PORT": "9092"}, "unknown-setting", "HEADRACE_PORT"),
        ({"HEADRACE_KAFKA_PORT": "9092"}, "unknown-setting", "HEADRACE_KAFKA"),
        ({"HEADRACE_SERVICE_PORTS": "80"}, "unknown-setting", "HEADRACE_SERVICE_PORTS"),
        ({"HEADRACE_CUT_MS": "soon"}, "bad-setting", "HEADRACE_CUT_MS"),
        ({"HEADRACE_CUT_MS": "-1"}, "bad-setting", "HEADRACE_CUT_MS"),
        ({"HEADRACE_PARTITIONS": "0"}, "bad-setting", "HEADRACE_PARTITIONS='0' is less than 1"),
        ({"HEADRACE_CUT_RECORDS": "0"}, "bad-setting", "HEADRACE_CUT_RECORDS"),
        ({"HEADRACE_CONFIG": "no/such/file.toml"}, "config-file", "HEADRACE_CONFIG"),
    ],
)
def test_bad_settings_are_refused_by_name(environ: dict[str, str], code: str, said: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        load(environ)
    assert caught.value.code == code
    assert said in str(caught.value)


def links(name: str, port: str) -> dict[str, str]:
    """Return the variables that Kubernetes makes of a Service with one port, called `sql`."""
    at = f"{name}_PORT_{port}_TCP"
    return {
        f"{name}_SERVICE_HOST": "10.0.0.1",
        f"{name}_SERVICE_PORT": port,
        f"{name}_SERVICE_PORT_SQL": port,
        f"{name}_PORT": f"tcp://10.0.0.1:{port}",
        at: f"tcp://10.0.0.1:{port}",
        f"{at}_PROTO": "tcp",
        f"{at}_PORT": port,
        f"{at}_ADDR": "10.0.0.1",
    }


def test_what_kubernetes_tells_of_services_is_no_setting() -> None:
    told = links("HEADRACE", "80") | links("HEADRACE_WAREHOUSE", "8790") | {"HEADRACE_SOURCE": "shop"}
    assert load(told) == Settings(source="shop")
    assert [name for name, *_ in table() if re.search("_PORT|_SERVICE", name)] == []


@pytest.mark.parametrize("name", links("HEADRACE", "80"))
def test_such_a_name_is_refused_in_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text(f'{name.removeprefix("HEADRACE_").lower()} = "tcp://10.0.0.1:80"')
    with pytest.raises(Misconfigured) as caught:
        load({}, config=file)
    assert caught.value.code == "unknown-setting"


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text("source = [")
    with pytest.raises(Misconfigured, match=r"headrace\.toml"):
        load({}, config=file)


def test_a_file_in_another_encoding_is_named_and_not_quoted(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_bytes('dsn = "postgresql://x:geheimnisvoll-ü@db/shop"'.encode("latin-1"))
    with pytest.raises(Misconfigured, match=r"headrace\.toml.*not UTF-8") as caught:
        load({}, config=file)
    assert (caught.value.code, caught.value.__cause__) == ("config-file", None)


@pytest.mark.parametrize("text", ['["a:9092", "x:hidden@b:9092"]', '{host = "hidden"}'])
@pytest.mark.parametrize("name", ["kafka", "partitions"])
def test_several_values_where_one_is_wanted_are_refused(tmp_path: Path, name: str, text: str) -> None:
    """They were taken as the text of a list."""
    file = tmp_path / "headrace.toml"
    file.write_text(f"{name} = {text}")
    with pytest.raises(Misconfigured, match=f"HEADRACE_{name.upper()} is a (list|table)") as caught:
        load({}, config=file)
    assert caught.value.code == "bad-setting"
    assert "hidden" not in str(caught.value)


def test_the_environment_of_settings_gives_them_back() -> None:
    settings = Settings(source="shop", partitions=4)
    assert environment(settings) == {"HEADRACE_SOURCE": "shop", "HEADRACE_PARTITIONS": "4"}
    assert load(environment(settings)) == settings


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://x:secret@db/shop",
        "postgresql://db/shop?user=x&password=secret&connect_timeout=5",
        "host=db user=x password=secret dbname=y",
        r"host=db password = 'secret \'secret' dbname=y",
    ],
)
def test_no_form_of_a_password_is_printed(dsn: str) -> None:
    shown = CliRunner().invoke(app, ["settings", "--json"], env={"HEADRACE_DSN": dsn}).stdout
    assert "***" in shown
    assert "db" in shown
    assert "secret" not in shown


def test_options_for_kafka_are_shown_without_their_secrets(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text(
        '[kafka_options]\n"sasl.username" = "us"\n"sasl.password" = "sec,ret=\\"1"\n"ssl.key.pem" = "secret"\n'
    )
    settings = load({"HEADRACE_ELASTICSEARCH_API_KEY": "secret"}, config=file)
    assert load(environment(settings)) == settings
    shown = CliRunner().invoke(app, ["settings", "--json"], env=environment(settings)).stdout
    assert '{\\"sasl.username\\": \\"us\\", \\"sasl.password\\": \\"***\\", \\"ssl.key.pem\\": \\"***\\"}' in shown
    assert "sec" not in shown.replace("seconds", "").replace("security", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("sasl.password=hidden", "no JSON object"),
        ('["hidden"]', "no JSON object"),
        ('{"enable.idempotence": false}', "enable.idempotence"),
        ('{"isolation.level": "hidden"}', "isolation.level"),
        ('{"transactional.id": "hidden"}', "transactional.id"),
        ('{"sasl.password": ["hidden"]}', "sasl.password"),
    ],
)
def test_options_that_are_not_for_connecting_are_refused(options: str, said: str) -> None:
    with pytest.raises(Misconfigured, match=said) as caught:
        load({"HEADRACE_KAFKA_OPTIONS": options})
    assert caught.value.code == "bad-setting"
    assert "HEADRACE_KAFKA_OPTIONS" in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("options", ['{"ssl.colour": "red"}', '{"security.protocol": "SASL"}'])
def test_options_that_librdkafka_does_not_know_are_refused_by_name(options: str) -> None:
    settings = load({"HEADRACE_KAFKA_OPTIONS": options})
    for client in (kafka.admin, kafka.consumer, kafka.producer):
        with pytest.raises(Misconfigured, match="HEADRACE_KAFKA_OPTIONS") as caught:
            client(settings)
        assert caught.value.code == "bad-setting"


@pytest.mark.parametrize("named", ["ca", "certificate", "key"])
def test_a_file_for_kafka_that_is_not_there_is_named(named: str) -> None:
    settings = Settings(kafka_options=f'{{"security.protocol": "SSL", "ssl.{named}.location": "/no/such.pem"}}')
    for client in (kafka.admin, kafka.consumer, kafka.producer):
        with pytest.raises(Misconfigured, match=f"ssl.{named}.location") as caught:
            client(settings)
        assert (caught.value.code, "'/no/such.pem'" in caught.value.remedy) == ("bad-setting", True)


@pytest.mark.parametrize(
    ("address", "said"), [("https://u:hidden@es:9200", "no/such"), ("http://u:hidden@es:9200", "https")]
)
def test_a_ca_of_elasticsearch_that_cannot_be_used_is_told(address: str, said: str) -> None:
    with pytest.raises(Misconfigured, match=said) as caught:
        elasticsearch(Settings(elasticsearch=address, elasticsearch_ca="no/such"))
    assert caught.value.code == "bad-setting"
    assert "HEADRACE_ELASTICSEARCH_CA" in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_every_setting_has_a_meaning() -> None:
    assert all(meaning for _, _, meaning in table())


@pytest.mark.parametrize(
    ("strange", "said"),
    [
        (Settings(schema_registry="u:hidden@host:8081"), r"\*\*\*@host"),
        (Settings(schema_registry="https://u:hidden#1@host:8081"), r"\*\*\*@host"),
        (Settings(schema_registry_ca="no/such"), "HEADRACE_SCHEMA_REGISTRY_CA='no/such'"),
    ],
)
def test_a_registry_that_cannot_be_used_is_told_without_its_password(strange: Settings, said: str) -> None:
    with pytest.raises(Misconfigured, match=said) as caught:
        Registry(strange).schema(1)
    assert caught.value.code == "bad-setting"
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("address", ["elastic:hidden@host:9200", "https://u:hidden#1@host:9200"])
def test_an_address_that_a_store_cannot_read_is_told_without_its_password(address: str) -> None:
    for settings, client in (
        (Settings(elasticsearch=address), elasticsearch),
        (Settings(redis=address), redis),
    ):
        with pytest.raises(Misconfigured) as caught:
            client(settings)
        assert caught.value.code == "bad-setting"
        assert "hidden" not in str(caught.value)
        assert "***@host" in str(caught.value)
