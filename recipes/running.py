"""How a recipe runs as a command."""

from __future__ import annotations

import sys
from collections.abc import Callable

from limner.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Run it; a mistake that the user can mend is a sentence, and no traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
