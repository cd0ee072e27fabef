"""The `gpt2-bundle` command: one Click group whose subcommands are imported only when they run.

`--help` must answer without TensorFlow or ONNX Runtime, so the group knows each subcommand by name, one line of help
and the place of its function, and imports that place when the subcommand itself is asked for.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from serving import __version__
from serving.errors import GPT2BundleError, one_line
from serving.support.interrupts import remembered_interrupts

COMMANDS: dict[str, tuple[str, str]] = {
    "prepare": ("builder.commands.prepare:prepare", "Read text, train or load the tokenizer, write token shards."),
    "train": ("builder.commands.train:train", "Train GPT-2 on prepared tokens."),
    "export": ("builder.commands.export:export", "Export a trained model to SavedModel and ONNX, or a bundle to GGUF."),
    "verify": (
        "builder.commands.verify:verify",
        "Prove that all runtimes give the same results; write the certificate.",
    ),
    "build": (
        "builder.commands.build:build",
        "Build a verified bundle from text: prepare, train, export, verify, package.",
    ),
    "recipe": ("builder.commands.recipe:recipe", "Print the keys of a recipe: types, defaults and meanings."),
    "inspect": ("serving.commands.inspect:inspect", "Check a bundle and print its contents."),
    "generate": ("serving.commands.generate:generate", "Continue a prompt with a bundle."),
    "serve": ("serving.commands.serve:serve", "Serve a bundle over HTTP and gRPC, with continuous batching."),
    "batch": ("serving.commands.batch:batch", "Answer a file of requests in OpenAI's batch format; resumable."),
    "evaluate": ("builder.commands.evaluate:evaluate", "Measure the perplexity of a bundle on a text."),
    "lint": ("builder.commands.lint:lint", "Check that stock TensorFlow Serving can serve a SavedModel."),
    "deploy": ("serving.commands.deploy:deploy", "Write a folder that serves a bundle: by containers or in a cluster."),
    "publish": ("serving.commands.publish:publish", "Publish a bundle to the Hugging Face hub or an OCI layout."),
    "sign": ("serving.commands.sign:sign", "Sign a bundle with a local key (OpenSSF Model Signing)."),
    "verify-signature": ("serving.commands.sign:verify_signature", "Check a bundle against its signature."),
    "sbom": ("serving.commands.sbom:sbom", "Write the bill of materials of a bundle (CycloneDX), or check one."),
    "client": ("serving.commands.client:client", "Call a running TensorFlow Serving or 'serve', over REST or gRPC."),
    "bench": (
        "benchmarks.commands.run:bench",
        "Measure latency and throughput of decode steps and of requests.",
    ),
    "completion": ("serving.commands.completion:completion", "Print the completion script of a shell."),
    "man": ("serving.commands.man:man", "Print the manual page."),
}
# What keeps its work by stages, and takes it up again.
STAGES = ("prepare", "train", "export", "verify", "build")


class LazyGroup(click.Group):
    """A group that imports a subcommand's module only to run it or to print its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module_name, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module_name), attribute)
        _name_ranges(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the subcommands from their names alone; click would import every one of them."""
        found = [CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)]
        return found or click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with remembered_interrupts():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            # Click itself would print an empty line, even where no terminal has shown "^C".
            raise click.Abort from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            from serving.support.suggestions import did_you_mean

            raise click.UsageError(f"no command {args[0]!r}{did_you_mean(args[0], COMMANDS)}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _name_ranges(command: click.Command) -> None:
    """Call the values of bounded options INTEGER and NUMBER in the help; click's own names are INTEGER RANGE and such.

    The bounds themselves stay next to the default.
    """
    for option in command.params:
        if isinstance(option, click.Option) and option.metavar is None and not option.count:
            if isinstance(option.type, click.IntRange):
                option.metavar = "INTEGER"
            elif isinstance(option.type, click.FloatRange):
                option.metavar = "NUMBER"
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        _name_ranges(below)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpt2-bundle")
def cli() -> None:
    """Turn text into a GPT-2 bundle for TensorFlow Serving and ONNX Runtime, and prove that both say the same."""


def _os_error_line(error: OSError) -> str:
    """One line for a failure of the file system, with what a person can do about it."""
    where = f": {error.filename}" if error.filename else ""
    advice = {
        errno.ENOSPC: "free some space or choose another folder",
        errno.EDQUOT: "free some space or choose another folder",
        errno.EACCES: "choose a folder that you may read and write",
        errno.EPERM: "choose a folder that you may read and write",
        errno.EROFS: "choose a folder that can be written",
        errno.ENOENT: "check the path",
    }.get(error.errno or 0, "check the path and the disk")
    return f"{error.strerror or error}{where} ({advice})"


def _fail(line: str, code: int) -> int:
    # What a server or a file's name put into it must not steer the terminal.
    plain = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(line.split()))
    click.echo(f"error: {plain}", err=True)
    return code


def _open_missing_streams() -> None:
    """Give a process that was started without standard output or errors (`>&-`) dummy ones."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors become one line on standard error.

    Set GPT2_BUNDLE_TRACEBACK=1 to see the traceback of an error instead.
    """
    _open_missing_streams()
    if os.environ.get("GPT2_BUNDLE_TRACEBACK") == "1":
        result: Any = cli.main(args=arguments, prog_name="gpt2-bundle", standalone_mode=False)
        return result if isinstance(result, int) else 0
    try:
        result = cli.main(args=arguments, prog_name="gpt2-bundle", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.UsageError as error:
        hint = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        return _fail(error.format_message() + hint, error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        if sys.stderr.isatty():
            click.echo(err=True)  # Behind the terminal's "^C".
        goes_on = next(iter(sys.argv[1:] if arguments is None else arguments), None) in STAGES
        return _fail(
            "interrupted"
            + ("; run the same command again to resume after the last completed stage" if goes_on else ""),
            130,
        )
    except GPT2BundleError as error:
        return _fail(one_line(error), error.exit_code)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): end quietly, and keep the interpreter from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(_os_error_line(error), 1)
    except MemoryError:
        return _fail("out of memory; use a smaller model, batch or context", 1)
    except Exception as error:  # A bug of ours: still one line, with the way to a full report.
        return _fail(
            f"internal error: {type(error).__name__}: {one_line(error)} (please report it; "
            "GPT2_BUNDLE_TRACEBACK=1 shows where it happened)",
            1,
        )


def main() -> None:
    """Entry point of the `gpt2-bundle` script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
