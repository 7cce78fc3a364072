"""Questions asked of mixtures; the answers are plain data, printed by cli/.

overview  what is in it: lengths, rows by source, what a store holds
rows      rows with their texts; those that were dropped are read from the sources again
why       the ledger, and the story of one row
diff      two mixtures
reasons   the reasons and their evidence in words
"""

from prefmix.inspect.diff import Diff, FileChange, RecipeChange, diff
from prefmix.inspect.overview import (
    Lengths,
    Listed,
    check_whole,
    lengths,
    listing,
    overview,
    rows_by_source,
    size_bytes,
)
from prefmix.inspect.reasons import SENTENCES, evidence, matching, sentence
from prefmix.inspect.rows import Dropped, Row, dropped_rows, kept_rows, sample, sample_drops
from prefmix.inspect.why import Story, drop_counts, why

__all__ = [
    "SENTENCES",
    "Diff",
    "Dropped",
    "FileChange",
    "Lengths",
    "Listed",
    "RecipeChange",
    "Row",
    "Story",
    "check_whole",
    "diff",
    "drop_counts",
    "dropped_rows",
    "evidence",
    "kept_rows",
    "lengths",
    "listing",
    "matching",
    "overview",
    "rows_by_source",
    "sample",
    "sample_drops",
    "sentence",
    "size_bytes",
    "why",
]
