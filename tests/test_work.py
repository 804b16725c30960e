"""Promised: phases cover the work of a run exactly once, and what is left of it is told from the pace so far, or not at all."""

import logging
from types import SimpleNamespace

import pytest
from helpers import set_up, toy_model, toy_run

from losa.api import run
from losa.baselines import one_shot
from losa.config import LosaConfig
from losa.method import dynamic_steps
from losa.models import find_decoder
from losa.planning.work import evaluation_windows, evaluations, remaining, stage_flops
from losa.session import Session

pytestmark = pytest.mark.usefixtures("no_figures")

WORK = {
    "baseline": 100.0,
    "importance": 10.0,
    "pruning": 500.0,
    "reconstruction": 0.0,
    "training": 3000.0,
    "evaluation": 300.0,
    "rounding": 0.0,
}


def test_what_is_left_goes_at_the_pace_so_far():
    done = {"baseline": 1.0, "evaluation": 2 / 3}
    seconds = {"baseline": 20.0, "evaluation": 20.0, "reading text": 7.0}
    # pruning as the baseline, 0.2 a unit; the others as evaluation, 0.1
    assert remaining(WORK, done, seconds) == pytest.approx(500 * 0.2 + (10 + 3000 + 100) * 0.1)
    done |= {"importance": 0.5, "pruning": 0.5}
    seconds |= {"importance": 4.0, "pruning": 25.0}
    assert remaining(WORK, done, seconds) == pytest.approx(25 + 4 + 310)
    done["training"], seconds["training"] = 0.1, 600.0
    assert remaining(WORK, done, seconds) == pytest.approx(25 + 4 + 5400 + 10)


def test_what_nothing_tells_is_not_told():
    assert remaining(WORK, {}, {"reading text": 3.0}) is None
    assert remaining(WORK, {"pruning": 0.5}, {"pruning": 25.0}) is None
    assert remaining(WORK, dict.fromkeys(WORK, 1.0), {}) == 0


@pytest.mark.parametrize(("steps", "epochs", "values"), [(1, 0, None), (1, 2, "int4"), (3, 0, "int8"), (3, 1, None)])
def test_phases_cover_all_work_once(monkeypatch, steps, epochs, values):
    seen = []
    config = LosaConfig.from_dict({"steps": steps, "values": values, "reconstruct": {"epochs": epochs}})
    session = SimpleNamespace(config=config, go_through=seen.extend, finish=lambda name: None)
    monkeypatch.setattr(Session, "start", lambda *args, **kwargs: session)
    run(None, None, session.config)
    assert [phase.name for phase in seen[1:]] == [phase.name for phase in dynamic_steps(session.config)]
    total = {stage: sum(phase.part_of.get(stage, 0.0) for phase in seen) for stage in WORK}
    parts = {"reconstruction": float(epochs > 0), "rounding": float(values is not None)}
    expected = dict.fromkeys(WORK, 1.0) | parts | {"evaluation": 1 - 1 / evaluations(config)}
    assert total == pytest.approx(expected)  # the last evaluation comes after all phases


@pytest.mark.parametrize(("epochs", "values"), [(0, None), (2, "int4")])
def test_phases_of_pruning_cover_its_work_once(epochs, values):
    config = LosaConfig.from_dict({"steps": 1, "rates": "rmi", "values": values, "reconstruct": {"epochs": epochs}})
    phases, model = one_shot(config), toy_model()
    total = {stage: sum(phase.part_of.get(stage, 0.0) for phase in phases) for stage in WORK}
    work = stage_flops(config.resolve(32, 64), find_decoder(model), model.config.get_text_config(), training=False)
    expected = {stage: float(amount > 0) for stage, amount in work.items()}
    assert expected["training"] == expected["baseline"] == 0.0
    assert total == pytest.approx(expected | {"evaluation": 0.5})  # the last evaluation comes after all phases


def test_flops_follow_the_configuration():
    model = toy_model()
    decoder, text_config = find_decoder(model), model.config.get_text_config()

    def flops(**changes):
        config = LosaConfig.from_dict(changes).resolve(text_config.hidden_size, 64)
        return stage_flops(config, decoder, text_config)

    base = flops(steps=3, rates="rmi")
    assert flops(rates="rmi")["baseline"] == 0  # a single step's own pruning is the baseline
    assert base.keys() == WORK.keys()
    assert base["reconstruction"] == 0 < flops(reconstruct={"epochs": 1})["reconstruction"]
    assert flops(rates="rmi", rate_band=0.0)["importance"] == flops(rates="depth")["importance"] == 0 < base["importance"]
    magnitude, wanda = (flops(steps=3, pruner=pruner)["baseline"] for pruner in ("magnitude", "wanda"))
    assert magnitude == wanda / 2  # no statistic
    assert flops(train={"distill": 0.0})["training"] < base["training"]
    assert flops(eval={"windows": 10})["evaluation"] * 2 == pytest.approx(flops(eval={"windows": 20})["evaluation"])


def test_windows_that_nobody_counted_are_those_of_wikitext():
    assert evaluation_windows(LosaConfig.from_dict({"eval": {"length": 2048}})) == 166
    assert evaluation_windows(LosaConfig.from_dict({"eval": {"length": 2048, "windows": 9}})) == 9


@pytest.mark.parametrize("weights", ["all", "adapters"])
def test_a_run_says_how_far_it_is(tmp_path, caplog, weights):
    set_up(tmp_path)
    with caplog.at_level(logging.INFO, "losa.session.session"):
        toy_run(tmp_path, steps=1, reconstruct={"epochs": 1}, train={"weights": weights})
    lines = [record.getMessage() for record in caplog.records if " done (phase " in record.getMessage()]
    assert [line.split(",")[0] for line in lines] == [
        "00-baselines done (phase 1 of 4)",
        "01-pruned done (phase 2 of 4)",
        "01-reconstructed done (phase 3 of 4)",
        "01-trained done (phase 4 of 4)",
    ]
    assert [line.endswith(" left") for line in lines] == [True, True, True, False]
