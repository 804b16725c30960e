"""Tasks and word perplexity: the numbers are lm-eval's own, on models of ours and data that need no hub."""

import json
import math
import re
import socket
import sys

import pytest
import torch
from helpers import HUB_ROWS, save_tasks, save_text, save_toy, set_up, toy_config
from test_cli import assert_one_line_error, losa_main

import losa.evaluation
from losa.commands.demo import assets
from losa.commands.toy import toy_tokenizer
from losa.config import LosaConfig
from losa.data import NAMED, evaluation_documents, evaluation_text, is_wikitext, prepare, read_evaluation, wikitext_pages
from losa.evaluation.checkpoint import evaluate_checkpoint, save_results
from losa.evaluation.zeroshot import MORE, PAPER, local_rows, mean_accuracy, task_names
from losa.models import load
from losa.runtime.files import pack_checkpoint

pytest.importorskip("lm_eval")
from datasets import Dataset, DatasetDict
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from losa.evaluation import harness

FEW = ["hellaswag", "winogrande", "boolq", "piqa", "lambada_openai"]  # each kind of request


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The real model of the package: dense, with 70 % zeros, and that packed."""
    place = tmp_path_factory.mktemp("models")
    model, tokenizer = load(assets() / "novels-4m")
    model, paths = model.to(torch.bfloat16), {}
    for kind in ("dense", "sparse"):
        if kind == "sparse":
            for name, weight in model.named_parameters():
                if ".layers." in name and weight.ndim == 2:
                    weight.data[weight.abs() < weight.float().abs().quantile(0.7)] = 0
        paths[kind] = place / kind
        model.save_pretrained(paths[kind])
        tokenizer.save_pretrained(paths[kind])
    paths["packed"] = place / "packed"
    pack_checkpoint(paths["sparse"], paths["packed"])
    return paths


def by_lm_eval(directory, tasks) -> dict:
    """What lm-eval says itself, of a saved directory."""
    model = HFLM(pretrained=str(directory), device="cpu", dtype="bfloat16", batch_size=harness.BATCH, max_length=256)
    return simple_evaluate(model=model, tasks=list(tasks.values()), task_manager=harness.manager(), bootstrap_iters=1000)


def by_losa(directory, tasks) -> dict:
    scorer = harness.Scorer(*load(directory), 256)
    return {name: harness.score(scorer, task) for name, task in tasks.items()}


def answers(tasks) -> list[float]:
    """Log-likelihood of every request that was answered last."""
    return [instance.resps[-1][0] for task in tasks.values() for instance in task.instances]


@pytest.fixture(scope="module")
def measured(models, folder):
    """Of the dense and sparse directories, by lm-eval and by us; and every log-likelihood of the sparse and packed one."""
    tasks = harness.load_tasks(FEW, folder)
    found = {kind: (by_lm_eval(models[kind], tasks), by_losa(models[kind], tasks)) for kind in ("dense", "sparse")}
    sparse = answers(tasks)
    return found, sparse, by_losa(models["packed"], tasks), answers(tasks)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_results_are_those_lm_eval_gives_itself(measured, kind):
    theirs, ours = measured[0][kind]
    assert list(ours) == FEW
    for name, task in ours.items():
        for metric in ("acc", "acc_norm", "perplexity"):
            assert task.get(metric) == theirs["results"][name].get(f"{metric},none")
        assert task["acc_stderr"] == theirs["results"][name]["acc_stderr,none"]
        assert (task["version"], task["shots"]) == (theirs["versions"][name], theirs["n-shot"][name])
        assert task["items"] == theirs["n-samples"][name]["effective"] == len(HUB_ROWS[name])


def test_packed_is_sparse_within_float_noise(measured):
    _, sparse, results, packed = measured
    assert packed == pytest.approx(sparse, rel=0.01, abs=0.1)
    assert results["lambada_openai"]["perplexity"] > 1


def test_zeros_change_the_answers(measured):
    (dense, _), (sparse, _) = (measured[0][kind] for kind in ("dense", "sparse"))
    assert dense["results"]["lambada_openai"] != sparse["results"]["lambada_openai"]


def requests(task) -> list[tuple]:
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [(instance.args, task.doc_to_target(instance.doc)) for instance in task.instances]


def hub(task, monkeypatch) -> dict:
    """lm-eval's task as it is, with the hub replaced by `HUB_ROWS`."""
    rows = Dataset.from_list(HUB_ROWS[task])
    every = DatasetDict(train=rows, validation=rows, test=rows)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: every)
    return harness.manager().load([task])["tasks"][task]


@pytest.fixture(scope="module")
def local(folder):
    return harness.load_tasks(task_names("paper"), folder)


