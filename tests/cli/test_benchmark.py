"""scripts/benchmark.py on shapes of two layers: every measurement, equal work checked, recorded lengths."""

import argparse
import importlib.util
import json
import os

import pytest
import torch

import benchmark
from benchmarks import decode, engines, epoch, lengths, limit, mixed, models, plots, scaling, startup, steps, tables
from prefixlib.runs import record
from prefixlib.system.errors import UserError
from tests.conftest import ROOT, run_command

pytest.importorskip("peft")

FEW = ["--sentences", "3", "--alone", "2", "--max_new_tokens", "12"]
# texts, mean and range of source and target, as counted when the files were read
RECORDED = {
    "webnlg_train": (18025, (50.63, 29.67), ((9, 186), (6, 107))),
    "webnlg_dev": (871, (50.85, 30.34), ((9, 168), (7, 103))),
    "e2e_train": (42061, (29.49, 26.84), ((14, 45), (4, 79))),
    "e2e_dev": (547, (34.07, 30.18), ((16, 42), (13, 66))),
    "xsum_train": (2000, (438.06, 28.1), ((38, 1024), (6, 60))),
    "xsum_test": (250, (440.22, 27.93), ((55, 1024), (11, 63))),
}


def measure(folder, what, *more):
    output = folder / f"{what}.json"
    assert benchmark.main([what, "--device", "cpu", "--rounds", "1", "--output", str(output), *more]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("train-step --shape bart-base", "train-step_bart-base"),
        ("train-step --shape bart-base --bsz 2", "train-step_bart-base-bsz2"),
        ("memory --shape bart-large --bsz 16 --accumulate 16", "memory_bart-large-accumulated"),
        ("limit --tiny", "limit-tiny"),
    ],
)
def test_what_differs_goes_to_another_file(words, name):
    args = benchmark.parse_args([*words.split(), "--device", "cpu"])
    assert benchmark.name_of(args).rpartition("_")[0] == f"benchmark_{name}"
    assert benchmark.name_of(args).rpartition("_")[2].startswith("cpu-")


def test_a_training_step_of_every_row(tmp_path, capsys):
    result = measure(tmp_path, "train-step", "--shape", "gpt2-tiny", "--tokens", "20")
    assert list(result["rows"]) == ["prefix", "checkpointing", "peft", "lora", "finetune", "original-style"]
    losses = {row: numbers["first_loss"] for row, numbers in result["rows"].items()}
    for row in ("checkpointing", "peft", "original-style"):
        assert losses[row] == pytest.approx(losses["prefix"], abs=1e-4)
    assert losses["finetune"] != pytest.approx(losses["prefix"], abs=1e-4)  # it has no prefix
    wanted = {"shape": "gpt2-tiny", "bsz": 5, "tokens": 20, "preseqlen": 5, "mid_dim": 512, "bf16": False}
    assert wanted.items() <= result["settings"].items()
    assert {"device", "threads", "torch", "transformers", "peft"} <= set(result["run"])
    assert "| PEFT LoRA, rank 8 (another method) |" in capsys.readouterr().out


def test_a_training_step_of_bart(tmp_path):
    sizes = ["--source", "16", "--tokens", "8", "--preseqlen", "7", "--bsz", "2"]
    result = measure(tmp_path, "train-step", "--shape", "bart-tiny", *sizes)
    losses = {row: numbers["first_loss"] for row, numbers in result["rows"].items()}
    for row in ("checkpointing", "original-style"):
        assert losses[row] == pytest.approx(losses["prefix"], abs=1e-4)
    assert "another function" in result["labels"]["peft"]


def test_an_epoch_of_bart_on_padded_batches(tmp_path):
    """The same loss in every row of the method, padding and all; grouped, the same examples in other batches."""
    sizes = ["--preseqlen", "7", "--bsz", "2", "--batches", "3", "--vs", "finetune,original-style"]
    rows = measure(tmp_path, "epoch", "--shape", "bart-tiny", *sizes)["rows"]
    assert list(rows) == ["prefix", "finetune", "original-style", "grouped"]
    assert rows["original-style"]["first_loss"] == pytest.approx(rows["prefix"]["first_loss"], abs=1e-4)
    args = argparse.Namespace(shape="bart-tiny", seed=3, device="cpu")
    batch = epoch.padded(args, [(9, 4), (5, 7)], [1, 0])
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 9]
    assert batch["labels"].ne(1).sum(dim=1).tolist() == [7, 4]
    alone = epoch.padded(args, [(9, 4), (5, 7)], [0])
    assert batch["input_ids"][1].tolist() == alone["input_ids"][0].tolist()


