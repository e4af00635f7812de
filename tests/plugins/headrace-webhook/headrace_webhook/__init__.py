"""Tells somebody of each change of an order. The header Idempotency-Key lets the receiver know what it has been told already."""

import os
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException

from headrace import codec
from headrace.change import Change
from headrace.effects import EffectConsumer, idempotency_key
from headrace.errors import Misconfigured, Poison, Transient


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Follow none: a redirected POST would be a GET without its body."""


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
                urllib.request.build_opener(_NoRedirect).open(request, timeout=10).close()
            except (OSError, HTTPException) as error:
                said, status = f"The webhook does not take it: {error!r}.", getattr(error, "code", 0)
                if 300 <= status < 400:
                    raise Misconfigured("webhook-elsewhere", said, "Change WEBHOOK to where it is now.") from error
                if 400 <= status < 500 and status not in (408, 429):
                    cursor = (change.table, change.key.decode())
                    raise Poison("webhook-refused", said, "Mend the row or the receiver.", cursor=cursor) from error
                raise Transient("webhook-away", said, "Change WEBHOOK.") from error
