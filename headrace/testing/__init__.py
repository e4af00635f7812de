"""What a plugin's author tests with: a log in memory, steps at which a process dies, a write fails or an answer is lost, and the suite
that every consumer passes.

    class TestTitles(ConsumerConformance):
        consumer = Titles
        history = {
            shape("public.products", id="integer", name="text"): [
                {"id": 1, "name": "kettle"}, {"id": 2, "name": "cup"}, {"id": 1, "name": "pot"}
            ]
        }

It needs the view's own server and nothing else: no Postgres, no Kafka, no headrace process.
"""

from headrace.testing.conformance import ConsumerConformance
from headrace.testing.history import History, shape
from headrace.testing.steps import FailAfterWrite, FailBeforeWrite, Steps, dies_before

__all__ = ["ConsumerConformance", "FailAfterWrite", "FailBeforeWrite", "History", "Steps", "dies_before", "shape"]
