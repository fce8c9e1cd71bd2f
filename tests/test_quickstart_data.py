"""The quickstart's data (parsing, prompts, pairs, folds) and its estimate of the time left. No downloads."""

from __future__ import annotations

import importlib
import io
import random
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from trl_extras.rollouts.sampling import SamplingSettings, TransformersSampler


QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"


# Recipes are scripts, not a package; they import each other by name, as they do beside the script that is run.
sys.path.insert(0, str(QUICKSTART))
film_lines = importlib.import_module("film_lines")
openings = importlib.import_module("openings")


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


# ---- Prompts ----


def _lines(number: int = 120) -> list:
    rng = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def text() -> str:
        return " ".join("".join(rng.choices(letters, k=5)) for _ in range(12)) + "."

    return [film_lines.Snippet("film", 0.1 * (number % 40) - 2, text()) for number in range(number)]


def test_prompts_are_openings_of_lines_that_nothing_else_is_taken_from() -> None:
    snippets = _lines()
    data = openings.make(snippets, rounds=3, prompts_a_round=8, seed=0, held_out_prompts=20)
    assert (len(data.train), len(data.held_out)) == (30, 20)  # a quarter to spare
    assert data.unseen
    sources = []
    for prompt in data.train + data.held_out:
        assert len(prompt.split()) == openings.OPENING_WORDS
        found = [s.text for s in snippets if s.text.startswith(f"{prompt} ")]
        assert len(found) == 1
        sources += found
    # No opening and no line twice, neither between training and held-out prompts nor with what is only measured on.
    together = [film_lines.normalise(text) for text in sources + data.unseen]
    assert len(together) == len(set(together))
    begun = [film_lines.normalise(openings.opening(text)) for text in sources + data.unseen]
    assert len(begun) == len(set(begun))


def test_lines_that_begin_alike_give_one_prompt() -> None:
    make = film_lines.Snippet
    found = openings.candidates(
        [
            make("film", 1, "A film that takes its time and rewards those who wait."),
            make("film", 1, "a film, that TAKES nothing seriously, least of all its own plot."),
            make("film", 1, "Too short to go on."),
            make("tweet", 1, "Not about a film at all, but long enough to be one of them."),
            make("film", 1, "The ''best'' film about \"quotation marks\" that ever opened in May."),
            make("film", 1, "In 1999 it might have been thought a funny film by someone."),
        ]
    )
    assert found == ["A film that takes"]


def test_the_seed_draws_training_prompts_but_not_what_is_measured() -> None:
    first, again, other = (
        openings.make(_lines(), rounds=3, prompts_a_round=8, seed=seed, held_out_prompts=20) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.train != other.train
    assert (first.held_out, first.unseen) == (other.held_out, other.unseen)


@pytest.mark.parametrize(("rounds", "prompts"), [(3, 1000), (3, 0), (0, 8)])
def test_prompts_that_cannot_be_had_are_refused(rounds: int, prompts: int) -> None:
    with pytest.raises(ValueError, match=r"prompts .* asked for, but the film lines give"):
        openings.make(_lines(), rounds=rounds, prompts_a_round=prompts, seed=0, held_out_prompts=20)


def test_the_reward_scores_the_completion_alone() -> None:
    pytest.importorskip("vaderSentiment")
    rewards = importlib.import_module("rewards")
    good, bad, plain = rewards.vader(
        ["a wonderful, moving film", [{"role": "assistant", "content": "a dull, awful mess"}], "of the two men"],
        prompts=["awful"] * 3,
    )
    assert -1 <= bad < -0.5 < plain == 0 < 0.5 < good <= 1


# ---- Time left ----


@pytest.fixture
def progress() -> Any:
    pytest.importorskip("rich")
    return importlib.import_module("progress")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, progress: Any) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def _meter(progress: Any, lines: list[str], alpha: float = 0.3) -> Any:
    class Log:
        is_terminal = False

        def print(self, text: str, **kwargs: Any) -> None:
            lines.append(text)

    settings = {"rounds": 3, "prompts": 48, "num_generations": 5, "alpha": alpha}
    return progress.Meter(Log(), progress.plan(settings, held_out=200, texts=120))


