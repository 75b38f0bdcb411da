"""Figures as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


class EngineStats(dict[str, dict[str, Any]]):
    """What each engine did, by its name: a plain dict that can become a table."""

    def to_frame(self) -> pd.DataFrame:
        """A row for each engine, a column for each plain figure (what is nested, such as `layers`, stays out)."""
        import pandas as pd  # noqa: PLC0415 — slow to import; Mesa brings it

        plain = {
            engine: {name: value for name, value in stats.items() if not isinstance(value, dict)}
            for engine, stats in self.items()
        }
        return pd.DataFrame.from_dict(plain, orient="index").rename_axis("engine")
