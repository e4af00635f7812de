"""Tells somebody of each change of an order. The header Idempotency-Key lets the receiver know what it has been told already."""

import os
import urllib.request
from collections.abc import Sequence

from headrace import codec
from headrace.change import Change
from headrace.effects import EffectConsumer, idempotency_key
from headrace.errors import Transient


class Webhook(EffectConsumer):
    """One POST for each change, in their order."""

    tables = ("public.orders",)

    def effect(self, changes: Sequence[Change]) -> None:
        """Post what has become of each row; None stands for a row that was deleted."""
        for change in changes:
            body = codec.dumps({"key": codec.decode_key(change.key), "row": change.row})
            headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key(change)}
            request = urllib.request.Request(os.environ["WEBHOOK"], body, headers, method="POST")
            try:
                urllib.request.urlopen(request, timeout=10).close()
            except OSError as error:
                raise Transient("webhook-away", f"The webhook does not answer: {error}.", "Change WEBHOOK.") from error
