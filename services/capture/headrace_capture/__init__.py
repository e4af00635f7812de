"""Capture: from the write-ahead log of Postgres to the log in Kafka."""
