"""`tvq bench decode`: what a token costs that a model writes, early and far on."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs import recipe as recipes
from jobs.bench.forms import describe_model, machine, numbers_of_tokens
from jobs.bench.measurement import Spread
from jobs.compiler_options import compiler_options
from jobs.console import Console
from jobs.errors import UserError
from model.config import ModelConfig, validate

if TYPE_CHECKING:
    from model.sampling import Prefilled
    from model.transformer import Cache

_LAST_POSITION = 2**31 - 1
_DOCUMENT = 1
"""The number of a sequence's first document, which its first token, eos, begins."""
_MIB = 2**20


class Position(NamedTuple):
    """What a token costs after so many others."""

    position: int
    seconds_per_token: Spread
    """Of wall-clock time: the network, the filters, the draw."""
    ratio: Spread
    """That over the first position's, round by round."""
    calls: int
    """Calls in each round."""


class DecodeTimes(NamedTuple):
    """All positions, timed with one executable."""

    compile_seconds: float
    cache_bytes: int
    """Of a row, at any position."""
    positions: list[Position]


def decode_command(
    name: str,
    overrides: tuple[str, ...],
    *,
    positions: str,
    tokens: int,
    rounds: int,
    seconds: float,
    batch_size: int,
    console: Console,
    as_json: bool = False,
) -> None:
    """Times `tokens` decoded tokens of each of B rows, after each number of others.

    `name` is a recipe; `positions` are separated by commas.

    Raises:
        UserError, ConfigError: an unknown recipe or field, a position that is none, an impossible
            combination.
    """
    recipe = recipes.resolve(recipes.load(name, overrides))
    model, places = recipe.model, numbers_of_tokens(positions, "--positions")
    validate(model, recipe.optimizer)
    if max(places) + tokens > _LAST_POSITION:
        raise UserError(
            f"--positions: must end, with --tokens {tokens} after it, by {_LAST_POSITION:,}, got"
            f" {max(places):,}"
        )
    console.heading("bench decode")
    describe_model(console, name, model)
    console.line(
        f"measured  a decoded token (network, filters, draw), {tokens} of them a call,"
        f" {batch_size} rows at once; the cache is as after so many tokens, of random content"
    )
    console.line(f"clock     wall-clock; median of {rounds} rounds in which all take turns")
    console.line(f"machine   {machine()}")
    times = time_positions(model, places, tokens, batch_size, rounds, seconds, console)
    if as_json:
        console.json(
            {
                "bench": "decode",
                "name": name,
                "model": dataclasses.asdict(model),
                "batch_size": batch_size,
                "tokens": tokens,
                "clock": "wall",
                "rounds": rounds,
                "machine": machine(),
                "executables": 1,
                "compile_seconds": times.compile_seconds,
                "cache_bytes": times.cache_bytes,
                "results": [
                    each._asdict()
                    | {"seconds_per_token": each.seconds_per_token._asdict()}
                    | {"ratio": each.ratio._asdict()}
                    for each in times.positions
                ],
            }
        )
        return
    first = places[0]
    console.table(
        ["position", "ms/token", "least", "most", f"x at {first:,}", "least", "most", "tokens/s"],
        [
            [
                f"{each.position:,}",
                *(f"{1e3 * figure:.3f}" for figure in each.seconds_per_token),
                *(f"{figure:.3f}" for figure in each.ratio),
                f"{batch_size / each.seconds_per_token.median:,.0f}",
            ]
            for each in times.positions
        ],
    )
    console.result(
        f"one executable for all positions, compiled once in {times.compile_seconds:.1f} s; the"
        f" cache of a row has {times.cache_bytes / _MIB:.1f} MiB at each of them"
    )