def test_the_time_left_does_not_jump_where_the_kind_of_work_changes(progress: Any, clock: list[float]) -> None:
    """A machine that trains three times slower than expected, and samples at twice the speed, in a run of its plan."""
    pace = {"sampling": 0.5, "reference": 1.0, "training": 3.0, "reading": 1.0}
    lines: list[str] = []
    meter = _meter(progress, lines)
    truth = sum(stage.seconds * pace[stage.kind] for stage in meter.stages)
    estimates, shares = [], []
    for stage in meter.stages:
        meter.enter(stage.label)
        units = stage.seconds / progress.SECONDS[stage.kind]
        for _ in range(40):
            clock[0] += stage.seconds * pace[stage.kind] / 40
            meter.advance(units / 40)
            shares.append(meter.share)
            if (left := meter.left()) is not None:
                estimates.append((clock[0], clock[0] + left))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    # Once every kind has been seen, which is after the first round, the estimate is right.
    later = [whole for at, whole in estimates if at > truth / 3]
    assert max(later) / truth < 1.1
    assert min(later) / truth > 0.9


def test_every_stage_is_named_when_it_begins(progress: Any, clock: list[float]) -> None:
    lines: list[str] = []
    meter = _meter(progress, lines)
    for stage in meter.stages:
        meter.enter(stage.label)
        meter.enter(stage.label)  # saying so again says nothing new
    assert len(lines) == len(meter.stages)
    assert all(stage.label in line for stage, line in zip(meter.stages, lines, strict=True))


def test_stages_that_were_not_needed_are_not_waited_for(progress: Any, clock: list[float]) -> None:
    meter = _meter(progress, [])
    meter.enter(progress.training_label(1))
    clock[0] += 10
    meter.advance(24)
    left = meter.left()
    meter.enter(progress.sampling_label(2))
    assert meter.left() < left
    assert not any("extrapolated" in stage.label for stage in _meter(progress, [], alpha=0).stages)


def test_text_to_keep_is_no_text_in_use_and_begins_with_no_prompt() -> None:
    snippets = _snippets()
    used = [snippets[140].text, openings.opening(snippets[150].text).upper()]
    everything = len(film_lines.kept_texts(snippets, [], 1, 0)) and [
        s for s in snippets if s.source != "film" or s.rating == 0.1
    ]
    begun = [s.text for s in everything if s.text.lower().startswith(used[1].lower())]
    allowed = [s for s in everything if film_lines.UNSEEN_WORDS[0] <= s.words <= film_lines.UNSEEN_WORDS[1]]
    most = len(allowed) - sum(s.text == used[0] or s.text in begun for s in allowed)
    kept = film_lines.kept_texts(snippets, used, most, 0)
    assert begun
    assert len(set(kept)) == most
    assert not set(kept) & {used[0], *begun}
    with pytest.raises(ValueError, match=f"1 to {most} are possible"):
        film_lines.kept_texts(snippets, used, most + 1, 0)


def test_the_samplers_own_look_at_the_model_is_no_stage(progress: Any, clock: list[float]) -> None:
    """One short pass before it samples, with no label of its own: as after the last round."""
    meter, model = _meter(progress, []), tiny.make_model().eval()
    settings = SamplingSettings(1.0, 1.0, 0, None, 1.0, 4, (1,), 0)
    watch = progress.Watch(meter, model, prompts=24, batch_size=4)
    watch.trained = watch.ended = 3
    with watch:
        TransformersSampler(model, settings)([[5, 6], [7, 8, 9]], 1, seed=0)
    assert meter.stages[meter.current].label == progress.held_out_label(3, True)
