"""Whether the store has what is served yet: who applies nothing makes nothing anew, nor are effects begun anew unasked."""

from __future__ import annotations

from headrace.consumer import Consumer, Generation
from headrace.errors import Wiped


def check_held(consumer: Consumer, generation: Generation) -> None:
    """Refuse to open what the store has lost: made again it would stay empty; who looks at the store lets it go (I6).

    Raises:
        Wiped: `view-wiped`.
    """
    if generation.number not in {each.number for each in consumer.generations()}:
        said = f"The store has lost generation {generation.number} of {generation.consumer}."
        raise Wiped("view-wiped", said)
