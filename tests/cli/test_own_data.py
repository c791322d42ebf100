"""--mode text in gpt2/: the user's own pairs through training and decoding, as a user runs them and from Python."""

import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

import gpt2
from gpt2 import decoding, gen, run_generation, run_language_modeling, train_e2e
from gpt2.dataset import Format, encode, encode_inputs, truncate
from gpt2.flags import Decoding
from prefixlib.data.conversations import as_chat
from prefixlib.data.tasks import as_group, training_text
from prefixlib.data.wording import Wording
from prefixlib.decoding import loop
from prefixlib.settings.search import Search
from prefixlib.system.errors import UserError
from tests.conftest import ROOT
from tests.llama2_tiny import make_llama

MODEL = ROOT / "data" / "demo" / "gpt2"
PAIRS = [
    ("the mill", "by the river\n- and old"),
    ("a | b || c", "x\ty"),
    ("two\nlines", "emoji 👩‍🚀 \u2028 end "),
    (" spaces ", "  kept\n\n"),
]
USER = {"role": "user", "content": "the mill?"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]  # breaks at U+2028 too


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"source": source, "target": target} for source, target in PAIRS]
    write(folder / "train.jsonl", rows * 3)
    write(folder / "valid.jsonl", rows[:2])
    blind = [{"source": "nothing\nknown"}]
    write(folder / "test.jsonl", [*rows, {"source": "the mill", "target": "another"}, *blind])
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("models") / "llama", chat=True)


def settings(data, output, model=MODEL, **more):
    brief = {"preseqlen": 3, "mid_dim": 8, "bsz": 4, "max_steps": 3, "learning_rate": 1e-2, "max_new_tokens": 12}
    files = {f"{name}_file": str(data / f"{split}.jsonl") for name, split in (("train", "train"), ("eval", "valid"))}
    where = {"model_name_or_path": str(model), "output_dir": str(output), "disable_tqdm": True}
    return gpt2.Settings(**{"mode": "text", **files, **where, **brief, **more})


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def trained(request, data, llama, tmp_path_factory):
    """A run with a test file and a template: its result."""
    model = {"gpt2": MODEL, "llama": llama}[request.param]
    more = {"test_file": str(data / "test.jsonl"), "source_template": "Say {source}:"}
    return gpt2.train(settings(data, tmp_path_factory.mktemp("run") / "run", model, **more))


def test_what_a_run_writes(trained):
    """The test file alone is decoded; rows with the same source are one; no score without references."""
    output = trained.output_dir
    kinds = {path.name.removeprefix("run_test_") for path in output.glob("run_*")}
    assert kinds == {"beam", "beam.jsonl", "gold", "src"}
    rows = read(output / "run_test_beam.jsonl")
    assert [row["source"] for row in rows] == [*(source for source, _ in PAIRS), "nothing\nknown"]
    references = [[PAIRS[0][1], "another"], *([target] for _, target in PAIRS[1:]), []]
    assert [row["references"] for row in rows] == references
    assert all(isinstance(row["score"], float) for row in rows)
    lines = (output / "run_test_beam").read_text().split("\n")
    assert lines == [*(row["output"].replace("\n", " ") for row in rows), ""]
    assert trained.scores.keys() == {"test"}
    assert list(trained.scores["test"]) == ["BLEU", "ROUGE-L", "chrF", "exact match"]
    task = json.loads((output / "prefix_config.json").read_text())["task"]
    assert (task["source_template"], task["source_column"]) == ("Say {source}:", "")


def test_python_gives_what_the_command_line_gives(trained, data):
    output, sources = trained.output_dir, [*(source for source, _ in PAIRS), "nothing\nknown"]
    written = [row["output"] for row in read(output / "run_test_beam.jsonl")]
    model = gpt2.load(output)
    for batch in (1, 2, 32):
        assert model.generate(sources, max_new_tokens=12, batch_size=batch) == written
    assert trained.model.generate(sources, max_new_tokens=12) == written
    command = gen.build_command(*gen.parse_args(["text", "yes", "test", str(output), "no"]))[2:]
    more = ["--data_file", str(data / "test.jsonl"), "--max_new_tokens", "12", "--output_dir", str(output / "again")]
    assert run_generation.main([*command, *more, "--disable_tqdm", "yes"]) == 0
    name = "run_test_beam.jsonl"
    assert (output / "again" / name).read_bytes() == (output / name).read_bytes()


