"""The command line as a user's shell calls it, within the test's process, which has loaded the libraries already."""

from __future__ import annotations

import pytest

from limner import cli


def limner(*arguments: object) -> int:
    """Run `limner` with these arguments. -> its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["limner", *map(str, arguments)])
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code
