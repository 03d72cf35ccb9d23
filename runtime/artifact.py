"""Compiled kernels as a value that can be saved and loaded.

An artifact is a manifest and named parts: the IR text of the program, and of each kernel its IR
text, its source and its binary. On disk it is a folder, or one file whose name ends in `.gossamer`
(a zip, nothing compressed, the same bytes for the same artifact). Loading verifies the format
version, the checksum of every part, and that the machine has the instruction sets the binaries use,
before anything of it runs.

A binary is code: loading an artifact from a stranger is running a stranger's program. The checksums
find accidents (a truncated download, a bad disk), not malice, for whoever changes a part can change
its checksum too. Load only what you would also execute.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..ir.errors import ArtifactError, InputError
from . import host
from .files import TEMPORARY, write_whole
from .manifest import Manifest, Requirements

SUFFIX = ".gossamer"
PROGRAM = "program.ir"  # the part that holds the IR text of the whole program
_MANIFEST, _CHECKSUM = "manifest.json", "manifest.sha256"
_AGAIN = "Copy the artifact again, or compile it again"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's earliest date: every entry bears it


@dataclass(frozen=True)
class Artifact:
    """An immutable compiled program. Make one with `Artifact.of`; parts maps names to contents.

    Equal artifacts have equal bytes.
    """

    manifest: Manifest
    parts: Mapping[str, bytes] = field(repr=False)

    @staticmethod
    def of(manifest: Manifest, parts: Mapping[str, bytes]) -> Artifact:
        """An artifact of these parts; their checksums are entered into the manifest."""
        for name in parts:
            _check_name(name)
        sums = {name: sha256(parts[name]).hexdigest() for name in sorted(parts)}
        return Artifact(replace(manifest, parts=sums), MappingProxyType(dict(parts)))

    def amended(self, quick_keys: Iterable[str], extra: Mapping[str, Any]) -> Artifact:
        """This artifact, answering these digests and carrying this data too; itself if it does already."""
        keys = tuple(dict.fromkeys((*self.manifest.quick_keys, *quick_keys)))
        manifest = replace(self.manifest, quick_keys=keys, extra={**self.manifest.extra, **extra})
        return self if manifest == self.manifest else Artifact(manifest, self.parts)

    def text(self, part: str) -> str:
        """A part that is text: IR or source. Raises KeyError."""
        return self.parts[part].decode()

    @property
    def ir(self) -> str:
        """IR text: the program's, where it was given, then each kernel's."""
        program = [self.text(PROGRAM)] if PROGRAM in self.parts else []
        return "\n".join([*program, *(self.text(launch.ir) for launch in self.manifest.launches)])

    @property
    def source(self) -> str:
        """Generated source of every kernel, in launch order."""
        return "\n".join(self.text(launch.source) for launch in self.manifest.launches)

    def to_bytes(self) -> bytes:
        """The artifact as one file."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, data in self._files().items():
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Artifact:
        """Read `to_bytes` back, verified as `load` does. Raises ArtifactError."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                return _verified({name: archive.read(name) for name in _entries(archive)})
        except ArtifactError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
            raise ArtifactError(
                f"expected a gossamer artifact; got a damaged or foreign file ({error}). {_AGAIN}"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to one file if path ends in `.gossamer`, else to a folder, at once or not at all.

        An older artifact there is replaced; anything else is left alone: InputError.
        """
        path = Path(path)
        if path.suffix == SUFFIX:
            if path.is_dir():
                raise InputError(
                    "save", f"a file name ending in {SUFFIX}", f"the folder {path}", "Choose another name."
                )
            write_whole(path, self.to_bytes())
        else:
            _write_folder(path, self._files())
        return path

    @staticmethod
    def load(path: str | os.PathLike[str], *, foreign: bool = False) -> Artifact:
        """Read and verify an artifact, folder or file.

        Needs no compiler and runs no pass. foreign: also accept what this machine cannot run, for
        looking at it. Raises ArtifactError saying what is wrong and what to do. A binary is code:
        load only what comes from a source you trust; see the module's notes.
        """
        path = Path(path)
        try:
            artifact = _read_folder(path) if path.is_dir() else Artifact.from_bytes(path.read_bytes())
            if not foreign:
                check_host(artifact.manifest.requires)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
        except FileNotFoundError:
            raise ArtifactError(f"{path}: expected a saved artifact; there is none. Check the path") from None
        except OSError as error:
            raise ArtifactError(
                f"{path}: cannot be read ({error.strerror}). Check the path and its permissions"
            ) from None
        return artifact

    def _files(self) -> dict[str, bytes]:
        manifest = self.manifest.to_json()
        files = {_MANIFEST: manifest, _CHECKSUM: sha256(manifest).hexdigest().encode() + b"\n"}
        return files | {name: self.parts[name] for name in sorted(self.parts)}


