"""The commands that make corpora and look into them."""

from typing import Any

import click

from jobs.cli.options import Root, console, json_option, root_option

_KINDS = (
    "auto", "text", "lines", "separator", "jsonl", "csv", "parquet",
    "enwik8", "pg19", "imagenet64", "images",
)  # fmt: skip


@click.command(
    epilog="""\b
Examples:
  tvq prepare ~/books --output corpora/books
  tvq prepare ~/code --include '**/*.py' --exclude '**/tests/**' --output corpora/code
  tvq prepare 'gs://bucket/crawl/*.jsonl.zst' --near-duplicates 0.8 --decontaminate -o corpora/web
  tvq prepare ~/books --tokenizer unigram --vocab-size 8192 --output corpora/pieces
  tvq prepare enwik8.zip --format enwik8 --output corpora/enwik8
  tvq prepare ~/pg19 --format pg19 --tokenizer unigram --vocab-size 32000 -o gs://bucket/pg19
  tvq prepare ~/imagenet64 --format imagenet64 --tokenizer images --output corpora/imagenet64
  tvq prepare --stdlib --output corpora/python"""
)
@click.argument("sources", nargs=-1)
@click.option(
    "--output", "-o", required=True, metavar="FOLDER",
    help="Folder of the corpus, or gs://bucket/folder; holds nothing else.",
)  # fmt: skip
@click.option("--stdlib", is_flag=True, help="The sources of this Python's standard library.")
@click.option("--include", multiple=True, help="Pattern of files to read (default: all).")
@click.option("--exclude", multiple=True, help="Pattern of files to leave out.")
@click.option(
    "--format", "format", type=click.Choice(_KINDS), default="auto", show_default=True,
    help="How files become documents; auto: by their ending, other files are one document each.",
)  # fmt: skip
@click.option(
    "--field", default="text", show_default=True,
    help="Column or key that holds the text, of jsonl, csv and parquet.",
)  # fmt: skip
@click.option("--separator", help="String between documents, of --format separator.")
@click.option(
    "--byte-splits", nargs=2, type=click.IntRange(0),
    help="Where validation and test begin, of --format enwik8 on another file than enwik8.",
)  # fmt: skip
@click.option(
    "--split-by", type=click.Choice(["hash", "name"]), default="hash", show_default=True,
    help="hash: of the document's id. name: train, valid, test ... in the path of the file.",
)  # fmt: skip
@click.option(
    "--validation", "validation_fraction", type=click.FloatRange(0, 1), default=0.05,
    show_default=True, help="Share of the documents held out for validation.",
)  # fmt: skip
@click.option(
    "--test", "test_fraction", type=click.FloatRange(0, 1), default=0.05,
    show_default=True, help="Share of the documents held out for the test.",
)  # fmt: skip
@click.option(
    "--normalize", multiple=True, type=click.Choice(["newlines", "bom", "nfc", "nfkc"]),
    help="Change the text: CRLF to LF, no byte order mark, a Unicode form; may be repeated.",
)  # fmt: skip
@click.option("--min-bytes", type=click.IntRange(0), default=1, help="Drop shorter documents.")
@click.option("--max-bytes", type=click.IntRange(1), help="Drop longer documents.")
@click.option("--keep-binary", is_flag=True, help="Keep documents with NUL bytes.")
@click.option("--quality", is_flag=True, help="Drop what does not read like text.")
@click.option(
    "--near-duplicates", type=click.FloatRange(0, 1, min_open=True), metavar="SIMILARITY",
    help="Drop documents that are so much like another, e.g. 0.8.",
)  # fmt: skip
@click.option(
    "--decontaminate", is_flag=True, help="Drop training documents that repeat a held-out one."
)
@click.option(
    "--tokenizer", default="bytes", show_default=True, metavar="TOKENIZER",
    help="bytes, images, unigram or bpe (SentencePiece, trained on the corpus), or a .model file.",
)  # fmt: skip
@click.option("--vocab-size", type=click.IntRange(1), help="Of unigram and bpe.  [default: 8192]")
@click.option(
    "--refresh-held-out", is_flag=True,
    help="Draw validation and test anew from all documents, not only train on new files.",
)  # fmt: skip
@json_option
def prepare(
    sources: tuple[str, ...],
    output: str,
    stdlib: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    refresh_held_out: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn files into a corpus: Arrow shards of tokens and a manifest.

    SOURCES are files, folders or patterns, on this machine or in gs://. Repeating the command goes
    on where it was interrupted, and does nothing when nothing changed. New files are added to
    train; the documents held out stay the same.
    """
    from jobs.corpora.prepare import PrepareOptions, prepare_command

    prepare_command(
        sources,
        output=output,
        stdlib=stdlib,
        include=include,
        exclude=exclude,
        refresh_held_out=refresh_held_out,
        options=PrepareOptions(**options),
        console=console(as_json),
        as_json=as_json,
    )


@click.command(
    epilog="""\b
Examples:
  tvq verify corpora/books
  tvq verify gs://bucket/pg19 --json"""
)
@click.argument("corpus")
@json_option
def verify(corpus: str, as_json: bool) -> None:
    """Read every byte of CORPUS and hold it against its manifest.

    Lengths, checksums, columns, counts, and the fingerprints made anew from ids and tokens. The
    first thing that is not as it was written is named, and the exit code is 2.
    """
    from jobs.corpora.verify import verify_command

    verify_command(corpus, console=console(as_json), as_json=as_json)


