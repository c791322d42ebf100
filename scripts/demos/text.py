"""The demo's small world: invented names, eleven domains of things, and the English that tells their facts.

All random choices use the `random.Random` that the caller passes, so one seed gives one text. A fact is a triple
(subject, property, value); a realisation is one way of saying a list of facts about one thing in a few sentences.
"""

from dataclasses import dataclass


def words(text):
    return tuple(text.split())


# A name is a head and a tail ("Hawk" + "ford"), each about one token, so most names are new: they can only be copied.
HEADS = words(
    "Alder Amber Apple Ash Badger Barley Beech Bell Birch Black Brook Bull Castle Cherry Clay Cliff Clover Copper "
    "Crane Crow Dawn Deer Dove Drum Dusk Eagle Ember Elm Fair Falcon Fern Fire Flint Fox Frost Glen Goat Gold Goose "
    "Grass Grey Hare Harp Hart Hawk Hazel Heath Hedge Heron High Holly Honey Horn Iron Ivy Jade Juniper Kestrel King "
    "Knight Lake Lamb Lark Laurel Leaf Lime Lion Long Lynx Maple March Marsh Mill Mint Moon Moss Night North Oak Old "
    "Olive Otter Owl Oxen Pear Pebble Pine Plum Pond Poppy Quail Queen Rain Raven Reed Ridge Rock Rose Rush Rye Salt "
    "Sand Shell Silver Snow South Spring Star Stone Storm Sun Swan Thorn Tiger Tide Timber Trout Vine Walnut Water "
    "Wheat White Wild Wolf Wool Wren Yew"
)
PLACE_TAILS = words(
    "berg bridge bury by combe cote dale den fell field ford gate ham hurst ley minster mouth port shire sted stow ton "
    "vale view ville wick wold worth"
)
COUNTRY_TAILS = words("avia land mania mark onia stan")
COMPANY_TAILS = words("Group Trust Council Works Line")
RIVER_TAILS = words("a el en et or une")
BAND_TAILS = words("bees boys cats girls kings tones")
MOUNTAIN_TAILS = words("a horn kop mont peak tor")
SURNAME_TAILS = words("bert er ing kin man sen smith son wright")
FIRST_NAMES = words(
    "Ada Boris Clara Daniel Elena Felix Greta Hugo Irene Jonas Karin Leon Maria Nils Olga Paul Quentin Rosa Stefan "
    "Tanya Ursula Victor Wanda Xavier Yvonne Zoe"
)
ADJECTIVES = words("Silent Golden Broken Distant Red Hidden Last Winter Burning Secret Quiet Blue Lost Northern")
NOUNS = words("Garden River Mirror Harbour Summer Letter Forest Island Winter Road Window Stone Lantern Shadow")
GENRES = words("crime romance horror comedy fantasy history adventure drama")
MUSIC = words("jazz folk rock blues metal soul punk dance")
COLOURS = words("red blue green white black yellow orange purple")
MATERIALS = words("stone steel wood iron concrete brick")
FOODS = words("Italian French Indian Chinese Japanese English Mexican Greek")
SUBJECTS = words("medicine law physics music history chemistry farming engineering")
FISH = words("salmon trout pike carp eels perch")


def coined(rng, tails):
    return rng.choice(HEADS) + rng.choice(tails)


def place(rng):
    return coined(rng, PLACE_TAILS)


def country(rng):
    return coined(rng, COUNTRY_TAILS)


def river(rng):
    return f"River {coined(rng, RIVER_TAILS)}"


def person(rng):
    return f"{rng.choice(FIRST_NAMES)} {coined(rng, SURNAME_TAILS)}"


def company(rng):
    return f"{place(rng)} {rng.choice(COMPANY_TAILS)}"


def title(rng):
    return f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} of {place(rng)}"


def motto(rng):
    return f"{rng.choice(HEADS)} and {rng.choice(HEADS)}"


def year(rng):
    return str(rng.randrange(1820, 2020))


def number(low, high, step):
    return lambda rng: str(rng.randrange(low, high, step))


def pick(values):
    return lambda rng: rng.choice(values)


