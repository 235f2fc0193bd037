"""A time limit for what a tracker asks of a server, whose client has none of its own."""

import threading
from collections.abc import Callable
from typing import Any

SERVER = 30.0  # seconds in which a server must have answered


def within(seconds: float, action: Callable[[], Any]) -> Any:
    """Return what an action returns, or raise what it raises, where that takes no longer.

    Raises:
        TimeoutError: if it takes longer; then it goes on in a thread that nobody waits for.
    """
    results: list[Any] = []
    errors: list[Exception] = []

    def act() -> None:
        try:
            results.append(action())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=act, name="tracker", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return results[0]
