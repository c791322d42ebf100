"""TER: translation edit rate with tercom 7.25's greedy shift search (Snover et al. 2006), case-insensitive.

Edits (insert, delete, substitute, shift of a block of words: 1 each) against the nearest reference, divided by the mean
length of the references. tercom's search is greedy and its beam prunes, so its order of search, its tie-breaking and
its limits are kept here to get the same figures. Unlike in tercom many segments are searched in parallel, and all their
candidate shifts share one edit-distance table in numpy.

Legend: R reference length, H hypothesis length (tokens), N segments, C rows of a batch (hypothesis, reference).
"""

from collections.abc import Iterable, Sequence

from prefixlib.metrics.base import Metric, progress

MAX_SHIFT_SIZE = 10  # tercom indexes blocks of up to 11 words but moves at most 10
MAX_SHIFT_DISTANCE = 50
BEAM_WIDTH = 20
SEGMENTS_AT_ONCE = 64
ROWS_AT_ONCE = 1024

Words = tuple[int, ...]
DIAGONAL, INSERT, DELETE = 0, 1, 2
UNREACHABLE, PADDING, NO_LIMIT = 15_000, 10_000, 30_000  # costs of int16 cells; their sums stay below 32,767


def edit_distances(rows: Sequence[tuple[Words, Words]], keep_steps: bool = False):
    """Edit distance of each (hypothesis, reference) under tercom's beam: (C,) ints, and the steps if asked for.

    The beam: while words remain, a cell that costs over 20 more than the cheapest one entered diagonally in its column
    is not extended. On equal cost the diagonal wins over an insertion, an insertion over a deletion.
    Steps are (H, C, R + 1) bytes: how cell (h, r) was entered, rows sorted by falling hypothesis length.
    """
    import numpy as np

    order = sorted(range(len(rows)), key=lambda c: -len(rows[c][0]))  # rows that end early leave at the bottom
    lengths = [len(rows[c][0]) for c in order]
    width = max(len(reference) for _, reference in rows)
    hypotheses = np.full((len(rows), max(lengths)), -1, dtype=np.int32)
    targets = np.full((len(rows), width), -2, dtype=np.int32)
    for at, c in enumerate(order):
        hypotheses[at, : lengths[at]] = rows[c][0]
        targets[at, : len(rows[c][1])] = rows[c][1]
    substitution = np.where(targets == -2, PADDING, 1).astype(np.int16)  # (C, R)
    index = np.arange(width + 1, dtype=np.int16)
    cost = np.repeat(index[None], len(rows), axis=0)  # (C, R + 1): before any hypothesis word, deletions only
    limit = np.full(len(rows), NO_LIMIT, dtype=np.int16)
    steps = np.zeros((max(lengths), len(rows), width + 1), dtype=np.uint8) if keep_steps else None
    distances, active = [0] * len(rows), len(rows)
    for h in range(max(lengths)):
        while lengths[active - 1] == h:
            active -= 1
            distances[order[active]] = int(cost[active, len(rows[order[active]][1])])
        left = np.where(cost[:active] > limit[:active, None], np.int16(UNREACHABLE), cost[:active])
        matches = hypotheses[:active, h, None] == targets[:active]
        diagonal = left[:, :-1] + np.where(matches, np.int16(0), substitution[:active])
        limit = diagonal.min(axis=1) + np.int16(BEAM_WIDTH)
        insertion = left + np.int16(1)
        cheapest = insertion.copy()
        np.minimum(diagonal, insertion[:, 1:], out=cheapest[:, 1:])
        # a run of deletions ending at cell i costs min over k <= i of cheapest[k] + i - k
        cost = np.minimum.accumulate(cheapest - index, axis=1) + index
        if keep_steps:
            inserted = np.ones_like(cost, dtype=bool)
            inserted[:, 1:] = insertion[:, 1:] < diagonal
            steps[h, :active] = np.where(cost < cheapest, DELETE, np.where(inserted, INSERT, DIAGONAL))
    for at in range(active):
        distances[order[at]] = int(cost[at, len(rows[order[at]][1])])
    return distances, [(steps[: lengths[at], at], c) for at, c in enumerate(order)] if keep_steps else None


