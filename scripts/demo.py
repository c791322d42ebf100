"""Compare no prefix, a trained prefix and fine-tuning on the bundled models and data: python scripts/demo.py

Runs the same launchers a user runs, then prints a table for each of the two trees and writes them to runs/demo/
(results.json, table.md). With --real: a real language model, SmolLM2-135M, before and after prefix-tuning on 100 of the
bundled restaurants.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefixlib.settings.flags import Parser
from prefixlib.system import files
from prefixlib.system.errors import UserError, one_line_errors
from prefixlib.system.places import DEMO_DATA, REPOSITORY

OUTPUT = REPOSITORY / "runs" / "demo"
REAL = "smollm2-135m"


def run(*arguments: str) -> float:
    """Run a launcher with this Python, showing its command; returns seconds. Raises UserError if it fails."""
    print("$ python " + shlex.join(arguments), flush=True)
    started = time.perf_counter()
    code = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=False).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"the demo stopped: the command above ended with exit code {code}")
    return time.perf_counter() - started


def rows_to_compare(output: Path) -> Iterator[tuple[dict, Path]]:
    """The three rows of a table, still without results, and the folder of each."""
    for name, tuning_mode in (("no prefix", None), ("prefix", "prefixtune"), ("fine-tune", "finetune")):
        row = {"name": name, "tuning_mode": tuning_mode, "trained": 0, "stored": 0, "seconds": 0.0}
        yield row, output / name.replace(" ", "-")


def table_to_text(output: Path) -> list[dict]:
    """The gpt2 tree: no prefix, a prefix, fine-tuning, on the demo's WebNLG-format test set."""
    rows = []
    for row, directory in rows_to_compare(output):
        checkpoint = DEMO_DATA / "gpt2"
        where = ("--output_dir", str(directory))
        if row["tuning_mode"]:
            checkpoint = directory
            train = ("gpt2/train_e2e.py", "--demo", "yes", "--tuning_mode", row["tuning_mode"], *where)
            run(*train, "--overwrite_output_dir", "yes", "--skip_decode", "yes")
            training = read(directory)["training"]
            weights = "prefix_flat.safetensors" if row["tuning_mode"] == "prefixtune" else "model.safetensors"
            row |= {"trained": training["trainable_parameters"], "stored": (directory / weights).stat().st_size}
            row["seconds"] = training["seconds"]
        run("gpt2/gen.py", "webnlg", "yes", "test", str(checkpoint), "no", "--demo", "yes", *where)
        rows.append(row | decoded(directory, checkpoint.name))
    return rows


def decoded(directory: Path, name: str) -> dict:
    """The outputs of gen.py for the checkpoint `name` in `directory`."""
    prompts = lines(directory / f"{name}_test_src")
    return {
        "scores": read(directory)["decoding"]["test"]["scores"],
        "outputs": lines(directory / f"{name}_test_beam"),
        "sources": [re.sub(r"<\|\w+\|>", "", text).strip() for text in prompts],
    }


def summarisation(output: Path) -> list[dict]:
    """The seq2seq tree: the same three rows on the demo's summaries."""
    rows = []
    for row, directory in rows_to_compare(output):
        checkpoint = ("--finetune_model_path", str(DEMO_DATA / "bart"))
        demo = ("seq2seq/train_bart.py", "--demo", "yes", "--output_dir", str(directory))
        if row["tuning_mode"]:
            run(*demo, "--tuning_mode", row["tuning_mode"], "--overwrite_output_dir", "yes")
            training = read(directory)["training"]
            is_prefix = row["tuning_mode"] == "prefixtune"
            checkpoint = ("--prefix_model_path" if is_prefix else "--finetune_model_path", str(directory))
            weights = directory / ("prefix_flat.safetensors" if is_prefix else "model.safetensors")
            row |= {"trained": training["trainable_parameters"], "stored": weights.stat().st_size}
            row["seconds"] = training["seconds"]
        run(*demo, "--do_train", "no", *checkpoint)
        row["scores"] = read(directory)["decoding"]["test"]["scores"]
        row["outputs"] = lines(directory / "test_beam_1.0")
        row["sources"] = lines(DEMO_DATA / "xsum" / "test.source")
        rows.append(row)
    return rows


