"""Views as topics: streams that others read."""

from headrace.stores.kafka.known import live_topic
from headrace.stores.kafka.topic import KafkaTopic

__all__ = ["KafkaTopic", "live_topic"]
