"""Fixtures of the whole suite: tiny random models of every family, fixed seeds, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("LOSA_PROGRESS", "0")
if "PYTEST_XDIST_WORKER" in os.environ:  # `make test` runs tests side by side; more threads than cores would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's interpreter runs its kernels on the CPU; before it is imported

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SHARED = Path(__file__).parents[2] / "shared"

VOCABULARY = 64
WINDOW = 5  # of sliding attention; shorter than any test sequence, so that masks differ from block to block

# What each family needs beyond the common sizes. Sliding families mix, where they can, full and sliding blocks.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "gpt_neox": {},
}

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_tiny_model(family: str, **sizes: Any) -> PreTrainedModel:
    """A random float32 model in eval mode; `sizes` override the configuration."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **sizes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def pytest_collection_finish() -> None:
    """What is imported by now stays: accelerate collects garbage before every training, half a second of looking at modules."""
    import_module("matplotlib.backends.backend_svg")  # the only large one that runs import later, when they draw their report
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    return make_tiny_model


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Path below the shared directory; skips the test where it is missing."""

    def path(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs {SHARED / name}")
        return SHARED / name

    return path


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their figures, which are a fifth of a toy run; `test_report.py` and whole runs elsewhere draw them."""
    monkeypatch.setattr("losa.report.page.plots", lambda record: [])


@pytest.fixture
def unsimulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that only count: what is counted does not depend on what is simulated, which takes seconds."""
    for stage in ("training", "calibration", "evaluation"):
        monkeypatch.setattr(f"losa.planning.plan.simulate_{stage}", lambda *_: 0)


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that measure for moments; `test_plan.py` says what is measured."""
    monkeypatch.setattr("losa.planning.probe.BUDGET", 0.02)  # seconds


@pytest.fixture(scope="session", autouse=True)
def _tried_once() -> Iterator[None]:
    """A model's forward is tried once for each configuration, where it passes: on tensors without data that takes 50 ms, and the
    same tiny models are opened a thousand times."""
    from losa.models import opening

    trial, tried = opening._try_forward, set[str]()

    def once(config: PreTrainedConfig) -> None:
        try:
            key = type(config).__name__ + config.to_json_string(use_diff=False)
        except (TypeError, ValueError, RecursionError):  # one that was damaged on purpose
            return trial(config)
        if key not in tried:
            trial(config)
            tried.add(key)
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "_try_forward", once)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


@pytest.fixture
def token_ids() -> Callable[..., torch.Tensor]:
    """Random token ids `(sequences, length)`, the same at every call."""

    def ids(sequences: int = 5, length: int = 16) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(7))

    return ids


@pytest.fixture
def paper_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval with the tasks of LLM pruning papers alone: reading all of its thousands takes ten seconds (`test_zeroshot.py`)."""
    lm_eval = pytest.importorskip("lm_eval")
    folders = ["hellaswag", "piqa", "arc", "winogrande", "super_glue", "glue", "openbookqa", "lambada", "wikitext"]
    paths = [Path(lm_eval.__file__).parent / "tasks" / name for name in folders]
    from lm_eval.tasks import TaskManager

    from losa.evaluation import harness

    index = TaskManager(include_path=paths, include_defaults=False)
    monkeypatch.setattr(harness, "manager", lambda: index)


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A finished toy run, which no test may change: its folder, its model, what a callback saw on the way (`helpers.Look`)."""
    from helpers import Look, set_up, toy_run

    folder = set_up(tmp_path_factory.mktemp("run"), talks=True)
    look = Look(folder / "sparse")
    model = toy_run(folder, callbacks=(look,))
    return folder, model, look


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A sparse checkpoint, and what packing makes of it with every type of values; no test may change them."""
    from packing import make_sparse

    from losa.runtime.files import pack_checkpoint

    folder = tmp_path_factory.mktemp("packed")
    make_sparse("llama", folder / "sparse")
    pack_checkpoint(folder / "sparse", folder / "packed")
    pack_checkpoint(folder / "sparse", folder / "int8", "int8")
    pack_checkpoint(folder / "sparse", folder / "int4", "int4")
    return folder