def test_the_template_is_what_the_model_reads(trained):
    model = trained.model
    (example,) = model.encode(["the mill"], Search(max_new_tokens=12))
    text = f"Say the mill:{model.tokenizer.eos_token}"
    assert example.prompt == model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (trained.output_dir / "run_test_src").read_text().split("\n")[0] == text


@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_values_survive_the_tokenizer(which, llama):
    """What is trained on is, token by token, what decoding would write: line breaks, tabs, spaces at both ends."""
    tokenizer = AutoTokenizer.from_pretrained({"gpt2": MODEL, "llama": llama}[which], local_files_only=True)
    texts = [text for pair in PAIRS for text in pair]
    ends = [training_text("text", "x", text, tokenizer.eos_token)[1] for text in texts]
    assert [decoding.to_text(tokenizer, ids, verbatim=True) for ids in encode(tokenizer, ends)] == texts
    newline = decoding.newline_token_ids(tokenizer)
    assert newline
    assert decoding.decoding_rule(Search(), tokenizer, verbatim=True).banned_token_ids == ()
    assert decoding.decoding_rule(Search(), tokenizer).banned_token_ids == newline


def test_line_breaks_are_learnt(data, tmp_path):
    """Fine-tuned on four pairs until it knows them, the model writes their line breaks; the score says so."""
    more = {"tuning_mode": "finetune", "max_steps": 60, "learning_rate": 2e-3, "bsz": 4, "decode": "valid"}
    result = gpt2.train(settings(data, tmp_path / "run", max_new_tokens=40, mid_dim=512, **more))
    rows = read(tmp_path / "run" / "run_valid_beam.jsonl")
    assert [row["output"] for row in rows] == [target for _, target in PAIRS[:2]]
    assert result.scores["valid"]["exact match"] == 100


def test_sampling_and_stops(trained):
    model, sources = trained.model, [source for source, _ in PAIRS]
    greedy = model.generate(sources, strategy="greedy", max_new_tokens=20)
    assert model.generate(sources, temperature=0, max_new_tokens=20) == greedy
    assert model.generate(sources, top_k=1, max_new_tokens=20) == greedy
    drawn = model.generate(sources, temperature=2.0, top_p=1.0, max_new_tokens=20, seed=1)
    assert drawn != greedy
    assert drawn == model.generate(sources, temperature=2.0, top_p=1.0, max_new_tokens=20, seed=1, batch_size=1)
    assert drawn != model.generate(sources, temperature=2.0, top_p=1.0, max_new_tokens=20, seed=2)
    stop = next(text[3:5] for text in greedy if len(text) > 6)
    for how in ({"strategy": "greedy"}, {"strategy": "nucleus", "temperature": 1.5, "seed": 3}):
        whole = model.generate(sources, max_new_tokens=20, **how)
        short = model.generate(sources, max_new_tokens=20, stop=stop, **how)
        assert short == [text.split(stop)[0] for text in whole]
        pieces = list(model.stream(sources[0], max_new_tokens=20, stop=[stop, "no such"], **how))
        if "\ufffd" not in whole[0]:  # broken bytes change what stands before them
            assert "".join(pieces) == short[0]
    for text in model.generate(sources, max_new_tokens=20, stop=stop):
        assert stop not in text


def test_a_stop_ends_the_search(trained):
    """No token is generated behind it."""
    model, source = trained.model, "the mill"
    greedy = Search(strategy="greedy", max_new_tokens=20)
    (found,) = model.decode(model.encode([source], greedy), greedy)
    text = model.to_text()(found[0].tokens[:4])
    how = Search(strategy="greedy", max_new_tokens=20, stop=(text[-1],))
    (stopped,) = model.decode(model.encode([source], how), how)
    assert stopped[0].finished
    assert len(stopped[0].tokens) <= 4
    beams = Search(num_beams=3, max_new_tokens=20)
    ((best, *_),) = model.decode(model.encode([source], beams), beams)
    stop = model.to_text()(best.tokens)[1]
    (found,) = model.decode(model.encode([source], beams), replace(beams, stop=(stop,)), 3)
    to_text = model.to_text()
    ended = [hypothesis for hypothesis in found if stop in to_text(hypothesis.tokens)]
    assert ended
    assert all(hypothesis.finished and stop not in to_text(hypothesis.tokens[:-1]) for hypothesis in ended)


