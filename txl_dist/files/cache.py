"""The folder in which downloads are kept for all runs of a user."""

import os
from pathlib import Path

from txl_dist.errors import UserError


def cache_folder() -> Path:
    """Return txl_dist below $XDG_CACHE_HOME, or below ~/.cache.

    As the XDG specification demands, a variable that is not set, empty or relative does not count.

    Raises:
        UserError: if there is no home directory either.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError as error:
        raise UserError("HOME: is not set, and downloads are kept below it; set HOME or XDG_CACHE_HOME") from error
    return root / "txl_dist"
