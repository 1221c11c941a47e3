"""Settings come from arguments, else from the environment; what cannot be is named with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from durably.errors import ConfigurationError
from durably.settings import Settings


def test_without_a_url_the_message_names_option_variable_and_forms() -> None:
    with pytest.raises(ConfigurationError) as error:
        Settings.from_environment({})
    for part in ("--url", "DURABLY_URL", "kafka://host:port", "embedded:PATH"):
        assert part in str(error.value)


def test_kafka_has_12_partitions_by_default_and_embedded_4() -> None:
    assert Settings.from_environment({"DURABLY_URL": "kafka://a:1"}).partitions == 12
    assert Settings.from_environment({"DURABLY_URL": "embedded:x"}).partitions == 4


def test_every_variable_is_read() -> None:
    settings = Settings.from_environment(
        {
            "DURABLY_URL": "kafka://a:1",
            "DURABLY_NAMESPACE": "shop",
            "DURABLY_PARTITIONS": "3",
            "DURABLY_DISPATCH": "committed",
            "DURABLY_DATA_DIR": "/data",
            "DURABLY_GROUP_INSTANCE_ID": "p-1",
            "DURABLY_RETENTION": "30d",
            "DURABLY_STANDBY": "1",
            "DURABLY_CODE_VERSION": "4b2a163",
            "DURABLY_BUILD": "v2",
            "DURABLY_KAFKA_SASL_MECHANISM": "PLAIN",
            "DURABLY_KAFKA_SSL_CA_LOCATION": "/ca.pem",
        }
    )
    assert settings == Settings(
        url="kafka://a:1", namespace="shop", partitions=3, dispatch="committed", data_dir=Path("/data"),
        group_instance_id="p-1", retention=30 * 86_400_000, standby=True, kafka={"sasl.mechanism": "PLAIN", "ssl.ca.location": "/ca.pem"},
        code_version="4b2a163", build="v2",
    )  # fmt: skip


def test_arguments_stand_before_the_environment_and_empty_variables_count_as_unset() -> None:
    environ = {"DURABLY_URL": "kafka://a:1", "DURABLY_NAMESPACE": "", "DURABLY_PARTITIONS": "3"}
    settings = Settings.from_environment(environ, url="kafka://b:1", partitions=5)
    assert (settings.url, settings.partitions, settings.namespace) == ("kafka://b:1", 5, "durably")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PARTITIONS", "many"),
        ("PARTITIONS", "0"),
        ("PARTITIONS", "-1"),
        ("NAMESPACE", "a b"),
        ("DISPATCH", "late"),
        ("STANDBY", "maybe"),
        ("BUILD", "a/b"),
        ("RETENTION", "soon"),
        ("RETENTION", "-1s"),
        ("RETENTION", "19s"),
    ],
)
def test_a_bad_value_is_named_with_its_variable_and_the_remedy(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"DURABLY_{name} is '{value}': use "):
        Settings.from_environment({"DURABLY_URL": "kafka://a:1", f"DURABLY_{name}": value})


def test_the_catalogue_has_the_namespace_and_the_partitions() -> None:
    catalogue = Settings(url="embedded:x", namespace="shop", partitions=3).catalogue
    assert (catalogue.commands, catalogue.partitions) == ("shop.commands", 3)