@pytest.mark.parametrize("name", HUB_ROWS)
def test_prompts_of_local_rows_are_those_of_the_hubs(local, monkeypatch, name):
    assert requests(local[name]) == requests(hub(name, monkeypatch))


def test_prompts_to_the_character(local):
    (prompt, answer), target = requests(local["hellaswag"])[3]
    assert (prompt, answer) == ("Roof shingle removal: A man is sitting on a roof. He", " starts pulling up roofing.")
    assert target == 3
    assert requests(local["boolq"])[0] == (("Rain is water.\nQuestion: is rain wet?\nAnswer:", " no"), 1)
    assert requests(local["lambada_openai"])[1][0][1] == " man"


def test_local_data_never_reach_for_the_network(folder, monkeypatch):
    tried = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: tried.append(args) or [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    harness.load_tasks(["arc_easy", "hellaswag"], folder)
    assert not tried


def test_split_used_is_named(local):
    splits = {name: task.config.test_split or task.config.validation_split for name, task in local.items()}
    assert splits == {name: "test" if name == "lambada_openai" else "validation" for name in task_names("paper")}


def test_real_local_data_are_whole(shared):
    folder = shared("data/bench")
    counts = {name: len(local_rows(name, folder)) for name in task_names("paper")}
    assert tuple(counts.values()) == (10_042, 1267, 3270, 500, 1838, 570, 299, 277, 5153)
    begins = [row for row in local_rows("hellaswag", folder) if row["ctx_b"]]
    assert len(begins) == 3243  # so many of HellaSwag's validation items are from ActivityNet


def test_request_longer_than_the_window_is_cut_and_counted(local):
    model, tokenizer = load(assets() / "novels-4m")
    assert harness.score(harness.Scorer(model, tokenizer, 256), local["lambada_openai"])["truncated"] == 0
    short = harness.score(harness.Scorer(model, tokenizer, 8), local["lambada_openai"], limit=1)
    assert (short["truncated"], short["items"], short["acc_stderr"]) == (1, 1, None)


def test_answer_longer_than_the_window_is_scored_on_its_end(local):
    model, tokenizer = load(assets() / "novels-4m")
    scorer = harness.Scorer(model.float(), tokenizer, 8)
    context, answer = tokenizer("He said", add_special_tokens=False)["input_ids"], list(range(20, 40))
    found = scorer._loglikelihood_tokens([(("", "long"), context, answer), (("", "fits"), context, answer[:2])])
    for (score, _), ids, scored in zip(found, (answer[-9:], context + answer[:2]), (8, 2), strict=True):
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([ids[:-1]])).logits[0, -scored:].log_softmax(-1)
        assert score == pytest.approx(logs.gather(1, torch.tensor(ids[-scored:])[:, None]).sum().item(), rel=1e-5)
    assert scorer.truncated == 1
    tiny = harness.score(harness.Scorer(model, tokenizer, 2), local["piqa"])
    assert tiny["truncated"] == 2 * tiny["items"]


def test_word_perplexity_is_its_definition():
    model, tokenizer = load(assets() / "novels-4m")
    model, pages = model.float(), ["The old man looked at the sea .", "He said , that it was late ."]
    total = words = 0
    for page in pages:
        ids = [tokenizer.bos_token_id, *tokenizer(page)["input_ids"]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total -= logits.double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
        words += len(re.split(r"\s+", page))
    found = harness.word_perplexity(harness.Scorer(model, tokenizer, 256), pages, wikitext=False)
    assert found == pytest.approx(math.exp(total / words), rel=1e-5)
    assert harness.word_perplexity(harness.Scorer(model, tokenizer, 256), pages, wikitext=True) != pytest.approx(found, rel=1e-3)


def test_word_perplexity_of_wikitext_is_the_one_lm_eval_gives_itself(models, monkeypatch):
    page = ' \n = Sea = \n \n The sea @-@ level was low , and " salt " . \n' * 20
    text = page + page.replace("Sea", "Land")
    pages = Dataset.from_list([{"page": each} for each in wikitext_pages(text)])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: DatasetDict(train=pages, validation=pages, test=pages))
    theirs = by_lm_eval(models["dense"], harness.manager().load(["wikitext"])["tasks"])["results"]["wikitext"]
    ours = harness.word_perplexity(harness.Scorer(*load(models["dense"]), 256), pages["page"], wikitext=True)
    assert ours == pytest.approx(theirs["word_perplexity,none"], rel=2e-3)  # batches of other windows, in bfloat16


