"""The configuration checks itself, field by field, before any weight is loaded; one dial sets the rest."""

import sys
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import yaml

from losa.cli import main
from losa.config import AdapterConfig, CalibrationConfig, EvalConfig, LosaConfig, TrainConfig
from losa.rules import RULES


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def test_default_is_the_headline():
    config = LosaConfig()
    assert (config.sparsity, config.steps, config.pruner, config.train.weights) == (0.7, 1, "alps", "all")
    assert config.rate_band == RULES[config.rates].band(0.7)


@pytest.mark.parametrize(
    ("sparsity", "delta"), [(0.3, 0.01), (0.5, 0.01), (0.51, 0.02), (0.6, 0.02), (0.61, 0.03), (0.7, 0.03), (0.95, 0.03)]
)
def test_delta_follows_the_dial(sparsity, delta):
    assert LosaConfig(sparsity=sparsity, rates="rmi").rate_band == delta


def test_delta_given_is_kept():
    assert LosaConfig(sparsity=0.7, rate_band=0.0).rate_band == 0.0
    assert LosaConfig(sparsity=0.7, rate_band=0.1).rate_band == 0.1


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75), ("1:3", 2 / 3)])
def test_pattern_sets_sparsity_and_delta(pattern, sparsity):
    config = LosaConfig(pattern=pattern)
    assert config.sparsity == pytest.approx(sparsity)
    assert config.rate_band == 0
    assert LosaConfig(pattern=pattern, sparsity=config.sparsity) == config


def test_pattern_with_another_sparsity_is_refused():
    with pytest.raises(ValueError, match=r"sparsity is 0\.7, expected 0\.5.*2:4"):
        LosaConfig(pattern="2:4", sparsity=0.7)


def test_pattern_with_a_delta_is_refused():
    with pytest.raises(ValueError, match=r"rate_band is 0\.02, expected 0"):
        LosaConfig(pattern="2:4", rate_band=0.02)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("tain.lr", "did you mean train?"),
        ("pruner_name", "did you mean pruner?"),
        ("sparcity", "did you mean sparsity?"),
        ("train.learning", "train.learning"),
        ("train.batchsize", "did you mean train.batch_size?"),
        ("adapter.rank", "adapter.rank"),
        ("xyzzy", "known keys are model, output"),
    ],
)
def test_unknown_key_names_the_nearest(key, suggestion):
    with pytest.raises(ValueError, match="unknown key") as caught:
        LosaConfig.from_dict(nested(key, 1))
    assert suggestion in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sparsity", "high", "expected float"),
        ("sparsity", [0.7], "expected float"),
        ("sparsity", True, "expected float"),
        ("steps", 2.5, "expected a whole number"),
        ("steps", "five", "expected a whole number"),
        ("steps", None, "expected a whole number"),
        ("steps", True, "expected a whole number"),
        ("seed", float("nan"), "expected a whole number"),
        ("train.tokens", float("inf"), "expected a whole number"),
        ("train.lr", "fast", "expected float"),
        ("train.lr", float("nan"), "expected float"),
        ("pruner", 3, "expected str"),
        ("model", None, "expected str"),
        ("offload", "yes", "expected bool"),
        ("offload", 1, "expected bool"),
        ("train.data", 7, "expected str"),
        ("train", 5, "expected a mapping"),
        ("adapter", None, "expected a mapping"),
        ("adapter", ["a"], "expected a mapping"),
    ],
)
def test_wrong_type_names_key_and_value(key, value, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        LosaConfig.from_dict(nested(key, value))
    assert str(caught.value).startswith(f"{key} is {value!r}")


OUT_OF_RANGE = [
    *(("sparsity", value) for value in (0, 1, -0.1, 1.5, 70)),
    *(("rate_band", value) for value in (-0.01, 1.0)),
    *(("steps", value) for value in (0, -1, 100)),  # stages have two digits
    ("seed", -1),
    *(("pruner", value) for value in ("wandas", "", "Wanda")),
    *(("pattern", value) for value in ("4:2", "0:4", "4:4", "2-4", "", "2:4:8")),
    *(("dtype", value) for value in ("int8", "bf16", "")),
    *(("calibration.sequences", value) for value in (0, -5)),
    *(("calibration.rmi_sequences", value) for value in (0, 1)),
    *(("calibration.length", value) for value in (0, 7)),
    *(("adapter.max_rank", value) for value in (0, -1)),
    *(("adapter.mean_rank_first", value) for value in (0, 0.5, 17)),
    *(("adapter.mean_rank_last", value) for value in (0.99, 16.5)),
    *(("adapter.scale", value) for value in (0, -2, float("inf"))),
    *(("adapter.allocation", value) for value in ("errors", "")),
    *((f"train.{name}", value) for name in ("tokens", "batch_size", "accumulation", "samples") for value in (0, -1)),
    *(("train.last_share", value) for value in (0, 1.01, -0.5)),
    *(("train.length", value) for value in (0, 7)),
    *(("train.lr", value) for value in (0, -1e-4, 1, 2e4)),
    *(("train.warmup", value) for value in (-0.1, 1, 30)),
    ("train.weight_decay", -0.1),
    *(("train.max_grad_norm", value) for value in (0, -1, float("inf"))),
    *(("train.schedule", value) for value in ("liner", "")),
    *(("eval.length", value) for value in (0, 1)),
    *(("eval.windows", value) for value in (0, -1)),
]


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE)
def test_out_of_range_names_the_field(key, value):
    with pytest.raises(ValueError, match="expected") as caught:
        LosaConfig.from_dict(nested(key, value))
    assert str(caught.value).startswith(f"{key} is {value!r}")


