"""How good each kind of attention becomes: the same recipe, corpus and tokens, several seeds.

Every run is a `tvq train` and a `tvq evaluate` under a root of its own, so that an interrupted
comparison goes on where it was, and each run can be looked at with `tvq compare` and `tvq ui`.

    python -m tests.baselines.attention_quality corpora/shakespeare --root quality
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.console import Console

VARIANTS: dict[str, tuple[str, ...]] = {
    "quantised, with cache": (),
    "quantised, window only": ("model.compressive_cache=false",),
    "all keys, unquantised": ("model.quantized_keys=false",),
    "window only, unquantised": ("model.quantized_keys=false", "model.compressive_cache=false"),
}
"""What differs from the recipe `small` in each row of the table."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and evaluates what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--root", type=Path, default=Path("quality"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="section.field=value, for every run")
    chosen = parser.parse_intermixed_args(arguments)
    console = Console()
    results: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(chosen.seeds):  # a whole table after each seed
        for name, differences in VARIANTS.items():
            overrides = (
                f"data.corpus={chosen.corpus}",
                f"training.seed={seed}",
                "cluster.workers=0",
                *differences,
                *chosen.overrides,
            )
            run = f"{name.replace(',', '').replace(' ', '-')}-{seed}"
            results[name].append(measured(chosen.root, "small", run, overrides))
        _show(results, console)


def measured(root: Path, recipe: str, run: str, overrides: Sequence[str]) -> float:
    """Bits per byte of a run on the whole validation split, kept beside the runs once known."""
    kept = root / f"{run}.json"
    if not kept.exists():
        _tvq("train", recipe, *overrides, "--run", run, "--root", str(root))
        kept.write_text(_tvq("evaluate", run, "--root", str(root), "--json"))
    return json.loads(kept.read_text())["bits_per_byte"]


def _tvq(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("tvq")), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _show(results: dict[str, list[float]], console: Console) -> None:
    rows = []
    for name, bits in results.items():
        rows.append(
            (
                name,
                f"{statistics.mean(bits):.4f}",
                f"{min(bits):.4f} to {max(bits):.4f}",
                len(bits),
            )
        )
    console.table(["attention", "bits per byte", "least to most", "seeds"], rows)


if __name__ == "__main__":
    main()