def block_positions(hypothesis: Words, reference: Words) -> dict[Words, list[int]]:
    """The start in the reference of each block of reference words that all occur in the hypothesis."""
    in_hypothesis = set(hypothesis)
    positions = {}
    for start in range(len(reference)):
        for end in range(start, min(len(reference), start + MAX_SHIFT_SIZE + 1)):
            if reference[end] not in in_hypothesis:
                break
            positions.setdefault(reference[start : end + 1], []).append(start)
    return positions


def shifted(words: Words, start: int, end: int, place: int) -> Words:
    """`words` with the block start..end moved after `place`, a position in the unshifted words (-1: to the start)."""
    block = words[start : end + 1]
    if place < start:
        return words[: place + 1] + block + words[place + 1 : start] + words[end + 1 :]
    if place <= end:  # inside the block itself: tercom moves it past that many of the following words
        place = end + place - start
    return words[:start] + words[end + 1 : place + 1] + block + words[place + 1 :]


class ShiftSearch:
    """The greedy search for one hypothesis and one reference (ids of words), one shift per round."""

    def __init__(self, hypothesis: Words, reference: Words):
        self.words, self.reference = hypothesis, reference
        self.positions = block_positions(hypothesis, reference)
        self.shifts = 0
        self.edits = 0  # without the shifts

    def read_steps(self, edits: int, steps: list[list[int]]):
        """Store an alignment: which words are wrong, and the hypothesis word at each reference word."""
        self.edits = edits
        self.wrong = [True] * len(self.words)
        self.reference_wrong = [True] * len(self.reference)
        self.aligned = [-1] * len(self.reference)  # a deleted word follows the hypothesis word it is aligned to
        r, h = len(self.reference), len(self.words)
        while r:
            step = steps[h - 1][r] if h else DELETE
            if step == INSERT:
                h -= 1
                continue
            self.aligned[r - 1] = h - 1
            r -= 1
            if step == DIAGONAL:
                h -= 1
                if self.words[h] == self.reference[r]:
                    self.wrong[h] = self.reference_wrong[r] = False

    def blocks(self) -> Iterable[tuple[int, int, int]]:
        """Blocks worth moving: (start, end) in the hypothesis and the places of the same words in the reference.

        A word of the block must be wrong on either side, and the block must not be aligned there already.
        """
        for start in range(len(self.words)):
            lies_at = [self.aligned[to] for to in self.positions.get(self.words[start : start + 1], ())]
            if not any(at != start and -MAX_SHIFT_DISTANCE - 1 <= at - start <= MAX_SHIFT_DISTANCE for at in lies_at):
                continue
            for end in range(start, min(len(self.words), start + MAX_SHIFT_SIZE)):
                targets = self.positions.get(self.words[start : end + 1])
                if targets is None:
                    break
                if not any(self.wrong[start : end + 1]):
                    continue  # a longer block may still hold an error
                movable = False
                for to in targets:
                    at = self.aligned[to]
                    if start <= at <= end or abs(at - start) > MAX_SHIFT_DISTANCE:
                        continue
                    movable = True
                    if any(self.reference_wrong[to : to + end - start + 1]):
                        yield start, end, to
                if not movable:
                    break

    def candidates(self) -> list[list[Words]]:
        """Shifted hypotheses by block length - 1, in tercom's order: the first of equally good ones will be taken."""
        found = [[] for _ in range(MAX_SHIFT_SIZE)]
        for start, end, to in self.blocks():
            places = [-1] if to == 0 else []
            for offset in range(-1 if to else 0, end - start + 1):
                place = self.aligned[to + offset]
                if place != start and (offset == 0 or place != self.aligned[to]):
                    places.append(place)
            found[end - start] += [shifted(self.words, start, end, place) for place in places]
        return found

    def choose(self, candidates: list[list[Words]], distances: dict[Words, int]) -> bool:
        """Make the shift that tercom would make; returns False if none pays.

        Long blocks come first; the search stops when more has been gained than shorter blocks could gain. A shift costs
        1, and the first one found may break even.
        """
        best, best_cost, best_edits = None, 0, self.edits
        for length in range(MAX_SHIFT_SIZE, 0, -1):
            for candidate in candidates[length - 1]:
                gained = self.edits - best_cost - best_edits
                if gained > 2 * length or (best_cost and gained == 2 * length):
                    break
                gain = best_edits + best_cost - distances[candidate] - 1
                if gain > 0 or (best_cost == 0 and gain == 0):
                    best, best_cost, best_edits = candidate, 1, distances[candidate]
        if best is None:
            return False
        self.words = best
        self.shifts += 1
        return True


