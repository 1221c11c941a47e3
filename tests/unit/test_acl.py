"""What the ACLs of roles are made of: words that Kafka knows, for topics that there are."""

from __future__ import annotations

from typing import get_args

import pytest
from durably.broker import acl, kafka
from durably.broker.acl import OPTIONS, ROLES, required_acls
from durably_schemas import Catalogue


def test_kafka_knows_every_operation_and_resource_that_an_acl_may_name() -> None:
    assert set(kafka._OPERATIONS) == set(get_args(acl.Operation))
    assert set(kafka._RESOURCES) == set(get_args(acl.Resource))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_adds_to_its_role_and_takes_nothing(option: acl.Option) -> None:
    for role in OPTIONS[option]:
        plain = required_acls(role, Catalogue(), options=())
        assert set(plain) < set(required_acls(role, Catalogue(), options=[option]))


def test_only_topics_of_the_catalogue_are_granted() -> None:
    catalogue = Catalogue("shop")
    topics = {topic.name for topic in catalogue.topics()}
    for role in ROLES:
        options = [option for option, roles in OPTIONS.items() if role in roles]
        named = {need.name for need in required_acls(role, catalogue, options=options) if need.resource == "topic"}
        assert named <= topics | {"shop.requests."}
