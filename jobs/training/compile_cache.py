"""Compiled programs kept on disk, so that a second start compiles nothing."""

import os
from pathlib import Path


def use_compile_cache(folder: str | None) -> None:
    """From now on this process looks for its programs in the folder and leaves new ones there.

    A program is found again for the same code, shapes, mesh, XLA flags, jaxlib and kind of device.
    Of several processes the first one writes. Does nothing with None.
    """
    if folder is None:
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    # Its default leaves out what compiled within a second: many small programs make up a start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # What was compiled before in this process has settled that there is no cache.
    compilation_cache.reset_cache()