def check_host(requires: Requirements) -> None:
    """Raise ArtifactError unless this machine can run a binary with these requirements."""
    wanted = (requires.system or host.system(), requires.machine or host.machine())
    if wanted != (host.system(), host.machine()):
        raise ArtifactError(
            f"expected binaries for {host.system()} {host.machine()}; got binaries for {' '.join(wanted)}. "
            "Compile on this kind of machine"
        )
    present = host.features()
    missing = [] if present is None else [f for f in requires.features if f not in present]
    if missing:
        raise ArtifactError(
            f"the binaries use instruction sets that this CPU lacks: {', '.join(missing)}. "
            "Compile again here, or for the oldest CPU they must run on, such as target='cpu:x86-64-v3'"
        )


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name, re.ASCII):
        raise ArtifactError(
            f"expected parts inside the artifact; got the name {name!r}. Do not use this artifact"
        )


def _entries(archive: zipfile.ZipFile) -> list[str]:
    names = archive.namelist()
    for name in names:
        _check_name(name)
    if len(set(names)) < len(names):
        raise ArtifactError(f"expected each part once; got {', '.join(sorted(names))}. {_AGAIN}")
    return names


def _manifest(files: Mapping[str, bytes]) -> Manifest:
    """The manifest among these files, once its checksum has been found right."""
    for name in (_MANIFEST, _CHECKSUM):
        if name not in files:
            raise ArtifactError(f"expected a gossamer artifact; {name} is missing. {_AGAIN}")
    if sha256(files[_MANIFEST]).hexdigest().encode() != files[_CHECKSUM].strip():
        raise ArtifactError(f"{_MANIFEST} does not match its checksum. {_AGAIN}")
    return Manifest.from_json(files[_MANIFEST])


def _verified(files: Mapping[str, bytes]) -> Artifact:
    manifest = _manifest(files)
    parts = {name: data for name, data in files.items() if name not in (_MANIFEST, _CHECKSUM)}
    if parts.keys() != manifest.parts.keys():
        names = ", ".join(sorted(parts.keys() ^ manifest.parts.keys()))
        raise ArtifactError(f"parts and manifest disagree about: {names}. {_AGAIN}")
    for name, data in parts.items():
        if sha256(data).hexdigest() != manifest.parts[name]:
            raise ArtifactError(f"{name} does not match its checksum. {_AGAIN}")
    for launch in manifest.launches:
        absent = {launch.ir, launch.source, launch.binary} - parts.keys()
        if absent:
            raise ArtifactError(f"kernel {launch.kernel} misses {', '.join(sorted(absent))}. {_AGAIN}")
    return Artifact(manifest, MappingProxyType(parts))


def _read_folder(folder: Path) -> Artifact:
    """The manifest says what to read, so that a stray file (.DS_Store) does no harm."""
    files = _read_files(folder, (_MANIFEST, _CHECKSUM))
    return _verified(files | _read_files(folder, _manifest(files).parts))


def _read_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    files = {}
    for name in names:
        _check_name(name)
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    return files


def _write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    if path.exists() and not ((path / _MANIFEST).is_file() or (path.is_dir() and not any(path.iterdir()))):
        what = "a folder with other things in it" if path.is_dir() else "a file"
        raise InputError(
            "save", "a new folder, or one with an older artifact", f"{path}, {what}", "Choose another path."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{os.urandom(8).hex()}"
    temporary.mkdir()
    try:
        for name, data in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(data)
        _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Put the folder `new` at `path`; an older folder there ends up at `new`."""
    try:
        os.rename(new, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        old = new.with_name(f"{new.name}-old")
        os.rename(path, old)
        os.rename(new, path)
        os.rename(old, new)