def suffixed(make, *endings):
    return lambda rng: f"{make(rng)} {rng.choice(endings)}"


@dataclass(frozen=True)
class Attribute:
    """One property of a domain: its key, a function that makes a value, and its verb phrases, likeliest first."""

    key: str
    value: object
    phrases: tuple[str, ...]

    @property
    def label(self):
        """The key as words, for fact sheets and questions: runwayLength -> runway length."""
        return "".join(f" {c.lower()}" if c.isupper() else c for c in self.key)


@dataclass(frozen=True)
class Domain:
    """A kind of thing: its category, its noun, how to sample a name, and its attributes."""

    category: str
    noun: str
    name: object
    attributes: tuple[Attribute, ...]


def attribute(key, value, *phrases):
    return Attribute(key, value, phrases)


COUNTRY = attribute("country", country, "is in {}", "can be found in {}")
LOCATION = attribute("location", place, "is located in {}", "stands in {}")
OPENED = attribute("openingYear", year, "opened in {}", "was opened in {}")
FOUNDED = attribute("founded", year, "was founded in {}", "was started in {}")
ARCHITECT = attribute("architect", person, "was designed by {}", "is the work of {}")

# fmt: off
SEEN = (
    Domain("Airport", "airport", suffixed(place, "Airport", "Airfield"), (
        attribute("cityServed", place, "serves the city of {}", "is the airport of {}"),
        attribute("runwayLength", number(800, 4000, 50), "has a runway of {} metres", "has a {} metre runway"),
        attribute("operator", company, "is operated by {}", "is run by {}"),
        COUNTRY, OPENED)),
    Domain("Book", "book", title, (
        attribute("author", person, "was written by {}", "is a work by {}"),
        attribute("pages", number(90, 900, 10), "has {} pages", "is {} pages long"),
        attribute("genre", pick(GENRES), "is a {} book", "belongs to the {} shelf"),
        attribute("publisher", company, "was published by {}", "came out at {}"),
        attribute("publicationYear", year, "appeared in {}", "was first printed in {}"))),
    Domain("FootballClub", "club", suffixed(place, "United", "City", "Rovers"), (
        attribute("ground", suffixed(place, "Park", "Stadium"), "plays at {}", "has its home ground at {}"),
        attribute("manager", person, "is managed by {}", "has {} as manager"),
        attribute("colour", pick(COLOURS), "plays in {} shirts", "wears {}"),
        attribute("members", number(500, 9000, 100), "has {} members", "counts {} members"),
        FOUNDED)),
    Domain("River", "river", river, (
        attribute("length", number(40, 900, 10), "is {} kilometres long", "has a length of {} kilometres"),
        attribute("source", suffixed(place, "Hills", "Lake"), "rises in {}", "has its source in {}"),
        attribute("mouth", suffixed(place, "Bay", "Sea"), "flows into {}", "ends in {}"),
        attribute("fish", pick(FISH), "is known for its {}", "is full of {}"),
        COUNTRY)),
    Domain("Band", "band", lambda rng: f"The {rng.choice(ADJECTIVES)} {coined(rng, BAND_TAILS)}", (
        attribute("genre", pick(MUSIC), "plays {} music", "is a {} band"),
        attribute("singer", person, "is led by the singer {}", "has {} as singer"),
        attribute("hometown", place, "comes from {}", "was formed in {}"),
        attribute("label", company, "records for {}", "is signed to {}"),
        FOUNDED)),
    Domain("Bridge", "bridge", suffixed(place, "Bridge"), (
        attribute("crosses", river, "crosses the {}", "spans the {}"),
        attribute("length", number(60, 2000, 20), "is {} metres long", "has a length of {} metres"),
        attribute("material", pick(MATERIALS), "is made of {}", "is built of {}"),
        ARCHITECT, OPENED)),
    Domain("Mountain", "mountain", lambda rng: f"Mount {coined(rng, MOUNTAIN_TAILS)}", (
        attribute("elevation", number(600, 6000, 50), "is {} metres high", "rises to {} metres"),
        attribute("firstAscent", year, "was first climbed in {}", "was conquered in {}"),
        attribute("firstClimber", person, "was first climbed by {}", "was conquered by {}"),
        attribute("range", suffixed(place, "Range", "Alps"), "is part of the {}", "belongs to the {}"),
        COUNTRY)),
    Domain("Film", "film", title, (
        attribute("director", person, "was directed by {}", "is a film by {}"),
        attribute("starring", person, "stars {}", "has {} in the main role"),
        attribute("runtime", number(70, 200, 5), "lasts {} minutes", "is {} minutes long"),
        attribute("genre", pick(GENRES), "is a {} film", "belongs to the {} genre"),
        attribute("releaseYear", year, "was released in {}", "came out in {}"))),
)
UNSEEN = (
    Domain("Ship", "ship", lambda rng: f"MS {place(rng)}", (
        attribute("builder", company, "was built by {}", "is the work of the yard of {}"),
        attribute("captain", person, "is commanded by {}", "has {} as captain"),
        attribute("homePort", place, "has its home port in {}", "sails from {}"),
        attribute("crew", number(20, 900, 10), "has a crew of {}", "carries a crew of {}"),
        attribute("launched", year, "was launched in {}", "first sailed in {}"))),
    Domain("University", "university", lambda rng: f"University of {place(rng)}", (
        attribute("students", number(900, 30000, 100), "has {} students", "teaches {} students"),
        attribute("rector", person, "is headed by {}", "has {} as rector"),
        attribute("subject", pick(SUBJECTS), "is known for {}", "is famous for its school of {}"),
        attribute("motto", motto, "has the motto {}", "goes by the motto {}"),
        FOUNDED)),
    Domain("Museum", "museum", suffixed(place, "Museum", "Gallery"), (
        attribute("curator", person, "has {} as curator", "is looked after by {}"),
        attribute("visitors", number(1000, 90000, 500), "has {} visitors a year", "draws {} visitors a year"),
        LOCATION, ARCHITECT, OPENED)),
)
RESTAURANT = Domain("Restaurant", "place", lambda rng: f"The {rng.choice(HEADS)} {rng.choice(NOUNS)}", (
    attribute("eatType", pick(("pub", "restaurant", "coffee shop")), "is a {}"),
    attribute("food", pick(FOODS), "serves {} food", "offers {} food"),
    attribute("priceRange", pick(("cheap", "moderate", "high")), "has {} prices", "is in the {} price range"),
    attribute("area", pick(("city centre", "riverside", "market")), "is in the {} area", "lies in the {} area"),
    attribute("near", place, "is near {}", "lies close to {}")))
