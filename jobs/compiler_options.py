"""What XLA is told for a kind of device, beyond what it does by itself."""


def compiler_options(platform: str | None = None) -> dict[str, str | bool]:
    """Options of `jax.jit` for whatever reads or trains with the model; those for this process's
    devices if no platform is named.

    On CPUs the YNN library is kept to matrix products: it sums columns at 14 ns an element (a step
    of a layer of `small` at 4,096 tokens on two cores: 147 ms with its sums, 121 without). Copies
    are left out that an analysis of whole loops finds needless (a step of `small` at 8,192 tokens:
    3% less time).
    """
    import jax

    if (platform or jax.default_backend()) != "cpu":
        return {}
    return {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
        "xla_cpu_copy_insertion_use_region_analysis": True,
    }
