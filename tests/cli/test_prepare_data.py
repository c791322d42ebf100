"""scripts/prepare_data.py as a user runs it: own files, public sources on a local server, no network, interruptions."""

import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

from prefixlib.system.errors import UserError
from prepare import sources
from scripts import prepare_data

SCRIPT = Path(prepare_data.__file__)
CSV = 'mr,ref\n"name[The Mill], eatType[pub]","The Mill isn\'t a pub."\nname[Cotto],Cotto.\n'
LINES = "name : The Mill | Type : pub||The Mill isn 't a pub . \nname : Cotto||Cotto . \n"
XML = (
    '<benchmark><entries><entry category="Airport" eid="Id1" size="1">'
    "<modifiedtripleset><mtriple>A | p | B</mtriple></modifiedtripleset>"
    '<lex comment="good" lid="Id1">A p B.</lex></entry></entries></benchmark>'
)
DART = json.dumps([{"tripleset": [["S", "R", "O"]], "annotations": [{"source": "x", "text": "S r O."}]}])


def run(*args, cwd=None, **env):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, timeout=60)


def names(folder):
    """Every file under a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_help_names_every_set():
    result = run("--help")
    assert result.returncode == 0
    assert "{e2e,webnlg,dart,xsum,cnn_dm,lowdata,xsum_news,xsum_news_sport}" in result.stdout


def test_own_csv_from_any_folder_and_odd_path(tmp_path):
    source = tmp_path / "my 'files' $(id); x"
    source.mkdir()
    (source / "devset.csv").write_text(CSV)
    result = run("e2e", "--source", source, "--output_dir", "out put", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert names(tmp_path / "out put") == ["e2e_data/src1_valid.txt"]
    assert (tmp_path / "out put/e2e_data/src1_valid.txt").read_text() == LINES
    assert "src1_valid.txt: 2 texts, where the published valid split has 4,672" in result.stderr


def test_one_file_or_an_archive_will_do(tmp_path):
    (tmp_path / "devset.csv").write_text(CSV)
    (tmp_path / "trainset.csv").write_text(CSV)
    prepare_data.prepare("e2e", tmp_path / "devset.csv", tmp_path / "a")
    assert names(tmp_path / "a") == ["e2e_data/src1_valid.txt"]  # that file, not its neighbours
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("master/webnlg_challenge_2017/dev/1triples/Airport.xml", XML)
        archive.writestr("master/webnlg_challenge_2017/test/testdata_with_lex.xml", XML)
    prepare_data.prepare("webnlg", tmp_path / "w.zip", tmp_path / "b")
    assert names(tmp_path / "b") == ["webnlg_challenge_2017/dev.json", "webnlg_challenge_2017/test.json"]
    (tmp_path / "testdata_with_lex.xml").write_text(XML)
    (tmp_path / "testdata_no_lex.xml").write_text("not read")
    prepare_data.prepare("webnlg", tmp_path / "testdata_with_lex.xml", tmp_path / "c")
    assert names(tmp_path / "c") == ["webnlg_challenge_2017/test.json"]
    found, archived = (tmp_path / folder / "webnlg_challenge_2017/test.json" for folder in "cb")
    assert found.read_text() == archived.read_text()


def test_ready_made_files_are_taken_as_they_are(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "dart-v1.1.1-full-test.json").write_text(DART)
    (source / "val.source").write_text("A  document \n")
    (source / "val.target").write_text("A summary\n")
    assert prepare_data.prepare("dart", source, tmp_path / "out") == [
        tmp_path / "out/dart/dart-v1.1.1-full-test.json",
    ]
    prepare_data.prepare("xsum", source, tmp_path / "out")
    assert (tmp_path / "out/dart/dart-v1.1.1-full-test.json").read_text() == DART
    assert (tmp_path / "out/xsum/val.source").read_text() == "A  document \n"
    assert (tmp_path / "out/xsum/val.target").read_text() == "A summary\n"


BAD_SOURCES = {
    # case: (set, file, content, what the one line must say)
    "nothing": ("webnlg", "notes.txt", "x", "found none of: folders train, dev, test with"),
    "csv row": ("e2e", "devset.csv", CSV + "name Cotto,Cotto.\n", "devset.csv:4: expected key[value]"),
    "src1 line": ("e2e", "src1_test.txt", "a : b\n", "in/src1_test.txt:1: expected source||target, found 'a : b'"),
    "empty csv": ("e2e", "devset.csv", "mr,ref\n", "out/e2e_data/src1_valid.txt: no examples"),
    "dart shape": ("dart", "dart-v1.1.1-full-dev.json", "{}", "in/dart-v1.1.1-full-dev.json: top level: expected [{"),
    "webnlg shape": ("webnlg", "dev.json", "[]", 'in/dev.json: top level: expected {"entries": [...]}'),
    "no targets": ("xsum", "val.source", "A document\n", "in/val.target: no such file"),
    "webnlg xml": ("webnlg", "testdata_with_lex.xml", "<a>\n<b>\n", "in/testdata_with_lex.xml:3: not XML"),
    "not an archive": ("webnlg", "set.zip", "x", "in/set.zip: neither a .zip nor a .tar.gz archive"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_source_is_one_line_and_changes_nothing(case, tmp_path):
    name, file, content, message = BAD_SOURCES[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / file).write_text(content)
    before = tmp_path / "out/e2e_data/src1_valid.txt"
    before.parent.mkdir(parents=True)
    before.write_text("was : here||before\n")
    source = tmp_path / "in" / (file if file.endswith((".zip", ".xml")) else "")
    with pytest.raises(UserError) as caught:
        prepare_data.prepare(name, source, tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ".prepare-" not in str(caught.value)  # the user's paths, not the scratch folder's
    assert names(tmp_path / "out") == ["e2e_data/src1_valid.txt"]
    assert before.read_text() == "was : here||before\n"


def test_missing_source_is_one_line(tmp_path):
    result = run("e2e", "--source", tmp_path / "nowhere", "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr == f"error: --source {tmp_path / 'nowhere'}: no such file or folder\n"


def test_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "trainset.csv").write_text(CSV)
    (tmp_path / "devset.csv").write_text(CSV)
    place = tmp_path / "out/e2e_data/src1_train.txt"
    place.parent.mkdir(parents=True)
    place.write_text("was : here||before\n")
    convert = prepare_data.DATASETS["e2e"].convert

    def interrupted(source, split, target):
        if split == "valid":  # after the train split was made and checked
            target.write_text("half a li")
            raise KeyboardInterrupt
        return convert(source, split, target)

    changed = dataclasses.replace(prepare_data.DATASETS["e2e"], convert=interrupted)
    monkeypatch.setitem(prepare_data.DATASETS, "e2e", changed)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.prepare("e2e", tmp_path, tmp_path / "out")
    assert names(tmp_path / "out") == ["e2e_data/src1_train.txt"]
    assert place.read_text() == "was : here||before\n"


# ---- public sources ----------------------------------------------------------------------------------------------

URLS = {
    "e2e": "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/trainset.csv",
    "webnlg": "https://gitlab.com/shimorina/webnlg-dataset/",
    "dart": "https://raw.githubusercontent.com/Yale-LILY/dart/master/data/v1.1.1/dart-v1.1.1-full-train.json",
    "xsum": "https://huggingface.co/datasets/EdinburghNLP/xsum",
    "cnn_dm": "https://huggingface.co/datasets/abisee/cnn_dailymail",
}


@pytest.mark.parametrize("name", prepare_data.DATASETS)
def test_unreachable_source_is_one_line_with_url_and_source_flag(name, tmp_path):
    dead = "http://127.0.0.1:9"  # nothing listens there: the answer is the same with and without a network
    result = run(
        *(name, "--output_dir", tmp_path / "out"),
        **{"https_proxy": dead, "http_proxy": dead, "no_proxy": "", "HF_HOME": str(tmp_path / "hf")},
        HF_ENDPOINT="https://huggingface.co",
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"error: {URLS[name]}")
    assert "--source" in result.stderr
    assert names(tmp_path / "out") == []


@pytest.fixture
def server(tmp_path):
    """A folder and the address that serves it."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

        def send_header(self, keyword, value):
            cut = keyword == "Content-Length" and self.path.endswith("cut.csv")
            super().send_header(keyword, str(int(value) + 1) if cut else value)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def use(monkeypatch, name, **changes):
    monkeypatch.setitem(prepare_data.DATASETS, name, dataclasses.replace(prepare_data.DATASETS[name], **changes))