# fmt: on
DOMAINS = (*SEEN, *UNSEEN, RESTAURANT)


def make_facts(rng, domain, count):
    """A new thing of the domain and `count` of its facts: (name, [(attribute, value)])."""
    chosen = rng.sample(domain.attributes, count)
    return domain.name(rng), [(a, a.value(rng)) for a in chosen]


def phrase(rng, fact):
    """One verb phrase for a fact; the first of its list in two of three samples."""
    kind, value = fact
    form = kind.phrases[0] if rng.random() < 2 / 3 else kind.phrases[-1]
    return form.format(value)


def realise(rng, domain, name, facts):
    """Say all facts, in order, in sentences of one or two verb phrases; later sentences start with a pronoun."""
    phrases = [phrase(rng, fact) for fact in facts]
    sentences = []
    while phrases:
        subject = name if not sentences else rng.choice(("It", "It", f"The {domain.noun}"))
        if len(phrases) == 1 or rng.random() < 0.25:
            sentences.append(f"{subject} {phrases.pop(0)}.")
        elif subject == name and rng.random() < 0.3:
            sentences.append(f"{subject}, which {phrases.pop(0)}, {phrases.pop(0)}.")
        else:
            sentences.append(f"{subject} {phrases.pop(0)} and {phrases.pop(0)}.")
    return " ".join(sentences)


# ---- running text: the language model's pretraining data, without the task ----
# Fact sheets in many layouts are followed by prose in the same document, as infoboxes are on the web; no document
# has the layout of the tuning sets, and none begins by retelling the document before it.


def rows(template, facts, joint="\n"):
    return joint.join(template.format(key=kind.key, label=kind.label, value=value) for kind, value in facts)


