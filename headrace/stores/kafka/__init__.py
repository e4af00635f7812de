"""Views as topics: streams that others read."""

from headrace.stores.kafka.topic import KafkaTopic, live_topic

__all__ = ["KafkaTopic", "live_topic"]