def test_memory_in_processes_of_their_own(tmp_path):
    rows = measure(tmp_path, "memory", "--shape", "gpt2-tiny", "--vs", "finetune")["rows"]
    assert rows["prefix"]["memory_ratio"] == 1
    libraries = [numbers["peak_memory_bytes"] - numbers["own_memory_bytes"] for numbers in rows.values()]
    assert all(100 * 2**20 < taken < rows["prefix"]["peak_memory_bytes"] for taken in libraries)


@pytest.mark.parametrize("shape", ["gpt2-tiny", "bart-tiny"])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(shape, monkeypatch):
    """The same gradients, with the prefix network run once for all parts."""
    build, models_made = steps.ROWS["prefix"], []

    def remembered(args):
        models_made.append(build(args))
        return models_made[-1]

    monkeypatch.setitem(steps.ROWS, "prefix", remembered)
    for count in ("1", "2"):
        sizes = ["--bsz", "4", "--preseqlen", "3", "--tokens", "8", "--accumulate", count]
        args = benchmark.parse_args(["memory", "--shape", shape, "--device", "cpu", *sizes])
        step, _ = steps.make_step(args, "prefix", [models.make_batch(args)])
        step()
    whole, parted = ([p for p in model.parameters() if p.requires_grad] for model, _ in models_made)
    assert len(whole) == len(parted) > 3
    for one, other in zip(whole, parted, strict=True):
        assert ((other.grad - one.grad).abs() <= (1e-3 * one.grad.abs()).clamp(min=1e-7)).all()


def test_an_epoch_through_both_trainers(tmp_path):
    sizes = ["--batches", "2", "--bsz", "2", "--vs", "peft,finetune"]
    rows = measure(tmp_path, "epoch", "--shape", "gpt2-tiny", *sizes)["rows"]
    assert list(rows) == ["prefix", "peft", "finetune"]
    for number in ("first_loss", "last_loss"):  # the last one only agrees if both took the same batches
        assert rows["peft"][number] == pytest.approx(rows["prefix"][number], abs=1e-4)


def test_the_recipe_in_small():
    words = ["recipe", "--shape", "gpt2-tiny", "--device", "cpu", "--batches", "1", *FEW]
    rows = epoch.train_and_decode(benchmark.parse_args(words))
    numbers = rows["prefix"]
    assert (numbers["examples"], numbers["epochs"], numbers["sources"]) == (5, 5, 3)
    assert numbers["seconds"] == numbers["training_seconds"] + numbers["decoding_seconds"]
    assert benchmark.parse_args(["recipe", "--device", "cpu"]).batches * 5 == 18_025


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ("gpt2-tiny", ["prefix", "prefix-alone", "peft", "original-style"]),
        ("bart-tiny", ["prefix", "prefix-alone", "original-style"]),
    ],
)
def test_decoding_gives_the_same_tokens(tmp_path, shape, rows):
    result = measure(tmp_path, "decode", "--shape", shape, *FEW)
    assert list(result["rows"]) == rows
    assert [numbers["sentences_that_differ"] for numbers in result["rows"].values()] == [0] * len(rows)
    assert [numbers["sentences_decoded"] for numbers in result["rows"].values()][:2] == [3, 2]


@pytest.mark.parametrize("shape", ["gpt2-tiny", "bart-tiny"])
def test_decoded_sentences_end_where_they_should_and_are_not_all_alike(shape):
    args = benchmark.parse_args(["decode", "--shape", shape, "--device", "cpu", "--sentences", "4"])
    work = decode.make_work(args)
    found = decode.our_decoder(args, work)(range(4))
    assert [len(tokens) for tokens in found] == work.ends
    assert len(set(work.ends)) > 1
    assert len({token for tokens in found for token in tokens}) > 20


def test_start_up(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "HELP", ("gpt2/gen.py",))
    monkeypatch.setattr(startup, "FIRST_STEP", ("gpt2/train_e2e.py",))
    rows = measure(tmp_path, "startup", "--shape", "gpt2-tiny")["rows"]
    assert list(rows) == ["gpt2/gen.py --help", "gpt2/train_e2e.py, first step", "gpt2/gen.py, first output"]
    help_seconds, *others = (numbers["seconds"] for numbers in rows.values())
    assert all(0 < help_seconds < seconds for seconds in others)
    with pytest.raises(UserError, match=r"gpt2/gen.py never said 'no such words': .*no such folder"):
        startup.seconds_until("no such words", *startup.DECODE, str(tmp_path / "none"))


