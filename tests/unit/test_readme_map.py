"""README's "To change X, open Y": each file decides what its row says, as far as a key word can tell."""

import re

from tests.conftest import ROOT

# first words of a row -> what each of its files must contain
KEYS = {
    "the method": r"class PrefixTuning",
    "what is trained": r"METHODS",
    "where a prefix starts": r"STARTS",
    "the positions": r"positions|best_layout",
    "label masking": r"IGNORED|labels\[row\] = self.padding",
    "the loss": r"def row_losses|def training_step",
    "the stopping rule": r"def is_done",
    "the seed": r"seed \+ n \* count \+ repeat",
    "the ban": r"def newline_token_ids",
    "which categories": r"def seen_categories",
    "WebNLG's learning rate": r"min_length",
    "DART's metrics": r'"dart": Task',
    "a flag": r"RULES|STRATEGIES",
    "the name": r"def short_name",
    "the checkpoint's format": r"FORMAT = ",
    "what `--overwrite_output_dir yes`": r"RUN_FILES",
    "which checkpoint": r"def is_better|patience",
    "the precision": r"autocast",
    "what breaks": r"DynamicCache|DynamicLayer",
}


def test_every_row_names_the_file_that_decides():
    table = (ROOT / "README.md").read_text().partition("| what | file |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.split("\n") if "`.py" in line or ".py`" in line]
    assert len(rows) == len(KEYS)
    for what, files in rows:
        (key,) = [word for start, word in KEYS.items() if what.startswith(start)]
        for name in re.findall(r"`([\w/]+\.py)`", files):
            assert re.search(key, (ROOT / name).read_text()), (what, name)
