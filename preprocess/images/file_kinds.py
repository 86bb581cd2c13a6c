"""Identifies files that are no supported images by their first bytes."""

import re

CONVERT = "which is not supported; convert it to PNG or JPEG"
# Beginnings of files, and their kinds; the first match counts.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", f"encoded as JPEG 2000, {CONVERT}"),
    (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", f"encoded as JPEG XL, {CONVERT}"),
    (rb"\xff\xd8\xff\xf7", f"encoded as JPEG-LS, {CONVERT}"),
    (rb"II\xbc[\0\x01]", f"encoded as JPEG XR, {CONVERT}"),
    (rb"....ftyp.{0,60}avi[fs]", f"encoded as AVIF, {CONVERT}"),
    (rb"....ftyp.{0,60}(hei|hev|mif|msf)", f"encoded as HEIC, {CONVERT}"),
    (rb"....ftypcrx|FUJIFILMCCD-RAW|IIU\0|IIRO", f"a camera's raw data, {CONVERT}"),
    (rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI |\0\0\x01\xba|FLV\x01", "a video"),
    (rb"RIFF....WAVE|ID3|fLaC|OggS", "sound"),
    (rb"8BPS", f"encoded as PSD, {CONVERT}"),
    (rb"%PDF", f"a PDF document, {CONVERT}"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", f"PostScript, {CONVERT}"),
    (rb"\0\0[\x01\x02]\0", f"encoded as ICO, {CONVERT}"),
    (rb"DDS ", f"encoded as DDS, {CONVERT}"),
    (rb"gimp xcf", f"encoded as XCF, {CONVERT}"),
    (rb"qoif", f"encoded as QOI, {CONVERT}"),
    (rb"\x76\x2f\x31\x01", f"encoded as OpenEXR, of floating-point pixels, {CONVERT}"),
    (rb"#\?RADIANCE|#\?RGBE", f"encoded as Radiance HDR, of floating-point pixels, {CONVERT}"),
    (rb"P[Ff]\s", f"encoded as PFM, of floating-point pixels, {CONVERT}"),
    (rb"P7\s", f"encoded as PAM, {CONVERT}"),
    (rb"SIMPLE  =", f"encoded as FITS, {CONVERT}"),
    (rb".{128}DICM", f"encoded as DICOM, {CONVERT}"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (rb"PK\x03\x04|PK\x05\x06", "a zip, or npz, archive"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!", "a compressed file"),
    (rb".{257}ustar", "a tar"),
    (rb"\x80[\x02-\x05]", "a pickle"),
    (rb"version https://git-lfs", "a pointer of Git LFS, which stands for the image; fetch it with `git lfs pull`"),
    (rb"(?i)\s*(<.*)?<(!doctype html|html|head|body)\b", "an HTML page, as a failed download leaves it"),
    (rb"(?i)\s*(<.*)?<svg", f"encoded as SVG, {CONVERT}"),
    (rb"\s*<\?xml|\s*<\w", "an XML text, as a failed download may leave it"),
    (rb"\s*[\[{]\s*[\"{\[\d]", "a JSON text, as a failed download may leave it"),
    (rb"\x89PNG|\xff\xd8\xff", "the header of its PNG or JPEG is damaged, or of an unsupported kind"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "the header of its TIFF is damaged, or of an unsupported kind"),
    (rb"GIF8|RIFF....WEBP", "the header of its GIF or WebP is damaged, or of an unsupported kind"),
    (rb"BM|P[1-6]\s", "the header of its BMP or PPM is damaged, or of an unsupported kind"),
)
_PATTERNS = tuple((re.compile(pattern, re.DOTALL), kind) for pattern, kind in _BEGINNINGS)
LOOKED_AT = 1024  # bytes


def kind_of_file(data: bytes) -> str:
    """The kind of a file, in words that follow "not readable as an image: "."""
    beginning = data[:LOOKED_AT].removeprefix(b"\xef\xbb\xbf")  # the UTF-8 byte order mark
    for pattern, kind in _PATTERNS:
        if pattern.match(beginning):
            return kind
    if not data.strip(b"\0"):
        return f"{len(data):,} bytes, all of them zero: reserved, and never written"
    return f"of no known format; it begins with {beginning[:12]!r}"