def test_scoring_on_one_core(tmp_path, monkeypatch, data_dir):
    monkeypatch.setattr(startup, "METRICS", ("BLEU",))
    rows = measure(tmp_path, "scores")["rows"]
    assert list(rows) == ["BLEU"]
    assert rows["BLEU"]["seconds"] > 0


def test_no_outputs_to_score(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIX_TUNING_DATA", str(tmp_path))
    rows = measure(tmp_path, "scores")["rows"]
    assert list(rows) == ["BLEU + METEOR + TER", "BLEU", "METEOR", "TER"]
    assert rows["TER"] == {"not_run": "no scoring/webnlg/systems/Baseline_all-cat.txt"}
    before = os.sched_getaffinity(0)
    with startup.one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "PROCESS_STEPS", 2)
    less = ["--sweeps", "tokens,beams,processes", "--points", "1", "--no_memory", "--shape", "gpt2-tiny"]
    rows = measure(tmp_path, "scaling", *less, "--sentences", "2", "--max_new_tokens", "5")["rows"]
    assert list(rows) == ["tokens", "beams", "processes"]
    assert list(rows["tokens"]["points"]["20"]) == ["prefix", "peft", "finetune", plots.LIMIT]
    for name in rows:
        assert (tmp_path / f"scaling_{name}.png").stat().st_size > 5000
        for point in () if name == "processes" else rows[name]["points"].values():  # none is beyond the machine
            (least,), (ours, *_) = point[plots.LIMIT].values(), point["prefix"].values()
            assert 0 < (ours / least if "decode" in name or name == "beams" else least / ours) < 1


def test_curves_of_bart(tmp_path):
    less = ["--sweeps", "source", "--points", "1", "--no_memory", "--shape", "bart-tiny", "--preseqlen", "3"]
    rows = measure(tmp_path, "scaling", *less)["rows"]
    assert list(rows["source"]["points"]["32"]) == ["prefix", "original-style", "finetune", plots.LIMIT]
    with pytest.raises(UserError, match="--sweeps source: for gpt2-tiny choose from prefix_length, tokens, batch"):
        measure(tmp_path, "scaling", "--sweeps", "source", "--shape", "gpt2-tiny")


