"""`python -m llmmw.cli`."""

from llmmw.cli import main

main()