def restaurants(output: Path) -> list[dict]:
    """A real language model's texts about 30 restaurants without a prefix, and with one trained on 100 others."""
    from prefixlib.base_model import gguf_base
    from prefixlib.runs import record

    folder = gguf_base.model_folder(gguf_base.find(REAL))
    sets = DEMO_DATA / "e2e_data"
    files.write_text(output / "train.txt", "".join(f"{line}\n" for line in lines(sets / "src1_train.txt")[:100]))
    data = ("--train_file", str(output / "train.txt"), "--eval_file", str(sets / "src1_valid.txt"))
    start = ("--init_text", "table-to-text:", "--mid_dim", "512", "--learning_rate", "1e-3", "--bsz", "10")
    length = ("--max_steps", "40", "--eval_steps", "20", "--keep_best", "yes", "--skip_decode", "yes")
    precision = ("--bf16", "yes" if record.has_fast_bfloat16() else "no")
    rule = ("--length_normalization", "output", "--decode_limit", "30", *precision)
    rows = []
    for row, directory in [*rows_to_compare(output)][:2]:
        checkpoint = folder
        if row["tuning_mode"]:
            train = ("gpt2/train_e2e.py", "--mode", "data2text", "--model_name_or_path", REAL, *precision, *data)
            run(*train, *start, *length, "--output_dir", str(directory), "--overwrite_output_dir", "yes")
            training, checkpoint = read(directory)["training"], directory / "best"
            stored = (checkpoint / "prefix_flat.safetensors").stat().st_size
            row |= {"trained": training["trainable_parameters"], "stored": stored, "seconds": training["seconds"]}
        gen = ("gpt2/gen.py", "data2text", "yes", "test", str(checkpoint), "no", "--demo", "yes")
        run(*gen, *rule, "--output_dir", str(directory))
        rows.append(row | decoded(directory, checkpoint.name))
    return rows


TABLES = {  # folder of the output -> function that fills the table, and the scores it shows
    "restaurants": (restaurants, ("BLEU", "ROUGE-L")),  # with --real alone
    "table-to-text": (table_to_text, ("BLEU seen", "BLEU unseen", "BLEU all")),
    "summarisation": (summarisation, ("ROUGE-1", "ROUGE-2", "ROUGE-L")),
}


def read(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def as_table(title: str, rows: list[dict], scores: Sequence[str]) -> str:
    """Markdown table of the rows."""
    columns = (title, "trained numbers", "stored bytes", "training s", *scores)
    made = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row["name"], f"{row['trained']:,}", f"{row['stored']:,}", f"{row['seconds']:.0f}"]
        made.append("| " + " | ".join([*cells, *(f"{row['scores'][score]:.1f}" for score in scores)]) + " |")
    return "\n".join(made) + "\n"


def examples(rows: list[dict], count: int = 3) -> str:
    """`count` sources, evenly spaced over the test set, with each row's outputs."""
    sources = rows[0]["sources"]
    made = []
    for number in range(count):
        index = number * (len(sources) - 1) // (count - 1)
        made += [f"source     {sources[index]}", *(f"{row['name']:<10} {row['outputs'][index]}" for row in rows), ""]
    return "\n".join(made)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=OUTPUT, help="where runs, curves and the tables go")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", choices=tuple(TABLES)[1:], help="one of the two tables (default: both)")
    which.add_argument("--real", action="store_true", help=f"instead of them {REAL}: about five minutes on two cores")
    args = parser.parse_args(argv)
    output = args.output_dir.resolve()
    chosen = ["restaurants"] if args.real else [args.only] if args.only else [*TABLES][1:]
    if not args.real:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slowed down by a second thread
    started = time.perf_counter()
    tables, results, shown = [], {}, []
    for name in chosen:
        compare, scores = TABLES[name]
        rows = compare(output / name)
        tables.append(as_table(name, rows, scores))
        shown.append(examples(rows))
        results[name] = [{k: v for k, v in row.items() if k not in ("outputs", "sources")} for row in rows]
    files.write_text(output / "table.md", "\n".join(tables))
    files.write_json(output / "results.json", results)
    for table, texts in zip(tables, shown, strict=True):
        print(f"\n{table}\n{texts}")
    print(f"{time.perf_counter() - started:.0f} s in all; loss curves: loss.png in the folders under {output}")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