def test_shares_of_the_machines_limit(tmp_path, monkeypatch):
    """A share is operations / seconds / the rate measured beside it; real lengths are counted without padding."""
    monkeypatch.setitem(limit.MATRIX, "cpu", 256)
    less = ["--tiny", "--bsz", "2", "--tokens", "9", *FEW[:2], "--max_new_tokens", "6", "--preseqlen", "3"]
    rows = measure(tmp_path, "limit", *less)["rows"]
    assert list(rows) == ["float32 matrix product", "bfloat16 matrix product", "memory, read", *limit.ROWS]
    rate = rows["float32 matrix product"]["operations_per_second"]
    for name in limit.ROWS:
        numbers = rows[name]
        assert numbers["operations"] == sum(numbers["operations_by_part"].values())
        assert numbers["share"] == pytest.approx(numbers["operations"] / numbers["seconds"] / rate)
    assert 0 < rows["gpt2-small decode, greedy, one at a time"]["memory_share"] < 1
    bart = rows["bart-base step, B 5, XSum's lengths, P 200"]["operations_by_part"]
    args = argparse.Namespace(lengths_from=None)
    pairs = lengths.draw(lengths.load_lengths(args, "xsum_train"), 2, 101)
    assert bart["head"] == 4 * sum(target for _, target in pairs) * 64 * 50265
    assert limit.share(6.0, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == 3.0


MIXED = ["--shape", "gpt2-tiny", "--prefixes", "1", "3", "--sentences", "4", "--max_new_tokens", "6"]


def test_many_prefixes_in_one_batch(tmp_path, monkeypatch):
    """Every row decodes; ours and PEFT's, with the same weights, to the same tokens, one prefix or three."""

    def peak(module, row, settings):
        assert module == "benchmarks.mixed"
        return mixed.peak(argparse.Namespace(**settings), row) | {"libraries": 0}

    monkeypatch.setattr(mixed, "peak_memory", peak)
    result = measure(tmp_path, "mixed", *MIXED)
    rows = result["rows"]
    assert list(rows) == ["prefix", "mixed-1", "peft-1", "lora-1", "mixed-3", "peft-3", "lora-3"]
    assert [rows[row].get("sentences_that_differ") for row in rows] == [0, 0, 0, None, 0, 0, None]
    assert all(numbers["own_memory_bytes"] > 0 for numbers in rows.values())
    assert result["labels"]["peft-3"] == "PEFT prefix: 3 prefixes, one after the other"
    args = benchmark.parse_args(["mixed", "--device", "cpu", *MIXED])
    work = decode.make_work(args)
    one, three = (mixed.our_decoder(args, work, count)(range(4)) for count in (1, 3))
    assert [a == b for a, b in zip(one, three, strict=True)] == [
        True,
        False,
        False,
        True,
    ]  # or prefixes would not matter


def test_a_mixed_batch_with_the_wrong_prefixes_is_refused(tmp_path, monkeypatch):
    right = mixed.MixedPrefixes._decode

    def wrong(self, jobs, prepared, **how):
        return right(self, [("0", job) for _, job in jobs], prepared, **how)

    monkeypatch.setattr(mixed.MixedPrefixes, "_decode", wrong)
    with pytest.raises(UserError, match=r"do not decode the same tokens.* 'peft-3': 2\} of 4"):
        measure(tmp_path, "mixed", *MIXED, "--vs", "peft")


SHORT = ["--sentences", "3", "--max_new_tokens", "9"]


def test_decoding_beside_ctranslate2(tmp_path):
    """Its tokens without a prefix are this package's; where all outputs end together."""
    pytest.importorskip("ctranslate2")
    result = measure(tmp_path, "engines", "--shape", "gpt2-tiny", *SHORT, "--vs", "ct2,ct2-int8,finetune")
    rows = result["rows"]
    assert list(rows) == ["prefix", "plain", "ct2", "ct2-int8", "finetune"]
    differ = {row: numbers.get("sentences_that_differ") for row, numbers in rows.items()}
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        del differ["ct2-int8"]  # CTranslate2 rounds its int8 otherwise there
    assert set(differ.values()) == {0, None}
    assert differ["finetune"] is None
    assert "ctranslate2" in result["run"]
    assert "no prefix, all outputs of the mean length" in result["labels"]["ct2"]


def test_ctranslate2_is_given_the_same_work(monkeypatch):
    """Outputs of the mean length; other weights give other tokens, which the table would say."""
    pytest.importorskip("ctranslate2")
    args = benchmark.parse_args(["engines", "--device", "cpu", "--shape", "gpt2-tiny", *SHORT])
    work = decode.make_work(args)
    mean = round(sum(work.ends) / 3)
    found = engines.ctranslate2_decoder(args, work, "float32")(range(3))
    assert [len(tokens) for tokens in found] == [mean] * 3
    assert found == engines.plain_decoder(args, work)(range(3))
    right = models.make_base

    def louder(args):
        base = right(args)
        base.base_model.h[0].mlp.c_fc.weight.data.mul_(30)
        return base

    monkeypatch.setattr(engines, "make_base", louder)
    assert engines.ctranslate2_decoder(args, work, "float32")(range(3)) != found


def test_decoding_in_bfloat16_is_compared_with_float32(tmp_path, monkeypatch):
    """In bfloat16 it is the model that is rounded; sentences that differ are counted, not refused."""
    monkeypatch.setattr(record, "has_fast_bfloat16", lambda: True)
    seen, ours = [], decode.our_model
    monkeypatch.setattr(decode, "our_model", lambda args: seen.append(ours(args)) or seen[-1])
    rows = measure(tmp_path, "engines", "--shape", "gpt2-tiny", *SHORT, "--vs", "bf16")["rows"]
    assert [str(model.base.dtype) for model in seen] == ["torch.float32", "torch.bfloat16"]
    assert all("sentences_that_differ" in numbers for numbers in rows.values())


@pytest.mark.parametrize("shape", ["bart-tiny", "t5-tiny"])
def test_decoding_beside_generate_of_a_fine_tuned_model(tmp_path, shape):
    rows = measure(tmp_path, "engines", "--shape", shape, *SHORT, "--preseqlen", "3")["rows"]
    assert list(rows) == ["prefix", "finetune"]
    args = benchmark.parse_args(["engines", "--device", "cpu", "--shape", shape, *SHORT])
    work = decode.make_work(args)
    for decoder in (decode.our_decoder, engines.generate_decoder):
        assert [len(tokens) for tokens in decoder(args, work)(range(3))] == work.ends


def test_decoding_one_sentence_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "has_fast_bfloat16", lambda: True)
    result = measure(tmp_path, "greedy", "--shape", "gpt2-tiny", *SHORT)
    assert list(result["rows"]) == ["prefix", "bf16", "finetune", "finetune-static"]
    assert (result["settings"]["beams"], result["settings"]["batch_size"]) == (1, 1)


