"""Where training runs: Ray sessions and worker groups, accelerators, the JAX mesh."""
