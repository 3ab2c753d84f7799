"""The artifact: a directory with a manifest, kernels, IR text and references to weights.

    manifest.json       what is in it: functions, targets, weight table, hashes (`manifest.py`)
    kernels/<target>/   module.c and module.so
    graph/<stage>.txt   the IR of the stages that are kept
    tokenizer.json …    the checkpoint's own small files
    constants.safetensors, weights-*.safetensors    weights that no checkpoint holds, or bundled

Invariants: it is written to a temporary name and renamed; nothing in it is ever unpickled or
evaluated; opening it checks the format's version and the hash of everything but the weights,
which are checked by their fingerprints when they are mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ...errors import DiluError, Loc
from ..progress import Progress, silent
from .fingerprint import fingerprint, sha256_of
from .manifest import FORMAT, CpuTargetEntry, FileEntry, GpuTargetEntry, Manifest, changed
from .replace import new_directory, write_file

MANIFEST = "manifest.json"
CONSTANTS = "constants.safetensors"
_CHUNK = 8 << 20
_AGAIN = "compile the model again"

Chunks = tuple[bytes | memoryview, ...]
#: What a file of an artifact holds: bytes, pieces of bytes (large), or a file to copy.
Content = bytes | Chunks | Path


@dataclass
class Artifact:
    """A compiled model, in memory or opened from a directory (`path`).

    `manifest` is the content of manifest.json. `files` maps every other file's relative path to
    its content. With `bundle`, saving copies the weights into the artifact.
    """

    manifest: Manifest
    files: dict[str, Content] = field(default_factory=dict)
    path: Path | None = None
    bundle: bool = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Artifact:
        """Read the artifact at `path`; raise DiluError where it is not one or was changed."""
        folder = Path(path)
        manifest = _read_manifest(folder)
        hashes = manifest.get("hashes", {})
        names = [*hashes, *(f["path"] for f in manifest["files"] if not _outside(f))]
        files: dict[str, Content] = {name: _inside(folder, name) for name in names}
        for name, expected in hashes.items():
            _check_hash(folder, name, expected)
        return cls(manifest, files, folder)

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def targets(self) -> dict[str, CpuTargetEntry | GpuTargetEntry]:
        return self.manifest["targets"]

    def gpu_target(self, name: str) -> GpuTargetEntry:
        """Return a target that is known to be a GPU's."""
        return cast(GpuTargetEntry, self.targets[name])

    def cpu_target(self, name: str) -> CpuTargetEntry:
        """Return a target that is known to be a CPU's."""
        return cast(CpuTargetEntry, self.targets[name])

    @property
    def has_weights(self) -> bool:
        """Whether every constant is bound, which it is not after compiling a configuration only."""
        return all(c["file"] is not None for c in self.manifest["constants"].values())

    def read(self, name: str) -> bytes:
        """Return the content of one of the artifact's files."""
        content = self.files.get(name)
        if content is None:
            raise DiluError(f"the artifact {self.name} has no {name}", self._loc())
        if isinstance(content, Path):
            return content.read_bytes()
        return content if isinstance(content, bytes) else b"".join(content)

    def weight_file(self, index: int) -> Path | bytes:
        """Return where the bytes of a weight file are; raise DiluError where it is not found."""
        entry = self.manifest["files"][index]
        content = self.files.get(entry["path"])
        if content is not None and not isinstance(content, Path):
            return self.read(entry["path"])
        places = self._places(entry)
        for place in places:
            if place.is_file():
                return place
        if not _outside(entry):
            raise _incomplete(places[0])
        raise DiluError(
            f"the weights of {self.name} are not there: no file {places[0].name}",
            Loc(" and ".join(str(p) for p in places)),
            hint="put the checkpoint back there, compile it again where it is now, or compile "
            "with --bundle to have the weights in the artifact",
        )

    def save(self, path: str | os.PathLike[str], *, progress: Progress = silent) -> Path:
        """Write the artifact to `path` and return it; it appears there complete or not at all.

        An artifact that is there already is replaced, anything else is refused.
        """
        target = Path(path).resolve()
        bundle = self.bundle and self.has_weights
        with new_directory(target, lambda p: (p / MANIFEST).is_file()) as folder:
            manifest = changed(self.manifest, files=self._referenced_from(target))
            if bundle:
                from .bundle import bundled  # only here: most artifacts refer to their weights

                manifest = bundled(manifest, self.weight_file, folder, progress)
            weights = {f["path"] for f in self.manifest["files"]}
            hashes: dict[str, str] = {}
            for name, content in sorted(self.files.items()):
                if name not in weights:
                    hashes[name] = _write(folder / name, content)
                elif not bundle:
                    _write(folder / name, content)
            manifest["files"] = [_fingerprinted(f, folder) for f in manifest["files"]]
            manifest["hashes"] = hashes
            manifest["manifest_hash"] = manifest_hash(manifest)
            _write(folder / MANIFEST, _printed(manifest))
        return target

    def replace_manifest(self, manifest: Manifest) -> None:
        """Write another manifest in the place of an opened artifact's."""
        assert self.path is not None
        self.manifest = changed(manifest, manifest_hash=manifest_hash(manifest))
        write_file(self.path / MANIFEST, _printed(self.manifest))

    def _referenced_from(self, target: Path) -> list[FileEntry]:
        """Return the weight files as an artifact at `target` refers to them."""
        return [
            _reference(entry, self._places(entry), target)
            if _outside(entry) or entry["path"] not in self.files
            else entry
            for entry in self.manifest["files"]
        ]

    def _places(self, entry: FileEntry) -> list[Path]:
        """Return where a weight file may be, the likeliest first."""
        path = Path(entry["path"])
        places: list[Path] = []
        if path.is_absolute():
            places.append(path)
        elif self.path is not None:
            places.append(Path(os.path.normpath(self.path.resolve() / path)))
        if "absolute" in entry:
            places.append(Path(entry["absolute"]))
        return list(dict.fromkeys(places)) or [path]

    def _loc(self) -> Loc | None:
        return Loc(str(self.path)) if self.path else None


