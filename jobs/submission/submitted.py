"""What a submitted job runs: `tvq` with the arguments, and a recipe, that came with it.

`python -m jobs.submission.submitted` in the unpacked wheel. All of it comes in one variable, so
that nothing passes through a shell.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "TVQ_SUBMITTED"
RECIPE = "@recipe"
"""Among the arguments: the file with the recipe."""


def encode(arguments: Sequence[str], recipe: str | None, secrets: Sequence[str]) -> str:
    """What the variable holds.

    Args:
        arguments: of `tvq`; RECIPE stands for the file.
        recipe: YAML; None where the arguments name no RECIPE.
        secrets: the variables that the cluster must have set for the job.
    """
    return json.dumps({"arguments": list(arguments), "recipe": recipe, "secrets": sorted(secrets)})


def main() -> None:
    """Runs it and exits with the code of `tvq`."""
    from jobs.cli.main import run_cli
    from jobs.errors import ExitCode

    fields = json.loads(os.environ[VARIABLE])
    if missing := [name for name in fields["secrets"] if name not in os.environ]:
        print(
            f"error: {', '.join(missing)}: not set on this cluster, and the job was submitted with"
            " --secret for it; set it for the head and the workers (a Kubernetes secret, the"
            " environment of `ray start`)",
            file=sys.stderr,
        )
        sys.exit(ExitCode.USER)
    with tempfile.TemporaryDirectory(prefix="tvq-job-") as folder:
        file = Path(folder, "recipe.yaml")
        if fields["recipe"] is not None:
            file.write_text(fields["recipe"], encoding="utf-8")
        code = run_cli([str(file) if each == RECIPE else each for each in fields["arguments"]])
    sys.exit(code)


if __name__ == "__main__":
    main()
