"""The `losa` command: its verbs (`verbs.py`, `storing.py`, `serving.py`), their options, its tables, and the terminal."""

from losa.cli.verbs import app, main

__all__ = ["app", "main"]
