"""The table of bad inputs: a kind, how to make it, the words that the one line of refusal holds. Both trees walk it.

`make` spoils a copy of good files and returns the settings that lead to what it spoilt.
"""

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.robustness.places import Place


@dataclass(frozen=True)
class Bad:
    """One bad input."""

    kind: str
    work: str  # what it is given to: train, load, resume, decode
    make: Callable[[Place], dict[str, Any] | None]
    words: tuple[str, ...]
    trees: tuple[str, ...] = ("gpt2", "seq2seq")


# ---- ways to spoil a file ----------------------------------------------------------------------------------------


def cut(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


GARBAGE = bytes(range(256)) * 40
PICKLE = pickle.dumps({"wte.weight": [1.0]})
DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "[" + "9" * 6000 + "]"
SPOILT_JSON = {  # what a JSON file may hold instead of what belongs there
    "empty": b"",
    "binary": GARBAGE,
    "cut": b'{"format": 1, "fam',
    "a list": b"[]",
    "a text": b'"text"',
    "null": b"null",
    "deep": DEEP.encode(),
    "a huge number": HUGE.encode(),
    "utf-16": '{"format": 1}'.encode("utf-16"),
}
SPOILT_ARRAYS = {
    "empty": b"",
    "garbage": GARBAGE,
    "a pickle": PICKLE,
    "a huge header": struct.pack("<Q", 2**62) + b"{}",
}


def put(where: Callable[[Place], Path], content: bytes, **settings: Any) -> Callable[[Place], dict[str, Any]]:
    """A `make` that gives a file other content."""

    def make(place: Place) -> dict[str, Any]:
        where(place).write_bytes(content)
        return dict(settings)

    return make


def edit(where: Callable[[Place], Path], change: Callable[[Any], Any]) -> Callable[[Place], None]:
    """A `make` that changes the JSON in a file."""

    def make(place: Place) -> None:
        path = where(place)
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return make


def without(where: Callable[[Place], Path]) -> Callable[[Place], None]:
    return lambda place: where(place).unlink()


def loop(place: Place) -> Path:
    path = place.data / "loop.json"
    os.symlink(path.name, path)
    return path


def lines(name: str, text: str) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        path = place.data / name
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return path

    return make


def trained_on(file: Callable[[Place], Path], **more: Any) -> Callable[[Place], dict[str, Any]]:
    """A `make`: train on a file, with the good dev file."""

    def make(place: Place) -> dict[str, Any]:
        return {"train_file": str(file(place)), "eval_file": str(place.table("dev")), "mode": "webnlg", **more}

    return make


def end_of_text(place: Place) -> dict[str, Any]:
    """Both trees' tokenizers have one of these as the end of a text."""
    rows = [{"source": "a", "target": "b"}, {"source": "a <|endoftext|> </s>", "target": "b"}]
    path = lines("own.jsonl", "".join(json.dumps(row) + "\n" for row in rows))(place)
    return {"mode": "text", "train_file": str(path), "eval_file": str(path)}


def entry(**change: Any) -> str:
    """A WebNLG file of one entry with a change."""
    good = {
        "category": "Airport",
        "modifiedtripleset": [{"subject": "A", "property": "b", "object": "C"}],
        "lexicalisations": [{"comment": "good", "lex": "A has C."}],
    }
    return json.dumps({"entries": [{"1": {**good, **change}}]})


def summaries(source: str, target: str) -> Callable[[Place], dict[str, Any]]:
    """A `make`: train on summaries."""

    def make(place: Place) -> dict[str, Any]:
        place.documents("train").write_bytes(source.encode())
        place.documents("train", "target").write_bytes(target.encode())
        return {"mode": "xsum"}

    return make


def original(config: bytes | None, weights: Callable[[Path], None] | None) -> Callable[[Place], dict[str, Any]]:
    """A `make`: a folder as the first implementation left it."""

    def make(place: Place) -> dict[str, Any]:
        folder = place.data / "original"
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_bytes(config)
        if weights is not None:
            weights(folder / "pytorch_model.bin")
        return {"directory": folder}

    return make


def saved(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def renamed_arrays(place: Place) -> None:
    path = place.base / "model.safetensors"
    save_file({f"module.{k}": v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def other_shapes(place: Place) -> None:
    path = place.base / "model.safetensors"
    save_file({k: v[:1].contiguous() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def other_vocabulary(place: Place) -> None:
    """Keep every tokenizer file, but make the model's table of embeddings smaller, in config and weights."""
    path = place.base / "config.json"
    config = json.loads(path.read_text())
    small = config["vocab_size"] // 2
    arrays = load_file(place.base / "model.safetensors")
    arrays = {k: v[:small].contiguous() if len(v) == config["vocab_size"] else v for k, v in arrays.items()}
    arrays = {k: v[:, :small].contiguous() if k == "final_logits_bias" else v for k, v in arrays.items()}
    save_file(arrays, place.base / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps({**config, "vocab_size": small}))


def a_folder_of(*kinds: str) -> Callable[[Place], None]:
    """A `make`: the base's folder keeps the files whose names begin so."""

    def make(place: Place) -> None:
        for path in place.base.iterdir():
            if not path.name.startswith(kinds):
                path.unlink()

    return make


ORIGINAL_CONFIG = json.dumps({"preseqlen": 3, "n_layer": 2, "n_head": 2, "n_embd": 16, "encoder_layers": 2}).encode()
LOCAL_CHECKPOINT = "use another checkpoint"


def _weights(place: Place) -> Path:
    return place.base / "model.safetensors"


def _config(place: Place) -> Path:
    return place.checkpoint / "prefix_config.json"


def _base_config(place: Place) -> Path:
    return place.base / "config.json"


def _trainer_state(place: Place) -> Path:
    return place.resumable / "trainer_state.json"


ROWS = (
    # ---- base models
    *(
        Bad(f"base config.json: {k}", "train", put(_base_config, v), ("config.json is damaged",))
        for k, v in SPOILT_JSON.items()
    ),
    *(Bad(f"base weights: {kind}", "train", put(_weights, v), ("cannot load",)) for kind, v in SPOILT_ARRAYS.items()),
    Bad("base weights: cut", "train", lambda p: cut(_weights(p)), ("cannot load",)),
    Bad("base weights: cut in the header", "train", lambda p: cut(_weights(p), 0.0005), ("cannot load",)),
    Bad("base weights: absent", "train", without(_weights), ("cannot load",)),
    Bad("base weights: module.", "train", renamed_arrays, ("weights do not fit its config.json", "module.")),
    Bad(
        "base weights: other shapes",
        "train",
        other_shapes,
        ("weights do not fit its config.json; arrays of another shape: ",),
    ),
    Bad(
        "base config: another kind", "train", edit(_base_config, lambda c: c | {"model_type": "odd"}), ("cannot load",)
    ),
    Bad("base config: no kind", "train", edit(_base_config, lambda c: {}), ("cannot load",)),
    Bad("base config: null layers", "train", edit(_base_config, lambda c: dict.fromkeys(c)), ("cannot load",)),
    Bad("base: no tokenizer", "train", a_folder_of("config", "model"), ("tokenizer",)),
    Bad(
        "base: a tokenizer that is damaged",
        "train",
        put(lambda p: p.base / "tokenizer.json", GARBAGE),
        ("tokenizer.json is damaged",),
    ),
    Bad(
        "base: a tokenizer that is []",
        "train",
        put(lambda p: p.base / "tokenizer.json", b"[]"),
        ("tokenizer.json is damaged",),
    ),
    Bad("base: a tokenizer of another model", "train", other_vocabulary, ("tokenizer has", "embeddings for")),
    Bad(
        "base: no such folder", "train", lambda p: {"model_name_or_path": str(p.base / "x")}, ("no model folder there",)
    ),
    Bad("base: a NUL", "train", lambda p: {"model_name_or_path": f"{p.base}/a\0b"}, ("model_name_or_path|NUL",)),
    # ---- data
    Bad("train file: absent", "train", trained_on(lambda p: p.data / "x.json"), ("x.json: no such file",)),
    Bad("train file: a folder", "train", trained_on(lambda p: p.data), ("no such file",)),
    Bad("train file: a symlink loop", "train", trained_on(loop), ("loop",)),
    Bad("train file: a NUL", "train", trained_on(lambda p: p.data / "a\0b"), ("no such file|NUL",)),
    *(
        Bad(f"train file: {kind}", "train", trained_on(lines("bad.json", text)), words)
        for kind, text, words in (
            ("empty", "", ("bad.json:1: not JSON",)),
            ("deep", DEEP, ("nested too deeply",)),
            ("a huge number", HUGE, ("bad.json",)),
            ("another shape", "[1, 2]", ("expected",)),
            ("no entries", '{"entries": []}', ("no examples in it",)),
            (
                "half a character",
                entry(lexicalisations=[{"comment": "good", "lex": "A \ud83d."}]),
                ("whole characters",),
            ),
            ("a separator", entry(category="x", lexicalisations=[{"lex": "<|endoftext|>"}]), ("entry 1",)),
            ("no triple", entry(modifiedtripleset=[]), ("at least one triple",)),
            ("a triple of numbers", entry(modifiedtripleset=[{"subject": 1}]), ("entry 1: triple 1",)),
            ("null texts", entry(lexicalisations=None), ("lexicalisations",)),
            ("no text", entry(lexicalisations=[]), ("bad.json: no text to train on",)),
            (
                "only bad texts",
                entry(lexicalisations=[{"comment": "bad", "lex": "x"}]),
                ("bad.json: no text to train on",),
            ),
        )
    ),
    *(
        Bad(f"own pairs: {kind}", "train", trained_on(lines(name, text), mode="text"), words)
        for kind, name, text, words in (
            ("marks that merge rows", "own.tsv", 'source\ttarget\na\t"b\nc\td"\n', ("own.tsv: row 1", "--quotes yes")),
            ("a name twice", "own.csv", "source,target,target\na,b,c\n", ("appears twice",)),
            ("a key twice", "own.jsonl", '{"source": "a", "source": "b"}', ("row 1", "appears twice")),
            ("a row too wide", "own.csv", "source,target\na,b,c\n", ("row 1: 3 values", ".jsonl")),
            ("no head line", "own.txt", "a\tb\n", ("names its columns",)),
            ("a cut list", "own.json", '[{"source": "a", "target": "b"},', ("the file is cut",)),
            ("a comment", "own.jsonl", "// mine\n{}", ("leave the comment out",)),
            ("a number", "own.jsonl", '{"source": "a", "target": 5}', ("row 1", "put it in quotation marks")),
            ("a list", "own.jsonl", '{"source": "a", "target": ["b"]}', ("row 1", '"references"')),
            ("other names", "own.jsonl", '{"question": "a", "answer": "b"}', ("--source_column question",)),
            ("alpaca", "own.jsonl", '{"instruction": "a", "input": "", "output": "b"}', ("--source_template",)),
            ("translations", "own.jsonl", '{"translation": {"en": "a", "de": "b"}}', ("translation.en",)),
            ("two lists", "own.json", '{"train": [{"source": "a"}], "test": [{"source": "a"}]}', ("train, test",)),
            ("no answer", "own.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', ("row 1", "no answer")),
            (
                "an image",
                "own.jsonl",
                '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
                ("row 1", "leave others out"),
            ),
            (
                "no chat template",
                "own.jsonl",
                '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
                ("chat template|row 1",),
            ),
        )
    ),
    Bad("own pairs: the end of a text", "train", end_of_text, ("own.jsonl: row 2", "take it out of the text")),
    Bad(
        "train file: two languages",
        "train",
        trained_on(
            lines(
                "bad.json",
                entry(lexicalisations=[{"lex": "A.", "comment": "good", "lang": lang} for lang in ("en", "ru")]),
            )
        ),
        ("several languages (en, ru)", "--lang en"),
    ),
    Bad("train file: not UTF-8", "train", trained_on(lambda p: _bytes(p, b'{"entries": "\xff"}')), ("not UTF-8",)),
    Bad(
        "dev file: absent", "train", lambda p: {"train_file": str(p.table("train")), "eval_file": "x.json"}, ("x.json",)
    ),
    Bad("dev file: not named", "train", lambda p: {"train_file": str(p.table("train"))}, ("--eval_file",)),
    Bad(
        "test file: misspelt", "train", lambda p: {"test_file": str(p.data / "tset.json")}, ("tset.json: no such file",)
    ),
    Bad("test file: damaged", "train", lambda p: {"test_file": str(_bytes(p, b"[1"))}, ("not JSON",)),
    Bad("summaries: one short", "train", summaries("a b\nc d\n", "a\n"), ("train.",)),
    Bad("summaries: one too many", "train", summaries("a b\n", "a\nb\n"), ("train.",)),
    Bad("summaries: a blank source", "train", summaries("a b\n\nc\n", "a\nb\nc\n"), ("train.source:2",)),
    Bad("summaries: a blank target", "train", summaries("a b\nc\n", "a\n\n"), ("train.target:2",)),
    Bad("summaries: empty", "train", summaries("", ""), ("train.source",)),
    Bad(
        "summaries: no targets",
        "train",
        lambda p: p.documents("train", "target").unlink() or {"mode": "xsum"},
        ("train.target: no such file",),
    ),
    # ---- output folders
    Bad(
        "output: an earlier run",
        "train",
        lambda p: {"output_dir": str(p.checkpoint)},
        ("of an earlier run|holds an earlier",),
    ),
    Bad(
        "output: a user's loss.png",
        "train",
        lambda p: _users(p, "loss.png"),
        ("loss.png", "--overwrite_output_dir yes"),
    ),
    Bad("output: a user's best/", "train", lambda p: _users(p, "best/notes"), ("best", "--overwrite_output_dir yes")),
    Bad("output: a file", "train", lambda p: _file_as_output(p), ("output",)),
    # ---- checkpoints
    *(
        Bad(f"checkpoint config: {k}", "load", put(_config, v), ("damaged", LOCAL_CHECKPOINT))
        for k, v in SPOILT_JSON.items()
    ),
    Bad("checkpoint config: absent", "load", without(_config), ("not a prefix checkpoint",)),
    Bad("checkpoint config: newer", "load", edit(_config, lambda c: c | {"format": 99}), ("format 99",)),
    Bad("checkpoint config: the other tree's", "load", edit(_config, lambda c: c | {"family": "x"}), ("kind x",)),
    Bad(
        "checkpoint config: no task",
        "load",
        edit(_config, lambda c: {k: v for k, v in c.items() if k != "task"}),
        ("no task",),
    ),
    *(
        Bad(f"checkpoint {name}: {kind}", "load", put(lambda p, name=name: p.checkpoint / name, v), (name, "damaged"))
        for name in ("prefix_model.safetensors", "prefix_flat.safetensors")
        for kind, v in SPOILT_ARRAYS.items()
    ),
    Bad(
        "checkpoint: a base that moved",
        "load",
        edit(_config, lambda c: c | {"base_model": {"name": "/no/such"}}),
        ("pass --model_name_or_path",),
    ),
    Bad(
        "checkpoint: a base without a name",
        "load",
        edit(_config, lambda c: c | {"base_model": {}}),
        ("pass --model_name_or_path",),
    ),
    Bad(
        "checkpoint: an empty folder",
        "load",
        lambda p: [f.unlink() for f in p.checkpoint.glob("*.*")] and None,
        ("not a prefix checkpoint",),
    ),
    Bad("checkpoint: no such folder", "load", lambda p: {"directory": p.data / "x"}, ("no such folder",)),
    Bad(
        "original: config.json binary",
        "load",
        original(b'"preseqlen"' + GARBAGE, saved({"wte.weight": torch.zeros(3, 16)})),
        ("damaged",),
    ),
    Bad("original: no weights", "load", original(ORIGINAL_CONFIG, None), ("not a prefix checkpoint",)),
    Bad("original: no arrays", "load", original(ORIGINAL_CONFIG, saved({})), ("holds no prefix",)),
    Bad("original: a list", "load", original(ORIGINAL_CONFIG, saved([1])), ("holds no prefix",)),
    Bad(
        "original: keys of numbers",
        "load",
        original(ORIGINAL_CONFIG, saved({1: torch.zeros(1), "wte.weight": torch.zeros(3, 16)})),
        ("named arrays",),
    ),
    Bad("original: no tensors", "load", original(ORIGINAL_CONFIG, saved({"wte.weight": "x"})), ("named arrays",)),
    Bad(
        "original: other arrays",
        "load",
        original(ORIGINAL_CONFIG, saved({"wte.weight": torch.zeros(3, 16)})),
        ("original|shape",),
    ),
    Bad(
        "original: settings of texts",
        "load",
        original(ORIGINAL_CONFIG.replace(b"2", b'"2"'), saved({"wte.weight": torch.zeros(3, 16)})),
        ("damaged",),
    ),
    Bad(
        "original: null settings",
        "load",
        original(b'{"preseqlen": 1, "n_layer": null}', saved({"wte.weight": torch.zeros(3, 16)})),
        ("damaged|no 'control",),
    ),
    Bad(
        "original: garbage as weights",
        "load",
        original(ORIGINAL_CONFIG, lambda path: path.write_bytes(GARBAGE)),
        ("cannot be read",),
    ),
    Bad(
        "original: empty weights",
        "load",
        original(ORIGINAL_CONFIG, lambda path: path.write_bytes(b"")),
        ("cannot be read",),
    ),
    # ---- runs to resume
    *(
        Bad(
            f"trainer_state.json: {kind}",
            "resume",
            put(_trainer_state, v),
            ("trainer_state.json is damaged", "remove"),
            ("gpt2",),
        )
        for kind, v in SPOILT_JSON.items()
    ),
    Bad(
        "optimizer.pt: cut",
        "resume",
        lambda p: cut(p.resumable / "optimizer.pt"),
        ("optimizer.pt is damaged",),
        ("gpt2",),
    ),
    Bad(
        "scheduler.pt: empty",
        "resume",
        put(lambda p: p.resumable / "scheduler.pt", b""),
        ("scheduler.pt is damaged",),
        ("gpt2",),
    ),
    Bad(
        "rng_state.pth: garbage",
        "resume",
        put(lambda p: p.resumable / "rng_state.pth", GARBAGE),
        ("rng_state.pth is damaged",),
        ("gpt2",),
    ),
    *(
        Bad(f"resume.ckpt: {kind}", "resume", make, ("resume.ckpt is damaged",), ("seq2seq",))
        for kind, make in (
            ("empty", put(lambda p: p.resumable, b"")),
            ("garbage", put(lambda p: p.resumable, GARBAGE)),
            ("a pickle", put(lambda p: p.resumable, PICKLE)),
            ("cut", lambda p: cut(p.resumable)),
            ("no settings", lambda p: torch.save({"state_dict": {}}, p.resumable)),
            ("null settings", lambda p: torch.save({"settings": None}, p.resumable)),
            ("a list", lambda p: torch.save([1], p.resumable)),
        )
    ),
    # ---- files to decode
    Bad("decode: absent", "decode", lambda p: {"file": p.data / "x.json"}, ("x.json: no such file",)),
    Bad("decode: damaged", "decode", lambda p: {"file": _bytes(p, b"{")}, ("not JSON",)),
    Bad("decode: empty", "decode", lambda p: {"file": _bytes(p, b'{"entries": []}')}, ("no examples in it",)),
    Bad("decode: a symlink loop", "decode", lambda p: {"file": loop(p)}, ("loop",)),
)


def _bytes(place: Place, content: bytes) -> Path:
    path = place.data / "bad.json"
    path.write_bytes(content)
    return path


def _users(place: Place, name: str) -> None:
    path = place.output / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")


def _file_as_output(place: Place) -> None:
    place.output.write_text("mine")
