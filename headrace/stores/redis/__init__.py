"""Pages in Redis: `RedisPages` keeps them, `PageReader` reads them."""

from headrace.stores.redis.pages import RedisPages
from headrace.stores.redis.reader import Page, PageReader

__all__ = ["Page", "PageReader", "RedisPages"]
