"""The report: one page that opens anywhere, with a section for everything that was measured and none for what was not."""

import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from helpers import record_of, set_up, toy_config, toy_run
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from losa.allocation import allocate_ranks, cubic_sparsity
from losa.api import prune
from losa.cli import app
from losa.cli.tables import summary
from losa.config import LosaConfig
from losa.models import load
from losa.report.card import model_card
from losa.report.content import command, gap_closed, headline, layer_bytes, overview, public, warning
from losa.report.figures import plots
from losa.report.page import documents, page, refresh
from losa.rules import RULES

EVALUATION = {
    "perplexity": [
        {
            "model": "org/sparse",
            "data": "Salesforce/wikitext:wikitext-2-raw-v1:test",
            "window": 2048,
            "windows": 166,
            "perplexity": 7.1234,
            "definition": "token, windowed",
        },
        {
            "model": "org/sparse",
            "data": "wikitext2",
            "window": 2048,
            "documents": 62,
            "perplexity": 13.5,
            "definition": "word, lm-eval",
        },
    ],
    "tasks": {
        "arc_easy": {
            "acc": 0.5512,
            "acc_stderr": 0.0102,
            "acc_norm": 0.5037,
            "acc_norm_stderr": 0.0103,
            "items": 2376,
            "split": "test",
            "version": 1.0,
            "shots": 0,
        },
        "winogrande": {
            "acc": 0.5201,
            "acc_stderr": 0.014,
            "acc_norm": None,
            "acc_norm_stderr": None,
            "items": 1267,
            "split": "validation",
            "version": 1.0,
            "shots": 0,
        },
    },
    "mean_acc": {"tasks": ["arc_easy", "winogrande"], "acc": 0.53565, "acc_stderr": 0.0087},
    "lm_eval": "0.4.13",
    "date": "2026-11-22",
}
BENCH = {
    "machine": "AMD EPYC, 2 threads",
    "bandwidth": 35e9,
    "prompt": 32,
    "new": 32,
    "rows": [
        {
            "name": name,
            "tokens_per_second": speed,
            "first_token_seconds": 0.31,
            "resident_bytes": memory,
            "weight_bytes": memory,
            "limit_tokens_per_second": 35e9 / memory,
        }
        for name, speed, memory in (("dense", 5.8, 2_100_000_000), ("sparse bfloat16", 18.1, 927_000_000))
    ],
}


def made_up(blocks: int, kind: str = "run", steps: int = 5, **changes) -> dict:
    """A record of a run that never was."""
    done = []
    for step in range(1, steps + 1):
        target = cubic_sparsity(step, steps, 0.7)
        waves = [math.sin(1.3 * block + 0.1 * step) for block in range(blocks)]
        errors = [0.02 * step + 0.3 * target * (block + 1) / blocks + 0.01 * wave for block, wave in enumerate(waves)]
        row = {"step": step, "target": target, "achieved": target, "errors": errors, "raised_damping": {}}
        row["importance"] = [0.88 + 0.001 * wave for wave in waves] if kind == "run" else None
        row["rates"] = [target - 0.02 * (wave > 0) + 0.02 * (wave <= 0) for wave in waves]
        row["ranks"] = allocate_ranks(errors, 6 + 4 * step / steps, 16)
        if kind == "run":
            row["loss"] = [[update, 2 + target + 1 / update] for update in (1, *range(10, 80 if step < steps else 700, 10))]
        done.append(row)
    preset = "one-shot" if kind == "prune" else None
    config = LosaConfig.load(preset=preset, overrides={"model": "org/dense-7b", "output": "sparse", "train.data": "org/text"})
    found = {"dense": 5.47, "pruned": 16.4} | ({"losa": 7.1} if kind == "run" else {})
    return {
        "kind": kind,
        "steps": done,
        "perplexity": found,
        "seconds": {"reading text": 2.5, "training": 600.25},
        "text_sha256": "ab" * 32,
        "sparsity": {"asked": 0.7, "achieved": 0.70001, "weights": 202_383_360 * blocks},
        "evaluation": {"data": "held out of the training text", "window": 2048, "windows": 40},
        "config": config.to_dict(),
        "versions": {"losa": "0.1.0", "torch": "2.13.0", "machine": "AMD EPYC, 2 threads"},
        "processes": 1,
    } | changes


