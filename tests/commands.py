"""The command line as a user's shell calls it, and a user without root's right to read and write everything."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from limner import cli


def limner(*arguments: object) -> int:
    """Run `limner` with these arguments, in this process, which has loaded the libraries. -> its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["limner", *map(str, arguments)])
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@contextmanager
def no_special_rights() -> Iterator[Path]:
    """Give up root's rights where there are some; yields a folder of the user that is left. Skips where there are none.

    pytest's own tmp_path is of no use here, as it is closed to others than root.
    """
    if os.name != "posix":
        pytest.skip("needs POSIX rights")
    before = os.geteuid()
    os.seteuid(65534 if before == 0 else before)  # nobody
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            for path in Path(folder).iterdir():
                path.chmod(0o700)
    finally:
        os.seteuid(before)
