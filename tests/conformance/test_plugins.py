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
"""What they share with those of test_builtin.py is killed before each of its steps there."""


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
    stride = STRIDE

    @pytest.fixture
    def settings(self, kafka: Kafka) -> Settings:
        return replace(Settings(), kafka=kafka.address())
