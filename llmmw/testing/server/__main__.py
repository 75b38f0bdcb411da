"""``python -m llmmw.testing.server``."""

from .cli import main

raise SystemExit(main())
