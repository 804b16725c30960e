"""Every kind of text becomes full blocks of tokens; what is measured on is never trained on; no row is seen in two steps."""

import gzip
import json
import logging

import pytest
import torch
from helpers import WORDS, save_text, toy_config
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from losa.commands.toy import toy_tokenizer
from losa.config import LosaConfig
from losa.data import (
    PIECE,
    calibration_windows,
    check_sources,
    evaluation_text,
    load_documents,
    pack,
    padded_samples,
    pieces,
    prepare,
    training_blocks,
    windows,
)
from losa.training import collate

EOS = 63


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return toy_tokenizer()


def write(path, content: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


RECORDS = [{"text": "ONE"}, {"instruction": "ADD", "output": "TWO"}, "THREE"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "ONE\n\nTWO", ["ONE\n\nTWO"]),
        ("a.md", "# ONE", ["# ONE"]),
        ("a.raw", " = ONE = \n", [" = ONE = \n"]),
        ("a.json", json.dumps([{"text": "ONE"}, "TWO"]), ["ONE", "TWO"]),
        ("a.json", json.dumps({"text": "ONE"}), ["ONE"]),
        ("a.json", '{"text": "ONE"}\n{"text": "TWO"}\n', ["ONE", "TWO"]),
        ("a.json", json.dumps([{"text": "ONE"}], indent=2), ["ONE"]),
        ("a.jsonl", '{"text": "ONE", "id": 3}\n\n"TWO"\n', ["ONE", "TWO"]),
        ("a.jsonl", json.dumps({"text": "A\u2028B\x85C"}, ensure_ascii=False) + "\n", ["A\u2028B\x85C"]),
        ("a.txt", "täxt ✓", ["täxt ✓"]),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_each_kind_of_file(tmp_path, name, content, expected, zipped):
    assert load_documents(write(tmp_path / (name + ".gz" * zipped), content)) == expected


def test_directory_is_read_recursively_in_order(tmp_path):
    write(tmp_path / "b.txt", "B")
    write(tmp_path / "a" / "z.jsonl.gz", '{"text": "Z"}')
    write(tmp_path / "a" / "deep" / "y.md", "Y")
    write(tmp_path / "c.pdf", "ignored")
    write(tmp_path / "empty.txt", " \n")
    assert load_documents(str(tmp_path)) == ["Y", "Z", "B"]


def test_instruction_becomes_the_alpaca_prompt(tmp_path):
    plain = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}
    with_input = {"instruction": "Add.", "input": "1 {2}", "output": "3"}
    documents = load_documents(write(tmp_path / "a.json", json.dumps([plain, with_input])))
    assert documents[0].text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n3"
    )
    assert documents[1].text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n3"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ONE\ncaf\xe9", "a.txt, line 2: not UTF-8 text"),
        ("a.jsonl", b'{"text": "ONE"}\n{"text": ', "a.jsonl, line 2: not valid JSON"),
        ("a.json", b'["ONE",\n "TWO"', "a.json, line 2: not valid JSON"),
        ("a.jsonl", b'{"title": "x", "id": 1}', r"a.jsonl, line 1: an object with \['id', 'title'\]; expected 'text',"),
        ("a.jsonl", b'{"text": 3}', r"a.jsonl, line 1: 'text' is a number \(3\), expected text"),
        ("a.json", b"[17]", r"a.json, line 1: a record that is a number \(17\)"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.json", b"[]", "holds no text"),
        ("a.pdf", b"%PDF", "cannot read a.pdf; expected .txt"),
        ("a.txt.gz", b"not gzip at all", "a.txt.gz"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / name))


def test_directory_without_text(tmp_path):
    write(tmp_path / "c.pdf", "1")
    with pytest.raises(ValueError, match=r"no \.txt, \.md, \.raw, \.json, \.jsonl, \.ndjson, \.csv or \.parquet file in"):
        load_documents(str(tmp_path))


def test_missing_source_is_one_clear_error():
    with pytest.raises(ValueError, match=r"'nobody/nothing-here:en' is neither a local file or directory nor a hub dataset"):
        load_documents("nobody/nothing-here:en")


def reference_pack(documents: list[str], length: int, count: int) -> list[list[int]]:
    stream: list[int] = []
    for document in documents:
        for character in document:
            stream.append(ord(character) - 32)
        stream.append(EOS)
    rows = []
    while len(stream) >= length and len(rows) < count:
        rows.append(stream[:length])
        stream = stream[length:]
    return rows


