"""The documents: short enough, their links and flags exist, their Python runs, their tables are today's."""

import dataclasses
import re

import pytest

import gpt2
from gpt2.flags import Decoding, Settings
from prefixlib.launch import Launch
from seq2seq.flags import Settings as Seq2SeqSettings
from tests.conftest import ROOT, run_command

DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/tutorial.md",
    "docs/tasks.md",
    "docs/differences.md",
    "results/README.md",
)
DEMO = ROOT / "data" / "demo"


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    output = tmp_path_factory.mktemp("docs") / "run"
    where = {"model_name_or_path": str(DEMO / "gpt2"), "data_dir": str(DEMO), "output_dir": str(output)}
    brief = {"max_steps": 2, "preseqlen": 3, "mid_dim": 8, "disable_tqdm": True, "skip_decode": True}
    gpt2.train(Settings(mode="webnlg", **where, **brief))
    return output


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 230


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(name))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not ((ROOT / name).parent / link).exists()] == []
    assert local or name in ("CONTRIBUTING.md", "docs/tasks.md", "docs/differences.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_exist(name):
    fields = [dataclasses.fields(kind) for kind in (Settings, Decoding, Launch, Seq2SeqSettings)]
    known = {f"--{field.name}" for kind in fields for field in kind}
    known |= {other for kind in fields for field in kind for other in field.metadata["names"]} | {"--help", "--dry_run"}
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.*"))
    foreign = {"--no-deps"}  # pip's
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text_of(name)))
    assert sorted(flag for flag in flags - known - foreign if f'"{flag}"' not in scripts) == []


def test_the_python_examples_run(checkpoint, capsys):
    blocks = [b for name in DOCUMENTS for b in re.findall(r"```python\n(.*?)```", text_of(name), re.S)]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block.replace("CHECKPOINT", str(checkpoint)), "example", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_launchers_take_the_printed_commands():
    """What the README and the tutorial print, from the folder they say, as far as the command line."""
    seen = 0
    for name in ("README.md", "docs/tutorial.md"):
        for block in re.findall(r"```bash\n(.*?)```", text_of(name), re.S):
            for line in block.splitlines():
                words = line.split("#")[0].split()
                if len(words) < 2 or words[0] != "python" or not words[1].split("/")[-1].startswith("train_"):
                    continue
                tree = "seq2seq" if "train_bart" in line or "tuning_mode finetune --epoch" in line else "gpt2"
                script = words[1] if "/" in words[1] else f"{tree}/{words[1]}"
                result = run_command(script, *words[2:], "--dry_run")
                assert result.returncode == 0, (line, result.stderr)
                seen += 1
    assert seen >= 8


def test_the_table_of_tasks_is_todays():
    assert run_command("scripts/tasks_table.py").stdout in text_of("docs/tasks.md")
