"""The quickstart's data: parsing, de-duplication, pairs, folds. No downloads, no model."""

from __future__ import annotations

import importlib.util
import io
import random
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest


QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"


def _load(name: str) -> ModuleType:
    # Recipes are scripts, not a package: loaded by path, under a name that nothing else has.
    spec = importlib.util.spec_from_file_location(f"_quickstart_{name}", QUICKSTART / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


film_lines = _load("film_lines")


def _snippets(per_side: int = 60) -> list:
    rng = random.Random(0)
    vocabulary = [f"word{number}" for number in range(500)]

    def text() -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randint(5, 14))) + "."

    make = film_lines.Snippet
    snippets = [make("film", 2.5, text()) for _ in range(per_side)]
    snippets += [make("film", -2.5, text()) for _ in range(per_side)]
    snippets += [make("film", 0.1, text()) for _ in range(per_side)]
    snippets += [make("product", 3.0, text()) for _ in range(per_side)]
    snippets += [make("editorial", 0.0, text()) for _ in range(per_side)]
    return snippets


def _texts(rows: list[dict]) -> list[str]:
    return [film_lines.normalise(row[side][0]["content"]) for row in rows for side in ("chosen", "rejected")]


def test_parsing_reads_ratings_and_undoes_html() -> None:
    rows = film_lines.parse_snippets("film", "1\t2.5\tLovely &amp;  Amazing .\r\n2\t-1.25\tdull\x85 film\r\n")
    assert [(row.rating, row.text) for row in rows] == [(2.5, "Lovely & Amazing ."), (-1.25, "dull film")]


def test_a_line_that_is_no_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 2: 2 fields, expected 3"):
        film_lines.parse_snippets("film", "1\t2.5\tfine\n2\tbroken\n")


def test_duplicates_are_found_across_files_after_normalising() -> None:
    make = film_lines.Snippet
    kept = film_lines.deduplicate(
        [
            make("film", 3, "A great film!"),
            make("tweet", -3, "a GREAT film..."),
            make("film", 1, "..."),
            make("film", 1, "b"),
        ]
    )
    assert [(row.source, row.text) for row in kept] == [("film", "A great film!"), ("film", "b")]


def test_pairs_are_of_equal_length_rated_apart_and_use_each_line_once() -> None:
    pairs = film_lines.pair_up(_snippets(), random.Random(0))
    assert len(pairs) > 30
    for high, low in pairs:
        assert high.words == low.words
        assert high.rating >= film_lines.MIN_RATING
        assert low.rating <= -film_lines.MIN_RATING
        assert high.source == low.source == "film"
    used = [snippet.text for pair in pairs for snippet in pair]
    assert len(used) == len(set(used))


def test_training_held_out_and_unseen_have_no_snippet_in_common() -> None:
    data = film_lines.make(_snippets(), rounds=3, pairs_a_round=8, seed=0, held_out_pairs=10)
    assert (len(data.train), len(data.held_out)) == (24, 10)
    train, held_out = _texts(data.train), _texts(data.held_out)
    unseen = [film_lines.normalise(text) for text in data.unseen]
    assert unseen
    together = train + held_out + unseen
    assert len(together) == len(set(together))


def test_the_seed_draws_training_pairs_but_not_what_is_measured() -> None:
    first, again, other = (
        film_lines.make(_snippets(), rounds=3, pairs_a_round=8, seed=seed, held_out_pairs=10) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.train != other.train
    assert first.held_out == other.held_out
    assert first.unseen == other.unseen


@pytest.mark.parametrize(("rounds", "pairs"), [(3, 8), (2, 7), (5, 6), (1, 9), (12, 2), (3, 2)])
def test_the_trainers_folds_come_out_whole(rounds: int, pairs: int) -> None:
    """Equal prompts stay in one fold, so the wordings of the instruction have to divide evenly among the rounds."""
    from trl_extras.rounds.data import split_folds

    data = film_lines.make(_snippets(), rounds=rounds, pairs_a_round=pairs, seed=0, held_out_pairs=5)
    prompts = [row["prompt"][0]["content"] for row in data.train]
    folds = split_folds(prompts, rounds, seed=0)
    assert [len(fold) for fold in folds] == [pairs] * rounds
    assert not set(prompts) & {row["prompt"][0]["content"] for row in data.held_out}


@pytest.mark.parametrize(
    ("rounds", "pairs", "message"),
    [(3, 1000, "pairs asked for, but the ratings give"), (13, 1, "1 to 12 are possible"), (3, 0, "pairs asked for")],
)
def test_what_cannot_be_had_is_refused(rounds: int, pairs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        film_lines.make(_snippets(), rounds=rounds, pairs_a_round=pairs, seed=0, held_out_pairs=10)


def test_the_four_files_are_read_out_of_the_source_distribution(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for number, name in enumerate(film_lines.FILES.values()):
            content = f"1\t{number}.5\ttext {number}\r\n".encode()
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path = tmp_path / "sdist.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        member.size = len(inner.getvalue())
        archive.addfile(member, io.BytesIO(inner.getvalue()))
    assert [(row.source, row.rating, row.text) for row in film_lines.read_sdist(path)] == [
        ("film", 0.5, "text 0"),
        ("product", 1.5, "text 1"),
        ("editorial", 2.5, "text 2"),
        ("tweet", 3.5, "text 3"),
    ]
