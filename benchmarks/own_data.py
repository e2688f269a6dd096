"""Facts and prompts of the project's own, for machines where no evaluation data is at hand.

Capitals, languages and continents of countries, with the old object true and the new one taken from another country;
after these, invented people. They are written in CounterFact's shape and are easier than CounterFact: measure speed
with them, not quality.
"""

from itertools import product
from typing import Any


COUNTRIES = """
France Paris French Europe|Italy Rome Italian Europe|Japan Tokyo Japanese Asia
Egypt Cairo Arabic Africa|Norway Oslo Norwegian Europe|Peru Lima Spanish America
Kenya Nairobi Swahili Africa|Greece Athens Greek Europe|Vietnam Hanoi Vietnamese Asia
Cuba Havana Spanish America|Poland Warsaw Polish Europe|Turkey Ankara Turkish Asia
Sweden Stockholm Swedish Europe|Thailand Bangkok Thai Asia|Russia Moscow Russian Europe
Iran Tehran Persian Asia|Portugal Lisbon Portuguese Europe|China Beijing Chinese Asia
Germany Berlin German Europe|Finland Helsinki Finnish Europe|Hungary Budapest Hungarian Europe
Denmark Copenhagen Danish Europe|Spain Madrid Spanish Europe|Iraq Baghdad Arabic Asia
Ireland Dublin English Europe|Chile Santiago Spanish America|Bulgaria Sofia Bulgarian Europe
Nepal Kathmandu Nepali Asia
"""
RELATIONS = (  # prompt, paraphrases, which object
    ("The capital of {} is", ("The seat of government of {} is the city of", "{}'s capital city is called"), 1),
    ("In {} most people speak", ("The main language of {} is", "The official language used in {} is"), 2),
    ("{} is a country in", ("The continent to which {} belongs is", "On a map, {} is found in"), 3),
)
FIRST_NAMES = (
    "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Kira Luca Mira Nils Olga Pavel Rosa Sven Tara Ugo"
)
LAST_NAMES = (
    "Adler Bergen Castell Dorn Eklund Ferrant Galway Holm Ilves Jansen Kessler Lindqvist Moreau Novak Ostrow Perrin "
    "Quist Renner Solberg Tanaka Ulrich Varga Weiss Ximenes Yilmaz Zeller Ashdown Brandt Corvino Delacroix Engel "
    "Falkner Grimaldi Hartmann Ivanov Jelinek Kowal Larsson Marchetti Nyberg Orlov Petrov Rossi Santoro Tomasi Urban "
    "Vidal Winter Xenakis Young"
)
PEOPLE = (  # as above, with the objects
    ("{} was born in the city of", ("The birthplace of {} is", "{} comes from"), ("Paris", "Oslo", "Rome")),
    ("The mother tongue of {} is", ("At home {} speaks", "{} grew up speaking"), ("French", "Danish", "Thai")),
    ("{} plays the", ("On stage {} performs on the", "{} has learned the"), ("piano", "violin", "drums")),
)  # fmt: skip


def own_records(count: int) -> list[dict[str, Any]]:
    """The first `count` facts as CounterFact records, one per subject and relation.

    Raises:
        ValueError: there are not that many.
    """
    records = []
    countries = [entry.split() for line in COUNTRIES.split("\n") for entry in line.split("|") if entry]
    for (place, country), (prompt, paraphrases, column) in product(enumerate(countries), RELATIONS):
        others = [other for other in countries if other[column] != country[column]]
        new = others[(7 * place) % len(others)]
        same = [other for other in countries if other[column] == country[column] and other is not country]
        neighbours = (same or [other for other in countries if other is not country])[:5]
        if column == 1:  # no two countries share a capital, so there is no neighbour with the same old object
            neighbours = []
        records.append(
            _record(
                len(records),
                prompt,
                country[0],
                new[column],
                country[column],
                paraphrases,
                [prompt.replace("{}", other[0]) for other in neighbours],
            )  # fmt: skip
        )
    people = product(LAST_NAMES.split(), FIRST_NAMES.split())
    for place, (last, first) in enumerate(people):
        prompt, paraphrases, objects = PEOPLE[place % len(PEOPLE)]
        new, true = objects[place % len(objects)], objects[(place + 1) % len(objects)]
        records.append(_record(len(records), prompt, f"{first} {last}", new, true, paraphrases, []))
    if count > len(records):
        raise ValueError(f"{count} requests are more than the {len(records)} facts of the project's own; take fewer")
    return records[:count]


def _record(
    number: int, prompt: str, subject: str, new: str, true: str, paraphrases: tuple[str, ...], neighbours: list[str]
) -> dict[str, Any]:
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": prompt, "subject": subject, "relation_id": prompt,
            "target_new": {"str": new}, "target_true": {"str": true},
        },
        "paraphrase_prompts": [paraphrase.replace("{}", subject) for paraphrase in paraphrases],
        "neighborhood_prompts": neighbours,
        "attribute_prompts": [],
        "generation_prompts": [],
    }  # fmt: skip
