"""METEOR 1.5's aligner: all matches of words and phrases, then a beam search for the best set of them.

The best set has the most (weighted) words, then the fewest chunks, then the shortest distance between matched places.
The search's peculiarities change scores and are kept: sums of half words are truncated, and a branch inherits the
distances of the branches tried before it.
"""

from collections import Counter
from operator import itemgetter
from typing import NamedTuple

from prefixlib.metrics.meteor_text import Tables

BEAM = 40
EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
WEIGHTS = (1.0, 0.5, 0.5, 0.5)  # in the search; the score weighs the modules differently


class Match(NamedTuple):
    """Words start .. start + length - 1 of the reference and test .. test + test_length - 1 of the hypothesis."""

    module: int
    start: int
    length: int
    test: int
    test_length: int


def find_matches(hypothesis: list[str], reference: list[str], tables: Tables) -> list[list[Match]]:
    """Every possible match, by its first reference word; the modules' order decides between equal ones."""
    matches = [[] for _ in reference]
    for j, word in enumerate(reference):
        matches[j] += [Match(EXACT, j, 1, i, 1) for i, other in enumerate(hypothesis) if other == word]
    if hypothesis == reference:
        return matches
    stems, synonyms = [tables.stem(word) for word in hypothesis], [tables.synonyms(word) for word in hypothesis]
    for j, word in enumerate(reference):
        stem, synsets = tables.stem(word), tables.synonyms(word)
        others = [i for i, other in enumerate(hypothesis) if other != word]
        matches[j] += [Match(STEM, j, 1, i, 1) for i in others if stems[i] == stem]
        if synsets:
            matches[j] += [Match(SYNONYM, j, 1, i, 1) for i in others if not synsets.isdisjoint(synonyms[i])]
    for j, length, i, other in _paraphrases(reference, hypothesis, tables):
        matches[j].append(Match(PARAPHRASE, j, length, i, other))
    for i, length, j, other in _paraphrases(hypothesis, reference, tables):
        matches[j].append(Match(PARAPHRASE, j, other, i, length))
    return matches


def _paraphrases(words: list[str], others: list[str], tables: Tables):
    """(start, length, start, length) of each phrase of `words` with a paraphrase that occurs in `others`."""
    first = {}
    for i, word in enumerate(others):
        first.setdefault(word, []).append(i)
    for start in range(len(words)):
        for length in range(1, min(tables.longest_phrase, len(words) - start) + 1):
            for paraphrase in tables.paraphrases.get(tuple(words[start : start + length]), ()):
                for i in first.get(paraphrase[0], ()):
                    if tuple(others[i : i + len(paraphrase)]) == paraphrase:
                        yield start, length, i, len(paraphrase)


# A partial alignment is a plain tuple, since millions are made; the first three fields rank it:
#   minus_words  -(words + test_words)
#   chunks
#   distance
#   words        weighted words of the reference
#   test_words   weighted words of the hypothesis
#   following    the first reference word after the last match, or after the last skipped word
#   end          where the current chunk ends in the hypothesis, -1 outside of one
#   taken        which words of the reference are used, as bits
#   test_taken   and of the hypothesis
#   chosen       (match, the chosen ones before it), () at the start; without the certain ones
RANK = itemgetter(0, 1, 2)


def _bits(start: int, length: int) -> int:
    return ((1 << length) - 1) << start


def _step(match: Match) -> tuple:
    """A match's contribution to a path: words and test words, the places after it, its distance and its start."""
    weight = WEIGHTS[match.module]
    behind = match.start + match.length, match.test + match.test_length
    return match.length * weight, match.test_length * weight, *behind, abs(match.start - match.test), match.test


def _certain(matches: list[list[Match]]) -> dict[int, Match]:
    """Matches without competitors, by their first reference word."""
    covered, covered_test = Counter(), Counter()
    for match in (match for each in matches for match in each):
        covered.update(range(match.start, match.start + match.length))
        covered_test.update(range(match.test, match.test + match.test_length))
    certain = {}
    for match in (each[0] for each in matches if len(each) == 1):
        alone = all(covered[j] == 1 for j in range(match.start, match.start + match.length))
        if alone and all(covered_test[i] == 1 for i in range(match.test, match.test + match.test_length)):
            certain[match.start] = match
    return certain


def best_alignment(matches: list[list[Match]]) -> list[Match]:
    """The matches of the best alignment, in reference order."""
    certain = _certain(matches)
    taken = sum(_bits(match.start, match.length) for match in certain.values())
    test_taken = sum(_bits(match.test, match.test_length) for match in certain.values())
    certain_steps = {start: _step(match) for start, match in certain.items()}
    paths = [(0, 0, 0, 0, 0, 0, -1, taken, test_taken, ())]
    for current, matches_here in enumerate(matches):
        steps = [
            (match, _bits(match.start, match.length), _bits(match.test, match.test_length), *_step(match))
            for match in matches_here
        ]
        longer = []
        for path in sorted(paths, key=RANK)[:BEAM]:
            minus_words, chunks, distance, words, test_words, following, end, taken, test_taken, chosen = path
            if taken >> current & 1:
                if current < following:
                    longer.append(path)
                elif following in certain_steps:
                    more, test_more, behind, test_behind, way, test = certain_steps[following]
                    words, test_words = int(words + more), int(test_words + test_more)
                    chunks += end != -1 and end != test
                    ranked = -words - test_words, chunks, distance + way
                    longer.append((*ranked, words, test_words, behind, test_behind, taken, test_taken, chosen))
                continue
            for match, used, test_used, more, test_more, behind, test_behind, way, test in steps:
                if taken & used or test_taken & test_used:
                    continue
                now, test_now = int(words + more), int(test_words + test_more)
                cut = chunks + (end != -1 and end != test)
                ranked = -now - test_now, cut, distance
                bits = taken | used, test_taken | test_used
                longer.append((*ranked, now, test_now, behind, test_behind, *bits, (match, chosen)))
                distance += way  # for the next branch and the path that skips the word
            chunks += end != -1
            rest = words, test_words, following + 1, -1, taken, test_taken, chosen
            longer.append((minus_words, chunks, distance, *rest))
        paths = longer or paths[:1]
    finished = sorted(paths, key=RANK)[:BEAM]
    best = min(((path[0], path[1] + (path[6] != -1), *path[2:]) for path in finished), key=RANK)
    aligned, chosen = list(certain.values()), best[-1]
    while chosen:
        match, chosen = chosen
        aligned.append(match)
    return sorted(aligned, key=lambda match: match.start)


def segment_statistics(hypothesis: list[str], reference: list[str], tables: Tables) -> list[int]:
    """The 23 statistics of one pair, as the jar prints them with -ssOut."""
    aligned = best_alignment(find_matches(hypothesis, reference, tables))
    is_function = [[word in tables.function_words for word in words] for words in (hypothesis, reference)]
    counts = [[0] * 4 for _ in WEIGHTS]  # per module: content words, the reference's, function words, the reference's
    chunks, place, end = 0, -1, -1
    for match in aligned:
        spans = ((match.test, match.test_length), (match.start, match.length))
        for side, (start, length) in enumerate(spans):
            for position in range(start, start + length):
                counts[match.module][2 * is_function[side][position] + side] += 1
        chunks += (place, end) != (match.start, match.test)
        place, end = match.start + match.length, match.test + match.test_length
    matched = [sum(row[0] + row[2] for row in counts), sum(row[1] + row[3] for row in counts)]
    lengths = [len(hypothesis), len(reference), sum(is_function[0]), sum(is_function[1])]
    return [*lengths, *(count for row in counts for count in row), chunks, *matched]
