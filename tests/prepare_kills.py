"""Kill `prepare` at steps it takes in the file system: python -m tests.prepare_kills FOLDER EVERY.

The work is the real one on a small text; each kill happens in a child of this process (see `kill_points`). After it the
same call must end with the very files of a call that was not broken off, and leave alone what was finished. The last
line is JSON: how many kills there were, how many of them found something finished, and what was wrong.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from builder.data import token_shards
from builder.recipe import CleaningRecipe, CorpusRecipe, Recipe, TokenizerRecipe, TrainingRecipe
from builder.run_folder import STAMP
from builder.stages.prepare import PARTS, prepare
from tests.kill_points import child, kill_at
from tests.tiny_build import contents


def recipe_of(folder: Path, documents: int = 30) -> Recipe:
    """Documents of which some are copies and some alike, with every kind of step switched on."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "text.jsonl"
    bodies = [" ".join(f"w{(number // 3) * 31 * place % 977}" for place in range(1, 61)) for number in range(documents)]
    texts = [body + " and more" * (number % 3 == 1) for number, body in enumerate(bodies)]
    path.write_text("".join(json.dumps({"text": f"<p>A licence line.</p>\n{text}"}) + "\n" for text in texts))
    return Recipe(
        corpus=CorpusRecipe(paths=(str(path),), near_duplicates=True, validation_fraction=0.2),
        cleaning=CleaningRecipe(html=True, boilerplate_documents=5, boilerplate_characters=5),
        tokenizer=TokenizerRecipe(vocab_size=300),
        training=TrainingRecipe(sequence_length=16),
    )


def main(folder: Path, every: int) -> None:
    """Try the kills."""
    token_shards._BATCH_CHARACTERS, token_shards._BATCHES_A_NOTE = 500, 1
    recipe, run = recipe_of(folder / "corpus"), folder / "run"

    def work() -> None:
        prepare(recipe, run, lambda line: None, key="a key")

    def killed() -> None:
        kill_at(number, False)
        work()

    assert child(work) == 0
    expected = contents(run)
    kills, taken_over, wrong, number = 0, 0, [], 0
    while True:
        shutil.rmtree(run)
        if child(killed) == 0:
            break
        kills += 1
        finished = {part: (run / part / STAMP).stat().st_mtime_ns for part in PARTS if (run / part / STAMP).exists()}
        taken_over += bool(finished)
        if child(work) != 0:
            wrong.append(f"step {number}: the next call failed")
        elif contents(run) != expected:
            wrong.append(f"step {number}: other files")
        elif any((run / part / STAMP).stat().st_mtime_ns != when for part, when in finished.items()):
            wrong.append(f"step {number}: made anew what was finished")
        number += every
    print(json.dumps({"kills": kills, "taken_over": taken_over, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
