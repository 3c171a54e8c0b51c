"""The rules of the house: who imports what, what starts fast, what is packed, what is named."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

from jobs import recipe as recipes

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "model", "jobs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "ray", "mlflow")

RAY_IN_JOBS = {
    "jobs/cluster/jax_backend.py",
    "jobs/cluster/ray_metrics.py",
    "jobs/cluster/ray_session.py",
    "jobs/cluster/ray_worker.py",
    "jobs/cluster/worker_placement.py",
    "jobs/evaluation/ray_scoring.py",
    "jobs/submission/ray_jobs.py",
    "jobs/sweeps/sweep.py",
    "jobs/training/trainer.py",
}
"""The thin files of `jobs` that know Ray."""
WITH_RAY = {"jobs/cluster/jax_backend.py", "jobs/cluster/worker_placement.py"}
"""Those that import Ray when they are imported, to extend its classes: themselves imported late."""
MLFLOW = "jobs/tracking"
"""The folder that knows MLflow."""
SERVED_MODEL = "jobs/tracking/served_model.py"
"""What MLflow imports, and nothing of ours."""
WITH_JAX = {
    "jobs/checkpoints/restore.py",
    "jobs/checkpoints/writer.py",
    "jobs/training/fallback.py",
    "jobs/training/global_batch.py",
    "jobs/training/host_load.py",
    "jobs/training/loop.py",
    "jobs/training/profile_trace.py",
    "jobs/training/programs.py",
    "jobs/training/recorder.py",
    "jobs/training/samples.py",
    "jobs/training/validation.py",
}
"""The files of `jobs` that import JAX when they are imported: what a worker runs, nothing else."""


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imports(path: Path, *, when_imported: bool = False) -> Iterator[str]:
    """The modules that a file imports anywhere, or when it is imported itself.

    An import under `if TYPE_CHECKING` counts only where it is looked for anywhere.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if when_imported and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if when_imported and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)


def roots(path: Path, *, when_imported: bool = False) -> set[str]:
    return {name.partition(".")[0] for name in imports(path, when_imported=when_imported)}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ---- Imports go one way --------------------------------------------------------------------------


@pytest.mark.parametrize("path", sources("model"), ids=name_of)
def test_model_imports_jax_and_its_like_and_itself(path: Path):
    allowed = {"jax", "flax", "optax", "numpy", "jaxtyping", "model"}
    if path.name == "config.py":
        allowed = set()  # the command line reads a recipe without JAX
    assert roots(path) - sys.stdlib_module_names <= allowed


@pytest.mark.parametrize("path", sources("pipeline"), ids=name_of)
def test_pipeline_imports_no_jax_no_tracker_and_none_of_us(path: Path):
    assert not roots(path) & {*HEAVY, "model", "jobs"} - {"ray"}
    assert "ray" not in roots(path) or path.name == "ray_tasks.py"


@pytest.mark.parametrize("path", sources("jobs"), ids=name_of)
def test_ray_and_mlflow_stay_in_few_files(path: Path):
    assert "ray" not in roots(path) or name_of(path) in RAY_IN_JOBS
    assert "mlflow" not in roots(path) or name_of(path).startswith(MLFLOW)
    # What the driver or the command line imports leaves the accelerator to the workers.
    heavy = roots(path, when_imported=True) & set(HEAVY)
    assert not heavy or name_of(path) in WITH_JAX | WITH_RAY | {SERVED_MODEL}


def test_the_lists_above_name_files_that_need_it():
    for names, what in ((RAY_IN_JOBS, "ray"), (WITH_JAX, "jax")):
        for name in names:
            assert what in roots(ROOT / name), name
    assert any("mlflow" in roots(path) for path in sources(MLFLOW))


def test_packages_begin_with_a_docstring_and_nothing_else():
    for path in sources(*PACKAGES):
        if path.name == "__init__.py":
            [docstring] = ast.parse(path.read_text()).body
            assert isinstance(docstring, ast.Expr), path


def test_no_module_bears_the_name_of_one_of_the_standard_library():
    modules = [path.stem for path in sources(*PACKAGES, "tests")] + list(PACKAGES)
    assert not set(modules) & sys.stdlib_module_names


# ---- Start-up ------------------------------------------------------------------------------------

REPORT = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def loaded_by(code: str) -> set[str]:
    """The top-level modules that are there after a fresh Python ran `code` in the checkout."""
    ended = python("-c", f"{code}\n{REPORT}", cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom jobs.cli.main import main\nsys.argv = ['tvq', '--help']\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0"
    )
    found = loaded_by(code)
    assert "click" in found
    assert not found & {*HEAVY, "pydantic", "numpy", "pyarrow", "rich", "matplotlib"}


def test_what_the_driver_imports_leaves_jax_ray_and_mlflow_alone():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sources("jobs")
        if name_of(path) not in WITH_JAX | WITH_RAY | {SERVED_MODEL} and path.name != "__init__.py"
    ]
    assert {"jobs.cli.main", "jobs.demo", "jobs.training.train"} <= set(modules)
    found = loaded_by("import " + ", ".join(modules))
    assert {"pydantic", "jobs"} <= found
    assert not found & set(HEAVY)


