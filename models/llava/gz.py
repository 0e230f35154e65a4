"""Files that are kept compressed."""

import gzip
from pathlib import Path


def compressed(data: bytes) -> bytes:
    """`data` as gzip has it; no name and no time goes in, so the same bytes make the same file."""
    return gzip.compress(data, 9, mtime=0)


def pack(path: Path) -> None:
    """Puts the compressed file NAME.gz in place of the file NAME."""
    path.with_name(f"{path.name}.gz").write_bytes(compressed(path.read_bytes()))
    path.unlink()
