"""pyarrow's errors, with the file that is damaged and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from batchnorm.datasets.sources.stored_files import StoredFile


@contextmanager
def reading(stored: StoredFile, what: str, part: str) -> Iterator[None]:
    """A block that reads ``part`` of a file, which should be ``what``, such as "a Parquet file".

    Raises:
        ValueError: If the file is damaged, or its content is refused in the block.
        OSError: If the operating system or a store cannot read it.
    """
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and (error.errno is not None or stored.address in str(error)):
            raise
        raise ValueError(
            f"expected {what}, got {stored.address}, which is damaged or no such file: {part} cannot be read "
            f"({' '.join(str(error).split()).rstrip('.')}). Write it again, or leave it out."
        ) from error
    except ValueError as error:
        if stored.address in str(error):
            raise
        raise ValueError(f"{stored.address}, {part}: {error}") from error