def test_pages_are_cut_at_titles_only():
    text = " \n = Du Fu = \n \n A poet . \n \n = = Life = = \n \n Long . \n \n = Kiss You = \n \n A song . \n \n"
    assert [page.split()[1] for page in wikitext_pages(text)] == ["Du", "Kiss"]
    assert "= = Life = =" in wikitext_pages(text)[0]


def test_wikitext_from_the_hub_has_the_pages_of_the_file(shared, monkeypatch):
    file = shared("data/wikitext-2-raw/wiki.test.raw")
    rows = [line if line.strip() else "" for line in file.read_text("utf-8").splitlines(keepends=True)]
    asked = hub_text(monkeypatch, "text", rows)
    assert evaluation_documents("wikitext2") == evaluation_documents(str(file))
    assert len(evaluation_documents("wikitext2")) == 62  # as EleutherAI/wikitext_document_level
    assert evaluation_text("wikitext2") == evaluation_text(str(file))
    assert is_wikitext("wikitext2")
    assert asked[0] == {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}


def hub_text(monkeypatch, field, rows) -> list[dict]:
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda **source: asked.append(source) or Dataset.from_dict({field: rows}))
    return asked


def test_ptb_and_c4_are_joined_as_their_papers_do(monkeypatch):
    asked = hub_text(monkeypatch, "sentence", ["no it was n't", "black monday"])
    assert evaluation_text("ptb") == "no it was n't black monday"
    assert "penn_treebank/test" in asked[0]["data_files"]["test"]
    asked = hub_text(monkeypatch, "text", [f"page {number}" for number in range(1200)])
    assert evaluation_text("c4").split(" page ")[-1] == "1099"
    assert evaluation_documents("c4")[-1] == "page 1099"
    assert asked[0]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert NAMED["c4"].windows == 256


def test_a_run_measures_c4_over_the_windows_of_its_papers(monkeypatch, tmp_path):
    hub_text(monkeypatch, "text", ["THE QUICK FOX " * 20] * 1200)
    text, tokenizer = read_evaluation("c4"), toy_tokenizer()
    assert [len(text.windows(tokenizer, 32, most).ids_ST) for most in (None, 7, 300)] == [256, 7, 300]
    set_up(tmp_path)
    config = toy_config(tmp_path, eval={"data": "c4", "windows": None}).resolve(32, 64)
    assert len(prepare(config, tokenizer).evaluation) == 256


def test_local_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "a.txt").write_text("MINE")
    assert evaluation_text("ptb") == "MINE"


def test_named_text_that_does_not_load_is_named(monkeypatch):
    def refuse(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(
        ValueError, match="'c4' does not load from the hub: no route; give a local copy of the text with --eval-data"
    ):
        evaluation_text("c4")


def test_task_names():
    assert task_names("paper") == [*PAPER, *MORE]
    assert task_names("rte, paper,mmlu") == ["rte", *PAPER, "lambada_openai", "mmlu"]
    assert len(PAPER) == 7


def test_mean_is_over_the_papers_seven_only():
    tasks = {name: {"acc": number / 10, "acc_stderr": 0.07} for number, name in enumerate(task_names("paper"))}
    mean = mean_accuracy(tasks)
    assert mean["tasks"] == list(PAPER)
    assert mean["acc"] == pytest.approx(0.3)
    assert mean["acc_stderr"] == pytest.approx(0.07 / math.sqrt(7))
    assert mean_accuracy({name: tasks[name] for name in PAPER[:6]}) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["helaswag"], "lm-eval has no task 'helaswag'; did you mean: hellaswag"),
        (["mrpc"], "no data for the task 'mrpc': expected"),
    ],
)
def test_task_that_is_not_there_is_named(folder, names, message):
    with pytest.raises(ValueError, match=message):
        harness.load_tasks(names, folder)


def test_task_without_a_hub_is_named():
    with pytest.raises(ValueError, match=r"the data of rte does not load from the hub.*--task-data"):
        harness.load_tasks(["rte"])


@pytest.fixture
def toy(tmp_path):
    save_text(tmp_path / "text.txt", 700)
    return save_toy(tmp_path / "model")


