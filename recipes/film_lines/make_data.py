"""Write preference pairs from human ratings, and human text to keep, as JSON lines, for the recipes in this folder.

python recipes/film_lines/make_data.py --out data/film-lines
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[2]
# The ratings and the model are those of the quickstart, and so is the code that fetches them.
sys.path.insert(0, str(REPOSITORY / "recipes" / "quickstart"))

import film_lines  # noqa: E402
import parts  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=48, help="pairs a round (default: 48)")
    parser.add_argument("--kept", type=int, default=96, help="texts whose likelihood is to be kept (default: 96)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "trl-extras-quickstart")
    parser.add_argument(
        "--model", action="store_true", help="also fetch the model, and print what to give as model_name_or_path"
    )
    options = parser.parse_args()
    try:
        snippets = film_lines.read_sdist(parts.ratings(options.cache, print))
        data = film_lines.make(snippets, options.rounds, options.pairs, options.seed)
        rows = [*data.train, *data.held_out]
        used = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]
        kept = film_lines.kept_texts(snippets, [*used, *data.unseen], options.kept, options.seed)
        base = parts.base_model(options.cache, print) if options.model else None
    except (ValueError, parts.PartError) as error:
        print(f"make_data: {error}", file=sys.stderr)
        return 2
    # `load_dataset` takes a folder's train and test files for its splits; the unseen texts are no pairs, so apart.
    options.out.mkdir(parents=True, exist_ok=True)
    film_lines.write_jsonl(options.out / "train.jsonl", data.train)
    film_lines.write_jsonl(options.out / "test.jsonl", data.held_out)
    apart = options.out.with_name(f"{options.out.name}-unseen.jsonl")
    film_lines.write_jsonl(apart, [{"text": text} for text in data.unseen])
    sft = options.out.with_name(f"{options.out.name}-sft")
    sft.mkdir(exist_ok=True)
    film_lines.write_jsonl(sft / "train.jsonl", [{"text": text} for text in kept])
    print(f"{len(data.train)} training pairs and {len(data.held_out)} held-out pairs in {options.out}")
    print(f"{len(kept)} texts to keep in {sft}; {len(data.unseen)} unseen ones in {apart}")
    if base is not None:
        print(f"model_name_or_path: {base.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
