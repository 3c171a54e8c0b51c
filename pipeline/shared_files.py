"""What all increments of a corpus share, made of the documents of the first: its tokenizer, and
the index of what is held out."""

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pipeline import records
from pipeline.contamination import ContaminationSettings, HeldOutIndex
from pipeline.plan import PrepareSettings
from pipeline.selection import LETTERS, TRAIN
from pipeline.sentencepiece_tokenizer import (
    SentencePieceSettings,
    reproducible_sample,
    train_sentencepiece,
)
from pipeline.storage import Store
from pipeline.tasks import Tasks
from pipeline.writing import (
    RangeTask,
    TokenizerFile,
    finished_scan,
    held_out_range,
    sample_range,
)


class SharedFiles(NamedTuple):
    """Where they lie in the corpus."""

    tokenizer: TokenizerFile
    held_out_index: str | None
    """None if new documents are not decontaminated."""

    def are_there(self, store: Store) -> bool:
        names = (self.tokenizer.model, self.held_out_index)
        return all(name is None or store.exists(name) for name in names)


def shared_files(
    settings: PrepareSettings, folder: str, fingerprint: str | None = None
) -> SharedFiles:
    """What there is to be in the folder of the first increment; `fingerprint` is that of the
    tokenizer of a corpus that is there."""
    has_model = settings.trains_tokenizer or settings.tokenizer_model is not None
    tokenizer = TokenizerFile(
        settings.tokenizer, f"{folder}/tokenizer.model" if has_model else None, fingerprint
    )
    return SharedFiles(tokenizer, f"{folder}/held-out.npy" if settings.contamination else None)


def make_shared_files(
    files: SharedFiles,
    settings: PrepareSettings,
    ranges: Sequence[RangeTask],
    store: Store,
    tasks: Tasks,
) -> None:
    """Make those that are missing, of the ranges of the first increment."""
    model, index = files.tokenizer.model, files.held_out_index
    if model is not None and not store.exists(model):
        if settings.sentencepiece is None:
            assert settings.tokenizer_model is not None
            store.write(model, settings.tokenizer_model)
        else:
            store.write(model, _train(settings.sentencepiece, ranges, tasks))
    if index is not None and settings.contamination and not store.exists(index):
        store.write(index, _index(settings.contamination, ranges, tasks))


def _train(settings: SentencePieceSettings, ranges: Sequence[RangeTask], tasks: Tasks) -> bytes:
    chosen = reproducible_sample(_training_documents(ranges), settings.sample_bytes)
    payloads = []
    for range_ in ranges:
        ids = records.document_ids(finished_scan(range_), range_.first_rows)
        if places := {at for at, doc_id in enumerate(ids) if doc_id in chosen}:
            payloads.append((range_, places))
    texts = _in_order(tasks, "tokenizer", sample_range, payloads)
    # In a task, for the trainer does not listen to Ctrl-C.
    ((_, model),) = tasks.run(train_sentencepiece, [(texts, settings)])
    return model


def _training_documents(ranges: Sequence[RangeTask]) -> Iterator[tuple[str, int]]:
    for range_ in ranges:
        scanned = finished_scan(range_)
        ids = records.document_ids(scanned, range_.first_rows)
        sizes = scanned.column("n_bytes").to_pylist()
        for doc_id, size, letter in zip(ids, sizes, range_.letters, strict=True):
            if letter == TRAIN:
                yield doc_id, size


def _index(settings: ContaminationSettings, ranges: Sequence[RangeTask], tasks: Tasks) -> bytes:
    held_out = set(LETTERS) - {TRAIN}
    payloads = [(range_, settings) for range_ in ranges if held_out & set(range_.letters)]
    data = io.BytesIO()
    documents = _in_order(tasks, "held-out", held_out_range, payloads)
    HeldOutIndex.build(documents, settings).save(data)
    return data.getvalue()


def _in_order(tasks: Tasks, stage: str, function: Any, payloads: Sequence[tuple]) -> list[Any]:
    """The lists that the ranges give, joined in the order of the ranges."""
    sizes = [range_.range_.size for range_, *_ in payloads]
    found = dict(tasks.stage(stage, function, payloads, sizes))
    return [item for index in range(len(payloads)) for item in found[index]]