class Page(HTMLParser):
    """Reads a page, insisting that every element is closed, and keeps what tests ask for."""

    VOID = {"meta", "link", "br", "hr", "img", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.targets, self.text = [], [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.targets += [(tag, found[key]) for key in ("src", "href", "xlink:href", "data", "srcset", "action") if key in found]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data


def figures_of(text: str) -> list[str]:
    return re.findall(r'<figure id="(\w+)">', text)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Pages of records that never were: two sizes of runs, and one-shot pruning."""
    return {
        "8": page(made_up(8), "sparse", EVALUATION, BENCH),
        "80": page(made_up(80), "sparse"),
        "prune": page(made_up(8, "prune", 1), "sparse"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = set_up(tmp_path_factory.mktemp("report"), talks=True)
    toy_run(folder, steps=2)
    return folder


@pytest.mark.parametrize("name", ["8", "80", "prune"])
def test_a_page_is_well_formed_and_needs_nothing_else(pages, name):
    text = pages[name]
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    assert {target for tag, target in found.targets if tag != "use"} == {"https://arxiv.org/abs/2502.14816"}
    assert all(target[1:] in found.ids for tag, target in found.targets if tag == "use")
    assert all(reference in found.ids for reference in re.findall(r"url\(#([^)]*)\)", text))
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not re.search(r"@import|url\((?!#)|data:\w+/|<\?xml|<!ENTITY", text)
    assert "#0102" not in text  # no placeholder colour is left


@pytest.mark.parametrize("name", ["8", "80", "prune"])
def test_every_figure_is_xml_with_words(pages, name):
    text = pages[name]
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == len(figures_of(text)) == text.count("<figcaption>") == text.count('role="img" aria-label="')
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("viewBox")
        assert root.get("width") is None
        words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert words & {"block", "update", "dynamic step"}  # the axis is named, in letters and not in outlines


def test_numbers_stand_in_the_cells_where_they_fit(pages):
    first, *_ = made_up(8)["steps"]
    assert f">{100 * first['rates'][0]:.1f}</text>" in pages["8"]
    assert not re.search(r">\d\d\.\d</text>", pages["80"])  # nor do colour bars split a rank
    ticks = re.findall(r'<g id="rates-xtick_\d+">', pages["80"])
    assert 10 <= len(ticks) <= 41


def test_sections_follow_the_data(pages):
    assert figures_of(pages["8"]) == ["targets", "rates", "importance", "errors", "ranks", "loss"]
    assert figures_of(pages["prune"]) == ["rates", "errors"]
    assert [re.findall(r"<h[23]>(.*?)</h", pages[name]) for name in ("8", "prune")] == [
        [
            *("Quality", "Perplexity", "Zero-shot tasks", "Size and speed", "Speed", "Where it opens", "Step by step", "Time"),
            "How it was made",
        ],
        ["Quality", "Perplexity", "Size", "Where it opens", "Block by block", "Time", "How it was made"],
    ]
    for text in ("55.12 ± 1.02", "53.56 ± 0.87", "lm-eval 0.4.13, 2026-11-22", "word, lm-eval", "7.123", "3.12x", "35.0 GB/s"):
        assert text in pages["8"]
        assert text not in pages["80"]
    assert "of the gap" not in pages["prune"]


def test_quality_size_and_speed_stand_beside_each_other():
    table = overview(made_up(8), BENCH)
    assert table.head == ("model", "perplexity", "zeros", "decoder layers", "of dense", "tokens/s")
    found = {row[0]: row[1:] for row in table.rows}
    assert list(found) == ["dense", "pruned only", "LoSA"]
    assert found["dense"][:2] == ("5.47", "0 %") and found["LoSA"][:2] == ("7.10", "70.00%")
    assert found["LoSA"][3] == "0.36" and float(found["LoSA"][4]) > float(found["dense"][4]) and found["pruned only"][4] == ""
    assert "tokens/s" not in overview(made_up(8)).head


def test_samples_and_openers_are_on_page_and_card():
    record = made_up(2) | {"samples": {"prompt": "The old man", "dense": "sat", "pruned": "", "losa": "<b>stood</b>"}}
    made = documents(record, "sparse")
    assert all(word in text for text in made.values() for word in ("The old man", "(nothing)", "vLLM", "llama.cpp"))
    assert "<b>stood" not in made["report.html"]
    assert "Samples" not in documents(made_up(2), "sparse")["report.html"]


def test_nothing_on_the_page_is_wider_than_a_phone(pages):
    style = re.search(r"<style>(.*?)</style>", pages["8"], re.DOTALL)[1]
    assert "@media (max-width: 600px)" in style
    assert all(int(width) <= 130 for width in re.findall(r"min-?width: ?(\d+)px", style.split("@media (max-width")[0]))


def test_the_headline():
    numbers = dict(headline(made_up(8), EVALUATION, BENCH))
    assert list(numbers) == ["70.00%", "7.10", "76.2%", "0.36x", "3.1x", "53.6%"]
    assert numbers["7.10"] == "perplexity; dense 5.47, pruned only 16.40"
    assert list(dict(headline(made_up(8, "prune", 1)))) == ["70.00%", "16.40", "0.36x"]
    one_item = EVALUATION | {"mean_acc": EVALUATION["mean_acc"] | {"acc_stderr": None}}
    assert dict(headline(made_up(8), one_item))["53.6%"] == "mean accuracy of 2 zero-shot tasks"


def test_gap_that_cannot_be_told():
    assert gap_closed({"dense": 5.0, "pruned": 10.0}) is None
    assert gap_closed({"dense": 5.0, "pruned": 5.0, "losa": 5.0}) is None
    assert gap_closed({"dense": 5.0, "pruned": math.inf, "losa": 9.0}) is None
    assert gap_closed({"dense": 5.0, "pruned": 20.0, "losa": 10.0}) == pytest.approx(0.5)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("last", "other"), [("losa", "unrounded"), ("pruned", "unrounded"), ("made", "pruned")])
def test_what_was_not_measured_is_left_out(last, other):
    found = {other: 9.0, last: 7.5}
    record = made_up(2, perplexity=found)
    assert gap_closed(found) is None and warning(record) is None
    dense, *others = overview(record).rows
    assert dense[:2] == ("dense", "") and len(others) == 2, "its size is there all the same"
    before = "; pruned only 9.00" if other == "pruned" else ""
    assert dict(headline(record))["7.50"] == f"perplexity{before}"
    console = Console(record=True, width=300)
    console.print(summary(record))
    for text in (console.export_text(), *documents(record, "sparse").values()):
        assert "of the gap" not in text and "gap in" not in text and "7.50" in text


def test_packed_size_is_that_of_the_format():
    import torch

    from losa.runtime.format import pack
    from losa.runtime.values import TYPES

    W = torch.zeros(64, 64, dtype=torch.bfloat16)
    W.view(-1)[::4] = 1
    record = {"sparsity": {"weights": W.numel(), "achieved": 0.75}}
    for found, kind in zip(list(layer_bytes(record).values())[1:], TYPES.values(), strict=True):
        packed = pack(W, kind)
        assert found == packed.mask.nbytes + packed.values.nbytes + (packed.groups.nbytes if kind.group else 0)


def test_names_are_text():
    name = "<script>alert('&')</script>"
    record = made_up(2)
    record["config"]["model"] = f"org/{name}"
    record["config"]["eval"]["data"] = record["evaluation"]["data"] = name
    text = page(record, name)
    assert "<script" not in text
    found = Page(text)
    assert found.text["h1"] == name
    assert name in found.text["title"]


def test_directories_stay_private(tmp_path):
    assert public("org/model") == "org/model"
    assert public("Salesforce/wikitext:wikitext-2-raw-v1:test") == "Salesforce/wikitext:wikitext-2-raw-v1:test"
    for path in ("/home/me/secret/model", "../secret/model", "~/secret/model"):
        assert public(path) == "model"
    record = made_up(2)
    record["config"] |= {"model": "/home/me/secret/model", "output": "/home/me/secret/sparse"}
    for part in ("train", "calibration", "eval"):
        record["config"][part]["data"] = "/home/me/secret/text.txt"
    record["evaluation"]["data"] = "/home/me/secret/text.txt"
    for text in documents(record, "sparse").values():
        assert "secret" not in text


def test_a_model_made_in_memory_has_no_command():
    record = made_up(2)
    record["config"]["model"] = ""
    texts = documents(record, "sparse")
    assert all("A sparse version of a model:" in text for text in texts.values())
    assert "losa run" not in texts["report.html"]


def test_equal_records_give_equal_bytes():
    evaluation, bench = json.loads(json.dumps(EVALUATION)), json.loads(json.dumps(BENCH))
    assert documents(made_up(3), "sparse", EVALUATION, BENCH) == documents(made_up(3), "sparse", evaluation, bench)


def test_figures_leave_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots(made_up(2))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("blocks", [1, 3])
def test_few_blocks_and_one_rate(blocks):
    record = made_up(blocks, steps=1)
    record["steps"][0]["rates"] = [0.7] * blocks
    assert [plot.name for plot in plots(record)] == ["rates", "importance", "errors", "ranks", "loss"]


# What YAML, a shell or both read as something else.
STRANGE = ("#x", "1e3", "12:30", "null", "yes", "a: b", "it's", '"a" b', "[a", " a\n\nb ", "$HOME", "ä\N{SPARKLES}\a")


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("run", {}),
        ("run", {"sparsity": 0.55, "pruner": "sparsegpt", "train.lr": 1e-5, "train.reuse_weights": True, "eval.data": "a b.txt"}),
        ("run", {"pruner": "movement", "protect": [0, 5], "sparsity": 0.4}),
        ("run", {"pattern": "2:4", "calibration.data": "allenai/c4:en", "eval.windows": 8}),
        ("prune", {"calibration.data": "org/text", "rate_band": 0.02}),
        ("run", {"preset": "paper"}),
        ("run", {"preset": "paper", "rate_band": 0.0}),
        ("run", {"preset": "paper,quick", "pattern": "2:4", "sparsity": 0.5, "values": "int4", "shard": True}),
        ("run", {"rates": "owl", "sparsity": 0.5, "eval.windows": 4, "train.samples": 9}),
        ("run", {"rates": "error", "rate_band": 0.1, "steps": 3, "reconstruct.epochs": 2, "calibration.data": "#x"}),
        ("prune", {"preset": "paper", "rates": "dlp", "rate_band": 0.0, "eval.windows": None}),
        *(("prune", {"calibration.data": "org/text", "train.data": text}) for text in STRANGE),
    ],
)
def test_the_command_makes_the_same_configuration(monkeypatch, kind, overrides):
    given = {"model": "org/dense", "output": "sparse"} | ({"train.data": "org/text"} if kind == "run" else {}) | overrides
    presets = [name for name in (given.pop("preset", None), "one-shot" if kind == "prune" else None) if name]
    config = LosaConfig.load(preset=",".join(presets) or None, overrides=given).resolve(768, 2048)
    line = command({"kind": kind, "config": config.to_dict()})
    seen = []
    monkeypatch.setattr("losa.session.check_request", lambda config, **_: seen.append(config))
    monkeypatch.setattr("losa.models.load", lambda config: (_ for _ in ()).throw(ValueError("enough")))
    CliRunner().invoke(app, shlex.split(line.replace("\\\n", " "))[1:])
    assert seen == [config]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("kind", "last", "pattern", "says"),
    [
        ("run", 10.9, "unstructured", None),
        ("run", 17.0, "unstructured", ["Training made it worse", "(16.4)", "train.lr"]),
        ("run", 140, "unstructured", ["140 against 5.47", "Lower --sparsity", "train.tokens", "--data"]),
        ("run", 140, "2:4", ["--pattern"]),
        ("run", math.inf, "unstructured", ["inf against 5.47"]),
        ("run", math.nan, "unstructured", ["nan against 5.47"]),
        ("prune", 16.4, "unstructured", ["16.4 against 5.47", "losa run recovers"]),
    ],
)
def test_a_result_far_from_dense_is_said_to_be(kind, last, pattern, says):
    record = made_up(3, kind)
    record["perplexity"]["losa" if kind == "run" else "pruned"] = last
    record["config"] |= {"pattern": pattern, "sparsity": 0.5, "rate_band": 0.0}
    found = warning(record)
    console = Console(record=True, width=300)
    console.print(summary(record))
    texts = [console.export_text(), *documents(record, "sparse").values()]
    if says is None:
        assert found is None
        assert not any("far from dense" in text for text in texts)
    else:
        assert all(part in found for part in says)
        assert all(found in text for text in texts)


@pytest.mark.parametrize("rule", [rule.name for rule in RULES.values() if not rule.by_layer])
def test_importance_is_that_of_the_rule(rule):
    record = made_up(3, steps=1)
    record["config"]["rates"] = rule
    (caption,) = (plot.caption for plot in plots(record) if plot.name == "importance")
    assert caption.startswith("Importance ") and ("mutual information" in caption) == (rule == "rmi")


def test_no_ranks_where_all_weights_are_trained():
    record = made_up(3)
    for step in record["steps"]:
        step["ranks"] = None
    assert [plot.name for plot in plots(record)] == ["targets", "rates", "importance", "errors", "loss"]


def test_command_of_several_processes():
    assert command(made_up(2, processes=4)).startswith("torchrun --nproc-per-node 4 -m losa run org/dense-7b \\\n  --output")


def test_a_run_leaves_its_report(folder):
    output = folder / "sparse"
    text, record = (output / "report.html").read_text("utf-8"), record_of(output)
    assert [step["achieved"] for step in record["steps"]] == pytest.approx([step["target"] for step in record["steps"]], abs=1e-3)
    assert record["steps"][-1]["achieved"] == record["sparsity"]["achieved"]
    assert figures_of(text) == ["targets", "rates", "importance", "errors", "ranks", "loss"]
    assert str(folder) not in text
    assert Page(text).text["h1"] == "sparse"
    AutoModelForCausalLM.from_pretrained(output)
    card = (output / "README.md").read_text("utf-8")
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    assert "(report.html)" in card
    assert not list(output.glob(".*"))


def test_the_report_of_a_run_that_trained_all_weights(folder, tmp_path):
    output = tmp_path / "whole"
    toy_run(folder, output=str(output), steps=1, train={"weights": "all", "lr": 1e-3}, reconstruct={"epochs": 1})
    text = (output / "report.html").read_text("utf-8")
    assert figures_of(text) == ["rates", "importance", "errors", "loss"]
    assert "by training every weight that was left" in text
    assert "reconstructed" in text


def test_prune_leaves_its_report(folder, tmp_path):
    config = toy_config(folder, output=str(tmp_path / "pruned"), rate_band=0.0)
    prune(*load(config), config)
    text = (tmp_path / "pruned" / "report.html").read_text("utf-8")
    assert figures_of(text) == ["rates", "errors"]
    assert "once, without training" in text


def test_report_takes_up_what_was_measured_since(folder, tmp_path, monkeypatch):
    output = tmp_path / "sparse"
    shutil.copytree(folder / "sparse", output)
    monkeypatch.setattr("losa.runtime.bench.compare", lambda *_: BENCH)
    assert CliRunner().invoke(app, ["bench", str(output), "--save"]).exit_code == 0
    (output / "eval.json").write_text(json.dumps(EVALUATION))
    with (output / "README.md").open("a", encoding="utf-8") as card:
        card.write("\n## Packed\n\nHow it opens.\n")
    result = CliRunner().invoke(app, ["report", str(output)])
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    text, card = ((output / name).read_text("utf-8") for name in ("report.html", "README.md"))
    assert "55.12 ± 1.02" in text
    assert "62 documents" in text
    assert "GB/s" in text
    assert "| arc_easy | test | 1.0 | 0 | 2376 | 55.12 ± 1.02 | 50.37 ± 1.03 |" in card
    assert card.endswith("\n## Packed\n\nHow it opens.\n")
    toy_run(folder, steps=1, output=str(output), overwrite=True)  # other weights: what was measured of the old ones is gone
    assert not {"eval.json", "bench.json"} & {path.name for path in output.iterdir()}
    assert "55.12" not in (output / "report.html").read_text("utf-8")


def test_report_takes_up_what_losa_eval_keeps(folder, tmp_path):
    output = tmp_path / "sparse"
    shutil.copytree(folder / "sparse", output)
    measured = ["eval", str(output), "--data", str(folder / "text.txt"), "--length", "16", "--windows", "5", "--save"]
    for arguments in (measured, ["report", str(output)]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    for name in ("report.html", "README.md"):
        text = (output / name).read_text("utf-8")
        assert "5 windows" in text
        assert str(folder) not in text


def test_report_of_something_else(tmp_path):
    with pytest.raises(ValueError, match=r"has no losa\.json; it is not a finished LoSA run"):
        refresh(tmp_path)
    (tmp_path / "losa.json").write_text(json.dumps(made_up(2)))
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval\.json is not JSON: .*; delete it, or measure again"):
        refresh(tmp_path)
    assert not (tmp_path / "report.html").exists()


HOSTILE = "<script>alert(1)</script> ![x](http://a/b.png) [y](javascript:z) a|b `c`\nlicense: evil"


def test_a_card_shows_what_comes_from_files_as_text():
    record, evaluation = made_up(2), json.loads(json.dumps(EVALUATION))
    record["config"] |= {"pruner": HOSTILE, "model": "org/" + HOSTILE}
    record["evaluation"]["data"] = HOSTILE
    evaluation["perplexity"][0]["data"] = evaluation["lm_eval"] = HOSTILE
    evaluation["tasks"][HOSTILE] = evaluation["tasks"]["arc_easy"]
    card = model_card(record, f"sparse{HOSTILE}", evaluation)
    assert "<script" not in card
    assert "\\[y\\](javascript:z)" in card
    assert not re.search(r"(?<!\\)!?\[[xy](?<!\\)\]\(", card)
    front = yaml.safe_load(card.split("---\n")[1])
    assert set(front) <= {"library_name", "base_model", "tags"}
    assert len(front["tags"]) == 3
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 6, 7, 8}  # the tables' own columns, and no more


def test_an_honest_card_is_as_it_was():
    card = model_card(made_up(2), "sparse")
    assert "tags: [sparse, losa, alps]" in card
    assert "\\" not in card and "&" not in card


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("losa.json", lambda found: found.pop("perplexity")),
        ("losa.json", lambda found: found.update(sparsity={"achieved": "most", "asked": [], "weights": None})),
        ("losa.json", lambda found: found.update(steps=[{"rates": "x"}])),
        ("eval.json", lambda found: found.update(tasks=[1])),
        ("bench.json", lambda found: found.update(rows=[])),
    ],
)
def test_damaged_records_are_named(tmp_path, name, damage):
    contents = {"losa.json": made_up(2), "eval.json": EVALUATION, "bench.json": BENCH}
    for file, content in contents.items():
        copy = json.loads(json.dumps(content))
        if file == name:
            damage(copy)
        (tmp_path / file).write_text(json.dumps(copy))
    with pytest.raises(ValueError, match=r"cannot report on .*what is damaged has to be measured again") as raised:
        refresh(tmp_path)
    assert name in str(raised.value)
    assert not (tmp_path / "report.html").exists()
