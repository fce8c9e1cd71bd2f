"""Preference pairs from human ratings: a line about a film that people rated high against one that they rated low.

The ratings are those of Hutto and Gilbert (ICWSM 2014; MIT): snippets from film reviews, product reviews, newspaper
editorials and tweets, each with the mean of 20 ratings from -4 (extremely negative) to 4 (extremely positive).

The two texts of a pair were NOT written in answer to a common prompt: they are lines about different films. The
instruction is ours, and it makes the line that speaks well of its film the better answer. What can be learned from
such pairs is the manner (praise, as human reviewers write it), not which film is good.
"""

from __future__ import annotations

import html
import io
import json
import random
import tarfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


# The held-out pairs are asked for in words that no training row has.
HELD_OUT_INSTRUCTION = "Write one line about a film that recommends it."
# Several, and equally often: equal prompts stay in one fold, so that each round has wordings of its own.
INSTRUCTIONS = (
    "Recommend a film in one line.",
    "In one line, recommend a film.",
    "Give me one line that recommends a film.",
    "Say in one line that a film is worth seeing.",
    "Write a short line that recommends a film.",
    "Tell me in one line to see a film.",
    "Praise a film in one line.",
    "One line, please, that recommends a film.",
    "Write a one-line recommendation of a film.",
    "Write one sentence that recommends a film.",
    "Sell me a film in one line.",
    "Make me want to see a film, in one line.",
)

# Film lines between these numbers of words, and rated at least so far from neutral, become pairs. Short, because on a
# CPU the time goes with the tokens; far apart (4 points and more on a scale of 8), because the labels are then clear.
MIN_WORDS, MAX_WORDS = 5, 14
MIN_RATING = 2.0
HELD_OUT_PAIRS = 200
UNSEEN_TEXTS = 120
UNSEEN_WORDS = (6, 16)

# The held-out pairs and the unseen texts are drawn with this seed whatever seed a run has: runs stay comparable.
SPLIT_SEED = 20140602

FILES = {
    "film": "movieReviewSnippets_GroundTruth.txt",
    "product": "amazonReviewSnippets_GroundTruth.txt",
    "editorial": "nytEditorialSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
}


@dataclass(frozen=True)
class Snippet:
    source: str  # a key of FILES
    rating: float  # mean of 20 people, in [-4, 4]
    text: str

    @property
    def words(self) -> int:
        return len(self.text.split())


@dataclass(frozen=True)
class FilmLines:
    train: list[dict]  # rows for DPOTrainer: prompt, chosen, rejected (conversational)
    held_out: list[dict]  # the same, no snippet in common with `train`
    unseen: list[str]  # human text that is in no pair


def normalise(text: str) -> str:
    """Lower case, letters and digits only: what two snippets are compared by."""
    return "".join(character for character in text.lower() if character.isalnum())


