"""The images in a tar file: an index of names, places and annotations; no member touches a file system."""

import io
import posixpath
import tarfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from pipeline.data.names import clean_name, is_image_name, unique_names
from pipeline.errors import ShardError

Place = tuple[int, int]  # offset and size

MAX_ANNOTATION_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TarImage:
    """One image member.

    Attributes:
        name: its cleaned name, unique in the file.
        place: where its bytes are.
        annotation: where those of the `<key>.json` beside it are.
        problem: why it has no bytes, where it is a link or no file.
    """

    name: str
    place: Place
    annotation: Place | None
    problem: str


def index_tar(file: IO[bytes], uri: str) -> list[TarImage]:
    """The images of a tar file in order, after proving that the file is whole.

    Raises:
        ShardError: it is damaged, cut short, can't be read or has members but no image.
    """
    try:
        members = _members(file, uri)
    except OSError as error:  # a bad sector, a mount that is gone
        raise ShardError(f"{uri}: can't be read ({error})") from error
    infos = [info for info in members if not info.isdir() and is_image_name(clean_name(info.name))]
    if members and not infos:
        first = clean_name(members[0].name)
        raise ShardError(f"{uri}: none of its {len(members)} members is an image (the first is {first})")
    files = {info.name: info for info in members if _is_plain(info)}
    annotations = _annotations(infos, files=members)
    names = unique_names([clean_name(info.name) for info in infos])
    images = []
    for info, name, annotation in zip(infos, names, annotations, strict=True):
        place, problem = _place(info, files)
        images.append(TarImage(name, place, annotation, problem))
    return images


class _TarInfo(tarfile.TarInfo):
    """Refuses a negative size, which would send `tarfile` backwards for ever (CVE-2025-8194)."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError("negative size")
        return super()._block(count)  # type: ignore[misc]


def _members(file: IO[bytes], uri: str) -> list[tarfile.TarInfo]:
    """All members. `tarfile` takes a cut or a damaged header as the end, so the end is looked at here."""
    members: list[tarfile.TarInfo] = []
    try:
        tar = cast("Any", tarfile.TarFile(fileobj=file, tarinfo=_TarInfo, errors="surrogateescape"))
        while (member := tar.next()) is not None:
            members.append(member)
            tar.members.clear()  # it keeps its own list
        file.seek(tar.offset)
    except (tarfile.TarError, ValueError, OverflowError, IndexError) as error:
        size = file.seek(0, io.SEEK_END)
        num_whole = sum(info.offset_data + info.size <= size for info in members)
        raise _cut_short(uri, num_whole, f": {error}") from error
    marker = file.read(tarfile.BLOCKSIZE)
    if len(marker) < tarfile.BLOCKSIZE:
        raise _cut_short(uri, len(members), "")
    if marker.strip(b"\0"):
        raise ShardError(f"{uri}: damaged header after {len(members)} members, at byte {tar.offset:,}")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise ShardError(f"{uri}: data after the end marker at byte {tar.offset:,} (two tars in one?)")
    return members


def _cut_short(uri: str, num_members: int, why: str) -> ShardError:
    return ShardError(f"{uri}: tar ends after {num_members} members (expected an end marker){why}")


def _place(info: tarfile.TarInfo, files: Mapping[str, tarfile.TarInfo]) -> tuple[Place, str]:
    """Where the bytes of a member are, or why it has none. A hard link has those of the file it names."""
    target = files.get(info.linkname) if info.islnk() else info if _is_plain(info) else None
    if target is not None:
        return (target.offset_data, target.size), ""
    if info.issym() or info.islnk():
        return (0, 0), f"the member is no file but a link to {clean_name(info.linkname)}"
    return (
        0,
        0,
    ), f"the member is no file but a {'sparse one' if info.issparse() else 'device or pipe'}"


def _is_plain(info: tarfile.TarInfo) -> bool:
    return info.isreg() and not info.issparse()


def _annotations(infos: Sequence[tarfile.TarInfo], *, files: Sequence[tarfile.TarInfo]) -> list[Place | None]:
    """For each image a JSON file: `a/b.c.jpg.json`, `a/b.c.json` or, with WebDataset's keys, `a/b.json`.

    Where names repeat, the first belongs to the first, and so on.
    """
    beside: dict[str, list[Place]] = defaultdict(list)
    for info in files:
        if info.name.endswith(".json") and _is_plain(info) and info.size <= MAX_ANNOTATION_BYTES:
            beside[info.name].append((info.offset_data, info.size))
    occurrences: Counter[str] = Counter()
    found = []
    for info in infos:
        keys = (info.name, posixpath.splitext(info.name)[0], _webdataset_key(info.name))
        places = next((beside[key + ".json"] for key in keys if key + ".json" in beside), [])
        nth = occurrences[info.name]
        occurrences[info.name] += 1
        found.append(places[nth] if nth < len(places) else None)
    return found


def _webdataset_key(name: str) -> str:
    """`a/b` of `a/b.c.jpg`: WebDataset's keys end at the first dot."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".")[0])
