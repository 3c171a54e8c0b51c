"""The log-probability of every token, as a Parquet file that plain pyarrow reads.

corpus    dictionary<string>  name within the mixture
doc_id    dictionary<string>
position  int64     of the target in its document, from 0; the eos is behind its last token
context   int32     tokens before it that the model saw
token     int32     the model's id: 1 is eos, the stored ids are 3 less
logprob   float32   natural logarithm
correct   bool      whether the model held it for the likeliest
"""

import itertools
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import UserError
from jobs.evaluation.scoring import SpanScores
from pipeline.document_table import DocumentTable
from pipeline.files import replace_durably, temporary_name

_TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("corpus", _TEXT, nullable=False),
        pa.field("doc_id", _TEXT, nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("context", pa.int32(), nullable=False),
        pa.field("token", pa.int32(), nullable=False),
        pa.field("logprob", pa.float32(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
    ]
)
_ROWS = 2**18
"""Of a row group: 5 MB as it comes."""


class ScoreDump:
    """Writes the file; it has its name once all is written, and none if that fails."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if no file can be written there."""
        self._path, self._temporary = path, temporary_name(path)
        self._pending: list[pa.RecordBatch] = []
        self._rows = 0
        try:
            self._writer = pq.ParquetWriter(self._temporary, SCHEMA, compression="zstd")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror or error}); give another file with"
                " --dump"
            ) from None

    def add(self, corpus: str, documents: DocumentTable, begin: int, scores: SpanScores) -> None:
        """Adds the targets of a span that begins at this position of the corpus's stream."""
        n = len(scores.nats)
        begins = documents.begins
        first, last = np.searchsorted(begins, [begin, begin + n - 1], side="right") - 1
        cuts = [0, *(begins[first + 1 : last + 1] - begin).tolist(), n]
        sizes = [end - start for start, end in itertools.pairwise(cuts)]
        within = np.repeat(begins[first : last + 1], sizes)
        columns = [
            pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([corpus])),
            pa.DictionaryArray.from_arrays(
                pa.array(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)),
                pa.array(documents.ids[first : last + 1]),
            ),
            pa.array(np.arange(begin, begin + n) - within),
            pa.array(np.arange(n, dtype=np.int32)),
            pa.array(scores.targets),
            pa.array(-scores.nats),
            pa.array(scores.correct),
        ]
        self._pending.append(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        self._rows += n
        if self._rows >= _ROWS:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._flush()
            self._writer.close()
            if kind is None:
                replace_durably(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches(self._pending).unify_dictionaries()
            self._writer.write_table(table, row_group_size=_ROWS)
            self._pending, self._rows = [], 0
