"""Compiles a recipe's programs for devices that are not there, in a process of its own.

`python -P -m jobs.planning.compiler` reads a request as JSON and writes what the compiler said of
each program. The process is the parent's to kill: a compilation takes minutes and cannot be
interrupted otherwise; and the platforms that JAX may use are set in it alone.
"""

import gzip
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from jobs.compiler_options import compiler_options
from jobs.planning.chips import read_target
from jobs.recipe import Recipe, from_yaml
from pipeline.storage import LocalStore

PROGRAMS = ("train", "evaluate", "decode")
"""What a training and its users run: the step of a batch, the evaluation of one, and the writing of
DECODED tokens."""
DECODED = 256
"""Tokens that `tvq sample` writes unless told otherwise."""


class Facts(NamedTuple):
    """What the compiler said of a program."""

    error: str
    """Empty, or why there is no program: the compiler's words."""
    seconds: float
    """It took to trace and compile."""
    arguments: int
    """Bytes a device, as all below."""
    results: int
    """Without those that take an argument's place."""
    temporaries: int
    code: int
    parts: dict[str, int]
    """Of the arguments and temporaries, by kind, from shapes and shardings: what `plan` calls
    them."""

    @property
    def total(self) -> int:
        """Bytes that the program needs at once."""
        return self.arguments + self.results + self.temporaries + self.code


