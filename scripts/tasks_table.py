"""Print the table of tasks in docs/tasks.md, from the rows in prefixlib/tasks.py.

python scripts/tasks_table.py
"""

import sys

from prefixlib.tasks import ROWS, Task

HEADER = "| gpt2/ | seq2seq/ | files under data/ | decoding, gpt2/ | decoding, seq2seq/ | metrics | paper's settings |"


def row_of(task: Task) -> str:
    """One task as a line of Markdown."""
    files = ", ".join(f"`{path}`" for path in task.files.values())
    cells = [f"`{task.name}`" if task.gpt2 else "", f"`{task.seq2seq.name}`" if task.seq2seq else "", files]
    cells.append(
        task.gpt2.strategy + (f", {task.gpt2.samples} samples" if task.gpt2.samples > 1 else "") if task.gpt2 else ""
    )
    s = task.seq2seq
    cells.append(f"{s.num_beams} beams, {s.min_length} to {s.max_length} tokens" if s else "")
    cells.append(task.metrics or "distinct-n")
    cells.append(", ".join(f"{tree}: {', '.join(recipes)}" for tree, recipes in task.paper.items()))
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """The whole table."""
    return "\n".join([HEADER, "|---" * HEADER.count(" | ") + "|---|", *map(row_of, ROWS)]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
