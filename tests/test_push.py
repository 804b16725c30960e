"""Promised: a finished checkpoint goes to a repository whole, in one commit, with a card that opens it by its name there."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import save_toy
from test_cli import assert_one_line_error, losa_main
from test_report import EVALUATION, made_up

from losa.runtime.card import NOTE


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files talks to."""

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        self.server.seen.append(self.path)
        if self.path.endswith("/repos/create"):
            asked = json.loads(body)
            self.server.private = bool(asked.get("private")) or asked.get("visibility") == "private"
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            return self._answer({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        if self.path.endswith("/validate-yaml"):  # of the card
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self._answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        if "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            return self._answer({"commitUrl": f"{self.server.address}/someone/toy/commit/{'a' * 40}", "commitOid": "a" * 40})
        return self._answer({"error": "no such door"}, 404)

    do_GET = do_POST

    def _answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.seen, server.private = {}, [], None
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    yield server
    server.shutdown()
    server.server_close()


def test_a_checkpoint_is_pushed_whole(hub, tmp_path, monkeypatch, capsys):
    directory = save_toy(tmp_path / "toy-sparse")
    (directory / ".hidden").write_text("no")
    (directory / "README.md").write_text('from_pretrained("toy-sparse")\n')
    code, out, err = losa_main(monkeypatch, capsys, "push", directory, "someone/toy", "--private")
    assert code == 0, err
    assert f"pushed: {hub.address}/someone/toy/commit/" in out
    assert " files, " in out
    assert hub.private is True
    assert sum("/commit/main" in path for path in hub.seen) == 1
    assert hub.files.keys() == {file.name for file in directory.iterdir()} - {".hidden"}
    assert hub.files["README.md"] == b'from_pretrained("someone/toy")\n'
    for name in ("config.json", "model.safetensors"):
        assert hub.files[name] == (directory / name).read_bytes()


def test_a_renamed_checkpoint_opens_by_its_name_there(hub, tmp_path, monkeypatch, capsys):
    directory = save_toy(tmp_path / "renamed")
    (directory / "README.md").write_text(f'# old\n\nfrom_pretrained("old")\n{NOTE.format(name="old", values="int8")}')
    assert losa_main(monkeypatch, capsys, "push", directory, "someone/toy")[0] == 0
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("someone/toy")' in card and 'losa.load("someone/toy")' in card and '"old"' not in card


@pytest.mark.parametrize("lists", [True, False])
def test_nothing_of_others_is_pushed(hub, tmp_path, monkeypatch, capsys, lists):
    directory = save_toy(tmp_path / "toy")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/rag.jinja").write_text("{{ documents }}")
    mine = {path.name for path in directory.iterdir() if path.is_file()} | {"additional_chat_templates/rag.jinja", "README.md"}
    if lists:
        (directory / "code.txt").write_text("of the model")
        (directory / "losa-files.json").write_text(json.dumps({"files": sorted(mine | {"code.txt"})}))
        mine |= {"losa-files.json", "code.txt"}
    for name in ("notes.txt", "own.json"):
        (directory / name).write_text("mine")
    assert losa_main(monkeypatch, capsys, "push", directory, "someone/toy")[0] == 0
    assert hub.files.keys() == mine
    assert hub.files["additional_chat_templates/rag.jinja"] == b"{{ documents }}"


def test_paths_stay_private(hub, tmp_path, monkeypatch, capsys):
    directory, home = save_toy(tmp_path / "toy"), str(tmp_path)
    record = made_up(2)
    record["config"] |= {"model": f"{home}/dense", "output": f"{home}/toy"}
    record["config"]["train"]["data"] = record["evaluation"]["data"] = f"{home}/text.txt"
    record["evaluation"]["held_out"] = {"sha256": "ab", "source": "../private/text.txt"}
    rows = [row | {"model": f"{home}/toy", "data": f"{home}/text.txt"} for row in EVALUATION["perplexity"]]
    (directory / "losa.json").write_text(json.dumps(record))
    (directory / "eval.json").write_text(json.dumps(EVALUATION | {"perplexity": rows}))
    assert losa_main(monkeypatch, capsys, "push", directory, "someone/toy")[0] == 0
    for name in ("losa.json", "eval.json"):
        assert home.encode() not in hub.files[name] and b"private" not in hub.files[name]
    pushed = json.loads(hub.files["losa.json"])
    assert (pushed["config"]["model"], pushed["config"]["train"]["data"]) == ("dense", "text.txt")
    assert pushed["steps"] == record["steps"] and home in (directory / "losa.json").read_text(), "only the copy"
    (directory / "losa.json").write_text("{}")
    assert_one_line_error(losa_main(monkeypatch, capsys, "push", directory, "someone/toy"), "cannot push")


def test_what_is_no_checkpoint_is_not_pushed(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / ".losa").mkdir()
    assert_one_line_error(losa_main(monkeypatch, capsys, "push", tmp_path, "someone/toy"), "holds an interrupted run")
    (tmp_path / "config.json").write_text("{}")
    assert_one_line_error(losa_main(monkeypatch, capsys, "push", tmp_path, "someone/toy"), "has no .safetensors file")
    assert hub.seen == []


def test_what_the_hub_refuses_is_one_line(hub, tmp_path, monkeypatch, capsys):
    directory = save_toy(tmp_path / "toy")
    monkeypatch.setattr(Hub, "do_POST", lambda self: self._answer({"error": "you may not"}, 403))
    code, _, err = losa_main(monkeypatch, capsys, "push", directory, "someone/toy")
    assert code == 2
    assert "cannot push to 'someone/toy'" in err and "hf auth login" in err
    code, _, err = losa_main(monkeypatch, capsys, "push", directory, "some one//toy")
    assert code == 2 and "cannot push to" in err
