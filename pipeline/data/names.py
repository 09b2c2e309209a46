"""Names of files, tar members and rows: which are images, and how they become ids."""

import posixpath
import re
from collections import Counter
from collections.abc import Sequence

# What counts as an image in a folder or a tar: photographs, and picture formats that become failed rows
# rather than being passed over in silence. Files with other endings (.json, .txt, .csv, .xml, .npy, ...) or
# none, and hidden ones (.DS_Store, ._a.jpg), are no images.
IMAGE_ENDINGS = {
    "jpg", "jpeg", "jpe", "jfif", "jif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff",
    "avif", "avifs", "heic", "heif", "hif", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "jxl", "ppm", "pgm",
    "pbm", "pnm", "pam", "tga", "ico", "icns", "psd", "svg", "fli", "flc", "sgi", "pcx", "dds", "hdr", "exr",
    "qoi", "cr2", "cr3", "nef", "arw", "dng", "orf", "rw2", "raf",
}  # fmt: skip


def is_image_name(path: str) -> bool:
    """Whether a file or tar member of this name counts as an image: a known ending, and not hidden."""
    return not is_hidden(path) and posixpath.splitext(path)[1][1:].lower() in IMAGE_ENDINGS


def is_hidden(path: str) -> bool:
    """Whether a part of the path begins with a dot (`.` and `..` don't count)."""
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def clean_name(name: str) -> str:
    r"""`name` as printable UTF-8: other bytes and control characters as \xNN, no leading `./`."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    while text.startswith("./"):
        text = text[2:]
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def unique_names(names: Sequence[str]) -> list[str]:
    """The names; the second, third, ... of one name get "#2", "#3", ... appended (the next free number)."""
    taken: set[str] = set()
    occurrences: Counter[str] = Counter()
    unique = []
    for name in names:
        occurrences[name] += 1
        candidate = name if occurrences[name] == 1 else f"{name}#{occurrences[name]}"
        while candidate in taken:
            occurrences[name] += 1
            candidate = f"{name}#{occurrences[name]}"
        taken.add(candidate)
        unique.append(candidate)
    return unique
