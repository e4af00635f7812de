"""The code of a consumer as one process has it.

Python reads modules once, but a plugin is made anew at every recovery, and what it reads then (templates) may have been edited meanwhile.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property

from headrace.consumer import Consumer, no_progress
from headrace.errors import Misconfigured
from headrace.fingerprint import files_print, fingerprint
from headrace.settings import Settings
from headrace.waiting import check_code


class Code:
    """Makes the consumers of one class."""

    def __init__(self, consumer: type[Consumer], settings: Settings, name: str) -> None:
        """Read nothing yet."""
        self._consumer, self._settings, self._name = consumer, settings, name
        self._files = ""

    @cached_property
    def fingerprint(self) -> str:
        """Return that of this process's code, as it is when this is asked first; a plugin may raise anything."""
        self._files = files_print(self._consumer)  # first: what is saved meanwhile is seen to have changed
        return fingerprint(self._consumer)

    def make(self) -> Consumer:
        """Make one, of whatever is in its files: it is asked, and applies nothing."""
        made = self._consumer(self._settings, self._name)
        made.progress = no_progress
        return made

    def make_same(self) -> Consumer:
        """Make one that applies. Raises Misconfigured: `other-code`, where files were changed, whatever else that makes it fail by."""
        try:
            return self.make()
        finally:
            if not self._has_its_files():
                said = f"A file of {self._name} is not what it was when its process was started."
                raise Misconfigured("other-code", said, "Start its process again.")

    def check(self, wanted: str | None) -> None:
        """Refuse to build by code that its files have no more, or of another fingerprint than is `wanted`. Raises `other-code`."""
        if not self._is_in_files():
            said = f"The code of {self._name} was changed after its process had been started."
            raise Misconfigured("other-code", said, f"Start that again, then: headrace rebuild {self._name}")
        if wanted is not None:
            check_code(self._name, self.fingerprint, wanted)

    def _has_its_files(self) -> bool:
        with suppress(Exception):  # they are gone, say
            return files_print(self._consumer) == self._files
        return False

    def _is_in_files(self) -> bool:
        with suppress(Exception):  # they are gone, or half written
            return fingerprint(self._consumer) == self.fingerprint
        return False
