"""What is at work in one process: it cannot be pickled or copied, and says what can."""

from __future__ import annotations

from typing import NoReturn


class AtWork:
    """An engine, or a client that has one."""

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a {type(self).__name__} is at work in one process: it cannot be pickled or copied. "
            "Pickle its Stack, and make one of it where it is needed"
        )