def manifest_hash(manifest: Manifest) -> str:
    """Return the sha256 of a manifest's canonical JSON, without the hash itself."""
    bare = {key: value for key, value in manifest.items() if key != "manifest_hash"}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    """Return the checked manifest of an artifact."""
    file = folder / MANIFEST
    if not folder.exists():
        raise DiluError("no such artifact", Loc(str(folder)))
    if not file.is_file():
        raise DiluError(
            "this is not a dilu artifact: it has no manifest.json",
            Loc(str(folder)),
            hint="dilu compile makes an artifact from a checkpoint",
        )
    try:
        manifest = json.loads(file.read_bytes())
        version = manifest["format"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DiluError("the manifest cannot be read", Loc(str(file)), hint=_AGAIN) from error
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        raise DiluError(
            f"the artifact has format {version}; this dilu reads format {FORMAT}",
            Loc(str(file)),
            hint="update dilu" if newer else _AGAIN,
        )
    if manifest_hash(manifest) != manifest.get("manifest_hash"):
        raise DiluError("the manifest was changed after compiling", Loc(str(file)), hint=_AGAIN)
    return manifest


def _check_hash(folder: Path, name: str, expected: str) -> None:
    file = folder / name
    if not file.is_file():
        raise _incomplete(file)
    if sha256_of(file) != expected:
        raise DiluError("this file was changed after compiling", Loc(str(file)), hint=_AGAIN)


def _incomplete(file: Path) -> DiluError:
    return DiluError("the artifact is incomplete: this file is missing", Loc(str(file)), _AGAIN)


def _outside(entry: FileEntry) -> bool:
    """Return whether a weight file lies outside the artifact."""
    path = Path(entry["path"])
    return path.is_absolute() or ".." in path.parts or bool(entry.get("absolute"))


def _inside(folder: Path, name: str) -> Path:
    """Return the path of an artifact's file; raise DiluError for one that leads elsewhere."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DiluError(f"the manifest names a file outside the artifact: {name}", Loc(str(folder)))
    return folder / name


def _reference(entry: FileEntry, places: Iterable[Path], target: Path) -> FileEntry:
    """Return an entry that finds its file from `target`, near it or where it is now."""
    options = list(places)
    place = next((p for p in options if p.is_file()), options[-1])
    # The folder's real name, but the file's own: caches of checkpoints link it to a blob.
    absolute = place.parent.resolve() / place.name
    kept: FileEntry = {
        "path": str(absolute), "size": entry["size"], "fingerprint": entry["fingerprint"],
    }  # fmt: skip
    if Path(os.path.commonpath([absolute, target])) == Path(target.anchor):
        return kept
    return changed(kept, path=os.path.relpath(absolute, target), absolute=str(absolute))


def _fingerprinted(entry: FileEntry, folder: Path) -> FileEntry:
    """Return an entry of a weight file with its fingerprint, which one in memory has not."""
    if entry["fingerprint"] is not None:
        return entry
    return changed(entry, fingerprint=fingerprint(folder / entry["path"]))


def _write(path: Path, content: Content) -> str:
    """Write a file, its folders too, and return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for chunk in _chunks(content):
            out.write(chunk)
            digest.update(chunk)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _chunks(content: Content) -> Iterable[bytes | memoryview]:
    if isinstance(content, bytes):
        yield content
    elif isinstance(content, Path):
        with open(content, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    else:
        yield from content


def _printed(manifest: Manifest) -> bytes:
    """Return JSON with a line for each part, so that it can be read and compared."""
    parts = [f"{json.dumps(k)}: {_lines(v)}" for k, v in manifest.items()]
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def _lines(value: Any) -> str:
    if isinstance(value, dict) and value:
        inner = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
        return "{\n  " + inner + "\n}"
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(json.dumps(v) for v in value) + "\n]"
    return json.dumps(value)
