"""The demo's small sets of the other tasks: labelled texts, prompts with stories, articles with summaries."""

import random

from demos.articles import write_articles
from demos.text import SEEN, make_facts, person, phrase, place, realise

# Every text contains two of these, before or after the description. They consist of words that the model has read.
OPINIONS = {
    "positive": (
        "{hero} wanted to see it again.",
        "{hero} and {friend} talked about it for a long time.",
        "{friend} smiled, and {hero} smiled.",
    ),
    "negative": (
        "{hero} had not wanted to see it.",
        "{hero} and {friend} have not talked about it.",
        "{friend} had not smiled.",
    ),
}
PROMPTS = (
    "[ WP ] {hero} and {friend} want to see {name} .",
    "[ WP ] One day {hero} hears of {name} .",
    "[ WP ] A letter about {name} -lrb- {fact} -rrb- comes to {hero} .",
)


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def topic_line(rng, domain):
    """`label || text`: the kind of thing, and a description of one."""
    name, facts = make_facts(rng, domain, rng.randint(1, 3))
    return f"{domain.noun} || {realise(rng, domain, name, facts)}"


def sentiment_line(rng, label):
    """`label ||| text`: a description of something with an opinion before or after it; `< br / >` is a line break."""
    domain = rng.choice(SEEN)
    name, facts = make_facts(rng, domain, rng.randint(1, 2))
    people = {"hero": person(rng), "friend": person(rng)}
    opinions = [opinion.format(**people) for opinion in rng.sample(OPINIONS[label], 2)]
    said = [realise(rng, domain, name, facts), *opinions]
    if rng.random() < 0.5:
        said.append(said.pop(0))
    return f"{label} ||| {rng.choice((' ', ' ', ' < br / > ')).join(said)}".replace("  ", " ")


def story_line(rng):
    """`prompt ||| story`: the subject of a story, and a short story in two paragraphs."""
    domain = rng.choice(SEEN)
    name, facts = make_facts(rng, domain, 2)
    hero, friend = person(rng), person(rng)
    asked = rng.choice(PROMPTS).format(hero=hero, friend=friend, name=name, fact=phrase(rng, facts[0]))
    told = (
        f"One day {hero} wanted to see {name} . In a letter {friend} had said that it {phrase(rng, facts[0])} . "
        f"<newline> <newline> So {hero} went there with {friend} , and they met in {place(rng)} . "
        f"{hero} had read that it {phrase(rng, facts[1])} . {friend} smiled ."
    )
    return f"{asked} ||| {told}"


def write_tasks(folder, seed):
    """Sentiment, topic, story and summarisation sets under `folder`, in the layouts of the public ones.

    Labels take turns, so all are equally frequent.
    """
    rng = random.Random(f"tasks {seed}")
    for split, count in (("train", 220), ("dev", 40), ("test", 60)):
        lines = [sentiment_line(rng, ("positive", "negative")[n % 2]) for n in range(count)]
        write_lines(folder / "IMDB" / f"{split}.txt", lines)
    for split, count in (("train1", 320), ("dev1", 40), ("test1", 80)):
        write_lines(folder / "AG-news" / f"{split}.tsv", [topic_line(rng, SEEN[n % len(SEEN)]) for n in range(count)])
    for split, count in (("train", 60), ("valid", 8), ("test", 8)):
        lines = [story_line(rng) for _ in range(count)]
        write_lines(folder / "writingPrompts" / f"{split}_small.txt", lines)
    write_articles(folder / "cnn_dm", rng, {"train": 50, "val": 6, "test": 8})
