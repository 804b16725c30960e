"""What is written as JSON is JSON to every program, and a record that is not there is named."""

import math

import pytest

from losa.system.output import read_record
from losa.system.writing import to_json


def test_json_holds_no_nan():
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"losa\.json would hold a number that is not finite"):
            to_json({"steps": [{"errors": [1.0, value]}]}, "losa.json")


def test_record_of_a_directory_without_one(tmp_path):
    with pytest.raises(ValueError, match=r"has no losa\.json; it is not a finished LoSA run"):
        read_record(tmp_path)
