"""Which validation is the best one, and what is said where the figure that chooses never changes."""

import pytest

from prefixlib.checkpoints import best

FIRST = {"rouge2": 5.0, "loss": 2.0}


@pytest.mark.parametrize(
    ("metric", "result", "kept", "better"),
    [
        ("rouge2", FIRST, {}, True),
        ("rouge2", {"rouge2": 6.0, "loss": 3.0}, FIRST, True),
        ("rouge2", {"rouge2": 4.0, "loss": 1.0}, FIRST, False),
        ("rouge2", {"rouge2": 5.0, "loss": 1.9}, FIRST, True),
        ("rouge2", {"rouge2": 5.0, "loss": 2.1}, FIRST, False),
        ("rouge2", FIRST, FIRST, False),
        ("loss", {"rouge2": 4.0, "loss": 1.9}, FIRST, True),
        ("loss", {"rouge2": 6.0, "loss": 2.0}, FIRST, False),
    ],
)
def test_a_score_chooses_and_a_tie_goes_to_the_lower_loss(metric, result, kept, better):
    assert best.is_better(result, kept, metric) is better


@pytest.mark.parametrize(
    ("metric", "values", "stopped", "words"),
    [
        ("rouge2", [0.0, 0.0], False, "rouge2 was 0 at each of the 2 validations, so the lowest dev loss chose the"),
        ("rouge2", [0.0, 0.0, 0.0], True, "and ended the run early; --val_metric loss"),
        (
            "loss",
            [3.25, 3.25],
            False,
            "loss was 3.25 at each of the 2 validations, so the first one counts as the best",
        ),
        ("loss", [3.25, 3.25], True, "the first one counts as the best, and the run ended early"),
    ],
)
def test_a_figure_that_never_changed_is_said_aloud(caplog, metric, values, stopped, words):
    best.warn_if_constant(metric, values, stopped)
    (record,) = caplog.records
    assert (record.levelname, "\n" in record.getMessage()) == ("WARNING", False)
    assert words in record.getMessage()


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 1.0], [1.0, 1.0, 0.5]])
def test_a_figure_that_changed_or_was_seen_once_is_not_worth_a_word(caplog, values):
    best.warn_if_constant("rouge2", values, True)
    assert not caplog.records
