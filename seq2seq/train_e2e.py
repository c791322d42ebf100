"""Launcher of table-to-text with an encoder-decoder: train_bart.py with the modes e2e, webnlg and triples.

python seq2seq/train_e2e.py --tuning_mode finetune --epoch 5 --learning_rate 0.00005 --mode webnlg --bsz 5 --seed 101
"""

import sys
from dataclasses import dataclass

from prefixlib.data.tasks import SEQ2SEQ_MODES, find_task
from prefixlib.settings.flags import TASK, flag
from prefixlib.system.errors import one_line_errors
from seq2seq import train_bart
from seq2seq.flags import Settings

TABLE_MODES = tuple(mode for mode in SEQ2SEQ_MODES if find_task(mode).is_table)


@dataclass(frozen=True)
class TableSettings(Settings):
    """The settings of a run on tables."""

    mode: str = flag("", "the task: its data, lengths and decoding", TASK, choices=TABLE_MODES)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(train_bart.main(description=__doc__.split("\n")[0], kind=TableSettings, demo_mode="webnlg"))