# ---- The wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    ended = python("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed in; its dependencies are those of this Python."""
    folder = tmp_path_factory.mktemp("site packages")
    ended = python(
        "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile",
        "--disable-pip-version-check", "--target", folder, wheel, cwd=folder,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working folder with files of the names that we use."""
    for name in ("model.py", "pipeline.py", "jobs.py", "yaml.py"):
        (tmp_path / name).write_text("raise SystemExit('the working folder was imported')\n")
    return tmp_path


def tvq(installed: Path, cwd: Path, *arguments: str, first: Path | None = None):
    """Runs the installed command, its path beginning with `first`."""
    path = os.pathsep.join(map(str, filter(None, (first, installed))))
    return python(installed / "bin" / "tvq", *arguments, cwd=cwd, PYTHONPATH=path)


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {name.rpartition("/")[2] for name in archive.namelist()} - packed
    expected = {
        name_of(path)
        for package in (*PACKAGES, "infra")
        for path in (ROOT / package).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.parent != ROOT / "infra/image"
    }
    assert packed == expected
    assert {"jobs/recipes/tiny.yaml", "infra/kubernetes/base/network.yaml"} <= packed
    assert {"METADATA", "entry_points.txt", "LICENSE"} <= metadata


def test_the_installed_command_finds_its_recipes_wherever_it_is_called(
    installed: Path, elsewhere: Path
):
    ended = tvq(installed, elsewhere, "recipes", "tiny")
    assert ended.returncode == 0, ended.stderr
    tiny = recipes.resolve(recipes.load("tiny"))
    assert recipes.from_yaml(ended.stdout, "printed") == tiny
    listed = tvq(installed, elsewhere, "recipes")
    assert "tiny" in listed.stdout
    version = tvq(installed, elsewhere, "--version")
    assert PROJECT["version"] in version.stdout
    # It was the wheel that answered, not the checkout.
    (installed / "jobs" / "recipes" / "mine.yaml").write_text("# A recipe only found here.\n")
    assert "mine" in tvq(installed, elsewhere, "recipes").stdout
    (installed / "jobs" / "recipes" / "mine.yaml").unlink()


def test_the_installed_command_renders_with_the_files_of_infra(installed: Path, elsewhere: Path):
    arguments = ("render", "tiny", "data.corpus=gs://b/c", "--for", "kuberay", "--output", "out")
    ended = tvq(installed, elsewhere, *arguments)
    assert ended.returncode == 0, ended.stderr
    for file in ("base/network.yaml", "run/tiny.yaml", "site/kustomization.yaml"):
        assert (elsewhere / "out" / file).is_file()


@pytest.mark.parametrize("file", ["model/__init__.py", "model.py", "pipeline/__init__.py"])
def test_a_package_that_shadows_ours_is_named_in_one_line(
    installed: Path, elsewhere: Path, tmp_path: Path, file: str
):
    foreign = tmp_path / "foreign"
    (foreign / file).parent.mkdir(parents=True)
    (foreign / file).write_text("")
    for arguments in (["recipes"], ["--help"]):
        ended = tvq(installed, elsewhere, *arguments, first=foreign)
        assert ended.returncode == 2, ended.stdout
        [line] = ended.stderr.splitlines()
        assert line.startswith(f"error: package '{Path(file).parts[0].removesuffix('.py')}'")
        assert str(foreign / file) in line
        assert "PYTHONPATH" in line


def test_a_model_file_inside_the_installation_shadows_too(installed: Path, elsewhere: Path):
    # Its folder lies in ours, as when somebody puts the checkout's `jobs` on the path.
    stray = installed / "jobs" / "model.py"
    stray.write_text("")
    ended = tvq(installed, elsewhere, "recipes", first=installed / "jobs")
    stray.unlink()
    assert ended.returncode == 2
    assert "package 'model' is imported from" in ended.stderr


# ---- The lock and what is committed --------------------------------------------------------------


def locked() -> list[tuple[Requirement, list[str]]]:
    """The requirements of the lock with their hashes."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement, *hashes = re.split(r"\s+--hash=", line)
        found.append((Requirement(requirement), hashes))
    return found


def test_the_lock_pins_everything_by_hash_and_names_no_address():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert not re.search(r"^\s*(-|#)(?!-hash=)", text.replace("    --hash=", ""), re.MULTILINE)
    for requirement, hashes in locked():
        [specifier] = requirement.specifier
        assert specifier.operator == "==", requirement
        assert hashes, requirement
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), requirement


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_every_dependency_is_locked_at_a_version_that_we_accept(minor: int):
    where = {
        **default_environment(),
        "python_version": f"3.{minor}",
        "python_full_version": f"3.{minor}.1",
        "sys_platform": "linux",
    }
    versions: dict[str, list[Version]] = {}
    for requirement, _ in locked():
        if requirement.marker is None or requirement.marker.evaluate(where):
            [specifier] = requirement.specifier
            name = re.sub(r"[-_.]+", "-", requirement.name.lower())
            versions.setdefault(name, []).append(Version(specifier.version))
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        wanted = Requirement(text)
        [version] = versions[re.sub(r"[-_.]+", "-", wanted.name.lower())]
        assert version in wanted.specifier, text


def test_no_file_names_a_package_registry():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are committed is not known")
    # In pieces, or this file would name them.
    hosts = [
        "pypi" ".org", "pythonhosted" ".org", "npmjs" ".org", "npmjs" ".com", "yarnpkg" ".com",
        "anaconda" ".org", "anaconda" ".com", "crates" ".io", "proxy.golang" ".org",
        "docker" ".io", "docker" ".com", "ghcr" ".io", "gcr" ".io", "quay" ".io", "pkg" ".dev",
    ]  # fmt: skip
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    named = re.compile("|".join(map(re.escape, hosts)).encode(), re.IGNORECASE)
    paths = [ROOT / name for name in listed.split("\0") if name]
    assert len(paths) > 50
    found = {
        name_of(path): match.group().decode()
        for path in paths
        if path.is_file() and (match := named.search(path.read_bytes()))
    }
    assert found == {}