def test_command_measures_prints_and_keeps(toy, folder, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["eval", toy, "--device", "cpu", "--save"]
    code, out, err = losa_main(monkeypatch, capsys, *arguments, "--tasks", "paper", "--task-data", folder, "--limit", "1")
    assert (code, err) == (0, f"kept in {toy / 'eval.json'}\n")
    assert re.search(r"paper's seven +│ +\d+\.\d\d ", out)
    assert "acc_norm" in out and "scored without their beginning" in out
    assert max(map(len, out.splitlines())) <= 80
    text = ["--data", toy.parent / "text.txt", "--words", "--json"]
    code, out, _ = losa_main(monkeypatch, capsys, *arguments, *text, "--length", "32")
    assert code == 0
    assert [(row["definition"], row["window"]) for row in json.loads(out)["perplexity"]] == [
        ("token, windowed", 32),
        ("word, lm-eval", 32),
    ]
    kept = json.loads((toy / "eval.json").read_text())
    assert kept["perplexity"] == json.loads(out)["perplexity"]
    assert list(kept["tasks"]) == task_names("paper")
    assert kept["mean_acc"]["tasks"] == list(PAPER)
    assert set(kept["tasks"]["rte"]) == {
        *("acc", "acc_stderr", "items", "truncated", "split", "shots", "version", "data", "limit"),
    }
    assert (kept["tasks"]["rte"]["data"], kept["lm_eval"]) == ("local", harness.version)


def test_tokenizer_without_a_beginning_is_refused_before_anything_is_measured(toy, folder, monkeypatch, capsys):
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(toy)
    arguments = ["eval", toy, "--device", "cpu", "--data", toy.parent / "text.txt", "--length", "32"]
    with monkeypatch.context() as patch:
        patch.setattr("losa.evaluation.checkpoint.load", lambda *_: pytest.fail("the model was loaded"))
        for more in (["--words"], ["--tasks", "rte", "--task-data", folder]):
            result = losa_main(monkeypatch, capsys, *arguments, *more)
            assert_one_line_error(result, "the tokenizer has neither BOS nor EOS, lm-eval expects one")
    assert losa_main(monkeypatch, capsys, *arguments)[0] == 0  # perplexity by token needs none


def test_saving_replaces_what_is_measured_again(tmp_path):
    row = {"data": "a", "definition": "token, windowed", "window": 8, "windows": 2}
    rte, mrpc = {"acc": 0.1, "items": 4}, {"acc": 0.2, "items": 4}
    first = {"perplexity": [row | {"perplexity": 3.0}], "tasks": {"rte": rte}, "lm_eval": "1"}
    second = {"perplexity": [row | {"perplexity": 2.0}, row | {"window": 9}], "tasks": {"mrpc": mrpc}, "lm_eval": None}
    save_results(str(tmp_path), first)
    save_results(str(tmp_path), second)
    kept = json.loads((tmp_path / "eval.json").read_text())
    assert [(each["window"], each.get("perplexity")) for each in kept["perplexity"]] == [(8, 2.0), (9, None)]
    assert (kept["tasks"], kept["lm_eval"]) == ({"rte": rte, "mrpc": mrpc}, "1")


def test_saving_a_quick_look_keeps_what_was_measured_over_more(tmp_path, caplog):
    def result(windows, items, limit):
        row = {"data": "a", "definition": "token, windowed", "window": 8, "windows": windows, "perplexity": 1.0}
        tasks = {name: {"acc": 0.5, "acc_stderr": 0.1, "items": items, "limit": limit} for name in PAPER}
        return {"perplexity": [row], "tasks": tasks, "lm_eval": "1"}

    save_results(str(tmp_path), result(40, 9, None))
    save_results(str(tmp_path), result(1, 2, 2))
    kept = json.loads((tmp_path / "eval.json").read_text())
    assert kept["perplexity"][0]["windows"] == 40 and kept["mean_acc"]["acc"] == 0.5
    assert {task["items"] for task in kept["tasks"].values()} == {9}
    assert "perplexity by token, windowed of a at 8: kept what is there, over 40 windows; this is over 1" in caplog.text
    quick = result(1, 10, 10)
    quick["tasks"] = {"piqa": quick["tasks"]["piqa"]}
    save_results(str(tmp_path), quick)
    kept = json.loads((tmp_path / "eval.json").read_text())
    assert (kept["tasks"]["piqa"]["items"], kept["mean_acc"]) == (10, None)


def test_packing_leaves_measurements_behind(models, tmp_path):
    (models["sparse"] / "eval.json").write_text("{}")
    pack_checkpoint(models["sparse"], tmp_path / "packed")
    assert not (tmp_path / "packed" / "eval.json").exists()


def test_missing_lm_eval_is_one_line(toy, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "losa.evaluation.harness")
    monkeypatch.delattr(losa.evaluation, "harness")
    assert_one_line_error(losa_main(monkeypatch, capsys, "eval", toy, "--tasks", "rte"), 'pip install ".[eval]"')


def test_tasks_alone_measure_no_perplexity(toy, folder):
    result = evaluate_checkpoint(LosaConfig(model=str(toy), device="cpu"), tasks=["rte"], task_data=folder)
    assert result["perplexity"] == []
    assert result["mean_acc"] is None
