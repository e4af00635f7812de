"""The shop's search index in Elasticsearch."""