def test_a_missing_engine_is_not_run(tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ctranslate2" else there(name))
    rows = measure(tmp_path, "engines", "--shape", "gpt2-tiny", *SHORT, "--vs", "ct2")["rows"]
    assert rows["ct2"] == {"not_run": "ctranslate2 is not installed"}
    said = capsys.readouterr()
    assert said.err.startswith("ct2: not run, ctranslate2 is not installed: pip install -e .[peers]\n")
    assert "| ctranslate2 is not installed |" in said.out


def test_bfloat16_is_not_run_where_it_would_take_hours(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "has_fast_bfloat16", lambda: False)
    rows = measure(tmp_path, "greedy", "--shape", "gpt2-tiny", *SHORT, "--vs", "bf16")["rows"]
    assert list(rows) == ["prefix", "bf16"]
    assert rows["bf16"] == {"not_run": "this processor has no instructions for bfloat16"}


def test_thinned_points_keep_both_ends():
    assert scaling.thin((1, 5, 20, 100, 200, 500), 3) == [1, 20, 500]
    assert scaling.thin((1, 2), None) == [1, 2]


def test_rows_of_unequal_loss_are_refused(tmp_path, monkeypatch):
    right = models.OriginalStyle.forward
    monkeypatch.setattr(models.OriginalStyle, "forward", lambda self, batch: right(self, batch) + 3e-4)
    with pytest.raises(UserError, match="do not compute the same loss"):
        measure(tmp_path, "train-step", "--shape", "gpt2-tiny", "--vs", "original-style")
    assert not list(tmp_path.iterdir())


def test_rows_of_unequal_tokens_are_refused(tmp_path, monkeypatch):
    right = decode.generate

    def one_wrong(model, args, work, members, **inputs):
        first, *others = right(model, args, work, members, **inputs)
        return [[*first[:-1], first[-1] + 1], *others]

    monkeypatch.setattr(decode, "generate", one_wrong)
    command = ["--shape", "gpt2-tiny", "--vs", "peft", *FEW]
    with pytest.raises(UserError, match=r"do not decode the same tokens.* 'peft': 1\} of 3"):
        measure(tmp_path, "decode", *command)
    rows = measure(tmp_path, "decode", *command, "--allow_ties", "1")["rows"]
    assert rows["peft"]["sentences_that_differ"] == 1


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_lengths(name):
    texts, means, ranges = RECORDED[name]
    path = lengths.RECORDED / f"{name}.json"
    assert path.stat().st_size < 30_000
    args = argparse.Namespace(lengths_from=None)
    drawn = lengths.draw(lengths.load_lengths(args, name), 20_000, seed=1)
    assert sum(count for *_, count in json.loads(path.read_text())["bins"]) == texts
    for side, mean, (lowest, highest) in zip(zip(*drawn, strict=True), means, ranges, strict=True):
        assert sum(side) / len(side) == pytest.approx(mean, rel=0.02)
        assert lowest <= min(side) <= max(side) <= highest
    assert lengths.draw([[1, 2, 3], [4, 5, 6]], 9, 7) == lengths.draw([[1, 2, 3], [4, 5, 6]], 9, 7)


def test_lengths_that_are_recorded_are_those_of_the_files(data_dir, tmp_path):
    """The histogram in the repository is what the command writes."""
    words = ["--lengths", "webnlg_dev", "--lengths_from", str(data_dir / "webnlg_challenge_2017" / "dev.json")]
    words += ["--tokenizer", str(data_dir / "tokenizers" / "gpt2")]
    benchmark.main(["record-lengths", *words, "--output", str(tmp_path / "again.json")])
    assert (tmp_path / "again.json").read_text() == (lengths.RECORDED / "webnlg_dev.json").read_text()


def test_bins_are_merged_at_their_mean():
    pairs = [(n, 2 * n) for n in range(100)]
    bins = lengths.to_bins(pairs, most=20)
    assert len(bins) <= 20
    assert sum(count for *_, count in bins) == 100
    assert sum(source * count for source, _, count in bins) == pytest.approx(sum(range(100)), abs=50)


def test_the_table_of_stored_results(tmp_path, capsys):
    stored = {
        "mixed": {"prefix": {"seconds": 4.0}, "mixed-8": {"seconds": 5.0}, "lora-8": {"not_run": "no library"}},
        "train-step": {"prefix": {}, "peft": {"time_ratio": 0.5}, "finetune": {"time_ratio": 0.25}},
        "memory": {
            "prefix": {},
            "checkpointing": {"peak_memory_bytes": 60, "own_memory_bytes": 40},
            "finetune": {"memory_ratio": 0.4, "peak_memory_bytes": 200, "own_memory_bytes": 160},
        },
    }
    for what, rows in stored.items():
        settings = {"shape": "gpt2-small", "bf16": False}
        run = {"device": "cpu (x86_64, AVX2, 2 cores)", "threads": 2}
        output = tmp_path / f"benchmark_{what}_gpt2-small_cpu-avx2.json"
        output.write_text(json.dumps({"what": what, "settings": settings, "run": run, "labels": {}, "rows": rows}))
    assert benchmark.main(["table", "--output", str(tmp_path)]) == 0
    page = capsys.readouterr().out.splitlines()
    assert "| 8 prefixes in one batch: time / one prefix | 1.25 | 1.1 | 1.02 | `mixed --shape gpt2-small` |" in page
    assert "| gpt2-small decode, 5 beams: share of the matrix product's rate | not run | 0.45 | 0.60 |  |" in page
    assert "| figure | cpu-avx2 | at least | reach for | made by `benchmark.py` with |" in page
    assert sum("| not run | " in line for line in page) == len(tables.GOALS) - 1
    assert {goal.row for goal in tables.GOALS if goal.what == "limit"} < set(limit.ROWS)
    assert page[-6:-1] == [
        "| row | seconds | not run |",
        "|---|---|---|",
        "| prefix | 4 |  |",
        "| mixed-8 | 5 |  |",
        "| lora-8 |  | no library |",
    ]
    other = json.loads((tmp_path / "benchmark_mixed_gpt2-small_cpu-avx2.json").read_text())
    other["rows"]["mixed-8"]["seconds"] = 4.0
    (tmp_path / "benchmark_mixed_gpt2-small_cuda.json").write_text(json.dumps(other))
    goals = tables.goals(tmp_path)
    assert "| figure | cpu-avx2 | cuda | at least | reach for | made by `benchmark.py` with |" in goals
    assert "| 8 prefixes in one batch: time / one prefix | 1.25 | 1.00 | 1.1 | 1.02 | `mixed" in goals
    assert page[:9] == [
        "On cpu (x86_64, AVX2, 2 cores), 2 threads:",
        "",
        "| figure | measured | made by `benchmark.py` with |",
        "|---|---|---|",
        "| gpt2-small step, B 5, T 80, P 5: time / PEFT prefix with MLP | 0.50 | `train-step --shape gpt2-small` |",
        "| gpt2-small step, B 5, T 80, P 5: time / full fine-tuning | 0.25 | `train-step --shape gpt2-small` |",
        "| peak training memory, gpt2-small / full fine-tuning | 0.40 | `memory --shape gpt2-small` |",
        "| the same, with activation checkpointing | 0.30 | `memory --shape gpt2-small` |",
        "| the same, without what the libraries take | 0.25 | `memory --shape gpt2-small` |",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe", "--device", "cpu"], "recipe would take hours on a CPU"),
        (["train-step", "--vs", "nothing"], "--vs nothing: choose from checkpointing, peft, lora, finetune"),
        (["decode", "--rounds", "0"], "--rounds 0: must be above 0"),
        (["decode", "--shape", "gpt2-tiny", "--lengths", "nowhere"], "no such histogram; there are e2e_dev"),
        (["memory", "--accumulate", "3"], "--accumulate 3: must divide --bsz 5"),
        (["record-lengths"], "record-lengths needs --lengths"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_line(words, said):
    with pytest.raises(UserError, match=said):
        benchmark.main(words)


def test_the_command_line_itself():
    result = run_command(ROOT / "scripts" / "benchmark.py", "train-step", "--bsz", "0")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --bsz 0: must be above 0\n"
