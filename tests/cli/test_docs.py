"""The pages: short enough, links and flags exist, commands and Python run, tables are those that the commands write.

A block of commands whose first line is `# needs ...` (a network, a GPU, data) is checked as far as its command lines;
every other one is run in a folder with a little of the demo's data, made short by the flags in SHORT.
"""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys

import pytest

import gpt2
import seq2seq
from gpt2 import gen, run_generation, run_language_modeling
from gpt2 import train_e2e as gpt2_launcher
from prefixlib.data.tasks import find_task
from prefixlib.decoding import outputs
from seq2seq import finetune, train_bart
from seq2seq.train_e2e import TableSettings
from tests.conftest import ROOT

PAGES = (
    *("README.md", "CONTRIBUTING.md", "docs/tutorial.md", "docs/tasks.md"),
    *("docs/models.md", "docs/serving.md", "docs/differences.md"),
    *("results/README.md", "data/README.md", "data/demo/README.md"),
)
BLOCKS = {
    "README.md": 10,
    "CONTRIBUTING.md": 2,
    "docs/tutorial.md": 15,
    "docs/tasks.md": 2,
    "docs/models.md": 1,
    "docs/serving.md": 4,
    "results/README.md": 2,
    "data/README.md": 2,
}
DEMO = ROOT / "data" / "demo"
SPLITS = {"train": 24, "dev": 3, "val": 3, "valid": 3, "test": 4}
SHORT = {
    "gpt2/train_e2e.py": "--max_steps 2 --max_new_tokens 20 --disable_tqdm yes --overwrite_output_dir yes",
    "gpt2/gen.py": "--decode_limit 3 --length 20 --disable_tqdm yes",
    "seq2seq/train_bart.py": "--max_steps 2 --n_val 2 --n_train 20 --num_workers 0 --disable_tqdm yes",
    "scripts/score.py": "--metrics BLEU",
}


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page, *languages):
    """(language, lines) of every block of code in a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [(language, body.splitlines()) for language, body in found if language in languages]


def script(path):
    """A file of scripts/ as a module."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


# ---- what a command does -----------------------------------------------------------------------------------------


def launch(name, words, only_parse):
    """What a launcher does; the process that it would become runs in this one."""
    if name == "gpt2/gen.py":
        command, child = gen.build_command(*gen.parse_args(words)), run_generation.main
    elif name == "gpt2/train_e2e.py":
        command, child = gpt2_launcher.build_command(gpt2_launcher.parse_args(words)), run_language_modeling.main
    else:
        kind, mode = (TableSettings, "webnlg") if name.endswith("e2e.py") else (seq2seq.Settings, "xsum")
        command, child = train_bart.build_command(train_bart.parse_args(words, "", kind, mode)), finetune.main
    if not only_parse:
        assert child(command[2:]) == 0


def run_script(name, words, only_parse):
    """A file of scripts/: all of it, or its command line."""
    module = script(ROOT / name)
    if not only_parse:
        assert not module.main(words)
    elif name == "scripts/reproduce.py":
        assert module.main([*words, "--dry_run", "--data_dir", str(DEMO)]) == 0
    else:
        module.parse_args(words)


def run_python(words, folder, only_parse):
    """`python SCRIPT ...`, from the root or from the folder of a tree."""
    path = (folder / words[0]).resolve()
    name = path.relative_to(ROOT).as_posix()
    rest = words[1:]
    if name == "scripts/tasks_table.py":
        return  # it writes into the page; test_written_tables compares
    if name == "scripts/benchmark.py" and rest in (["table"], ["plan"]):
        return
    if not only_parse and "--help" not in rest and not ("--do_train" in rest and "no" in rest):
        rest += shlex.split(SHORT.get(name, ""))
    if name.startswith("scripts/"):
        run_script(name, rest, only_parse)
    else:
        launch(name, rest, only_parse)


