"""The build: its stages in order, each skipped when it is done, and the bundle published only when it is proven."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from builder.data.content_hashes import Inputs
from builder.progress import Reporter
from builder.run_folder import STAMP, is_done, refusals_named, refuse_strangers, run_stage
from builder.stages.prepare import PAGE as PREPARED_PAGE
from builder.stages.prepare import PARTS, prepare
from builder.stages.prepare import WRITES as PREPARE_FILES
from builder.stages.run_keys import EXPORT_FILES, INPUTS, Run
from builder.stages.train import KEEPS, REPORT, SETTINGS, check_quality, quality, tokens_digest, train
from builder.stages.train import WRITES as TRAIN_FILES
from builder.tracking.session import Tracking
from builder.training.metrics_log import read_metrics
from builder.training.plan import fine_tuning_line, settled
from builder.training.training_report import REPORT_PAGE as TRAINED_PAGE
from builder.training.workers import Workers
from serving.bundle import MANIFEST_NAME, Bundle, open_bundle, publish, write_manifest
from serving.bundle.publishing import check_destination
from serving.errors import BundleError, GPT2BundleError, InputError
from serving.support.cores import usable_cores


def as_prepared(run: Run, reporter: Reporter) -> Run:
    """Return the run for the texts that its tokens were made of, which the stages after `prepare` continue from.

    If the corpus has changed since, or is gone, a line says so.
    """
    try:
        stored = json.loads((run.prepared / INPUTS).read_text(encoding="utf-8"))
        texts: Inputs = [(str(name), str(digest)) for name, digest in stored]
    except (OSError, ValueError, TypeError):
        return run
    try:
        changed = run.corpus != texts
    except InputError:
        changed = True
    if not changed:
        return run
    then = Run(run.recipe, run.folder)
    then.__dict__["corpus"] = texts
    if is_done(run.prepared, then.prepare_key()):
        reporter.line(
            "the corpus has changed since it was read: the build continues with what was read; 'prepare' reads it again"
        )
        return then
    return run


def prepare_stage(run: Run, reporter: Reporter, workers: int = 0) -> None:
    """Text to tokens, by `workers` processes, or one per core. Raises InputError for a base that is this run's own
    work."""
    _refuse_as_base(run, run.folder, "the folder of this very run, which is emptied on the way")

    key = run.prepare_key()

    def work(folder: Path) -> None:
        recipe = settled(run.recipe)  # A wrong name must be reported before the text is read.
        if recipe.model.base:
            reporter.line(fine_tuning_line(recipe))
        prepare(
            recipe,
            folder,
            reporter.line,
            key=key,
            workers=workers or usable_cores(),
            check=partial(_unchanged, run),
        )
        (folder / INPUTS).write_text(json.dumps(run.corpus) + "\n", encoding="utf-8")

    if not run_stage(run.prepared, key, work, writes=(*PREPARE_FILES, INPUTS), parts=PARTS):
        reporter.line("prepare: done already")


def _unchanged(run: Run) -> None:
    """Raise InputError if the texts are no longer those that the run's keys are made of."""
    now = Run(run.recipe, run.folder).corpus
    if Run(run.recipe, run.folder).transform != run.transform:
        raise InputError("corpus.transform changed while the corpus was read; run the same command again")
    if now != run.corpus:
        changed = sorted({name for name, _ in set(now) ^ set(run.corpus)}) or ["the order of the files"]
        raise InputError(f"corpus: {', '.join(changed[:3])} changed while it was read; run the same command again")


def _refuse_as_base(run: Run, folder: Path, what: str) -> None:
    """Refuse a base that is `folder` or lies in it: a build must not consume what it starts from."""
    name = run.recipe.model.base
    base = Path(name).expanduser().resolve()
    if name and base.is_dir() and folder.resolve() in (base, *base.parents):
        raise InputError(f"model.base {name!r}: {what}; give the new one another name (--set name=...)")


def train_stage(run: Run, reporter: Reporter, workers: Workers | None = None, tracking: Tracking | None = None) -> None:
    """Tokens to weights, as the chief of `workers` if there are any, which may end when this returns.

    `tracking` is started, and has the metrics of all steps in the end.

    Raises InputError if the tokens of this recipe are not prepared.
    """
    if not is_done(run.prepared, run.prepare_key()):
        raise InputError(f"{run.prepared}: no tokens of this recipe here; run 'gpt2-bundle prepare' with it first")
    key = run.train_key()
    if tracking is not None:
        tracking.start(run.export_key())

    def work(folder: Path) -> None:
        if workers is not None:
            workers.start_training({"run": key, "tokens": tokens_digest(run.prepared)})
        train(run.recipe, run.prepared, folder, key, reporter, workers, tracking)

    # The checkpoint stays while the key is another's too: it names the run that it belongs to, and the figures of a
    # run that is not resumed are dropped when the new one begins.
    if not run_stage(run.trained, key, work, writes=TRAIN_FILES, keep=KEEPS):
        reporter.line("train: done already")
    if tracking is not None:
        # Whatever an earlier start, or a tracker that failed for a while, has left out.
        tracking.log(read_metrics(run.trained))
    if workers is not None:
        workers.finish()


def check_trained(run: Run) -> None:
    """Hold the trained model to `verify.better_than` of its recipe. Raises TrainingError if it is no better."""
    check_quality(run.recipe.verify, quality(json.loads((run.trained / REPORT).read_text(encoding="utf-8"))))