def test_public_files_are_downloaded_converted_and_counted(server, tmp_path, monkeypatch):
    folder, base = server
    tables = ("trainset.csv", "devset.csv", "testset_w_refs.csv")
    for table in tables:
        (folder / table).write_text(CSV)
    two = {"train": 2, "valid": 2, "test": 2}
    use(monkeypatch, "e2e", fetch=sources.from_files(base, *tables), texts=two)
    prepare_data.prepare("e2e", None, tmp_path / "out")
    assert names(tmp_path / "out") == [f"e2e_data/src1_{split}.txt" for split in ("test", "train", "valid")]
    assert (tmp_path / "out/e2e_data/src1_test.txt").read_text() == LINES

    use(monkeypatch, "e2e", texts={**two, "test": 3})  # one row short of what was published
    with pytest.raises(
        UserError, match=r"src1_test\.txt: 2 texts, where the published test split has 3; nothing was wri"
    ):
        prepare_data.prepare("e2e", None, tmp_path / "out2")
    assert names(tmp_path / "out2") == []

    use(monkeypatch, "e2e", fetch=sources.from_files(base, *tables[:2]), texts=two)
    with pytest.raises(UserError, match="the public source: found src1_train, src1_valid of: trainset"):
        prepare_data.prepare("e2e", None, tmp_path / "out2")


