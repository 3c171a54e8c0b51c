"""What a k-means start and the revival of codes gain on real text, where codes are scarce in use:
a window of 16 tokens and 256 codes, of which a codebook that starts at random leaves some 190 dead.

Both are compared with neither, in models trained from nothing and in one that was trained on
unquantised keys and then has them quantised (`training.init_from`).

    python -m tests.baselines.codebook_quality corpora/shakespeare --root quality
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from jobs.console import Console
from tests.baselines.attention_quality import measured

SETTING = (
    "cluster.workers=0", "data.sequence_length=1024", "model.window=16", "model.n_codes=256",
    "model.unrolled_layers=4", "training.update_length=256", "training.batch_size=4",
    "training.samples=0",
)  # fmt: skip
"""What all trainings of the recipe `tiny` here have in common."""

FROM_NOTHING = ("training.steps=800", "checkpoint.every=400")
FROM_UNQUANTISED = (
    "training.init_from=unquantised-0", "training.steps=100", "training.evaluate_every=20",
    "checkpoint.every=100", "optimizer.learning_rate=1e-3", "optimizer.warmup_steps=10",
)  # fmt: skip

BEGINNINGS: dict[str, tuple[str, ...]] = {
    "random": (),
    "k-means": ("model.kmeans_iterations=10",),
    "revived": ("model.revive_below=1",),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and evaluates what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--root", type=Path, default=Path("quality"))
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args(arguments)
    console = Console()

    def bits(run: str, seed: int, *differences: str) -> float:
        overrides = (f"data.corpus={chosen.corpus}", f"training.seed={seed}", *SETTING)
        return measured(chosen.root, "tiny", f"{run}-{seed}", (*overrides, *differences))

    source = bits("unquantised", 0, *FROM_NOTHING, "model.quantized_keys=false")
    rows = []
    for start, common in (("nothing", FROM_NOTHING), ("unquantised", FROM_UNQUANTISED)):
        random: list[float] = []
        for name, differences in BEGINNINGS.items():
            run = f"{start}-{name}"
            found = [bits(run, seed, *common, *differences) for seed in range(chosen.seeds)]
            random = random or found
            gains = [one - other for one, other in zip(found, random, strict=True)]
            rows.append(
                (
                    f"{start}, {name}",
                    f"{statistics.mean(found):.4f}",
                    f"{min(found):.4f} to {max(found):.4f}",
                    f"{statistics.mean(gains):+.4f}",
                    f"{min(gains):+.4f} to {max(gains):+.4f}",
                    len(found),
                )
            )
    columns = ["begun from", "bits per byte", "least to most", "less random", "by seed", "seeds"]
    console.table(columns, rows)
    console.result(f"the unquantised model that the last three began from: {source:.4f}")


if __name__ == "__main__":
    main()
