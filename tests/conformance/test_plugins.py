"""Strangers' plugins pass the suite that is shipped for them: those of tests/plugins whose view is of documents."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest

from headrace.settings import Settings
from headrace.testing import ConsumerConformance, shape
from headrace_ops.kafka import Kafka
from headrace_ops.redis import Redis
from tests.integration.test_example_plugins import plugin

STRIDE = 11
"""Their stores are killed oftener elsewhere: Redis before each step in tests/faults/test_steps.py, of promotions and drops in TestPages;
Kafka before every third in TestStream."""


class TestSitemap(ConsumerConformance):
    consumer = plugin("sitemap")
    name = "sitemap"
    history: ClassVar = {
        shape("public.products", id="integer", category_id="integer"): [
            {"id": 2, "category_id": 5},
            {"id": 10, "category_id": 5},
            {"id": 2, "category_id": 7},
        ],
        shape("public.categories", id="integer", name="text"): [{"id": 5, "name": "a"}, {"id": 7, "name": "b"}],
    }
    test_a_column_less = None  # it can do without none
    stride = STRIDE

    @pytest.fixture
    def settings(self, redis_server: Redis) -> Settings:
        return replace(Settings(), redis=redis_server.address())


class TestOrderDetails(ConsumerConformance):
    consumer = plugin("order_details")
    name = "order_details"
    history: ClassVar = {
        shape("public.orders", id="integer", customer_id="integer", status="text"): [
            {"id": 2, "customer_id": 1, "status": "new"},
            {"id": 10, "customer_id": 1, "status": "new"},
            {"id": 2, "customer_id": 1, "status": "paid"},
        ],
        shape("public.customers", id="integer", name="text"): [{"id": 1, "name": "Ada"}],
    }
    test_a_column_less = None  # it can do without none
    test_every_lost_answer = test_every_write_that_does_not_arrive = None  # as of TestStream in test_builtin.py
    # Generations are its store's, whatever is rendered: TestStream has all of these.
    test_readers_are_pointed_at_one_generation = test_a_promotion_keeps_the_earlier_generation = None
    test_a_kill_between_every_two_steps_of_a_promotion = test_every_promotion_that_fails = None
    test_a_kill_between_every_two_steps_of_a_drop = test_every_drop_that_fails = None
    test_what_is_dropped_is_gone_and_nothing_else = test_what_is_dropped_while_it_is_live_is_live_no_more = None
    test_a_process_that_was_replaced_changes_nothing_any_more = None
    stride = STRIDE

    @pytest.fixture
    def settings(self, kafka: Kafka) -> Settings:
        return replace(Settings(), kafka=kafka.address())