def test_a_polynomial_schedule_begins_above_its_end():
    with pytest.raises(ValueError, match=r"train\.lr is 1e-07, expected more than 1e-7, where a polynomial schedule ends"):
        LosaConfig.from_dict({"train": {"schedule": "polynomial", "lr": 1e-7}})


def test_shrinking_max_rank_names_the_mean_rank_that_no_longer_fits():
    with pytest.raises(ValueError, match=r"adapter\.mean_rank_last is 10\.0, expected 1\.\.adapter\.max_rank = 8"):
        LosaConfig.from_dict({"adapter": {"max_rank": 8}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("sparsity", 1e-6), ("sparsity", 0.999), ("rate_band", 0), ("steps", 1), ("train.warmup", 0), ("train.last_share", 1)),
        *(("train.weight_decay", 0), ("adapter.mean_rank_first", 16), ("calibration.sequences", 1), ("eval.length", 2)),
    ],
)
def test_edges_of_the_ranges_are_allowed(key, value):
    LosaConfig.from_dict(nested(key, value))


def test_whole_floats_are_whole_numbers_and_ints_are_floats():
    config = LosaConfig.from_dict({"steps": 4.0, "train": {"tokens": "1e6", "weight_decay": 0}, "sparsity": "0.5"})
    assert (config.steps, config.train.tokens, config.sparsity) == (4, 1_000_000, 0.5)
    assert isinstance(config.steps, int)
    assert isinstance(config.train.weight_decay, float)


def test_yaml_round_trip():
    config = LosaConfig.from_dict(
        {"model": "m", "sparsity": 0.65, "train": {"lr": 1e-3, "samples": 10, "data": "täxt.txt"}, "eval": {"windows": 3}}
    )
    assert LosaConfig.from_dict(yaml.safe_load(config.to_yaml())) == config
    assert list(yaml.safe_load(config.to_yaml())) == [field.name for field in fields(LosaConfig)]