def test_public_archive_is_unpacked(server, tmp_path, monkeypatch):
    folder, base = server
    with zipfile.ZipFile(folder / "w.zip", "w") as archive:
        for split in ("train", "dev", "test"):
            archive.writestr(f"m/webnlg_challenge_2017/{split}/1triples/Airport.xml", XML)
    one = {"train": 1, "valid": 1, "test": 1}
    use(monkeypatch, "webnlg", fetch=sources.from_archive(base + "w.zip?path=x"), texts=one)
    prepare_data.prepare("webnlg", None, tmp_path / "out")
    assert names(tmp_path / "out") == [f"webnlg_challenge_2017/{split}.json" for split in ("dev", "test", "train")]


def test_missing_and_cut_downloads_are_errors(server, tmp_path):
    folder, base = server
    (folder / "cut.csv").write_text(CSV)
    with pytest.raises(UserError, match=r"cut\.csv: only \d+ of \d+ bytes came"):
        sources.download(base + "cut.csv", tmp_path / "file")
    with pytest.raises(UserError, match=r"none\.csv: not reachable \(.*[Nn]ot [Ff]ound\).*--source"):
        sources.download(base + "none.csv", tmp_path / "file")


def test_hub_rows_are_written_out_and_converted(server, tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args):
        asked.append(args)
        row = {"article": "One.\nTwo.", "highlights": "Sum."}
        return {"train": [row, row], "validation": [row], "test": [row]}

    monkeypatch.setenv("HF_ENDPOINT", server[1].rstrip("/"))  # answers 404: reachable, the library decides
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    use(monkeypatch, "cnn_dm", texts={"train": 2, "valid": 1, "test": 1})
    prepare_data.prepare("cnn_dm", None, tmp_path / "out")
    assert asked == [("abisee/cnn_dailymail", "3.0.0")]
    assert names(tmp_path / "out") == [
        f"cnn_dm/{split}.{side}" for split in ("test", "train", "val") for side in ("source", "target")
    ]
    assert (tmp_path / "out/cnn_dm/train.source").read_text() == "One. Two.\nOne. Two.\n"


def test_hub_copy_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    def load_dataset(*args):
        assert os.environ["HF_HUB_OFFLINE"] == "1"  # or the library would try the network again and again
        return {split: [{"document": "One.", "summary": "Sum."}] for split in ("train", "validation", "test")}

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    use(monkeypatch, "xsum", texts={"train": 1, "valid": 1, "test": 1})
    prepare_data.prepare("xsum", None, tmp_path / "out")
    assert (tmp_path / "out/xsum/test.target").read_text() == "Sum.\n"
