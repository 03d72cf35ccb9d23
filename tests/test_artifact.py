"""Artifacts: what is saved comes back, and what is damaged, foreign or from the future is refused."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from gossamer.ir.errors import ArtifactError, InputError
from gossamer.runtime import host
from gossamer.runtime.artifact import Artifact
from gossamer.runtime.formula import parse_formula
from gossamer.runtime.manifest import FORMAT, Argument, Intermediate, Launch, Manifest, Requirements

PARTS = {
    "program.ir": b"graph @scale { }\n",
    "kernels/0_scale.ir": b"kernel scale() { }\n",
    "kernels/0_scale.py": b"def scale(): pass\n",
    "kernels/0_scale.o": bytes(range(256)),
}

ANY_MACHINE = Requirements()


def make_artifact(requires: Requirements = ANY_MACHINE, **changes: object) -> Artifact:
    launch = Launch(
        kernel="scale",
        entry="scale",
        arguments=(
            Argument("x", "x", "tensor", "f32", ("n", 64), "in", 1),
            Argument("y", "y", "tensor", "f32", ("n", 64), "out", 1),
            Argument("by", "by", "scalar", "f32"),
        ),
        grid=("(n + 31) // 32",),
        workspace=4096,
        ir="kernels/0_scale.ir",
        source="kernels/0_scale.py",
        binary="kernels/0_scale.o",
        details={"warps": 4},
    )
    manifest = Manifest(
        format=FORMAT,
        gossamer="0.1.0",
        target="cpu",
        backend="tvm",
        versions={"tvm": "0.27.0", "llvm": "22"},
        requires=requires,
        launches=(launch,),
        intermediates=(Intermediate("part", "f32", ("n", "8")),),
        quick_keys=("0" * 64,),
        extra={"spec": {"sizes": [1, 2]}},
    )
    return Artifact.of(replace(manifest, **changes), PARTS)


def files_of(artifact: Artifact, tmp_path: Path) -> dict[str, bytes]:
    folder = artifact.save(tmp_path / "as_files")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def zipped(files: Mapping[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def with_manifest(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    """The files with another manifest whose checksum is right: only its content is wrong."""
    manifest = json.dumps(json.loads(files["manifest.json"]) | changes).encode()
    return files | {"manifest.json": manifest, "manifest.sha256": sha256(manifest).hexdigest().encode()}


# ---- what is saved comes back ----


@pytest.mark.parametrize("name", ["kernel.gossamer", "kernel", "model-3.1"])
def test_saved_artifact_comes_back_equal(name: str, tmp_path: Path) -> None:
    artifact = make_artifact()
    path = artifact.save(tmp_path / "deep" / name)
    assert path.is_file() == name.endswith(".gossamer")
    loaded = Artifact.load(path)
    assert loaded == artifact
    assert loaded.parts == PARTS
    assert loaded.source == "def scale(): pass\n"
    assert loaded.ir == "graph @scale { }\n\nkernel scale() { }\n"
    assert loaded.manifest.launches[0].details == {"warps": 4}
    assert list(path.parent.iterdir()) == [path]


def test_equal_artifacts_have_equal_bytes(tmp_path: Path) -> None:
    assert make_artifact().to_bytes() == make_artifact().to_bytes()
    first, second = (make_artifact().save(tmp_path / n) for n in ("a.gossamer", "b.gossamer"))
    assert first.read_bytes() == second.read_bytes() == Artifact.load(first).to_bytes()


def test_artifact_cannot_be_changed() -> None:
    artifact = make_artifact()
    with pytest.raises(AttributeError):
        artifact.manifest = artifact.manifest
    with pytest.raises(TypeError):
        artifact.parts["kernels/0_scale.o"] = b""
    with pytest.raises(TypeError):
        artifact.manifest.extra["spec"] = None


@pytest.mark.parametrize("name", ["kernel.gossamer", "kernel"])
def test_saving_replaces_an_older_artifact(name: str, tmp_path: Path) -> None:
    make_artifact().save(tmp_path / name)
    newer = make_artifact(target="cpu:x86-64-v3")
    assert Artifact.load(newer.save(tmp_path / name)) == newer
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_saving_leaves_other_things_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"expected a new folder.*a folder with other things"):
        make_artifact().save(tmp_path)
    with pytest.raises(InputError, match=r"notes.txt, a file"):
        make_artifact().save(tmp_path / "notes.txt")
    (tmp_path / "x.gossamer").mkdir()
    with pytest.raises(InputError, match=r"expected a file name ending in .gossamer; got the folder"):
        make_artifact().save(tmp_path / "x.gossamer")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_stray_file_in_a_folder_does_no_harm(tmp_path: Path) -> None:
    path = make_artifact().save(tmp_path / "kernel")
    (path / ".DS_Store").write_bytes(b"\0")
    assert Artifact.load(path) == make_artifact()


# ---- what is damaged ----


def test_flipped_byte_in_each_part_of_a_folder_is_found(tmp_path: Path) -> None:
    path = make_artifact().save(tmp_path / "kernel")
    for file in [p for p in path.rglob("*") if p.is_file()]:
        good = file.read_bytes()
        for at in (0, len(good) // 2, len(good) - 2):
            file.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
            with pytest.raises(ArtifactError, match=r"kernel: .* does not match its checksum. Copy .*again"):
                Artifact.load(path)
        file.write_bytes(good)
    assert Artifact.load(path) == make_artifact()


def test_flipped_byte_anywhere_in_one_file_is_found_or_harmless() -> None:
    artifact = make_artifact()
    good = artifact.to_bytes()
    found = 0
    for at in range(len(good)):
        try:
            assert Artifact.from_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :]) == artifact
        except ArtifactError:
            found += 1
    assert found > len(good) / 2  # the rest are dates and attributes in zip's headers


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_file_is_refused(keep: float, tmp_path: Path) -> None:
    good = make_artifact().to_bytes()
    path = tmp_path / "kernel.gossamer"
    path.write_bytes(good[: int(keep * len(good)) if keep < 1 else keep])
    with pytest.raises(ArtifactError, match=r"kernel.gossamer: expected a gossamer artifact; got a damaged"):
        Artifact.load(path)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "kernels/0_scale.o", "program.ir"])
def test_missing_part_is_refused(name: str, tmp_path: Path) -> None:
    files = files_of(make_artifact(), tmp_path)
    (tmp_path / "as_files" / name).unlink()
    del files[name]
    for path in (tmp_path / "as_files", zipped(files, tmp_path / "kernel.gossamer")):
        with pytest.raises(ArtifactError, match=name):
            Artifact.load(path)


def test_absent_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"there is none. Check the path"):
        Artifact.load(tmp_path / "nothing.gossamer")
    with pytest.raises(ArtifactError, match=r"manifest.json is missing"):
        Artifact.load(tmp_path)


# ---- what is foreign or hostile ----


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "a\\b", ".hidden", "a//b", "C:x"])
def test_path_out_of_the_artifact_is_refused(name: str, tmp_path: Path) -> None:
    files = files_of(make_artifact(), tmp_path)
    entries = with_manifest(files, parts=json.loads(files["manifest.json"])["parts"] | {name: "0" * 64})
    for part in ("manifest.json", "manifest.sha256"):
        (tmp_path / "as_files" / part).write_bytes(entries[part])
    for path in (tmp_path / "as_files", zipped(entries | {name: b""}, tmp_path / "kernel.gossamer")):
        with pytest.raises(ArtifactError, match="expected parts inside the artifact; got the name"):
            Artifact.load(path)
    with pytest.raises(ArtifactError, match="expected parts inside"):
        Artifact.of(make_artifact().manifest, {name: b""})


def test_extra_part_in_a_file_is_refused(tmp_path: Path) -> None:
    files = files_of(make_artifact(), tmp_path) | {"kernels/1_more.o": b"x"}
    with pytest.raises(ArtifactError, match=r"parts and manifest disagree about: kernels/1_more.o"):
        Artifact.load(zipped(files, tmp_path / "kernel.gossamer"))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (FORMAT + 1, f"expected artifact format {FORMAT}; got {FORMAT + 1}. Upgrade gossamer, or compile"),
        (0, f"expected artifact format {FORMAT}; got 0. Compile the kernel again"),
        ("new", f"expected artifact format {FORMAT}; got 'new'. Compile the kernel again"),
    ],
)
def test_other_format_version_is_refused(version: object, message: str, tmp_path: Path) -> None:
    files = with_manifest(files_of(make_artifact(), tmp_path), format=version)
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(zipped(files, tmp_path / "kernel.gossamer"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 3}, "manifest.target: expected str; got 3"),
        ({"launches": {}}, "manifest.launches: expected a list; got {}"),
        ({"launches": [7]}, r"manifest.launches\[0\]: expected an object with arguments, .*; got 7"),
        ({"versions": []}, r"manifest.versions: expected an object; got \[\]"),
        ({"surprise": 1}, "manifest: expected an object with backend, .*"),
    ],
)
def test_malformed_manifest_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    files = with_manifest(files_of(make_artifact(), tmp_path), **changes)
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(zipped(files, tmp_path / "kernel.gossamer"))


def test_foreign_instruction_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "features", lambda: frozenset({"avx2"}))
    path = make_artifact(Requirements(features=("avx2", "avx512f"))).save(tmp_path / "kernel")
    with pytest.raises(
        ArtifactError, match=r"this CPU lacks: avx512f. Compile again here, or .*'cpu:x86-64-v3'"
    ):
        Artifact.load(path)
    assert Artifact.load(path, foreign=True).manifest.requires.features == ("avx2", "avx512f")
    monkeypatch.setattr(host, "features", lambda: None)  # a system that does not tell
    assert Artifact.load(path).manifest.requires.features == ("avx2", "avx512f")


def test_foreign_machine_is_refused(tmp_path: Path) -> None:
    path = make_artifact(Requirements("plan9", "pdp11")).save(tmp_path / "kernel")
    with pytest.raises(ArtifactError, match=r"got binaries for plan9 pdp11. Compile on this kind of machine"):
        Artifact.load(path)


def test_this_machine_lists_its_instruction_sets() -> None:
    features = host.features()
    if host.system() == "linux" and host.machine() == "x86_64":
        assert features is not None
        assert "pni" in features  # every 64-bit x86
    assert host.linux_names(["sse4.1", "bmi", "slow-3ops-lea"]) == {"sse4_1", "bmi1"}


# ---- loading needs little ----


def test_loading_needs_no_compiler_and_no_geometry(tmp_path: Path) -> None:
    path = make_artifact().save(tmp_path / "kernel.gossamer")
    code = f"""
import sys
from gossamer.runtime import driver
executable = driver.load({str(path)!r})
assert executable.source and executable.ir and list(executable.inputs) == ["x", "y", "by"]
print(*{{"tvm", "tvm_ffi", "sympy", "islpy", "networkx", "numpy", "torch", "triton"}} & set(sys.modules))
"""
    environment = {"PATH": "/nonexistent", "GOSSAMER_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# ---- shapes without sympy ----


def test_formulas_agree_with_python() -> None:
    names = {"B": 3, "S": 100, "p0": -7}
    for text in (
        "B",
        "-S + 2*B",
        "min(S, 64) * ((B + 1) // 2)",
        "max(p0 % 4, abs(p0), 1)",
        "S - (B - p0)",
        "not (S < 3) and (B == 3 or p0 != 1)",
    ):
        assert parse_formula(text)(names) == eval(text, {"min": min, "max": max, "abs": abs} | names)


@pytest.mark.parametrize(
    "text", ["__import__('os')", "S.real", "1.5", "True", "S[0]", "S if B else 1", "S +", "S / 2"]
)
def test_anything_but_integer_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="expected integer arithmetic"):
        parse_formula(text)
