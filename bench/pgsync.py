"""pgsync, from PyPI, in an environment of its own: what people use who want documents of joined tables in Elasticsearch.

It asks Postgres for each document (one query with lateral joins for a first load), and follows by triggers and a replication slot.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import orjson
import psycopg

from bench.program import Program
from bench.viewed import PRODUCT_MAPPINGS
from headrace.errors import Transient
from headrace.settings import Settings

VERSION: Final = "7.3.0"
INDEX: Final = "pgsync-products"
TUNING: Final = {"ELASTICSEARCH_CHUNK_SIZE": "5000", "QUERY_CHUNK_SIZE": "10000", "ELASTICSEARCH_TIMEOUT": "120"}
"""Its defaults but for the patience; one index of one shard without replicas, never refreshed while it loads."""
_SCHEMA: Final[dict[str, Any]] = {
    "index": INDEX,
    "setting": {"number_of_shards": 1, "number_of_replicas": 0, "refresh_interval": "-1"},
    "mapping": PRODUCT_MAPPINGS["properties"],
    "nodes": {
        "table": "products",
        "columns": ["id", "name", "description", "price"],
        "children": [
            {
                "table": "reviews",
                "columns": ["stars", "body"],
                "relationship": {"variant": "object", "type": "one_to_many"},
            }
        ],
    },
}


class Pgsync:
    """pgsync for one database; makes its triggers and its slot.

    Raises:
        Transient: `bench-program-ended`, `bench-slow`.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        """Install it, below the user's cache, and prepare the database."""
        self._bin = _installed()
        self._folder = folder
        known = psycopg.conninfo.conninfo_to_dict(settings.dsn)
        database = str(known["dbname"])
        (folder / "schema.json").write_bytes(orjson.dumps([_SCHEMA | {"database": database}]))
        redis = settings.redis.removeprefix("redis://").partition("/")[0].partition(":")
        self._environment = TUNING | {
            "PG_HOST": str(known["host"]),
            "PG_PORT": str(known["port"]),
            "PG_USER": str(known["user"]),
            "PG_DATABASE": database,
            "ELASTICSEARCH_URL": settings.elasticsearch,
            # The client of OpenSearch says the same and does not ask `GET /`, which our small Elasticsearch does not answer.
            "ELASTICSEARCH": "False",
            "OPENSEARCH": "True",
            "REDIS_HOST": redis[0],
            "REDIS_PORT": redis[2],
            "SCHEMA": str(folder / "schema.json"),
            "CHECKPOINT_PATH": str(folder),
        }
        self._run("bootstrap").wait(600)

    def load(self) -> Program:
        """Start its first load; the program ends with it."""
        return self._run("pgsync")

    def teardown(self) -> None:
        """Take its triggers and its slot away."""
        self._run("bootstrap", "--teardown").wait(600)

    def _run(self, script: str, *options: str) -> Program:
        command = [str(self._bin / "python"), str(self._bin / script), *options]
        return Program(f"pgsync-{script}", command, self._folder, self._environment)


def _installed() -> Path:
    """Return the folder of its programs. Raises Transient: `bench-no-pgsync`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"
    home = cache / f"pgsync-{VERSION}"
    if not (home / "bin/pgsync").exists():
        for command in (
            [sys.executable, "-m", "venv", str(home)],
            [str(home / "bin/python"), "-m", "pip", "install", "--quiet", f"pgsync=={VERSION}"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Transient("bench-no-pgsync", f"pgsync {VERSION} cannot be installed: {done.stderr[-500:]}")
    return home / "bin"
