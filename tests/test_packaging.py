"""What ships is what the tree holds, it imports from anywhere, and folders import in one direction only."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

import gossamer

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# Folders that do not ship, and what builds and runs leave behind.
DEVELOPMENT = {"benchmarks", "docs", "examples", "tests"}
LEFTOVERS = ("build", "dist", "*.egg-info", "__pycache__", ".*")

# Who may import whom, besides itself.
MAY_IMPORT = {
    "ir": set(),
    "passes": {"ir"},
    "codegen": {"ir"},
    "runtime": {"passes", "codegen", "ir"},
    "frontend": {"runtime", "passes", "codegen", "ir"},
}


def files_under(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if any(path.match(pattern) for pattern in LEFTOVERS):
            continue
        yield from files_under(path) if path.is_dir() else [path]


def ships(path: Path) -> bool:
    """Whether a file, named from the root, belongs in a wheel."""
    if len(path.parts) == 1:
        return path.suffix in {".py", ".typed"}
    return path.parts[0] not in DEVELOPMENT


FILES = [path.relative_to(ROOT) for path in files_under(ROOT)]
SHIPPED = [path for path in FILES if ships(path)]
MODULES = [path for path in SHIPPED if path.suffix == ".py"]


def run_python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def unpack_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def source_copy(tmp_path: Path) -> Path:
    """A copy of the tree to build in: nothing is left behind in the checkout, nor taken from old builds."""
    ignore = shutil.ignore_patterns(*LEFTOVERS, *DEVELOPMENT)
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignore))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


# ---- what ships ----


def test_every_folder_with_python_is_a_listed_package() -> None:
    folders = {path.parent for path in MODULES}
    assert {".".join(("gossamer", *folder.parts)) for folder in folders} == set(SETTINGS["packages"])
    assert [folder for folder in folders if folder / "__init__.py" not in MODULES] == []


def test_no_module_stands_at_the_root() -> None:
    # One called like a dependency would hide it from everything run in this folder.
    assert [path.name for path in MODULES if len(path.parts) == 1] == ["__init__.py", "__main__.py"]


def test_wheel_holds_the_tree_and_imports(source_copy: Path, elsewhere: Path, tmp_path: Path) -> None:
    run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), cwd=source_copy)
    site = unpack_wheel(tmp_path)
    package = site / "gossamer"
    assert [path.relative_to(package) for path in files_under(package)] == SHIPPED

    import_everything = """
import sys
sys.path.insert(0, sys.argv[1])
import importlib, pkgutil, gossamer
names = [module.name for module in pkgutil.walk_packages(gossamer.__path__, "gossamer.")]
print(*(importlib.import_module(name).__file__ for name in ["gossamer", *names]), sep="\\n")
"""
    imported = run_python("-c", import_everything, str(site), cwd=elsewhere).splitlines()
    assert {Path(file) for file in imported} == {package / path for path in MODULES}


def test_editable_install_imports_from_anywhere(source_copy: Path, elsewhere: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    run_python("-c", build, str(tmp_path), cwd=source_copy)
    site = unpack_wheel(tmp_path)

    # -S leaves out the environment's own gossamer.
    use = "import sys, site; site.addsitedir(sys.argv[1]); import gossamer.ir; print(gossamer.ir.__file__)"
    assert run_python("-S", "-c", use, str(site), cwd=elsewhere) == str(source_copy / "ir" / "__init__.py")


def test_tests_see_one_installed_copy() -> None:
    loaded = list(sys.modules.items())
    assert [n for n, m in loaded if getattr(m, "__file__", None) == gossamer.__file__] == ["gossamer"]
    assert str(ROOT) not in sys.path


# ---- the face ----


def test_import_loads_no_framework_and_no_compiler(elsewhere: Path) -> None:
    heavy = (
        "torch jax jaxlib triton tvm tvm_ffi sympy islpy numpy networkx transformers matplotlib typer rich"
    )
    code = "import sys, gossamer; print(*set(sys.argv[1:]) & set(sys.modules))"
    assert run_python("-c", code, *heavy.split(), cwd=elsewhere) == ""


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
    run_python("-c", code, cwd=elsewhere)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gossamer' has no attribute 'no_such_name'"):
        _ = gossamer.no_such_name
    with pytest.raises(ModuleNotFoundError, match="no_such_name"):
        import_module("gossamer.no_such_name")


# ---- who imports whom ----


class Import(NamedTuple):
    where: str  # file:line
    name: str  # absolute and dotted: `from ..ir import mask` in passes/ is gossamer.ir.mask
    relative: bool


def imports_of(file: Path) -> Iterator[Import]:
    package = ("gossamer", *file.parent.parts)
    for node in ast.walk(ast.parse((ROOT / file).read_text(), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(f"{file}:{node.lineno}", alias.name, relative=False)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            for alias in node.names:
                name = ".".join(filter(None, (*base, node.module, alias.name)))
                yield Import(f"{file}:{node.lineno}", name, relative=node.level > 0)


def may_import(folder: str, name: str) -> bool:
    top, _, inside = name.partition(".")
    if top != "gossamer":
        return True
    reached = inside.partition(".")[0]
    if reached == "__version__":
        return folder != "ir"
    return reached == folder or reached in MAY_IMPORT[folder]


def test_folders_import_in_one_direction() -> None:
    files = [file for file in MODULES if len(file.parts) > 1]
    assert {file.parts[0] for file in files} == set(MAY_IMPORT)
    wrong = [i for file in files for i in imports_of(file) if not may_import(file.parts[0], i.name)]
    assert wrong == []


def test_nothing_imports_a_second_copy() -> None:
    files = [file for file in FILES if file.suffix == ".py"]
    wrong = [i for file in files for i in imports_of(file) if i.name.partition(".")[0] in MAY_IMPORT]
    assert wrong == [], "use relative imports inside the package and `gossamer.` outside"


def test_package_imports_itself_relatively() -> None:
    ours = [i for file in MODULES for i in imports_of(file) if i.name.partition(".")[0] == "gossamer"]
    assert [i for i in ours if not i.relative] == []
