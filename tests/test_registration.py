"""`import losa` is enough for transformers to open packed checkpoints, in whichever order the two are imported."""

import subprocess
import sys

import processes
import pytest
from helpers import save_toy

from losa.runtime.files import pack_checkpoint


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registration")
    save_toy(folder / "dense")
    pack_checkpoint(folder / "dense", folder / "packed")
    return str(folder / "packed")


LOSA_FIRST = """
import sys
import losa
assert not {"torch", "transformers", "numpy"} & sys.modules.keys(), "import losa is slow"
from importlib import import_module, reload
from transformers import AutoModelForCausalLM, pipeline
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert any(isinstance(module, losa.SparseLinear) for module in model.modules())
assert pipeline("text-generation", sys.argv[1], max_new_tokens=2)("THE")
auto = import_module("transformers.quantizers.auto")
assert auto.__spec__.loader is auto.__loader__ and "losa" not in type(auto.__loader__).__module__
assert "losa" in reload(auto).AUTO_QUANTIZER_MAPPING
"""
PLUGIN_FIRST = """
import losa.integrations.transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["losa"] is losa.integrations.transformers.SparseQuantizer
assert AUTO_QUANTIZATION_CONFIG_MAPPING["losa"] is losa.SparseConfig
"""


@pytest.mark.parametrize("code", [LOSA_FIRST, PLUGIN_FIRST], ids=["losa", "its plug-in"])
def test_losa_before_transformers(packed, code):
    done = subprocess.run([sys.executable, "-c", code, packed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_losa_after_transformers(packed, tmp_path):
    assert processes.call(tmp_path / "log", processes.import_losa_last, packed) == 0, (tmp_path / "log").read_text()