def export_stage(run: Run, reporter: Reporter) -> Bundle:
    """Weights to a draft bundle. Raises InputError if this recipe is not trained."""
    if not is_done(run.trained, run.train_key()):
        raise InputError(f"{run.trained}: no weights of this recipe here; run 'gpt2-bundle train' with it first")

    def work(folder: Path) -> None:
        from builder.stages.export import export

        run.draft.mkdir(parents=True)
        report = json.loads((run.trained / REPORT).read_text(encoding="utf-8"))
        # The loop is not in the key, and a row's length may be the base's: the manifest has what made these weights.
        settings = replace(run.recipe.training, **{key: report[key] for key in SETTINGS if key in report})
        recipe = replace(run.recipe, training=settings)
        export(recipe, run.prepared, run.trained, run.draft, quality(report), reporter)

    if not run_stage(run.draft.parent, run.export_key(), work, writes=EXPORT_FILES):
        reporter.line("export: done already")
    return open_draft(run)


def open_draft(run: Run) -> Bundle:
    """Return the draft with every byte checked. Raises InputError if this recipe is not exported."""
    if not is_done(run.draft.parent, run.export_key()):
        raise InputError(f"{run.draft}: no export of this recipe here; run 'gpt2-bundle export' with it first")
    try:
        return open_bundle(run.draft)
    except GPT2BundleError as error:
        clear_stamp(run)
        raise BundleError(
            f"the export was changed ({error}); run the same command again, which makes it again"
        ) from None


def verify_bundle(bundle: Bundle, batch_size: int, reporter: Reporter) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the certificate on a draft or on a published bundle (see `builder.verification.certificate.verify`)."""
    from builder.verification.certificate import verify

    return verify(bundle, batch_size, reporter)


def package(draft: Bundle, certificate: dict[str, Any], golden: dict[str, Any], destination: Path) -> Path:
    """Add certificate and model card to the draft, write the manifest again, and move it to `destination`, atomically.

    Variants that the certificate leaves out are removed.
    A bundle that stands there is replaced at once; any other folder is refused.
    """
    from builder.stages.model_card import model_card
    from builder.verification.certificate import summary, write_certificate

    write_certificate(draft.folder, certificate, golden)
    manifest = draft.manifest
    for name in certificate["left_out"]:
        shutil.rmtree(draft.path(draft.graph(name).path).parent)
    card = model_card(draft, certificate, manifest.quality)
    (draft.folder / "README.md").write_text(card, encoding="utf-8")
    write_manifest(
        draft.folder,
        name=manifest.name,
        model=manifest.model,
        graphs={name: graph for name, graph in manifest.graphs.items() if name not in certificate["left_out"]},
        provenance=manifest.provenance,
        quality=manifest.quality,
        parity=summary(certificate),
    )
    destination.parent.mkdir(parents=True, exist_ok=True)
    return publish(draft.folder, destination)


def build(
    run: Run, output: Path, reporter: Reporter, workers: Workers | None = None, tracking: Tracking | None = None
) -> Bundle:
    """Run every stage that is not done and publish the bundle to `output`/NAME; return it opened.

    With `workers`, this is their chief; the others take part in training alone. `tracking` gets metrics, figures and
    bundle.
    """
    destination = output / run.recipe.name
    _refuse_as_base(run, destination, "the bundle that this build would replace")
    done = _published(run, destination)
    if done is not None:
        reporter.line(f"{destination} is this recipe's bundle already, and whole")
        return done
    # Now, and not after hours of training.
    check_destination(destination)
    for folder, writes, keeps in run.stage_files():
        refuse_strangers(folder, writes, keeps)
    prepare_stage(run, reporter)
    train_stage(run, reporter, workers, tracking)
    check_trained(run)
    draft = export_stage(run, reporter)
    certificate, golden = verify_bundle(draft, run.recipe.verify.batch_size, reporter)
    # From here on the draft differs from the export that the stamp describes.
    key = run.export_key()
    clear_stamp(run)
    with refusals_named(destination):
        package(draft, certificate, golden, destination)
    record = _record(key, destination)
    (run.folder / "published.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    reporter.line(f"published {destination}")
    bundle = open_bundle(destination, check="sizes")
    if tracking is not None:
        tracking.publish(bundle.folder, {"quality": bundle.manifest.quality, "certificate": bundle.manifest.parity})
    return bundle


def report_lines(run: Run, bundle: Bundle) -> list[str]:
    """Return a line for each report of a build that is there."""
    reports = {
        "data report": run.prepared / PREPARED_PAGE,
        "training report": run.trained / TRAINED_PAGE,
        "certificate": bundle.folder / "verification.json",
        "model card": bundle.folder / "README.md",
    }
    return [f"{name}: {path}" for name, path in reports.items() if path.is_file()]


def clear_stamp(run: Run) -> None:
    """Take back the export stage's stamp."""
    (run.draft.parent / STAMP).unlink(missing_ok=True)


def _record(key: str, destination: Path) -> dict[str, str]:
    """What says that a run published the very bundle at `destination`."""
    return {"key": key, "manifest": hashlib.sha256((destination / MANIFEST_NAME).read_bytes()).hexdigest()}


def _published(run: Run, destination: Path) -> Bundle | None:
    """The bundle at `destination` if this very run published it and no byte of it has changed."""
    try:
        record = json.loads((run.folder / "published.json").read_text(encoding="utf-8"))
        if record != _record(run.export_key(), destination):
            return None
        return open_bundle(destination)
    except (OSError, ValueError, GPT2BundleError):
        return None