def parse_snippets(source: str, content: str) -> list[Snippet]:
    """Lines of `id <tab> mean rating <tab> text`; anything else is an error, not a row that silently goes missing."""
    snippets = []
    for number, line in enumerate(content.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 3:
            raise ValueError(f"{FILES.get(source, source)}, line {number}: {len(fields)} fields, expected 3")
        text = " ".join(html.unescape(fields[2]).split())
        snippets.append(Snippet(source, float(fields[1]), text))
    return snippets


def read_sdist(path: Path) -> list[Snippet]:
    """The four rated files out of the source distribution of vaderSentiment, read in memory: nothing is unpacked."""
    with tarfile.open(path) as outer:
        names = [name for name in outer.getnames() if name.endswith("/additional_resources/hutto_ICWSM_2014.tar.gz")]
        if len(names) != 1:
            raise ValueError(f"{path.name} holds {len(names)} files hutto_ICWSM_2014.tar.gz, expected 1")
        inner_bytes = outer.extractfile(names[0])
        if inner_bytes is None:
            raise ValueError(f"{path.name}: {names[0]} is not a file")
        with tarfile.open(fileobj=io.BytesIO(inner_bytes.read())) as inner:
            snippets = []
            for source, name in FILES.items():
                member = inner.extractfile(f"hutto_ICWSM_2014/{name}")
                if member is None:
                    raise ValueError(f"{path.name}: {name} is not a file")
                snippets += parse_snippets(source, member.read().decode("utf-8"))
    return snippets


def deduplicate(snippets: Iterable[Snippet]) -> list[Snippet]:
    """The first of every group of snippets that are equal after normalising, across all files; empty ones go."""
    seen = {""}
    kept = []
    for snippet in snippets:
        key = normalise(snippet.text)
        if key not in seen:
            seen.add(key)
            kept.append(snippet)
    return kept


def pair_up(snippets: Iterable[Snippet], rng: random.Random) -> list[tuple[Snippet, Snippet]]:
    """(high, low) pairs of film lines with equally many words, so that length says nothing; each line once at most."""
    high: dict[int, list[Snippet]] = defaultdict(list)
    low: dict[int, list[Snippet]] = defaultdict(list)
    for snippet in snippets:
        if snippet.source == "film" and MIN_WORDS <= snippet.words <= MAX_WORDS and abs(snippet.rating) >= MIN_RATING:
            (high if snippet.rating > 0 else low)[snippet.words].append(snippet)
    pairs = []
    for words in sorted(high.keys() & low.keys()):
        rng.shuffle(high[words])
        rng.shuffle(low[words])
        pairs += zip(high[words], low[words], strict=False)
    rng.shuffle(pairs)
    return pairs


def as_row(high: Snippet, low: Snippet, instruction: str = HELD_OUT_INSTRUCTION) -> dict:
    return {
        "prompt": [{"role": "user", "content": instruction}],
        "chosen": [{"role": "assistant", "content": high.text}],
        "rejected": [{"role": "assistant", "content": low.text}],
    }


def unseen_texts(unique: Iterable[Snippet]) -> list[str]:
    """Neutral film lines, and the other sources' whatever their rating, to measure on: none can be in a pair."""
    candidates: dict[str, list[str]] = defaultdict(list)
    for snippet in unique:
        neutral = abs(snippet.rating) < MIN_RATING / 2
        if UNSEEN_WORDS[0] <= snippet.words <= UNSEEN_WORDS[1] and (snippet.source != "film" or neutral):
            candidates[snippet.source].append(snippet.text)
    rng = random.Random(SPLIT_SEED)
    sources = [source for source in ("film", "product", "editorial") if candidates[source]]
    unseen = []
    for source in sources:
        unseen += rng.sample(candidates[source], min(UNSEEN_TEXTS // len(sources), len(candidates[source])))
    return unseen


def kept_texts(snippets: Iterable[Snippet], used: Iterable[str], count: int, seed: int) -> list[str]:
    """
    Human text to keep the likelihood of, of the unseen texts' kind: neutral film lines, products, editorials.

    Args:
        used: what it must not be, whole lines or their beginnings.

    Raises:
        ValueError: there is not as much.
    """
    begun = tuple({normalise(text) for text in used})
    found = [
        snippet.text
        for snippet in deduplicate(snippets)
        if snippet.source != "tweet"
        and (snippet.source != "film" or abs(snippet.rating) < MIN_RATING / 2)
        and UNSEEN_WORDS[0] <= snippet.words <= UNSEEN_WORDS[1]
        and not normalise(snippet.text).startswith(begun)
    ]
    if not 1 <= count <= len(found):
        raise ValueError(f"{count} texts to keep asked for, but 1 to {len(found)} are possible")
    return random.Random(seed).sample(found, count)


def make(
    snippets: Iterable[Snippet], rounds: int, pairs_a_round: int, seed: int, held_out_pairs: int = HELD_OUT_PAIRS
) -> FilmLines:
    """
    Args:
        snippets: as `read_sdist` gives them.
        rounds: number of folds; making them is the trainer's work (`round_data="split"`).
        pairs_a_round: training pairs of a fold.
        seed: draws the training pairs from what the held-out pairs leave.
        held_out_pairs: how many pairs are kept for measuring, the same ones for every `seed`.

    Raises:
        ValueError: more folds than wordings of the instruction, or more pairs than the ratings give.
    """
    if not 1 <= rounds <= len(INSTRUCTIONS):
        raise ValueError(f"{rounds} rounds asked for, but 1 to {len(INSTRUCTIONS)} are possible: a wording a round")
    unique = deduplicate(snippets)
    pairs = pair_up(unique, random.Random(SPLIT_SEED))
    held_out, rest = pairs[:held_out_pairs], pairs[held_out_pairs:]
    wanted = rounds * pairs_a_round
    if pairs_a_round < 1 or wanted > len(rest):
        raise ValueError(
            f"{rounds} rounds of {pairs_a_round} pairs asked for, but the ratings give {len(rest)} training pairs "
            f"beside {len(held_out)} held-out ones: 1 to {len(rest) // rounds} a round are possible"
        )
    train = random.Random(seed).sample(rest, wanted)
    # Equally many wordings a round and, as far as it goes, equally many rows a wording: then the folds come out equal.
    a_round = min(len(INSTRUCTIONS) // rounds, pairs_a_round)
    wordings = [INSTRUCTIONS[fold * a_round + row % a_round] for row in range(pairs_a_round) for fold in range(rounds)]

    rows = [as_row(*pair, instruction) for pair, instruction in zip(train, wordings, strict=True)]
    return FilmLines(rows, [as_row(*pair) for pair in held_out], unseen_texts(unique))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