@click.command(
    epilog="""\b
Examples:
  tvq inspect corpora/books
  tvq inspect corpora/books --document chapters/3.txt
  tvq inspect corpora/books --diff corpora/books-without-duplicates
  tvq inspect corpora/books --step 12 --batch-size 8 --sequence-length 512 --seed 1
  tvq inspect --run tiny --step 12"""
)
@click.argument("corpus", required=False)
@click.option("--split", type=click.Choice(["train", "validation", "test"]), help="Only this one.")
@click.option("--document", metavar="ID", help="One document whole, or why it was dropped.")
@click.option("--diff", "other", metavar="OTHER", help="What differs between CORPUS and OTHER.")
@click.option(
    "--step", type=click.IntRange(0), metavar="N",
    help="The documents and the text behind batch N of a training, counted from 0.",
)  # fmt: skip
@click.option("--run", metavar="NAME", help="With --step: of this run, in place of CORPUS.")
@click.option(
    "--batch-size", type=click.IntRange(1), help="With --step: B; default: a new recipe's."
)
@click.option("--sequence-length", type=click.IntRange(1), help="With --step: T, likewise.")
@click.option("--update-length", type=click.IntRange(1), help="With --step: U, likewise.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="With --step: likewise.")
@click.option("--window", type=click.Choice(["stream", "document"]), help="With --step: likewise.")
@click.option("--shuffle-span", type=click.IntRange(1), help="With --step: shards, likewise.")
@root_option
@json_option
def inspect(
    corpus: str | None,
    split: str | None,
    document: str | None,
    other: str | None,
    step: int | None,
    run: str | None,
    root: Root,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what is in CORPUS: its sizes, lengths, drops and samples.

    Or one document, or what differs from another corpus, or what a training sees in one batch.
    """
    from jobs.errors import UserError

    asked = {"--document": document, "--diff": other, "--step": step, "--split": split}
    asked = [option for option, value in asked.items() if value is not None]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: give one of them")
    batch = [name for name, value in options.items() if value is not None]
    if step is None and (run is not None or batch):
        option = "run" if run is not None else batch[0].replace("_", "-")
        raise UserError(f"--{option}: goes with --step; add --step N")
    if (corpus is None) == (run is None):
        raise UserError("expected either CORPUS, or --run NAME with --step N")
    out = console(as_json)
    if step is not None:
        from jobs.corpora.batch_inspection import BatchOptions, batch_command

        batch_command(
            corpus,
            step,
            run=run,
            root=root,
            options=BatchOptions(**options),
            console=out,
            as_json=as_json,
        )
        return
    assert corpus is not None
    if other is not None:
        from jobs.corpora.difference_inspection import difference_command

        difference_command(corpus, other, console=out, as_json=as_json)
    elif document is not None:
        from jobs.corpora.inspection import document_command

        document_command(corpus, document, console=out, as_json=as_json)
    else:
        from jobs.corpora.inspection import card_command

        card_command(corpus, split=split, console=out, as_json=as_json)
