"""A record that cannot be applied is named by its key and by where it stands."""

from __future__ import annotations

from dataclasses import replace

from headrace.change import Change, Version
from headrace.consumer import Batch
from headrace.errors import Poison
from headrace.runner.poison import placed
from tests.fixtures.documents import PRODUCTS, REVIEWS


def change(table: str, key: str, offset: int, partition: int = 0) -> Change:
    return Change(table, "u", key.encode(), {}, Version(1, 7), offset, 1, 1, partition, offset)


BATCH = Batch(
    [change(PRODUCTS, '{"id":1}', 4), change(REVIEWS, '{"id":9}', 7), change(REVIEWS, '{"id":8}', 12)],
    None,
    None,
    loading=False,
)  # type: ignore[arg-type]


def test_the_offset_is_that_of_the_key_that_the_error_names() -> None:
    error = placed(Poison("render-failed", f'render failed for {PRODUCTS} {{"id":1}}: no.', "Mend render."), BATCH)
    assert (error.code, error.remedy) == ("render-failed", "Mend render.")
    assert error.message == f'render failed for {PRODUCTS} {{"id":1}}: no. See {PRODUCTS} partition 0 offset 4.'


def test_a_document_whose_joined_rows_changed_is_among_the_offsets_of_its_batch() -> None:
    error = placed(Poison("document-refused", "Elasticsearch refuses document '3'."), BATCH)
    assert error.message.endswith(f"See {PRODUCTS} partition 0 offset 4; {REVIEWS} partition 0 offset 7 to 12.")
    loading = placed(Poison("document-refused", "Elasticsearch refuses document '3'."), replace(BATCH, loading=True))
    assert loading.message.endswith("offset 7 to 12, or before.")
