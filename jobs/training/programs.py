"""The model's functions as the training loop calls them: compiled for its mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jobs.compiler_options import compiler_options
from jobs.recipe import Recipe
from model.sampling import Filters, decode, prefill
from model.sharding import abstract_state, on_mesh, replicated
from model.training import (
    SAMPLE_STREAM,
    Batch,
    TrainState,
    UpdateMetrics,
    evaluation_step,
    go_on_from,
    initial_state,
    kmeans_codebooks,
    train_step,
)


class Programs:
    """What runs on the devices; each program is compiled at its first call.

    A state that is given to one that returns a state is donated: there need not be room for two.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh):
        model, optimizer, training = recipe.model, recipe.optimizer, recipe.training
        length, parts = training.update_length, training.accumulate

        def create() -> TrainState:
            return initial_state(model, optimizer, training.seed)

        def step(
            state: TrainState, batch: Batch, flags: jax.Array
        ) -> tuple[TrainState, UpdateMetrics, jax.Array]:
            state, metrics = train_step(
                model, optimizer, length, state, batch,
                accumulate=parts, spike_deviations=training.spike_deviations,
            )  # fmt: skip
            return state, metrics, flags.max()

        def start_codebooks(state: TrainState, batch: Batch) -> TrainState:
            return kmeans_codebooks(model, length, state, batch, accumulate=parts)

        def evaluate(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
            nats = evaluation_step(model, state.params, state.codebooks, batch)
            return nats.sum(), batch.loss_mask.sum()

        def write(
            state: TrainState, prompts: jax.Array, filters: Filters, n_tokens: int
        ) -> jax.Array:
            params, codebooks = state.params, state.codebooks
            # Compiled in half the time (4.6 and 8.2 CPU-seconds for `tiny`), and no slower.
            rolled = dataclasses.replace(model, unrolled_layers=1)
            # The draws are the same at each update, so that what differs is the model.
            key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
            key = jax.random.fold_in(key, SAMPLE_STREAM)
            n_rows, n_read = prompts.shape
            read = prefill(rolled, params, codebooks, prompts, capacity=n_read + n_tokens)
            rows = jnp.arange(n_rows)
            return decode(rolled, params, codebooks, read, rows, n_tokens, key, filters).tokens

        self.abstract: TrainState = abstract_state(mesh, model, create)
        """Shapes and shardings of the state."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        jit = functools.partial(
            jax.jit, compiler_options=compiler_options(mesh.devices.flat[0].platform)
        )
        self.create: Callable[[], TrainState] = jax.jit(create, out_shardings=shardings)
        """The state before the first batch, each part made where it lies."""
        self.start_codebooks: Callable[[TrainState, Any], TrainState] = jit(
            on_mesh(mesh, start_codebooks), out_shardings=shardings, donate_argnums=0
        )
        """The state with codebooks from k-means over the first update's keys."""
        self.step: Callable[..., tuple[TrainState, UpdateMetrics, jax.Array]] = jit(
            on_mesh(mesh, step), out_shardings=(shardings, None, None), donate_argnums=0
        )
        """(state, batch, flags) -> the state after the batch, its metrics, the highest flag."""
        self.go_on_from: Callable[[TrainState, TrainState], TrainState] = jax.jit(
            go_on_from, out_shardings=shardings, donate_argnums=0
        )
        """An earlier state at the position of the present one."""
        self.evaluate: Callable[[TrainState, Any], tuple[jax.Array, jax.Array]] = jit(
            on_mesh(mesh, evaluate)
        )
        """(state, batch) -> the sum of its targets' nats, and their number."""
        # Not `on_mesh`: parameters that `fsdp` splits would be gathered anew for every token, while
        # XLA alone sums the few rows' products.
        self.write: Callable[..., jax.Array] = jit(
            write, static_argnames=("filters", "n_tokens"), out_shardings=replicated(mesh)
        )
        """(state, prompts [R, P], filters, n_tokens) -> what follows each of them [R, n_tokens], on
        every device."""
