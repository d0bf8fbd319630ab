"""One name for one thing, whatever a sensor's or a benchmark's labels call it.

`concept("aircraft")`, `concept("plane")` and `concept("airplanes")` are all "plane". A concept is an English noun in
the singular, in lower case; `plural`, `indefinite` and `counted` say it in a sentence. A class that no table knows is
its own name, tidied: "Container_Crane" is "container crane".

The table holds SOI-Det's 26 classes, those of the data they come from (SARDet-100K, DOTA, DroneVehicle), and of NWPU
VHR-10, DIOR and HIT-UAV. Three entries are judgements, after looking at the images: "vehicle" (NWPU VHR-10, DIOR) is
nearly always a car, "other vehicle" (HIT-UAV) a truck, and "tank" (SARDet-100K, of MSAR's oil tanks) a storage tank.
Who labels otherwise renames the class first.
"""

from __future__ import annotations

import re

from babelrs_geo.errors import LabelError

ALIASES: dict[str, tuple[str, ...]] = {
    "airport": (),
    "baseball diamond": ("baseball field",),
    "basketball court": (),
    "bicycle": ("bike",),
    "bridge": (),
    "bus": (),
    "car": ("small vehicle", "vehicle"),
    "chimney": (),
    "container crane": (),
    "dam": (),
    "expressway service area": (),
    "expressway toll station": (),
    "freight car": ("feright car", "feright", "freight"),
    "golf course": ("golf field",),
    "ground track field": (),
    "harbor": ("harbour",),
    "helicopter": (),
    "helipad": (),
    "large vehicle": (),
    "overpass": (),
    "person": ("pedestrian",),
    "plane": ("aircraft", "airplane", "aeroplane"),
    "roundabout": (),
    "ship": ("vessel",),
    "soccer field": ("soccer ball field", "football field"),
    "stadium": (),
    "storage tank": ("oil tank", "tank"),
    "swimming pool": (),
    "tennis court": (),
    "train station": (),
    "truck": ("truvk", "other vehicle"),
    "van": (),
    "windmill": (),
}
"""Each concept, and what else it is called; plurals, hyphens, capitals and missing spaces aside."""

LONGEST = {
    "bicycle": 3.0,
    "bus": 30.0,
    "car": 20.0,  # also what is labelled as a vehicle, lorries among them
    "helicopter": 45.0,
    "large vehicle": 60.0,
    "person": 3.0,
    "plane": 120.0,
    "ship": 460.0,
    "truck": 60.0,
    "van": 10.0,
}
"""Metres that nothing of a kind exceeds: the ship Seawise Giant had 458 m, the wings of the plane Roc span 117 m."""

_IRREGULAR = {"person": "people", "aircraft": "aircraft"}
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")  # OtherVehicle
_VOWEL = re.compile(r"^(?!eu|uni|use|one\b)[aeiou]|^(hour|heir|x-ray)")
_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def concept(name: str) -> str:
    """The concept that a class of some labels is. Raises LabelError where the name has no letter or digit."""
    plain = tidy(name)
    return _TABLE.get(plain.replace(" ", ""), plain)


def longest(name: str) -> float | None:
    """Metres that no object of a class exceeds in length; None for what has no limit, as a bridge."""
    return LONGEST.get(concept(name))


def tidy(name: str) -> str:
    """A class name as words: lower case, hyphens and underscores as spaces. Raises LabelError as `concept` does."""
    plain = " ".join(re.split(r"[\s_\-]+", _CAMEL.sub(" ", name.strip()))).lower().strip()
    if not re.search(r"\w", plain):
        raise LabelError(
            f"a class is called {name!r}; expected a name with a letter or a digit, so rename it"
        )
    return plain


def plural(thing: str) -> str:
    """Several of a concept. A name of no table that ends in s is taken for a plural already."""
    head, space, last = thing.rpartition(" ")
    if last in _IRREGULAR:
        return head + space + _IRREGULAR[last]
    if last.endswith(("ss", "us", "x", "z", "ch", "sh")):
        return thing + "es"
    if last.endswith("s"):
        return thing
    if re.search(r"[^aeiou]y$", last):
        return thing[:-1] + "ies"
    return thing + "s"


def indefinite(thing: str) -> str:
    """One of a concept, with its article: "a ship", "an airport"."""
    return f"{'an' if _VOWEL.match(thing) else 'a'} {thing}"


def counted(thing: str, count: int, most: int = 10) -> str:
    """So many of a concept: "a ship", "three ships"; "many ships" beyond `most`, which is at most ten."""
    if count == 1:
        return indefinite(thing)
    return f"{_WORDS[count] if count <= min(most, len(_WORDS) - 1) else 'many'} {plural(thing)}"


def listed(parts: list[str], last: str = "and") -> str:
    """Parts of a sentence in a row: "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def _table() -> dict[str, str]:
    """Names without spaces, singular and plural, to the concept."""
    found: dict[str, str] = {}
    for thing, others in ALIASES.items():
        for name in (thing, *others):
            for form in (name, plural(name)):
                found[form.replace(" ", "")] = thing
    return found


_TABLE = _table()
