"""What a run does with its data: which files, what is held out, what is checked before what, and `losa eval` afterwards."""

import json
import logging
import math
import re

import pytest
import torch
from helpers import record_of, save_text, save_toy, toy_config, toy_run
from test_data_chat import chats
from test_data_kinds import lines, zst

from losa.cli import app
from losa.commands.toy import toy_tokenizer
from losa.comparison import Also, Row, measure
from losa.config import LosaConfig
from losa.data import hold_out, load_documents, prepare, read_run
from losa.data.files import directory_files
from losa.evaluation import evaluate_checkpoint
from losa.evaluation.checkpoint import recorded_text
from losa.loss import IGNORED
from losa.models import load
from losa.training import collate

pytestmark = pytest.mark.usefixtures("no_figures")

TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'][0] | upper + ']' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
CHAT = {"steps": 1, "rates": "uniform", "train": {"data": "chat.jsonl", "tokens": 2560}, "eval": {"windows": None}}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a toy instruct model and conversations."""
    save_toy(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    chats(400, tmp_path / "chat.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_directory_says_what_it_took_and_what_it_left(tmp_path, caplog):
    for name, content in (("A.JSONL.ZST", zst(lines("ONE", "TWO"))), ("notes.txt", b"About."), ("b.csv", b"text\nTHREE\n")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "Readme-first.md").write_bytes(b"About.")
    (tmp_path / "prose" / "sources of the nile.txt").write_bytes(b"FOUR")
    with caplog.at_level(logging.INFO, logger="losa"):
        assert load_documents(str(tmp_path)) == ["ONE", "TWO", "THREE", "FOUR"]
    taken, left = caplog.records
    assert (
        "3 files, 4 records\n  A.JSONL.ZST: 2 records\n  b.csv: 1 record\n  prose/sources of the nile.txt: a text"
        in taken.message
    )
    assert left.levelname == "WARNING" and "left out, as prose" in left.message
    assert "notes.txt, prose/Readme-first.md; name a file to read it" in left.message
    assert load_documents(str(tmp_path / "notes.txt")) == ["About."]  # named, it is read


def test_what_is_measured_on_is_not_trained_on_wherever_it_lies(tmp_path, caplog):
    words = [f"{number} SAILS AND {number * number} OARS" for number in range(3000)]
    (tmp_path / "fold").mkdir()
    (tmp_path / "fold" / "train.txt").write_text(" ".join(words[:2000]))
    (tmp_path / "fold" / "valid.txt").write_text(" ".join(words[2000:]))
    sets = {"calibration": {"length": 16, "sequences": 60}, "eval": {"length": 16}, "train": {"length": 16, "tokens": 40_000}}
    tokenizer, fold = toy_tokenizer(), tmp_path / "fold"

    def rows(part_ST):
        return {tuple(row) for row in part_ST.unfold(1, 12, 1).flatten(0, 1).tolist()}

    for data, calibration, measured in (
        (fold, None, fold / "valid.txt"),
        (fold / "train.txt", fold, fold / "valid.txt"),
        (fold / "train.txt", f"{fold}/../fold/train.txt", None),  # the same text, spelt otherwise
    ):
        caplog.clear()
        config = LosaConfig.from_dict(sets | {"model": "toy"})
        config.train.data, config.calibration.data = str(data), calibration and str(calibration)
        config.eval.data = measured and str(measured)
        found = prepare(config.resolve(32, 64), tokenizer)
        seen = rows(found.train) | rows(found.calibration)
        assert len(rows(found.evaluation) & seen) < 0.1 * len(rows(found.evaluation)), (data, calibration)
        assert ("left out, as perplexity is measured on it" in caplog.text) == (measured is not None)


def test_many_files_are_not_all_listed(tmp_path, caplog):
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_text("A")
    with caplog.at_level(logging.INFO, logger="losa"):
        assert len(load_documents(str(tmp_path))) == 30
    assert "19.txt: a text\n  and 10 more" in caplog.text and "20.txt" not in caplog.text
    assert len(directory_files(tmp_path)[0]) == 30


def test_places_in_a_directory_name_the_folder_too(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.ndjson").write_bytes(lines("ONE", None, None))
    with pytest.raises(
        ValueError, match=r"^deep/a\.ndjson, line 2: a record that is null; .* \(and 1 more bad records of 3\); mend it"
    ):
        load_documents(str(tmp_path))


def test_long_fields_and_lines_in_quotes_are_read(tmp_path):
    text = 'She said "A",\nand then\n' + "B" * 200_000
    quoted = text.replace('"', '""')
    (tmp_path / "a.csv").write_text(f'id,text\n1,"{quoted}"\n2\n', "utf-8")
    assert load_documents(str(tmp_path / "a.csv"), skip=True) == [text]
    with pytest.raises(ValueError, match=r"a\.csv, line 5: 1 columns, expected the header's 2"):
        load_documents(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("sizes", [[1000] * 100, [10] * 1000 + [90_000], [200_000, 10], [60_000], [50] * 200 + [20_000] * 3])
def test_two_percent_of_the_text_is_held_out_or_a_window(sizes):
    """However it is cut into documents; a long one is not held out whole."""
    texts = [f"{number:05d} ".ljust(size - 1, "X") + "\n" for number, size in enumerate(sizes)]
    texts = [re.sub("X{90}", "X" * 89 + "\n", text) for text in texts]
    total = sum(map(len, texts))
    for seed in range(3):
        rest, held = hold_out(texts, seed, toy_tokenizer(), 300)
        assert sum(map(len, rest)) + sum(map(len, held)) == total
        assert max(338, total // 50 - 16_400) <= sum(map(len, held)) <= max(total // 50, 338 + 16_400)


def test_a_short_text_gives_a_window_and_a_shorter_one_none(tmp_path):
    texts = ["A" * 40] * 50
    rest, held = hold_out(texts, 0, toy_tokenizer(), 400)
    assert (len(rest), len(held)) == (38, 12)  # 450 tokens and a little, where 2 % are 40
    with pytest.raises(ValueError, match=r"2000 characters, is too short to hold a part out; .*--eval-data, or set eval\.length"):
        hold_out(texts, 0, toy_tokenizer(), 1000)


def test_a_run_trains_on_answers_and_eval_finds_what_it_held_out(home, caplog, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("losa.training.trainer.collate", lambda rows, eos: seen.append(rows) or collate(rows, eos=eos))
    with caplog.at_level(logging.INFO, logger="losa"):
        model = toy_run(home, **CHAT)
    labels = torch.stack([row["labels"] for rows in seen for row in rows])
    assert 0.2 < (labels != IGNORED).float().mean() < 0.8
    assert "what is between >>> and <<<:\n[" in caplog.text
    assert caplog.text.index("a training example") < caplog.text.index("perplexity, dense")
    record = record_of(home / "sparse")
    assert record["evaluation"] | {"held_out": None} == {
        "data": "held out of the training text", "window": 32, "counts": "answers", "held_out": None,
        "windows": record["evaluation"]["windows"],
    }  # fmt: skip
    monkeypatch.chdir(home / "model")  # the text is found from the checkpoint
    result = evaluate_checkpoint(toy_config(home, model=str(home / "sparse")), recorded_text(str(home / "sparse")))
    (row,) = result["perplexity"]
    assert (row["definition"], row["window"], row["windows"]) == ("answer token, windowed", 32, record["evaluation"]["windows"])
    assert row["perplexity"] == pytest.approx(model.losa_record["perplexity"]["losa"], rel=1e-6)
    app(["eval", str(home / "sparse"), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["perplexity"][0]["perplexity"] == row["perplexity"]


def test_a_text_that_changed_or_went_is_not_taken_for_the_same(home):
    toy_run(home, **CHAT)
    text = home / "chat.jsonl"
    text.write_bytes(text.read_bytes().replace(b"WHY", b"WHO"))
    config, recorded = toy_config(home, model=str(home / "sparse")), recorded_text(str(home / "sparse"))
    with pytest.raises(ValueError, match=r"held out of .*chat\.jsonl, which has changed since; give a text with --data"):
        evaluate_checkpoint(config, recorded)
    text.unlink()
    with pytest.raises(ValueError, match=r"chat\.jsonl, which is not there .*; give a text with --data"):
        evaluate_checkpoint(config, recorded_text(str(home / "sparse")))


def test_loss_on_all_counts_prompts_too(home):
    counted = read_run(toy_config(home, **CHAT), training=True).train
    everything = read_run(toy_config(home, **{**CHAT, "train": CHAT["train"] | {"loss_on": "all"}}), training=True).train
    assert torch.equal(counted.ids_ST, everything.ids_ST) and everything.counted_ST.all()
    assert 0.2 < counted.counted_ST.float().mean() < 0.8


def test_an_update_of_prompts_alone_is_no_nan(home, caplog):
    (home / "long.jsonl").write_bytes(lines(*[{"prompt": "A" * 60, "completion": "B" * 9}] * 60))
    changes = {**CHAT, "train": {"data": "long.jsonl", "length": 16, "batch_size": 1, "tokens": 640, "distill": 0.5}}
    toy_run(home, **changes)
    losses = [loss for _, loss in record_of(home / "sparse")["steps"][0]["loss"]]
    assert losses and all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("option", ["--data", "--eval-data", "--calibration"])
def test_data_is_checked_before_the_model_is_loaded_and_the_configuration_printed(home, option, monkeypatch, caplog, capfd):
    save_text(home / "text.txt")
    (home / "bad.jsonl").write_bytes(lines({"text": "A" * 30_000}, {"prompt": "A", "completion": None}))
    monkeypatch.setattr("losa.models.load", lambda config: pytest.fail("the model was loaded"))
    data = [] if option == "--data" else ["--data", "text.txt"]
    short = [f"{part}.length=32" for part in ("train", "calibration", "eval")] + ["calibration.sequences=4"]
    command = ["run", "model", "-o", "sparse", *data, option, "bad.jsonl", *(word for key in short for word in ("--set", key))]
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match=r"bad\.jsonl, line 2: 'completion' is null"):
        app(command, standalone_mode=False)
    assert "configuration" not in caplog.text + capfd.readouterr().err
    assert not (home / "sparse").exists()
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        app([*command, "--skip-bad-records"], standalone_mode=False)
    assert "bad.jsonl: skipped 1 bad records of 2; the first: bad.jsonl, line 2" in caplog.text + capfd.readouterr().err


def test_a_comparison_reads_its_texts_before_each_model(home, monkeypatch):
    (home / "chat.jsonl").write_bytes(lines({"prompt": "A", "completion": ""}))
    monkeypatch.setattr("losa.comparison.rows.load", lambda config: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 1: an answer in 'completion' is empty"):
        measure(Row("LoSA", "losa", "0.6", 0, toy_config(home, **CHAT, output=None), Also(False, False, None, None, None)))


def test_a_tokenizer_without_a_template_gets_the_plain_form(home):
    (home / "model" / "chat_template.jinja").unlink()
    config = toy_config(home, **CHAT)
    _, tokenizer = load(config)
    data = prepare(config.resolve(32, 64), tokenizer)
    text = "".join(chr(token + 32) for token in data.train.ids_ST.flatten().tolist())
    assert "### " in text and "WHY" in text and data.counted is not None