def tpu_environment(version: str) -> dict[str, str]:
    """With which libtpu compiles where there is no TPU."""
    return {
        "TPU_SKIP_MDS_QUERY": "1",
        # Without: minutes of questions to a metadata server that is not there.
        "TPU_ACCELERATOR_TYPE": f"{version}-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        # It locks a file of the machine, although it only compiles here.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def main() -> None:
    """Compiles what the request on standard input asks for, and writes each as it is done."""
    request = json.load(sys.stdin)
    target = read_target(request["on"])
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target.kind == "tpu":
        os.environ |= tpu_environment(target.version)
    import jax

    if target.kind != "tpu":
        jax.config.update("jax_num_cpu_devices", target.devices)
    recipe = from_yaml(request["recipe"], "the recipe to plan")
    devices = _devices(request["on"])
    for name, path in request["programs"].items():
        facts, text = _compiled(recipe, name, devices)
        _write(Path(path), facts, text)


def _devices(on: str) -> list[Any]:
    import jax

    target = read_target(on)
    if target.kind != "tpu":
        return jax.devices("cpu")
    from jax.experimental import topologies

    settings: dict[str, Any] = {}
    if target.devices == 1:  # a host has 2 x 2 chips, unless told otherwise
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if target.version == "v4":  # its two cores are one device where it runs, but here two unless:
        settings["chip_config_name"] = "megacore"
    devices = list(topologies.get_topology_desc(on, "tpu", **settings).devices)
    if len(devices) != target.devices:
        raise RuntimeError(f"{on}: libtpu sees {len(devices)} devices, not {target.devices}")
    return devices


def _compiled(recipe: Recipe, name: str, devices: list[Any]) -> tuple[Facts, str]:
    import jax

    began = time.monotonic()
    program, arguments, parts = _program(recipe, name, devices)
    try:
        compiled = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Facts(str(error), time.monotonic() - began, 0, 0, 0, 0, parts), ""
    sizes = compiled.memory_analysis()
    facts = Facts(
        error="",
        seconds=time.monotonic() - began,
        arguments=sizes.argument_size_in_bytes,
        results=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        parts=parts,
    )
    return facts, compiled.as_text()


def _program(
    recipe: Recipe, name: str, devices: list[Any]
) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    """Something to lower, its abstract arguments, and their bytes a device by kind."""
    if name.startswith("attention "):
        return _attention(recipe, name, devices)
    from jobs.training.programs import Programs
    from model.sharding import make_mesh

    axes = recipe.cluster
    if name == "decode":  # `tvq sample` is one process with one device
        return _decode(recipe, Programs(recipe, make_mesh(devices[:1])), devices[0].platform)
    mesh = make_mesh(devices, data=axes.data, fsdp=axes.fsdp, tensor=axes.tensor)
    programs = Programs(recipe, mesh)
    batch, flags = _batch(recipe, mesh)
    parts = _state_bytes(programs.abstract)
    if name == "evaluate":
        return programs.evaluate, (programs.abstract, batch), parts
    rows = len(batch.rows) // (mesh.shape["data"] * mesh.shape["fsdp"])
    parts |= _training_bytes(recipe, parts["parameters"], rows)
    return programs.step, (programs.abstract, batch, flags), parts


def _batch(recipe: Recipe, mesh: Any) -> tuple[Any, Any]:
    """The batch and the flags that the loop hands to a step, as shapes on the mesh."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jobs.bench.programs import RandomBatch
    from model.sharding import batch_sharding

    rows = batch_sharding(mesh)
    along = mesh.shape["data"] * mesh.shape["fsdp"]
    padded = -(-recipe.training.batch_size // along) * along

    def shape(sizes: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    window = (padded, recipe.data.sequence_length)
    batch = RandomBatch(
        inputs=shape(window, jnp.int32, rows),
        targets=shape(window, jnp.int32, rows),
        loss_mask=shape(window, jnp.bool_, rows),
        rows=shape((padded,), jnp.uint32, rows),
    )
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return batch, shape((mesh.size,), jnp.int32, everywhere)


def _decode(
    recipe: Recipe, programs: Any, platform: str
) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    """Writing on, as `tvq sample` does it: one row, on one device."""
    import jax
    import jax.numpy as jnp

    from model.sampling import Filters, decode, prefill

    model, state = recipe.model, programs.abstract
    device = jax.tree.leaves(state.params)[0].sharding
    where = jax.sharding.NamedSharding(device.mesh, jax.sharding.PartitionSpec())

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
        )

    def read(params: dict, codebooks: dict, prompt: Any) -> Any:
        return prefill(model, params, codebooks, prompt, 1 + DECODED)

    def go_on(params: dict, codebooks: dict, prefilled: Any, rows: Any, key: Any) -> Any:
        return decode(model, params, codebooks, prefilled, rows, DECODED, key, Filters())

    prompt = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    prefilled = placed(jax.eval_shape(read, state.params, state.codebooks, prompt))
    rows = placed(jax.ShapeDtypeStruct((1,), jnp.int32))
    key = placed(jax.eval_shape(lambda: jax.random.key(0)))
    parts = _state_bytes(state) | {"optimizer": 0}
    parts["cache"] = _bytes_of(prefilled.cache)
    program = jax.jit(go_on, compiler_options=compiler_options(platform))
    return program, (state.params, state.codebooks, prefilled, rows, key), parts


def _attention(
    recipe: Recipe, name: str, devices: list[Any]
) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    """One layer, forward and backward, with a form of attention at a length, on one device."""
    import jax

    from jobs.bench.programs import Geometry, attention_program
    from model.sharding import make_mesh, replicated

    _, form, length = name.split()
    geometry = Geometry(recipe.model, recipe.optimizer, 1, None)
    program = attention_program(geometry, form, int(length))
    where = replicated(make_mesh(devices[:1]))
    state, inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(program.begin),
    )
    options = compiler_options(devices[0].platform)
    compiled = jax.jit(program.function, donate_argnums=0, compiler_options=options)
    return compiled, (state, inputs), {}


# ---- Bytes by kind -------------------------------------------------------------------------------


def _state_bytes(state: Any) -> dict[str, int]:
    """Of the train state on a device, and of the whole of it, which is what a checkpoint holds."""
    import jax

    return {
        "parameters": _bytes_of(state.params),
        "optimizer": _bytes_of(state.optimizer),
        "codebooks": _bytes_of(state.codebooks),
        "whole_state": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
    }


def _bytes_of(tree: Any) -> int:
    """A device's share of arrays that have a sharding."""
    import jax
    import numpy as np

    def size(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return int(np.prod(shape)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _training_bytes(recipe: Recipe, parameters: int, rows: int) -> dict[str, int]:
    """Of a training step's temporaries, those whose size the recipe says.

    `rows` are a device's. What the backward pass keeps is found by tracing it for one micro-batch,
    as if `tensor` did not split it.
    """
    import jax
    import jax.numpy as jnp

    from model.accumulation import initial_caches
    from model.layers import Randomness
    from model.objective import objective
    from model.training import initial_state
    from model.transformer import initial_cache

    model, training = recipe.model, recipe.training
    part = rows // training.accumulate
    state = jax.eval_shape(lambda: initial_state(model, recipe.optimizer, 0))
    whole = jax.eval_shape(
        lambda: initial_caches(model, rows, recipe.data.sequence_length, training.accumulate)
    )
    kept = 0

    def differentiate(params: dict, codebooks: dict, cache: Any, tokens: Any, mask: Any) -> Any:
        nonlocal kept
        key = jax.random.key(0, impl="threefry2x32")
        own = Randomness(key, key, jnp.zeros(part, jnp.uint32))

        def loss(params: dict) -> Any:
            return objective(
                params, codebooks, cache, tokens, tokens, mask, jnp.ones(()), own, config=model
            )

        given = {id(leaf) for leaf in jax.tree.leaves((params, codebooks, cache, tokens, mask))}
        value, pullback, _ = jax.vjp(loss, params, has_aux=True)
        kept = sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(pullback)
            if hasattr(leaf, "size") and id(leaf) not in given
        )
        return value

    cache = jax.eval_shape(lambda: initial_cache(model, part, recipe.data.sequence_length))
    shape = (part, training.update_length)
    jax.eval_shape(
        differentiate, state.params, state.codebooks, cache,
        jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_),
    )  # fmt: skip
    return {
        "gradients": parameters,
        "cache": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole)),
        "activations": kept,
    }


def _write(path: Path, facts: Facts, text: str) -> None:
    # The text first: who finds the facts finds it too. Both by renaming, so whole or not at all.
    for target, data in (
        (path.with_suffix(".hlo.gz"), gzip.compress(text.encode(), 5)),
        (path, json.dumps(facts._asdict()).encode()),
    ):
        LocalStore(target.parent).write(target.name, data)


if __name__ == "__main__":
    main()