def test_exponent_without_a_dot_in_yaml_is_a_number(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {lr: 1e-3, tokens: 2e6}\n")
    config = LosaConfig.load(str(file))
    assert config.train.lr == 0.001
    assert config.train.tokens == 2_000_000


def test_defaults_then_preset_then_file_then_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("sparsity: 0.6\nsteps: 4\ntrain: {batch_size: 2, warmup: 0.1}\n")
    overrides = {"sparsity": 0.5, "train.batch_size": 16, "train.samples": None}
    config = LosaConfig.load(str(file), "paper", overrides)
    assert (config.sparsity, config.train.batch_size) == (0.5, 16)  # overrides
    assert (config.steps, config.train.warmup) == (4, 0.1)  # file
    assert config.train.samples is None  # an override may take a value back
    assert (config.train.lr, config.train.last_share) == (2e-4, 0.6)  # preset
    assert (config.seed, config.train.accumulation) == (0, 1)  # defaults
    assert config.pruner == "wanda"


def test_delta_follows_the_dial_of_the_last_layer(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("sparsity: 0.7\nrates: rmi\n")
    assert LosaConfig.load(str(file), overrides={"sparsity": 0.5}).rate_band == 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected a mapping"),
        ("just words", "expected a mapping"),
        ("a: [1", "cannot read the config"),
        ("", "mapping"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        LosaConfig.load(str(file))
    assert "c.yaml" in str(caught.value)


def test_home_is_found_in_every_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    file = tmp_path / "run.yaml"
    file.write_text("train: {data: ~/a.txt}\neval: {data: ./~/b.txt}\n")
    config = LosaConfig.load(str(file), overrides={"calibration.data": "~/c"})
    assert (config.train.data, config.calibration.data) == ("/home/someone/a.txt", "/home/someone/c")
    assert config.eval.data == "./~/b.txt"


def test_missing_file_is_named():
    with pytest.raises(ValueError, match=r"cannot read the config nowhere\.yaml"):
        LosaConfig.load("nowhere.yaml")


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="preset is 'papers', expected one of one-shot, paper, quick"):
        LosaConfig.load(preset="papers")


def test_resolve_takes_lengths_from_the_model():
    short = LosaConfig().resolve(hidden_size=64, max_length=256)
    assert (short.calibration.length, short.train.length, short.eval.length) == (256, 256, 256)
    long = LosaConfig().resolve(hidden_size=4096, max_length=131_072)
    assert (long.calibration.length, long.train.length, long.eval.length) == (2048, 1024, 2048)
    given = LosaConfig.from_dict({"train": {"length": 4096}}).resolve(hidden_size=4096, max_length=4096)
    assert given.train.length == 4096


def test_resolve_takes_the_learning_rate_from_the_width():
    adapters = LosaConfig.load(overrides={"train.weights": "adapters"})
    assert adapters.resolve(4096, 2048).train.lr == 2e-4
    assert adapters.resolve(1024, 2048).train.lr == pytest.approx(8e-4)
    assert adapters.resolve(32, 64).train.lr == 5e-3  # capped
    assert LosaConfig().resolve(576, 2048).train.lr == pytest.approx(5e-4)  # all weights
    assert LosaConfig().resolve(1152, 2048).train.lr == pytest.approx(2.5e-4)
    assert LosaConfig().resolve(32, 64).train.lr == 3e-3  # capped
    assert LosaConfig().resolve(576, 2048).reconstruct.lr == pytest.approx(1e-3)
    assert LosaConfig.load(overrides={"train.lr": 3e-5}).resolve(64, 64).train.lr == 3e-5


@pytest.mark.parametrize(
    ("train", "processes", "rows"),
    [
        ({}, 1, 1),  # rows of 1,024 tokens
        ({"length": 256}, 1, 4),
        ({"length": 4096}, 1, 1),
        ({"length": 256}, 3, 6),
        ({}, 8, 8),
        ({"weights": "adapters"}, 1, 8),
        ({"weights": "adapters"}, 3, 9),
        ({"batch_size": 5}, 2, 5),  # what is given stays
    ],
)
def test_resolve_takes_the_rows_of_an_update_from_their_length_and_the_processes(train, processes, rows):
    assert LosaConfig.from_dict({"train": train}).resolve(576, 8192, processes).train.batch_size == rows


def test_resolve_leaves_the_original_alone_and_is_idempotent():
    config = LosaConfig()
    resolved = config.resolve(512, 128)
    assert config.train.lr is None
    assert config.train.length is None
    assert resolved.resolve(512, 128) == resolved


@pytest.mark.parametrize("part", ["calibration", "train", "eval"])
def test_resolve_refuses_what_the_model_cannot_read(part):
    config = LosaConfig.from_dict({part: {"length": 65}})
    with pytest.raises(ValueError, match=rf"{part}\.length is 65, expected at most the model's 64 tokens"):
        config.resolve(32, 64)


@pytest.mark.parametrize(
    ("pruner", "hidden", "sequences"), [("alps", 576, 18), ("sparsegpt", 4096, 128), ("alps", 64, 8), ("wanda", 576, 32)]
)
def test_calibration_follows_the_pruner_and_the_width(pruner, hidden, sequences):
    assert LosaConfig(pruner=pruner).resolve(hidden, 2048).calibration.sequences == sequences


def test_shares_are_a_tenth_each_and_the_rest_at_last():
    assert TrainConfig(last_share=0.6).shares(5) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.6])
    assert TrainConfig().shares(5) == pytest.approx([0.025, 0.025, 0.025, 0.025, 0.9])
    assert TrainConfig().shares(1) == [1.0]
    for steps in (2, 3, 7):
        shares = TrainConfig(last_share=0.3).shares(steps)
        assert len(shares) == steps
        assert sum(shares) == pytest.approx(1)
        assert shares[-1] == 0.3