@pytest.mark.parametrize(("length", "count"), [(8, 1000), (8, 5), (7, 1000), (1, 3), (400, 9), (5000, 9)])
def test_pack_equals_plain_reference(tokenizer, length, count):
    documents = [f"DOCUMENT {number} " + "ABC" * number for number in range(100)]
    packed = pack(documents, tokenizer, length, count)
    assert packed.tolist() == reference_pack(documents, length, count)
    assert packed.dtype == torch.int64
    assert packed.shape[1] == length


def test_pack_puts_one_eos_between_documents(tokenizer):
    assert pack(["AB", "C", "DE"], tokenizer, 8, 9).tolist() == [[33, 34, EOS, 35, EOS, 36, 37, EOS]]
    assert pack(["AB</s>", "C"], tokenizer, 5, 9).tolist() == [[33, 34, EOS, 35, EOS]]  # it ends with one already


def test_windows_are_the_text_in_order_without_its_tail(tokenizer):
    text = "THE QUICK BROWN FOX"
    assert windows(text, tokenizer, 5).tolist() == [[ord(c) - 32 for c in text[i : i + 5]] for i in (0, 5, 10)]
    assert windows(text, tokenizer, 5, most=2).tolist() == windows(text, tokenizer, 5).tolist()[:2]
    assert windows(text, tokenizer, 5, most=99).shape == (3, 5)
    assert windows(text, tokenizer, len(text)).shape == (1, len(text))


def test_text_shorter_than_a_window(tokenizer):
    with pytest.raises(ValueError, match="the text has 3 tokens, expected at least one window of 5"):
        windows("FOX", tokenizer, 5)


def test_calibration_shorter_than_asked_is_refused(tokenizer):
    assert calibration_windows(["A" * 99], tokenizer, 10, 10).shape == (10, 10)
    with pytest.raises(ValueError, match=r"9 windows of 10 tokens, expected 10;.*--calibration"):
        calibration_windows(["A" * 98], tokenizer, 10, 10)
    with pytest.raises(ValueError, match="0 windows of 1000 tokens, expected 1"):
        calibration_windows(["A" * 98], tokenizer, 1000, 1)