def run_line(line, folder, only_parse, playground):
    """One command of a page; returns the folder for the next one."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):  # a variable of the environment
        words = words[1:]
    if not words:
        return folder
    tool, rest = words[0], words[1:]
    if tool == "cd":
        return (folder / rest[0]).resolve()
    if tool == "python":
        run_python(rest, folder, only_parse)
    elif tool == "bash":
        assert subprocess.run(["bash", "-n", str(ROOT / rest[0])], check=False).returncode == 0, line
        assert all((ROOT / word).exists() for word in rest[1:] if not word.startswith("-")), line
    elif tool in ("pip", "curl"):
        assert only_parse, f"{line}: {tool} is not run, so its block begins with # needs"
    elif tool in ("ls", "head"):
        subprocess.run(words, cwd=playground, check=True, stdout=subprocess.DEVNULL)
    else:
        raise AssertionError(f"{line}: the test does not know {tool}")
    return folder


# ---- the folder in which they run --------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def unscored():
    """METEOR's tables alone take longer than all the rest; scoring is tested elsewhere."""
    scores = {"BLEU seen": 1.0, "BLEU unseen": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        score = outputs.score
        patch.setattr(
            outputs, "score", lambda mode, *of: dict(scores) if find_task(mode).is_table else score(mode, *of)
        )
        yield


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    """A folder with the demo's models, a little of its data, a checkpoint of each tree, and files for the scorers."""
    folder = tmp_path_factory.mktemp("docs")
    demo = folder / "data" / "demo"
    for path in sorted(DEMO.glob("*/*")):
        target = demo / path.relative_to(DEMO)
        target.parent.mkdir(parents=True, exist_ok=True)
        count = next((n for split, n in SPLITS.items() if re.search(rf"(^|[-_]){split}[._\d]", path.name)), None)
        if path.parent.name in ("gpt2", "bart") or count is None or path.parent.name == "dart":
            target.symlink_to(path)
        elif path.suffix == ".json":
            target.write_text(json.dumps({"entries": json.loads(path.read_text())["entries"][:count]}))
        else:
            target.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    brief = {"max_steps": 1, "preseqlen": 3, "mid_dim": 8, "disable_tqdm": True, "data_dir": str(demo)}
    gpt2_run = {"output_dir": str(folder / "CHECKPOINT"), "model_name_or_path": str(demo / "gpt2")}
    gpt2.train(gpt2.Settings(mode="webnlg", skip_decode=True, **gpt2_run, **brief))
    bart_run = {"output_dir": str(folder / "BART_CHECKPOINT"), "model_name_or_path": str(demo / "bart")}
    seq2seq.train(seq2seq.Settings(mode="xsum", n_val=1, n_train=8, num_workers=0, **bart_run, **brief))
    for name in ("OUTPUT", "OUTPUT_A", "OUTPUT_B", "GOLD"):
        (folder / name).write_text("the mill is by the river .\n")
    (folder / "my_text.txt").write_text("The Fern River is a pub in the riverside area. It serves Chinese food. " * 3)
    for name in ("train", "dev"):
        (folder / f"{name}.jsonl").write_text('{"source": "a mill", "target": "by the river\\n"}\n' * 4)
    return folder


@pytest.mark.parametrize("page", BLOCKS)
def test_commands_and_python_run(page, playground, monkeypatch, capfd):
    """From top to bottom, as a reader would."""
    monkeypatch.chdir(playground)
    monkeypatch.setattr(gpt2_launcher, "TREE", playground / "gpt2")  # runs without --output_dir go there
    monkeypatch.setattr(train_bart, "TREE", playground / "seq2seq")
    blocks = blocks_of(page, "bash", "python")
    for language, lines in blocks:
        if language == "python":
            code = compile("\n".join(lines), f"an example of {page}", "exec")
            named = re.findall(r"^import (\w+)$", "\n".join(lines), re.MULTILINE)
            if not lines[0].startswith("# needs") or all(map(importlib.util.find_spec, named)):
                exec(code, {})
            continue
        folder, only_parse = ROOT, lines[0].startswith("# needs")
        for line in "\n".join(lines).replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                folder = run_line(command, folder, only_parse, playground)
    assert len(blocks) == BLOCKS[page]


# ---- what stands in them -----------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 230


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
            assert heading in slugs, link


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    """Paths in code that begin with a folder of the repository; what stands under data/ may be prepared later."""
    folders = "gpt2|seq2seq|prefixlib|scripts|tests|docs|results"
    for path in re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]*\w\.(?:py|md|sh|json|png|txt))\b", text_of(page)):
        assert (ROOT / path).exists() or path == "results/NAME.json", path


def help_of(module_main):
    """What --help prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        module_main(["--help"])
    return printed.getvalue()


@pytest.fixture(scope="module")
def known_flags():
    mains = [gpt2_launcher.main, gen.main, run_generation.main, train_bart.main, finetune.main]
    names = ("score", "export", "prepare_data", "reproduce", "benchmark", "build_demo", "demo")
    mains += [script(ROOT / "scripts" / f"{name}.py").main for name in names]
    found = set(re.findall(r"--[a-z][\w-]*", "".join(map(help_of, mains))))
    assert len(found) > 120
    return found | {"--no-deps", "--durations"}  # pip's, pytest's


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page, known_flags):
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"<!--.*?-->", "", text_of(page))))
    assert sorted(flags - known_flags) == []


@pytest.mark.parametrize(
    ("page", "command"), [("docs/tasks.md", "tasks_table"), ("results/README.md", "benchmark")], ids=lambda value: value
)
def test_written_tables(page, command, tmp_path, capsys):
    """What is committed is what the command writes today."""
    module = script(ROOT / "scripts" / f"{command}.py")
    copy = tmp_path / "README.md"
    begun = re.sub(r"(<!-- \w+: .*? -->\n).*?(<!-- end)", r"\1\2", text_of(page), flags=re.DOTALL)
    copy.write_text(begun)
    if command == "benchmark":
        for path in (ROOT / "results").glob("benchmark_*.json"):
            (tmp_path / path.name).symlink_to(path)
        assert [module.main([part, "--output", str(tmp_path)]) for part in ("table", "plan")] == [0, 0]
    else:
        module.main(copy)
    assert len(text_of(page)) > len(begun) + 2000
    assert copy.read_text() == text_of(page)


def test_the_readme_shows_the_results_there_are():
    script(ROOT / "scripts" / "reproduce.py")
    from paper import summary

    assert f"-->\n\n{summary.summary(ROOT / 'results')}\n<!-- end of results" in text_of("README.md")


@pytest.mark.parametrize("name", ["README.md", "setup.py", "data/demo/README.md", "CONTRIBUTING.md"])
def test_no_licence_is_claimed(name):
    assert re.search(r"(is|none is) given yet", text_of(name))