SHEETS = (
    lambda d, name, facts: f"{name}\n{rows('{label}: {value}', facts)}\n",
    lambda d, name, facts: f"{{ {d.noun}\n| name = {name}\n{rows('| {key} = {value}', facts)}\n}}\n",
    lambda d, name, facts: f"Facts about {name}: {rows('{label} {value}', facts, '; ')}.\n",
    lambda d, name, facts: f"# {name}\n{rows('* {label} - {value}', facts)}\n",
    lambda d, name, facts: f"<{d.noun}> {name} {rows('<{key}> {value}', facts, ' ')}\n",
    lambda d, name, facts: rows(f"{name} -> {{key}} -> {{value}}", facts) + "\n",
    lambda d, name, facts: f"( {rows(f'{name} , {{key}} , {{value}}', facts, ' ) ( ')} )\n",
    lambda d, name, facts: rows(f"@ {name} @ {{key}} @ {{value}}", facts) + "\n",
)


def sheet_and_prose(rng, domain, name, facts):
    return rng.choice(SHEETS)(domain, name, facts) + realise(rng, domain, name, facts)


def description(rng, domain, name, facts):
    return realise(rng, domain, name, facts)


def prose_and_notes(rng, domain, name, facts):
    return f"{realise(rng, domain, name, facts)}\nNotes\n{rows('- {label}: {value}', facts)}"


def questions(rng, domain, name, facts):
    asked = rng.sample(facts, min(2, len(facts)))
    answers = "\n".join(f"Question: what is the {k.label} of {name}? Answer: {v}." for k, v in asked)
    return f"Read about this {domain.noun}. {realise(rng, domain, name, facts)}\n{answers}"


def story(rng, domain, name, facts):
    hero, friend = person(rng), person(rng)
    told = ", and that it ".join(phrase(rng, fact) for fact in facts[:2])
    return rng.choice(
        (
            f"One day {hero} wanted to see {name}. In a letter {friend} had said that it {told}. "
            f"So {hero} went there with {friend}, and they talked about {name} for a long time.",
            f"Have you heard of {name}? {hero} asked. {friend} had not. I have read that it {told}, said {hero}.",
            f"{hero} and {friend} met in {place(rng)}. {friend} spoke of {name} and of how it {told}. {hero} smiled.",
        )
    )


def listing(rng, domain, name, facts):
    names = [name, domain.name(rng), domain.name(rng)]
    rng.shuffle(names)
    listed = "\n".join(f"- {n}" for n in names)
    return f"Every {domain.noun} of the week\n{listed}\nToday we look at {name}, which {phrase(rng, facts[0])}."


def comparison(rng, domain, name, facts):
    other, theirs = make_facts(rng, domain, 1)
    return f"While {name} {phrase(rng, facts[0])}, {other} {phrase(rng, theirs[0])}."


def refrain(rng, domain, name, facts):
    sung = ", ".join([name, *(value for _, value in facts), domain.name(rng)])
    return f"{person(rng)} sang: {sung}. And again: {sung}. And once more: {sung}."


ABOUT = {
    description: 2,
    sheet_and_prose: 6,
    prose_and_notes: 1,
    questions: 2,
    story: 2,
    listing: 1,
    comparison: 1,
    refrain: 2,
}
FOLLOW_UPS = {story: 2, listing: 1, comparison: 1, refrain: 1}  # what may follow a document about the same thing


def weighted(rng, kinds):
    return rng.choices(list(kinds), list(kinds.values()))[0]


def documents(rng):
    """Documents without end, one string each; every other one is about the same thing as the one before it."""
    while True:
        domain = rng.choice(DOMAINS)
        name, facts = make_facts(rng, domain, rng.randint(1, 4))
        kinds = ABOUT
        while True:
            text = weighted(rng, kinds)(rng, domain, name, facts)
            if rng.random() < 0.1:  # some pages are tokenised, as the E2E references are
                text = text.replace(".", " .").replace(",", " ,")
            yield rng.choice(("", " ")) + text + rng.choice(("", "", "", " ", "\n\n"))
            if rng.random() < 1 / 2:
                break
            kinds = FOLLOW_UPS
