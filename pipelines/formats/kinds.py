"""What a file is that is no image of a format read here, by its first bytes."""

from __future__ import annotations

import re

_TO_JPEG = "convert it to JPEG or PNG"
_UNPACK = "unpack it first"
_NOT = "remove it from the data, or fetch the image again"

# (offset, bytes, what it is, what to do)
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull` where it came from"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image", _TO_JPEG),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image", _TO_JPEG),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image", _TO_JPEG),
    (0, b"\xff\x0a", "a JPEG XL image", _TO_JPEG),
    (0, b"II\xbc", "a JPEG XR image", _TO_JPEG),
    (0, b"BPG\xfb", "a BPG image", _TO_JPEG),
    (0, b"qoif", "a QOI image", _TO_JPEG),
    (0, b"8BPS", "a Photoshop document", _TO_JPEG),
    (0, b"gimp xcf", "a GIMP document", _TO_JPEG),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image", _TO_JPEG),
    (0, b"#?RADIANCE", "a Radiance HDR image", _TO_JPEG),
    (0, b"DDS ", "a DirectDraw surface", _TO_JPEG),
    (0, b"SIMPLE  =", "a FITS image", _TO_JPEG),
    (128, b"DICM", "a DICOM image", _TO_JPEG),
    (0, b"\0\0\1\0", "an icon (.ico)", _TO_JPEG),
    (0, b"icns", "an icon (.icns)", _TO_JPEG),
    (0, b"FUJIFILM", "a camera's raw image", _TO_JPEG),
    (0, b"IIRO", "a camera's raw image", _TO_JPEG),
    (0, b"%PDF", "a PDF document", _TO_JPEG),
    (0, b"%!PS", "a PostScript document", _TO_JPEG),
    (0, b"\x1f\x8b", "gzip data", _UNPACK),
    (0, b"BZh", "bzip2 data", _UNPACK),
    (0, b"\xfd7zXZ", "xz data", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "zstd data", _UNPACK),
    (0, b"PK\3\4", "a ZIP archive", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", "give it the ending .tar and name it as the data"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video", "extract its frames first"),
    (0, b"FLV", "a Flash video", "extract its frames first"),
    (0, b"OggS", "an Ogg stream", _NOT),
    (0, b"ID3", "an MP3 recording", _NOT),
    (0, b"\x93NUMPY", "a NumPy array", "give it the ending .npy and name it as the data"),
    (0, b"\x89HDF", "an HDF5 file", "write its images as files or as an .npz"),
    (0, b"\0\5\x16\7", "a macOS resource file without the image itself", _NOT),
    (0, b"\xd0\xcf\x11\xe0", "a Windows thumbnail cache or Office document", _NOT),
)
# Formats that are read, where Pillow did not recognise the image.
_UNREADABLE = (
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"RIFF", "WebP"),
)
# The brand of an ISO media file (`....ftypBRAND`).
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "an AVIF image"),
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC image"
    ),
    b"crx ": "a camera's raw image",
}
_RIFF = {b"AVI ": "an AVI video", b"WAVE": "a WAV recording"}
_JSON = re.compile(rb'\s*(\{\s*"|\{\s*\}|\[\s*[\[{"\d\]])')


def kind_of(data: bytes) -> str:
    """What `data` is and what to do, or that it is unknown with its first bytes."""
    for offset, sign, what, advice in _SIGNATURES:
        if data[offset : offset + len(sign)] == sign:
            return _named(what, advice)
    if data[4:8] == b"ftyp":
        end = min(len(data), int.from_bytes(data[:4], "big"), 256)
        brands = [data[8:12], *(data[i : i + 4] for i in range(16, end, 4))]
        what = next((_BRANDS[brand] for brand in brands if brand in _BRANDS), "a video (MP4, MOV)")
        return _named(what, _TO_JPEG if "image" in what else "extract its frames first")
    if data[:4] == b"RIFF" and data[8:12] in _RIFF:
        return _named(_RIFF[data[8:12]], _NOT)
    for sign, name in _UNREADABLE:
        if data.startswith(sign):
            return f"a {name} that is damaged, or of a kind that is not read: {_TO_JPEG}"
    head = data[:256].removeprefix(b"\xef\xbb\xbf")
    if _JSON.match(head):
        return _named("JSON text", f"it may be a server's error message; {_NOT}")
    if not any(data):
        return _named(f"{len(data):,} zero bytes", "fetch the image again")
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        start = head[:40].decode("ascii")
        return f"plain text ({start!r}), no image of a known format: {_NOT}"
    return f"no image of a known format (it starts with {data[:8]!r})"


def _named(what: str, advice: str) -> str:
    return f"{what}, not an image of a format that is read: {advice}"