def test_short_training_text_is_repeated_with_a_warning(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        blocks = training_blocks(["A" * 9, "B" * 9], tokenizer, 10, 5)
    assert blocks.tolist() == [[33] * 9 + [EOS], [34] * 9 + [EOS]] * 2 + [[33] * 9 + [EOS]]
    assert "the training text has 20 tokens; seen 2.5 times" in caplog.text


def test_long_training_text_is_not(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        assert training_blocks(["A" * 99], tokenizer, 10, 4).shape == (4, 10)
    assert not caplog.text


@pytest.mark.parametrize(("eos", "begins"), [(None, False), ("</s>", True)])
def test_documents_that_eos_does_not_tell_apart_say_where_they_begin(eos, begins):
    """A tokenizer without EOS, and one whose documents begin with theirs: places start anew with a document, and only there."""
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = eos
    if begins:
        one = tokenizer.convert_tokens_to_ids(eos)
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{eos} $A", special_tokens=[(eos, one)])
    found = training_blocks(["HELLO WORLD", "SECOND", "THE THIRD ONE"] * 20, tokenizer, 60, 8)
    batch = collate([found[index] for index in range(8)], eos=tokenizer.eos_token_id)
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"].flatten().tolist())
    text, places = "", batch["position_ids"].flatten().tolist()
    for place, word in zip(places, words, strict=True):
        text += ("|" if place == 0 else "") + word
    whole = {"HELLOWORLD", "SECOND", "THETHIRDONE"}
    documents = [part.replace("</s>", "").replace(" ", "") for part in text.split("|")[1:]]
    assert sum(document in whole for document in documents) >= len(documents) - 16, documents  # but where rows begin and end


def test_training_text_that_fills_no_block(tokenizer):
    with pytest.raises(ValueError, match="does not fill one block of 10 tokens"):
        training_blocks(["A" * 8], tokenizer, 10, 4)


def test_padded_samples_are_documents_of_their_own(tokenizer):
    samples = padded_samples(["AB", "CDEFGH", "X"], tokenizer, 4, 2)
    assert samples == [{"input_ids": [33, 34, EOS]}, {"input_ids": [35, 36, 37, 38]}]
    assert padded_samples(["AB</s>"], tokenizer, 8, 1) == [{"input_ids": [33, 34, EOS]}]  # it ends with one already


def test_fewer_samples_than_asked(tokenizer):
    with pytest.raises(ValueError, match=r"1 samples, expected 2 \(train\.samples\)"):
        padded_samples(["AB"], tokenizer, 4, 2)


def test_collate_pads_without_loss_and_attention():
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_collate_of_full_rows_has_nothing_to_mask():
    batch = collate([{"input_ids": torch.tensor([5, 0])}, {"input_ids": torch.tensor([0, 8])}])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["labels"].tolist() == [[5, 0], [0, 8]]


def test_pieces_hold_the_whole_text_once():
    lines = [f"{number} " + "X" * (number % 90) for number in range(2000)]
    document = "\n".join(lines)
    parts = pieces([document, "short"], seed=3)
    assert max(len(part) for part in parts) <= 2 * PIECE
    assert sorted("".join(parts)) == sorted(document + "short")
    assert all(part in document or part == "short" for part in parts)
    assert sum(part.endswith("\n") for part in parts) == len(parts) - 2  # cut at line ends, but for the two ends of text
    assert parts == pieces([document, "short"], seed=3)
    assert parts != pieces([document, "short"], seed=4)


def test_text_without_lines_is_cut_too():
    parts = pieces(["X" * (10 * PIECE)], seed=0)
    assert sum(map(len, parts)) == 10 * PIECE
    assert max(map(len, parts)) <= 2 * PIECE


def numbered(path, count: int = 3000):
    """Documents that can be told apart wherever 24 characters of them turn up."""
    path.write_text("\n".join(json.dumps({"text": f"[{number:06d} {WORDS[number % 13]}] " * 4}) for number in range(count)))
    return path


def documents_in(rows) -> set[str]:
    text = "".join(chr(token + 32) for row in rows for token in torch.as_tensor(row).tolist())
    return {part[1:7] for part in text.split(" ") if len(part) == 7 and part[0] == "["}


def test_held_out_text_is_never_trained_or_calibrated_on(tmp_path, tokenizer):
    data = numbered(tmp_path / "data.jsonl")
    train = {"data": str(data), "tokens": 100_000, "length": 32}
    prepared = prepare(toy_config(tmp_path, train=train, eval={"length": 32, "windows": None}), tokenizer)
    held, trained = documents_in(prepared.evaluation), documents_in(prepared.train)
    assert prepared.evaluation.numel() == pytest.approx(0.02 * sum(map(len, load_documents(str(data)))), rel=0.03)  # tokens
    assert len(held) == pytest.approx(60, abs=2)
    assert len(trained) > 1000
    assert not held & trained
    assert not held & documents_in(prepared.calibration)


def test_calibration_falls_back_to_the_end_of_the_training_text(tmp_path, tokenizer):
    data = numbered(tmp_path / "data.jsonl")
    train = {"data": str(data), "tokens": 32_000, "length": 32}
    prepared = prepare(toy_config(tmp_path, train=train), tokenizer)
    assert prepared.calibration.shape == (8, 32)
    assert documents_in(prepared.calibration)
    assert not documents_in(prepared.calibration) & documents_in(prepared.train)


def test_calibration_text_of_its_own(tmp_path, tokenizer):
    data, own = numbered(tmp_path / "data.jsonl"), save_text(tmp_path / "own.txt")
    prepared = prepare(toy_config(tmp_path, train={"data": str(data)}, calibration={"data": str(own)}), tokenizer)
    assert not documents_in(prepared.calibration)
    assert documents_in(prepared.train)


def test_evaluation_text_of_its_own_is_taken_whole(tmp_path, tokenizer):
    data = numbered(tmp_path / "data.jsonl")
    (tmp_path / "held").mkdir()
    for name, text in (("a.txt", "A" * 50), ("b.txt", "B" * 50)):
        (tmp_path / "held" / name).write_text(text)
    config = toy_config(tmp_path, train={"data": str(data)}, eval={"data": str(tmp_path / "held"), "length": 51, "windows": None})
    prepared = prepare(config, tokenizer)
    assert evaluation_text(str(tmp_path / "held")) == "A" * 50 + "\n\n" + "B" * 50
    assert prepared.evaluation.shape == (2, 51)


def test_more_rmi_than_pruning_sequences_are_prepared(tmp_path, tokenizer):
    data = numbered(tmp_path / "data.jsonl")
    calibration = {"sequences": 4, "rmi_sequences": 9}
    for rates, band, expected in (("rmi", 0.1, 9), ("depth", 0.1, 4), ("rmi", 0, 4)):  # none where no rate is measured
        changes = {"rates": rates, "rate_band": band, "calibration": calibration}
        prepared = prepare(toy_config(tmp_path, train={"data": str(data)}, **changes), tokenizer)
        assert prepared.calibration.shape == (expected, 32)


@pytest.mark.parametrize("samples", [None, 100])
@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_steps_share_no_row_and_cover_all(tmp_path, tokenizer, steps, samples):
    data = numbered(tmp_path / "data.jsonl")
    config = toy_config(tmp_path, steps=steps, train={"data": str(data), "tokens": 3200, "samples": samples})
    prepared = prepare(config, tokenizer)
    shares = config.train.shares(steps)
    parts = [prepared.step_rows(step, shares) for step in range(1, steps + 1)]
    assert [len(part) for part in parts] == pytest.approx([share * 100 for share in shares], abs=1)
    together = [row for part in parts for row in part]
    assert len(together) == len(prepared.train) == 100
    for one, other in zip(together, prepared.train, strict=True):
        assert one == other if samples else torch.equal(one, other)


@pytest.mark.parametrize("train", [{"tokens": 1}, {"samples": 5}])
def test_no_step_is_left_without_rows(tmp_path, tokenizer, train):
    data = numbered(tmp_path / "data.jsonl")
    config = toy_config(tmp_path, steps=5, train={"data": str(data), **train})
    prepared = prepare(config, tokenizer)
    counts = [len(prepared.step_rows(step, config.train.shares(5))) for step in range(1, 6)]
    assert min(counts) >= 1, counts


def test_seed_decides_the_data(tmp_path, tokenizer):
    data = numbered(tmp_path / "data.jsonl")

    def of(seed: int):
        return prepare(toy_config(tmp_path, seed=seed, train={"data": str(data)}), tokenizer)

    first, same, other = of(1), of(1), of(2)
    for name in ("train", "calibration", "evaluation"):
        assert torch.equal(getattr(first, name), getattr(same, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_pruning_alone_prepares_no_training_rows(tmp_path, tokenizer):
    data = numbered(tmp_path / "data.jsonl")
    config = toy_config(tmp_path, train={"data": None}, calibration={"data": str(data)})
    assert prepare(config, tokenizer, training=False).train is None


def test_training_needs_training_text():
    config = LosaConfig.from_dict({"calibration": {"data": "some/set"}})
    with pytest.raises(ValueError, match="no training text; give one with --data"):
        check_sources(config, training=True)
    check_sources(config, training=False)


def test_pruning_needs_some_text():
    with pytest.raises(ValueError, match="no calibration text; give one with --calibration"):
        check_sources(LosaConfig(), training=False)


@pytest.mark.parametrize("part", ["train", "calibration", "eval"])
@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/nowhere/at/all", "missing.jsonl.gz"])
def test_missing_file_is_found_before_a_model_is_loaded(part, source):
    config = LosaConfig.from_dict({"train": {"data": "some/set"}} | {part: {"data": source}})
    with pytest.raises(ValueError, match=f"no such file or directory: {source}"):
        check_sources(config, training=True)


def test_names_of_hub_datasets_are_left_to_the_hub():
    sources = ("allenai/c4:en", "imdb", "Salesforce/wikitext:wikitext-2-raw-v1:test")
    values = {part: {"data": source} for part, source in zip(("train", "calibration", "eval"), sources, strict=True)}
    check_sources(LosaConfig.from_dict(values), training=True)


def test_raw_wikitext_is_evaluated_as_its_hub_rows_are(tmp_path):
    """One row a line, blank lines empty, joined by a blank line; a line ends at a newline and nowhere else."""
    file = tmp_path / "wiki.test.raw"
    file.write_text(" \n = ONE = \n \n TEXT\u2028MORE\x85. \n", encoding="utf-8")
    assert evaluation_text(str(file)) == "\n\n".join(["", " = ONE = \n", "", " TEXT\u2028MORE\x85. \n"])


def test_text_too_short_to_hold_a_part_out(tmp_path, tokenizer):
    save_text(tmp_path / "short.txt", 300)
    with pytest.raises(ValueError, match=r"too short to hold a part out.*--eval-data"):
        prepare(toy_config(tmp_path, train={"data": str(tmp_path / "short.txt")}), tokenizer)
