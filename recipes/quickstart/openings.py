"""The quickstart's prompts: the first words of lines that people wrote about films, for the model to go on with."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from film_lines import SPLIT_SEED, Snippet, deduplicate, normalise, unseen_texts


# Enough to set a subject and a grammar, too few to settle whether the line will praise.
OPENING_WORDS = 4
# The line itself goes on after its opening: an opening that is the whole line leaves nothing to say.
MIN_WORDS = 8
HELD_OUT_PROMPTS = 200
# A quotation or a bracket that an opening begins would ask for its end, and numbers read badly.
WORD = re.compile(r"[A-Za-z]+(?:[-'][A-Za-z]+)*[,;:.]?")
# Prompts of a round beyond those that it trains on: they stand in for the ones whose completions are judged alike.
SPARE = 0.25


@dataclass(frozen=True)
class Openings:
    train: list[str]
    held_out: list[str]  # no opening, and no line that one is taken from, in common with `train`
    unseen: list[str]  # human text that no opening is taken from


def opening(text: str) -> str:
    return " ".join(text.split()[:OPENING_WORDS])


def candidates(snippets: Iterable[Snippet]) -> list[str]:
    """
    One opening a film line; of lines that begin alike, and of equal lines, the first. "Alike" is after normalising.
    """
    seen: set[str] = set()
    found = []
    for snippet in snippets:
        words = snippet.text.split()
        plain = all(WORD.fullmatch(word) for word in words[:OPENING_WORDS])
        key = normalise(opening(snippet.text))
        if snippet.source == "film" and len(words) >= MIN_WORDS and plain and key not in seen:
            seen.add(key)
            found.append(opening(snippet.text))
    return found


def make(
    snippets: Iterable[Snippet],
    rounds: int,
    prompts_a_round: int,
    seed: int,
    held_out_prompts: int = HELD_OUT_PROMPTS,
) -> Openings:
    """
    Args:
        snippets: as `film_lines.read_sdist` gives them.
        rounds: number of folds; making them is the trainer's work (`round_data="split"`).
        prompts_a_round: prompts that a round trains on; a fold holds `SPARE` more.
        seed: draws the training prompts from what the held-out prompts leave.
        held_out_prompts: how many prompts are kept for measuring, the same ones for every `seed`.

    Raises:
        ValueError: more prompts than the lines give.
    """
    unique = deduplicate(snippets)
    unseen = unseen_texts(unique)
    # A line that the loss on unseen text is measured on gives no prompt, and neither does one that begins like it.
    apart = {normalise(text) for text in unseen}
    begun = {normalise(opening(text)) for text in unseen}
    possible = [
        text
        for text in candidates(snippet for snippet in unique if normalise(snippet.text) not in apart)
        if normalise(text) not in begun
    ]
    random.Random(SPLIT_SEED).shuffle(possible)
    held_out, rest = possible[:held_out_prompts], possible[held_out_prompts:]
    wanted = rounds * math.ceil(prompts_a_round * (1 + SPARE))
    if rounds < 1 or prompts_a_round < 1 or wanted > len(rest):
        raise ValueError(
            f"{rounds} rounds of {prompts_a_round} prompts (and {SPARE:.0%} to spare) asked for, but the film lines "
            f"give {len(rest)} training prompts beside {len(held_out)} held-out ones"
        )
    return Openings(random.Random(seed).sample(rest, wanted), held_out, unseen)
