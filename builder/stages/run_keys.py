"""Where a recipe's stages keep their work, and the keys that decide whether each is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from builder.data.content_hashes import ContentHashes, Inputs, corpus_inputs
from builder.data.transforms import transform_hash
from builder.model.pretrained import Base, resolve_base
from builder.recipe import OBSERVING, Recipe
from builder.run_folder import stage_key
from builder.stages.prepare import PARTS
from builder.stages.prepare import WRITES as PREPARE_FILES
from builder.stages.train import KEEPS
from builder.stages.train import WRITES as TRAIN_FILES
from serving import __version__

# In the folder of `prepare`: what it read.
INPUTS = "inputs.json"
# In the folder of `export`: the draft, and what `verify` says of it.
EXPORT_FILES = ("bundle", "verification.json")


@dataclass(frozen=True)
class Run:
    """Where one recipe's stages live, and the keys that say whether each is done."""

    recipe: Recipe
    folder: Path

    @property
    def prepared(self) -> Path:
        return self.folder / "prepare"

    @property
    def trained(self) -> Path:
        return self.folder / "train"

    @property
    def draft(self) -> Path:
        return self.folder / "export" / "bundle"

    def stage_files(self) -> list[tuple[Path, tuple[str, ...], tuple[str, ...]]]:
        """Each stage's folder, what the stage writes there, and what of it the next call keeps."""
        return [
            (self.prepared, (*PREPARE_FILES, INPUTS), PARTS),
            (self.trained, TRAIN_FILES, KEEPS),
            (self.draft.parent, EXPORT_FILES, ()),
        ]

    @cached_property
    def hashes(self) -> ContentHashes:
        return ContentHashes(self.folder / "hashes.json")

    @cached_property
    def corpus(self) -> Inputs:
        """What the corpus holds when this is first asked for: a file that changes later belongs to the next build."""
        return corpus_inputs(self.recipe.corpus, self.hashes)

    @cached_property
    def transform(self) -> str:
        """The source of the function that texts go through."""
        return transform_hash(self.recipe.corpus.transform) if self.recipe.corpus.transform else ""

    @cached_property
    def base_parts(self) -> Base | None:
        """Where the base checkpoint lies: in its folder, or in the hub's cache."""
        return resolve_base(self.recipe.model.base) if self.recipe.model.base else None

    @cached_property
    def base(self) -> Inputs:
        """The files of the base checkpoint, as `corpus`; empty from scratch."""
        base = self.base_parts
        return self.hashes.all_of((path.name, path) for path in base.files()) if base else []

    def prepare_key(self) -> str:
        """Of the texts, of all that decides what becomes of them, and of the base that brings the tokenizer."""
        recipe = self.recipe
        corpus = {key: value for key, value in asdict(recipe.corpus).items() if key not in ("paths", "transform")}
        parts = corpus, asdict(recipe.instruction), asdict(recipe.cleaning), asdict(recipe.tokenizer)
        sequence = recipe.training.sequence_length, recipe.training.packing
        model = (recipe.model.n_positions, self.base)
        return stage_key(__version__, *parts, recipe.seed, model, sequence, self.corpus, self.transform)

    def train_key(self) -> str:
        """Of the tokens and of what decides the weights: both loops' are equal but for rounding, so it is not said."""
        recipe = self.recipe
        training = {key: value for key, value in asdict(recipe.training).items() if key not in OBSERVING}
        model = asdict(recipe.model) | {"base": self.base}
        return stage_key(self.prepare_key(), model, training, recipe.seed)

    def export_key(self) -> str:
        return stage_key(self.train_key(), asdict(self.recipe.export), asdict(self.recipe.verify), self.recipe.name)
