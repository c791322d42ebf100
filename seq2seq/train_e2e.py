"""Launcher of table-to-text with an encoder-decoder: train_bart.py with the modes e2e, webnlg and triples.

python seq2seq/train_e2e.py --tuning_mode finetune --epoch 5 --learning_rate 0.00005 --mode webnlg --bsz 5 --seed 101
"""

import sys

from prefixlib.errors import one_line_errors
from seq2seq import flags, train_bart

TABLE_MODES = tuple(name for name, mode in flags.MODES.items() if mode.is_table)

if __name__ == "__main__":
    with one_line_errors():
        sys.exit(train_bart.main(description=__doc__.split("\n")[0], modes=TABLE_MODES))
