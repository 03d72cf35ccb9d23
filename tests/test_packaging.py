"""What ships is what the tree holds, it imports from anywhere, and folders import in one direction only."""

import ast
import fnmatch
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path, PurePosixPath

import pytest

import gossamer

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# Folders of the repository that do not ship.
DEVELOPMENT = {"benchmarks", "docs", "examples", "tests"}
BUILD_LEFTOVERS = ("build", "dist", "*.egg-info", "__pycache__", ".*")

# Who may import whom, besides itself.
MAY_IMPORT = {
    "ir": set(),
    "passes": {"ir"},
    "codegen": {"ir"},
    "runtime": {"passes", "codegen", "ir"},
    "frontend": {"runtime", "passes", "codegen", "ir"},
}


def kept(names: list[str]) -> list[str]:
    return sorted(name for name in names if not any(fnmatch.fnmatch(name, p) for p in BUILD_LEFTOVERS))


def files_under(folder: Path) -> Iterator[Path]:
    for name in kept([path.name for path in folder.iterdir()]):
        path = folder / name
        yield from files_under(path) if path.is_dir() else [path]


def shipped_files() -> set[PurePosixPath]:
    """The files of the tree that belong in a wheel, relative to the package."""
    relative = {PurePosixPath(path.relative_to(ROOT).as_posix()) for path in files_under(ROOT)}
    in_folders = {path for path in relative if len(path.parts) > 1 and path.parts[0] not in DEVELOPMENT}
    return in_folders | {
        path for path in relative if len(path.parts) == 1 and path.suffix in {".py", ".typed"}
    }


def python_files(*, shipped: bool) -> list[Path]:
    if shipped:
        return sorted(ROOT / path for path in shipped_files() if path.suffix == ".py")
    return [path for path in files_under(ROOT) if path.suffix == ".py"]


def run_python(
    code: str, *, cwd: Path, first_on_path: Path | None = None, options: tuple[str, ...] = ()
) -> str:
    if first_on_path is not None:
        code = f"import sys; sys.path.insert(0, {str(first_on_path)!r})\n{code}"
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def source_copy(tmp_path: Path) -> Path:
    """A copy of the tree to build in: nothing is left behind in the checkout, nor taken from old builds."""
    ignore = shutil.ignore_patterns(*BUILD_LEFTOVERS, *DEVELOPMENT)
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignore))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


# ---- what ships ----


def test_every_folder_with_python_is_a_listed_package() -> None:
    folders = {path.parent for path in shipped_files() if path.suffix == ".py"}
    assert {".".join(("gossamer", *folder.parts)) for folder in folders} == set(SETTINGS["packages"])
    without_init = [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()]
    assert without_init == []


def test_no_module_stands_at_the_root() -> None:
    # One called like a dependency would hide it from everything run in this folder.
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_wheel_holds_the_tree_and_imports(source_copy: Path, elsewhere: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    built = subprocess.run([*command, str(source_copy)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert {
        PurePosixPath(p.relative_to(site / "gossamer").as_posix()) for p in files_under(site / "gossamer")
    } == (shipped_files())

    import_everything = """
import importlib, pkgutil, gossamer
names = [module.name for module in pkgutil.walk_packages(gossamer.__path__, "gossamer.")]
print(*(importlib.import_module(name).__file__ for name in ["gossamer", *names]), sep="\\n")
"""
    imported = run_python(import_everything, cwd=elsewhere, first_on_path=site).splitlines()
    assert {Path(file) for file in imported} == {
        site / "gossamer" / path for path in shipped_files() if path.suffix == ".py"
    }


def test_editable_install_imports_from_anywhere(source_copy: Path, elsewhere: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    built = subprocess.run(command, cwd=source_copy, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # -S leaves out the environment's own installed gossamer.
    use = f"import site; site.addsitedir({str(site)!r}); import gossamer.ir; print(gossamer.ir.__file__)"
    assert run_python(use, cwd=elsewhere, options=("-S",)) == str(source_copy / "ir" / "__init__.py")


def test_tests_see_one_installed_copy() -> None:
    copies = [
        name for name, module in sys.modules.items() if getattr(module, "__file__", None) == gossamer.__file__
    ]
    assert copies == ["gossamer"]
    assert str(ROOT) not in sys.path


# ---- the face ----


def test_import_loads_no_framework_and_no_compiler(elsewhere: Path) -> None:
    heavy = (
        "torch jax jaxlib triton tvm tvm_ffi sympy islpy numpy networkx transformers matplotlib typer rich"
    )
    loaded = run_python(
        f"import sys, gossamer; print(*set({heavy!r}.split()) & set(sys.modules))", cwd=elsewhere
    )
    assert loaded == ""


def test_public_module_is_the_module_it_names(elsewhere: Path) -> None:
    # The package's own folder under another name stands for masks and flex, which bring in much more.
    code = """
import sys, gossamer
gossamer._MODULES["first"] = gossamer._MODULES["second"] = gossamer._MODULES["third"] = "ir"
assert "gossamer.ir" not in sys.modules
import gossamer.first
from gossamer.second import __name__ as name
from gossamer import third
import gossamer.ir
assert gossamer.first is third is gossamer.second is gossamer.ir, gossamer.first
assert name == gossamer.ir.__spec__.name == "gossamer.ir"
"""
    run_python(code, cwd=elsewhere)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gossamer' has no attribute 'mask_of_zorro'"):
        _ = gossamer.mask_of_zorro
    with pytest.raises(ModuleNotFoundError, match="mask_of_zorro"):
        import_module("gossamer.mask_of_zorro")


# ---- who imports whom ----


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything `file` imports; names of ours start with ``gossamer.``"""
    package = ("gossamer", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def test_folders_import_in_one_direction() -> None:
    assert {name.partition(".")[2] for name in SETTINGS["packages"]} - {""} == set(MAY_IMPORT)
    wrong = []
    for file in python_files(shipped=True):
        folder, *_ = file.relative_to(ROOT).parts
        allowed = MAY_IMPORT.get(folder, set(MAY_IMPORT)) | {folder}
        for line, name in imports_of(file):
            top, _, inside = name.partition(".")
            reached = inside.partition(".")[0]
            if (
                top == "gossamer"
                and reached not in allowed
                and not (reached == "__version__" and folder != "ir")
            ):
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {folder} may not import {name}")
    assert wrong == []


def test_nothing_imports_a_second_copy() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: import {name}"
        for file in python_files(shipped=False)
        for line, name in imports_of(file)
        if name.partition(".")[0] in MAY_IMPORT
    ]
    assert wrong == [], "use relative imports inside the package and `gossamer.` outside"


def test_package_imports_itself_relatively() -> None:
    absolute = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in python_files(shipped=True)
        for node in ast.walk(ast.parse(file.read_text(), str(file)))
        if (isinstance(node, ast.Import) and any(a.name.partition(".")[0] == "gossamer" for a in node.names))
        or (
            isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("gossamer")
        )
    ]
    assert absolute == []
