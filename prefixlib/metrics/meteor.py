"""METEOR 1.5 (Denkowski & Lavie 2014) for English, with the official jar's tables (`-l en -norm`).

The PyPI package pycocoevalcap (`pip install -e .[meteor]`) contains the tables: the jar and its paraphrases. `METRIC`
aligns in Python and needs no Java. `JAR` runs the official jar once per file instead (`-ssOut`: it prints sufficient
statistics per segment); both give the same statistics, and the corpus score is computed from their sum as the jar does.
"""

import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

from prefixlib.metrics.base import Metric, Unavailable, progress

# The jar's parameters for English, task "rank" (tuned on WMT data by its authors)
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MODULE_WEIGHTS = (1.0, 0.6, 0.8, 0.6)  # exact, stem, synonym, paraphrase
COLUMNS = 23
INSTALL = "pip install -e .[meteor]"
INSTALL_JAVA = f"{INSTALL} and a Java runtime"


def find_jar() -> Path:
    """The path of the jar in the pycocoevalcap package, which is not imported. Raises Unavailable."""
    package = importlib.util.find_spec("pycocoevalcap")
    for folder in package.submodule_search_locations or () if package else ():
        jar = Path(folder) / "meteor" / "meteor-1.5.jar"
        if jar.is_file() and (jar.parent / "data" / "paraphrase-en.gz").is_file():
            return jar
    raise Unavailable(INSTALL)


def one_line(text: str) -> str:
    """The text without line breaks of any kind: the jar reads a segment per line."""
    return " ".join(text.split())


def statistics(hypotheses: list[str], references: list[list[str]]):
    """(N, 23) array against each hypothesis's best reference: lengths, function words, matches per module, chunks,
    matched words, as the jar orders them.
    """
    import numpy as np

    from prefixlib.metrics.meteor_align import segment_statistics
    from prefixlib.metrics.meteor_text import load_tables

    tables = load_tables(find_jar())
    tests = [tables.normalise(text) for text in hypotheses]
    targets = [[tables.normalise(text) for text in texts] or [[]] for texts in references]
    tables.load_paraphrases([*tests, *(words for texts in targets for words in texts)])
    chosen = np.zeros((len(tests), COLUMNS))
    for i in progress(range(len(tests)), "METEOR"):
        rows = np.array([segment_statistics(tests[i], words, tables) for words in targets[i]], dtype=float)
        rows = without_perfect_chunks(rows)
        chosen[i] = rows[combine(rows).argmax()]
    return chosen


def jar_statistics(hypotheses: list[str], references: list[list[str]]):
    """(N, 23) array from the jar. Raises Unavailable without Java or the package.

    Segments are filled up with empty references, which never win, to the same number of references.
    """
    import numpy as np

    jar, java = find_jar(), shutil.which("java")
    if java is None:
        raise Unavailable(INSTALL_JAVA)
    most = max((len(texts) for texts in references), default=1) or 1
    with tempfile.TemporaryDirectory() as folder:
        test, gold = Path(folder) / "test.txt", Path(folder) / "reference.txt"
        test.write_text("".join(one_line(text) + "\n" for text in hypotheses), encoding="utf-8")
        filled = [[*texts, *[""] * (most - len(texts))] for texts in references]
        gold.write_text("".join(one_line(text) + "\n" for texts in filled for text in texts), encoding="utf-8")
        command = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(jar), str(test), str(gold)]
        command += ["-l", "en", "-norm", "-r", str(most), "-ssOut"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    rows = [line.split() for line in done.stdout.splitlines()]
    rows = [[float(value) for value in row] for row in rows if len(row) == COLUMNS]
    if done.returncode or len(rows) != len(hypotheses):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"{INSTALL_JAVA} (the METEOR jar failed: {last})")
    return without_perfect_chunks(np.array(rows))


def without_perfect_chunks(rows):
    """Statistics (N, 23) in which the one chunk of a hypothesis that equals its reference is not a fragment."""
    perfect = (rows[:, 20] == 1) & (rows[:, 21] == rows[:, 0]) & (rows[:, 22] == rows[:, 1])
    rows[perfect, 20] = 0
    return rows


def combine(sums):
    """F-mean of weighted precision and recall, times one minus the fragmentation penalty: (..., 23) -> (...)."""
    import numpy as np

    weights = np.array(MODULE_WEIGHTS)
    # columns 4..19: per module the matched content words, those of the reference, function words, the reference's
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)

    def side(length, function_words, content_column, function_column):
        found = DELTA * matches[..., content_column] @ weights + (1 - DELTA) * matches[..., function_column] @ weights
        total = DELTA * (length - function_words) + (1 - DELTA) * function_words
        return np.where(total > 0, found / np.where(total > 0, total, 1), 0.0)

    precision = side(sums[..., 0], sums[..., 2], 0, 2)
    recall = side(sums[..., 1], sums[..., 3], 1, 3)
    denominator = ALPHA * precision + (1 - ALPHA) * recall
    f_mean = np.where(denominator > 0, precision * recall / np.where(denominator > 0, denominator, 1), 0.0)
    chunks, matched = sums[..., 20], (sums[..., 21] + sums[..., 22]) / 2
    fragmentation = np.where(matched > 0, chunks / np.where(matched > 0, matched, 1), 0.0)
    return f_mean * (1 - GAMMA * fragmentation**BETA)


METRIC = Metric("METEOR", statistics, combine)
JAR = Metric("METEOR-jar", jar_statistics, combine)