def test_mean_rank_climbs_from_six_to_ten():
    adapter = AdapterConfig()
    assert [adapter.mean_rank(step, 5) for step in range(1, 6)] == [6, 7, 8, 9, 10]
    assert adapter.mean_rank(1, 1) == 10
    assert [adapter.mean_rank(step, 3) for step in (1, 2, 3)] == [6, 8, 10]


def test_paper_preset_is_the_released_recipe():
    config = LosaConfig.load(preset="paper")
    assert (config.sparsity, config.steps, config.rate_band, config.pruner, config.rates) == (0.7, 5, 0.03, "wanda", "rmi")
    assert (config.train.weights, config.reconstruct.epochs, config.rotate) == ("adapters", 0, False)
    assert config.calibration == CalibrationConfig(
        data="allenai/c4:en", sequences=128, rmi_sequences=64, rmi_length=2048, error_sequences=128
    )
    assert [config.adapter.mean_rank(step, 5) for step in range(1, 6)] == [6, 7, 8, 9, 10]
    assert (config.adapter.max_rank, config.adapter.scale) == (16, 2)
    train = config.train
    assert [round(share * (train.samples or 0)) for share in train.shares(5)] == [1000] * 4 + [6000]
    assert (train.length, train.batch_size, train.lr, train.schedule) == (1024, 8, 2e-4, "linear")
    assert (train.weight_decay, train.warmup, train.max_grad_norm) == (0.001, 0.3, 0.3)
    assert config.eval.data == "Salesforce/wikitext:wikitext-2-raw-v1:test"


def test_fingerprint_ignores_only_what_does_not_decide_the_result():
    base = LosaConfig(output="a")
    assert LosaConfig(output="b").fingerprint() == base.fingerprint()

    def leaves(values: Any, prefix: str = "") -> list[str]:
        return [
            leaf
            for field in fields(values)
            for value in [getattr(values, field.name)]
            for leaf in (leaves(value, f"{prefix}{field.name}.") if is_dataclass(value) else [prefix + field.name])
        ]

    for key in leaves(base):
        values = base.to_dict()
        *path, name = key.split(".")
        inner = values
        for part in path:
            inner = inner[part]
        inner[name] = "changed"
        changed = LosaConfig(output="a")
        target = changed
        for part in path:
            target = getattr(target, part)
        setattr(target, name, "changed")
        assert (changed.fingerprint() == base.fingerprint()) == (key in ("output", "train.save_minutes")), key


def test_parts_can_be_built_alone():
    for part in (CalibrationConfig, AdapterConfig, TrainConfig, EvalConfig):
        assert part() == part()
    with pytest.raises(TypeError):
        TrainConfig(0.1)  # keywords only


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "sparsity is 1.5, expected a ratio between 0 and 1"),
        (["--set", "tain.lr=1"], "unknown key tain; did you mean train?"),
        (["--pattern", "2:4", "--sparsity", "0.7"], "sparsity is 0.7, expected 0.5"),
    ],
)
def test_checked_before_the_model_is_even_looked_for(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["losa", "run", str(tmp_path / "no-such-model"), "-o", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