@pytest.mark.parametrize("decode", ["valid", "both", "none", None])
def test_what_is_decoded_after_training(data, tmp_path, decode):
    more = {} if decode is None else {"decode": decode}
    more |= {"test_file": str(data / "test.jsonl")} if decode == "both" else {}
    result = gpt2.train(settings(data, tmp_path / "run", decode_limit=1, **{"max_steps": 1, **more}))
    splits = {"both": ["valid", "test"], "none": []}.get(decode, ["valid"])  # without a test file, the dev file
    assert list(result.scores) == splits
    for split in splits:
        assert len(read(tmp_path / "run" / f"run_{split}_beam.jsonl")) == 1


def test_conversations_go_through_the_models_template(llama, tmp_path):
    talk = [{"messages": [USER, {"role": "assistant", "content": f"by the\nriver {n}"}]} for n in range(4)]
    for split in ("train", "valid"):
        write(tmp_path / f"{split}.jsonl", talk)
    result = gpt2.train(settings(tmp_path, tmp_path / "run", llama))
    (row,) = read(tmp_path / "run" / "run_valid_beam.jsonl")
    assert row["source"] == [USER]
    assert row["references"] == [f"by the\nriver {n}" for n in range(4)]
    model = gpt2.load(tmp_path / "run")
    (example,) = model.encode([[USER]], Search(max_new_tokens=12))
    assert model.tokenizer.decode(example.prompt) == "<s> [user]the mill?[/user]\n[assistant]"
    assert example.prompt.count(1) == 1
    assert result.model.generate([[USER], USER["content"]], max_new_tokens=12) == [row["output"]] * 2


def test_a_long_conversation_keeps_its_end(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama, local_files_only=True)
    group = as_group("text", [{"role": "user", "content": "the " * 50}])
    form = Format(wording=Wording(chat=True))
    (whole,) = encode_inputs("text", [group], tokenizer, form)
    assert tokenizer.decode(whole.prompt[-whole.closing :]).endswith("[/user]\n[assistant]")
    assert "the" not in tokenizer.decode(whole.prompt[-whole.closing :])
    (cut,) = encode_inputs("text", [group], tokenizer, form, source_limit=20)
    assert len(cut.prompt) == 20 + whole.closing
    short = truncate(replace(whole, continuation=[5] * 4), 40)
    for example in (cut, short):
        assert example.prompt[-whole.closing :] == whole.prompt[-whole.closing :]
    assert len(short.prompt) + len(short.continuation) == 40
    with pytest.raises(UserError, match="chat template's end alone takes"):
        truncate(whole, 5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mode": "webnlg", "source_column": "q"}, "--mode webnlg and --source_column do not go together"),
        ({"source_template": "none"}, r"--source_template 'none': must hold \{source\} once"),
        ({"decode": "test"}, "--decode test: there is no test file"),
        ({"skip_decode": True, "decode": "test"}, "--skip_decode yes and --decode test do not go together"),
        ({"decode": "all"}, "--decode all: one of valid, test, both, none"),
        ({"source_column": "q"}, r'train.jsonl: row 1: no column "q", found'),
        ({"eval_file": "valid.txt"}, "valid.txt:validation: .*no file of that name is here"),
    ],
)
def test_what_makes_no_sense_is_one_line(data, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as error:
        gpt2.train(replace(settings(data, tmp_path / "run"), **more))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top_k", "-1"], "--top_k -1: must be at least 0"),
        (["--stop", ""], "--stop .*: must be texts that are not empty"),
        (["--temperature", "0", "--strategy", "beam"], "--strategy beam and --temperature do not"),
        (["--temperature", "0", "--num_beams", "3"], "--strategy greedy and --num_beams do not"),
        (["--top_k", "3", "--num_beams", "3"], "--strategy nucleus and --num_beams do not"),
    ],
)
def test_decoding_flags_without_effect_are_refused(argv, message):
    words = ["--mode", "text", "--split", "test", "--checkpoint", "x", *argv]
    with pytest.raises(UserError, match=message):
        Decoding.from_args(run_generation.make_parser().parse_args(words)).strategy_for("text")


