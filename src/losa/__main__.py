"""`python -m losa`."""

from losa.cli import main

main()