def time_positions(
    model: ModelConfig,
    positions: list[int],
    n_tokens: int,
    batch_size: int,
    rounds: int,
    seconds: float,
    console: Console,
) -> DecodeTimes:
    """Compiles the decoding once, warms it up at each position, then lets the positions alternate.

    Calls are repeated until they last `seconds`.
    """
    import jax

    capacity = max(positions) + n_tokens
    decode = _compiled(model, batch_size, n_tokens, capacity)
    caches = [
        jax.block_until_ready(cache_after(model, batch_size, position, capacity))
        for position in positions
    ]

    def per_token(cache: "Cache", calls: int) -> float:
        began, decoded = time.perf_counter(), None
        for _ in range(calls):
            decoded = decode.call(cache)
        jax.block_until_ready(decoded)
        return (time.perf_counter() - began) / (calls * n_tokens)

    calls = []
    for cache in caches:
        per_token(cache, 1)  # the first call touches its memory for the first time
        calls.append(max(1, math.ceil(seconds / (n_tokens * per_token(cache, 1)))))
    taken: list[list[float]] = []
    with console.progress("round", rounds) as progress:
        for round_ in range(rounds):
            progress.update(round_)
            taken.append([per_token(*each) for each in zip(caches, calls, strict=True)])
        progress.update(rounds)
    return DecodeTimes(
        compile_seconds=decode.seconds,
        cache_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(caches[0].layers)) // batch_size,
        positions=[
            Position(
                position,
                Spread.of([times[index] for times in taken]),
                Spread.of([times[index] / times[0] for times in taken]),
                calls[index],
            )
            for index, position in enumerate(positions)
        ],
    )


class _Compiled(NamedTuple):
    call: Callable[["Cache"], Any]
    seconds: float


def _compiled(model: ModelConfig, batch_size: int, n_tokens: int, capacity: int) -> _Compiled:
    """Decoding after a cache that is its argument: one program, whatever the position in it."""
    import jax
    import jax.numpy as jnp

    from model.sampling import Filters, Prefilled, decode
    from model.transformer import initial_cache, initial_network

    network = jax.jit(lambda: initial_network(model, jax.random.key(0)))()
    # All rows go on to the end, whatever they draw.
    filters = Filters(temperature=0.8, top_p=0.95, ignore_eos=True)
    rows, key = jnp.arange(batch_size, dtype=jnp.int32), jax.random.key(1)

    def run(params: dict, codebooks: dict, prefilled: "Prefilled") -> Any:
        # The first token is drawn from the logits before it: the network runs for the others.
        return decode(model, params, codebooks, prefilled, rows, n_tokens + 1, key, filters)

    def argument(cache: "Cache") -> "Prefilled":
        return Prefilled(logits, cache)

    logits = jnp.zeros((batch_size, model.vocab_size), network.params["embedding"]["bias"].dtype)
    abstract = jax.eval_shape(lambda: initial_cache(model, batch_size, capacity))
    began = time.perf_counter()
    executable = (
        jax.jit(run, compiler_options=compiler_options())
        .lower(*network, argument(abstract))
        .compile()
    )
    taken = time.perf_counter() - began
    return _Compiled(lambda cache: executable(*network, argument(cache)), taken)


def cache_after(model: ModelConfig, batch_size: int, position: int, capacity: int) -> "Cache":
    """The cache of B rows after `position` tokens of one document, of random content.

    The window holds the newest M of them, and the counts sum to the others.
    """
    import jax
    import jax.numpy as jnp

    from model.transformer import Cache, initial_cache

    empty = initial_cache(model, batch_size, capacity)
    keys, values, codes, counts, means, documents, counted = empty.layers
    columns = jnp.arange(keys.shape[-2])
    # Attention to all keys has each at its position, else the newest is the last.
    filled = columns < position if model.attends_all_keys else columns >= len(columns) - position
    draws = iter(jax.random.split(jax.random.key(2), 4))

    def normal(leaf: jax.Array) -> jax.Array:
        return jax.random.normal(next(draws), leaf.shape, leaf.dtype)

    older = max(0, position - model.window)
    layers = empty.layers._replace(
        keys=jnp.where(filled[:, None], normal(keys), keys),
        values=jnp.where(filled[:, None], normal(values), values),
    )
    if codes is not None and counts is not None and means is not None:
        drawn = jax.random.randint(next(draws), codes.shape, 0, model.n_codes, codes.dtype)
        layers = layers._replace(
            codes=jnp.where(filled, drawn, codes),
            counts=jnp.full_like(counts, older / model.n_codes),
            means=normal(means) if older else means,
        )
    if documents is not None:
        layers = layers._replace(documents=jnp.where(filled, _DOCUMENT, documents))
    if counted is not None and older:
        layers = layers._replace(counted_document=jnp.full_like(counted, _DOCUMENT))
    of_rows = None if empty.document is None else jnp.full_like(empty.document, _DOCUMENT)
    return Cache(layers, jnp.int32(position), of_rows, empty.document_start)