def test_stops_are_words_of_the_command_line():
    words = ["--mode", "text", "--split", "test", "--checkpoint", "x", "--stop", r"\n\n", "--stop", "END"]
    assert Decoding.from_args(run_generation.make_parser().parse_args(words)).stop == ("\n\n", "END")


def test_a_conversation_takes_no_template(llama, tmp_path):
    talk = [{"messages": [USER, {"role": "assistant", "content": "yes"}]}]
    for split in ("train", "valid"):
        write(tmp_path / f"{split}.jsonl", talk)
    with pytest.raises(UserError, match="--source_template and a column of messages do not go together"):
        gpt2.train(settings(tmp_path, tmp_path / "run", llama, source_template="{source}"))
    with pytest.raises(UserError, match="the base model has no chat template"):
        gpt2.train(settings(tmp_path, tmp_path / "run"))


def test_a_run_goes_on_with_its_own_template_only(data, tmp_path):
    gpt2.train(settings(data, tmp_path / "run", max_steps=1, decode="none", source_template="a {source}"))
    with pytest.raises(UserError, match="--source_template b .* contradicts .*trained with source_template a"):
        gpt2.train(settings(data, tmp_path / "run", max_steps=1, resume=True, source_template="b {source}"))


def test_the_launcher_passes_it_on(data, tmp_path):
    words = ["--mode", "text", "--train_file", str(data / "train.jsonl"), "--eval_file", str(data / "valid.jsonl")]
    words += ["--source_template", "a\n{source}", "--decode", "none", "--output_dir", str(tmp_path / "run")]
    child = run_language_modeling.parse(train_e2e.build_command(train_e2e.parse_args(words))[2:])
    assert (child.source_template, child.decode) == ("a\n{source}", "none")


def test_a_tuned_model_with_the_originals_word_reads_it_once(data, tmp_path):
    """generate put the word in front twice."""
    more = {"tuning_mode": "finetune", "use_lowdata_token": True, "lowdata_token": "say", "mid_dim": 512}
    result = gpt2.train(settings(data, tmp_path / "run", decode="none", **more))
    (example,) = result.model.encode(["the mill"], Search(max_new_tokens=12))
    assert result.model.tokenizer.decode(example.prompt) == "say the mill<|endoftext|>"


def test_a_chat_is_data_for_generate():
    assert as_group("text", [USER]).source == as_chat([USER])
    with pytest.raises(UserError, match="an input of mode text cannot be made from"):
        as_group("text", [("a", "b")])


def test_in_a_mixed_batch_every_task_keeps_its_own_rule(trained, data, tmp_path, monkeypatch):
    """Newlines are banned for tables and not for texts; a stop ends both."""
    if "llama" in trained.model.base_record["name"]:
        pytest.skip("the tables' prefix is the demo's")
    table, demo = " | A : b : C", {"data_dir": str(ROOT / "data" / "demo"), "test_file": None}
    where = {"train_file": None, "eval_file": None, "mode": "webnlg", "decode": "none"}
    gpt2.train(replace(settings(data, tmp_path / "tables", max_steps=1), **demo, **where))
    mixed = gpt2.load_mixed({"own": trained.output_dir, "tables": tmp_path / "tables"})
    how = {"strategy": "greedy", "max_new_tokens": 20, "stop": "e"}
    banned, decode = [], loop.decode

    def spy(start, lengths, rule, **more):
        banned.append((len(lengths), bool(rule.banned_token_ids)))
        return decode(start, lengths, rule, **more)

    monkeypatch.setattr(loop, "decode", spy)
    found = mixed.generate(["the mill", table, "a"], ["own", "tables", "own"], **how)
    assert sorted(banned) == [(1, True), (2, False)]
    own, tables = gpt2.load(trained.output_dir), gpt2.load(tmp_path / "tables")
    assert found == [*own.generate(["the mill"], **how), *tables.generate([table], **how), *own.generate(["a"], **how)]
