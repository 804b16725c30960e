"""A run under way, everything of it that is not the method: what it refuses (`checks.py`), what it resumes from (`stages.py`,
`origin.py`), what it leaves (`result.py`, `samples.py`)."""

from losa.session.checks import check_request
from losa.session.session import Phase, Session

__all__ = ["Phase", "Session", "check_request"]
