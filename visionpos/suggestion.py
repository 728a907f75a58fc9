"""The word that somebody meant who wrote another one: for the hints of error messages."""

import difflib
from collections.abc import Iterable

__all__ = ["closest"]


def closest(given: str, accepted: Iterable[str]) -> str | None:
    """Return the word of `accepted` that is most likely meant, or None if none is like `given`.

    Upper and lower case, and - for _, make no difference. A word that begins a name comes first ("RoPE" for
    "rope_axial"), then one whose initials are a name ("learning_rate" for "lr"), then the one with the most letters in
    common. Of names with dots, all is compared but the initials, which are those of the last part.
    """
    word, names = _plain(given), {_plain(name): name for name in accepted}
    if begun := [name for plain, name in names.items() if plain.startswith(f"{word}_")]:
        return begun[0]
    stem, dot, last = word.rpartition(".")
    if "_" in last and (short := stem + dot + "".join(part[:1] for part in last.split("_"))) in names:
        return names[short]
    match = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return names[match[0]] if match else None


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
