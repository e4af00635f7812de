"""The log: Kafka, as headrace uses it. The only package that imports `confluent_kafka`.

`Log` names the topics of one source and reads them; `CutWriter` writes one Kafka transaction a cut; `Reader` hands out cut-aligned batches,
`FeedReader` those of a Debezium feed.
"""

from headrace.log.feed import FeedReader
from headrace.log.lag import Lag
from headrace.log.log import Log
from headrace.log.reader import Reader
from headrace.log.writer import CutWriter

__all__ = ["CutWriter", "FeedReader", "Lag", "Log", "Reader"]
