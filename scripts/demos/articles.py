"""Articles about the demo's world and their one-sentence summaries, on which the small BART is pretrained and tuned."""

import itertools

from demos.text import DOMAINS, documents, make_facts, person, phrase, place

OPENINGS = (
    "{hero} of {town} has written to us again.",
    "It was a quiet week in {town}, says {hero}.",
    "Our reader {hero} sends this from {town}.",
    "{hero} went on a long walk near {town}.",
)
TURNS = (
    "The story of the week is about a {noun}.",
    "Many readers asked about one {noun}.",
    "This time the talk is of a {noun}.",
)
ASIDES = (
    "By the way, {other} {fact}.",
    "Some would rather hear that {other} {fact}.",
    "As we wrote last week, {other} {fact}.",
)
CLOSINGS = ("We shall come back to it.", "That was all for today.", "More will follow next week.", "Do write to us.")


def summary(name, facts):
    """One sentence with the first two facts, in their likeliest words."""
    (first, value), (second, other_value) = facts[:2]
    return f"{name} {first.phrases[0].format(value)} and {second.phrases[0].format(other_value)}."


def article(rng):
    """(sentences, summary): news of one thing, told among an opening, a turn to the subject, an aside and a closing."""
    domain, aside = rng.sample(DOMAINS, 2)
    name, facts = make_facts(rng, domain, 4)
    other, others = make_facts(rng, aside, 1)
    told = [f"{name} {phrase(rng, facts[0])}.", f"It {phrase(rng, facts[1])}."]
    if rng.random() < 0.5:
        told = [f"{name} {phrase(rng, facts[0])} and {phrase(rng, facts[1])}."]
    told.append(f"The {domain.noun} {phrase(rng, facts[2])} and {phrase(rng, facts[3])}.")
    remark = rng.choice(ASIDES).format(other=other, fact=phrase(rng, others[0]))
    told.insert(rng.choice((0, len(told))), remark)
    opening = rng.choice(OPENINGS).format(hero=person(rng), town=place(rng))
    turn = rng.choice(TURNS).format(noun=domain.noun)
    return [opening, turn, *told, rng.choice(CLOSINGS)], summary(name, facts)


def write_articles(folder, rng, counts):
    """Write `folder`/{split}.source and .target, one document a line, as in the summarisation sets."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        made = [article(rng) for _ in range(count)]
        for kind, lines in (("source", [" ".join(s) for s, _ in made]), ("target", [summary for _, summary in made])):
            (folder / f"{split}.{kind}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def readings(rng):
    """Lists of sentences without end: articles, half of them closed by `In short, ...`, and other pages."""
    pages = documents(rng)
    while True:
        sentences, short = article(rng)
        yield [*sentences, f"In short, {short}"] if rng.random() < 0.5 else sentences
        for page in itertools.islice(pages, 1):
            yield page.strip().replace(". ", ".\0").split("\0")


def corrupt(rng, sentences, mask):
    """BART's noise (Lewis et al. 2020): sentences in another order; a sentence, or spans of words, become one mask."""
    noisy = rng.sample(sentences, len(sentences)) if rng.random() < 0.3 else list(sentences)
    if rng.random() < 0.5:
        noisy[rng.randrange(len(noisy))] = mask
        return " ".join(noisy)
    kept, skip = [], 0
    for word in " ".join(noisy).split(" "):
        if skip:
            skip -= 1
        elif rng.random() < 0.08:
            kept.append(mask)
            skip = rng.randint(0, 3)
        else:
            kept.append(word)
    return " ".join(kept)
