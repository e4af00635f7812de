"""Documents in Elasticsearch: `ElasticsearchIndex` keeps them, `SearchReader` finds them."""

from headrace.stores.elasticsearch.index import ElasticsearchIndex
from headrace.stores.elasticsearch.reader import SearchReader

__all__ = ["ElasticsearchIndex", "SearchReader"]