def run_searches(searches: Iterable[ShiftSearch]) -> None:
    """Run all searches to their end, in parallel."""
    active = list(searches)
    while active:
        edits, steps = edit_distances([(search.words, search.reference) for search in active], keep_steps=True)
        for table, c in steps:
            active[c].read_steps(edits[c], table.tolist())
        active = [search for search in active if search.edits]
        candidates = [search.candidates() for search in active]
        rows = {
            (words, search.reference): 0
            for search, groups in zip(active, candidates, strict=True)
            for group in groups
            for words in group
        }
        keys = sorted(rows, key=lambda row: (len(row[1]), len(row[0])))
        for first in range(0, len(keys), ROWS_AT_ONCE):
            batch = keys[first : first + ROWS_AT_ONCE]
            rows.update(zip(batch, edit_distances(batch)[0], strict=True))
        by_reference = {}
        for (words, reference), distance in rows.items():
            by_reference.setdefault(reference, {})[words] = distance
        active = [
            search
            for search, groups in zip(active, candidates, strict=True)
            if search.choose(groups, by_reference.get(search.reference, {}))
        ]


def edit_counts(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[int]:
    """Edits, shifts included, that turn each hypothesis into its reference (lists of tokens)."""
    ids = {}
    searches = []
    for hypothesis, reference in pairs:
        words, target = (tuple(ids.setdefault(word, len(ids)) for word in text) for text in (hypothesis, reference))
        searches.append(ShiftSearch(words, target))
    run_searches(search for search in searches if search.words and search.reference)
    return [
        search.edits + search.shifts if search.words and search.reference else len(search.words) + len(search.reference)
        for search in searches
    ]


def statistics(hypotheses: list[str], references: list[list[str]]):
    """(N, 2) array: edits against the nearest reference, mean reference length; empty references are left out.

    tercom's own tokenisation is off, as in the WebNLG 2017 evaluation: the text is already tokenised.
    """
    import numpy as np

    rows = []
    for first in progress(range(0, len(hypotheses), SEGMENTS_AT_ONCE), "TER"):
        pairs, lengths = [], []
        for hypothesis, texts in zip(
            hypotheses[first : first + SEGMENTS_AT_ONCE], references[first : first + SEGMENTS_AT_ONCE], strict=True
        ):
            targets = [text.lower().split() for text in texts if text.strip()] or [[]]
            pairs += [(hypothesis.lower().split(), target) for target in targets]
            lengths.append([len(target) for target in targets])
        edits = iter(edit_counts(pairs))
        rows += [(min(next(edits) for _ in each), sum(each) / len(each)) for each in lengths]
    return np.array(rows, dtype=float).reshape(-1, 2)


def combine(sums):
    """Edits per reference word, lower is better: (..., 2) -> (...)."""
    import numpy as np

    edits, length = sums[..., 0], sums[..., 1]
    return np.where(length > 0, edits / np.maximum(length, 1e-9), (edits > 0).astype(float))


METRIC = Metric("TER", statistics, combine, span="from 0, lower is better")
