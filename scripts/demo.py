"""Compare no prefix, a trained prefix and fine-tuning on the bundled model and data: python scripts/demo.py

Runs the same launchers a user runs, then prints one table and writes it to runs/demo/ (results.json, table.md).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from prefixlib import files
from prefixlib.errors import UserError, one_line_errors
from prefixlib.launch import DEMO_DATA, REPOSITORY

OUTPUT = REPOSITORY / "runs" / "demo"
COLUMNS = ("", "trained numbers", "stored bytes", "training s", "BLEU seen", "BLEU unseen", "BLEU all")


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


def table_to_text(output: Path) -> list[dict]:
    """The gpt2 tree: three rows on the demo's WebNLG-format test set."""
    model = DEMO_DATA / "gpt2"
    rows = []
    for name, tuning_mode in (("no prefix", None), ("prefix", "prefixtune"), ("fine-tune", "finetune")):
        directory = output / name.replace(" ", "-")
        row = {"name": name, "trained": 0, "stored": 0, "seconds": 0.0}
        checkpoint = model
        if tuning_mode:
            checkpoint = directory
            where = ("--output_dir", str(directory), "--overwrite_output_dir", "yes", "--skip_decode", "yes")
            run("gpt2/train_e2e.py", "--demo", "yes", "--tuning_mode", tuning_mode, *where)
            training = json.loads((directory / "results.json").read_text())["training"]
            weights = "prefix_flat.safetensors" if tuning_mode == "prefixtune" else "model.safetensors"
            row |= {"trained": training["trainable_parameters"], "stored": (directory / weights).stat().st_size}
            row["seconds"] = training["seconds"]
        run(
            "gpt2/gen.py",
            "webnlg",
            "yes",
            "test",
            str(checkpoint),
            "no",
            "--demo",
            "yes",
            "--output_dir",
            str(directory),
        )
        row["scores"] = json.loads((directory / "results.json").read_text())["decoding"]["test"]["scores"]
        row["outputs"] = (directory / f"{checkpoint.name}_test_beam").read_text(encoding="utf-8").splitlines()
        row["sources"] = (directory / f"{checkpoint.name}_test_src").read_text(encoding="utf-8").splitlines()
        rows.append(row)
    return rows


def as_table(rows: list[dict]) -> str:
    """Markdown table of the rows."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        scores = [f"{row['scores'][column]:.1f}" for column in COLUMNS[4:]]
        cells = [row["name"], f"{row['trained']:,}", f"{row['stored']:,}", f"{row['seconds']:.0f}", *scores]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def examples(rows: list[dict], count: int = 3) -> str:
    """`count` sources, evenly spaced over the test set, with what each row made of them."""
    sources = rows[0]["sources"]
    lines = []
    for number in range(count):
        index = number * (len(sources) - 1) // (count - 1)
        lines.append(f"source     {sources[index].replace('<|endoftext|>', '').strip()}")
        lines += [f"{row['name']:<10} {row['outputs'][index]}" for row in rows] + [""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=OUTPUT, help="where runs, curves and the table go")
    output = parser.parse_args(argv).output_dir.resolve()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slowed down by a second thread
    started = time.perf_counter()
    rows = table_to_text(output)
    table = as_table(rows)
    files.write_text(output / "table.md", table)
    files.write_json(
        output / "results.json", [{k: row[k] for k in row if k not in ("outputs", "sources")} for row in rows]
    )
    print(f"\n{table}\n{examples(rows)}")
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s in all; loss curves: {output}/prefix/loss.png and {output}/fine-tune/loss.png")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
