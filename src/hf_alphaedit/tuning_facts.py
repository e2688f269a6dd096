"""Facts to tune on, so that settings are never chosen on the facts that a benchmark judges them by.

48 facts that any language model has met, in four relations, with an object of another subject as the new target. Every
subject comes once: two edits of one subject would disturb each other and blur the measurement.
"""

from __future__ import annotations

from hf_alphaedit.records import Record
from hf_alphaedit.requests import EditRequest


# relation -> (prompt, two paraphrases, {subject: object})
RELATIONS: dict[str, tuple[str, tuple[str, str], dict[str, str]]] = {
    "capital": (
        "The capital of {} is",
        ("The government of {} sits in the city of", "Everybody who visits the capital of {} will see"),
        {
            "France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Russia": "Moscow", "Ireland": "Dublin",
            "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana", "Norway": "Oslo", "Iraq": "Baghdad",
            "Austria": "Vienna", "South Korea": "Seoul",
        },
    ),
    "language": (
        "Most people in {} speak",
        ("The official language of {} is", "To be understood in {}, a visitor should learn some"),
        {
            "Germany": "German", "Spain": "Spanish", "Brazil": "Portuguese", "Poland": "Polish", "Turkey": "Turkish",
            "Greece": "Greek", "Sweden": "Swedish", "Thailand": "Thai", "Hungary": "Hungarian", "Finland": "Finnish",
            "Saudi Arabia": "Arabic", "Vietnam": "Vietnamese",
        },
    ),
    "continent": (
        "{} lies on the continent of",
        ("On a map of the world, {} is found in", "The country {} belongs to"),
        {
            "Nigeria": "Africa", "Mongolia": "Asia", "Portugal": "Europe", "Ethiopia": "Africa", "Nepal": "Asia",
            "Belgium": "Europe", "Ghana": "Africa", "Pakistan": "Asia", "Denmark": "Europe", "Uganda": "Africa",
            "Cambodia": "Asia", "Romania": "Europe",
        },
    ),
    "field": (
        "{} is best known for work in",
        ("The life's work of {} was in", "Students read about {} when they learn about"),
        {
            "Isaac Newton": "physics", "Johann Sebastian Bach": "music", "Charles Darwin": "biology",
            "Pablo Picasso": "painting", "Albert Einstein": "physics", "Ludwig van Beethoven": "music",
            "Gregor Mendel": "biology", "Vincent van Gogh": "painting", "Marie Curie": "physics",
            "Wolfgang Amadeus Mozart": "music", "Louis Pasteur": "biology", "Claude Monet": "painting",
        },
    ),
}  # fmt: skip
NEIGHBORS = 3


def tuning_facts(count: int = 24) -> list[Record]:
    """The first `count` of the 48 facts; the four relations take turns.

    The new target is the next different object of the relation. Neighbours are prompts of the same relation about
    subjects that aren't edited in the same fact, and whose answer is another than the new target.

    Raises:
        ValueError: `count` is not between 1 and 48.
    """
    groups = [_records(relation) for relation in RELATIONS]
    everything = [record for turn in zip(*groups, strict=True) for record in turn]
    if not 1 <= count <= len(everything):
        raise ValueError(f"count={count} must be between 1 and {len(everything)}")
    return everything[:count]


def _records(relation: str) -> list[Record]:
    prompt, paraphrases, objects = RELATIONS[relation]
    subjects = list(objects)
    records = []
    for index, subject in enumerate(subjects):
        others = subjects[index + 1 :] + subjects[:index]  # in turn, from the next one on
        target = next(objects[other] for other in others if objects[other] != objects[subject])
        neighbors = [other for other in reversed(others) if objects[other] != target][:NEIGHBORS]
        records.append(
            Record(
                EditRequest(prompt, subject, target, objects[subject], relation, f"{relation} {index}"),
                paraphrases=tuple(text.replace("{}", subject) for text in paraphrases),
                neighborhood=tuple((prompt.replace("{}", other), objects[other]) for other in neighbors),
            )
        )
    return records
