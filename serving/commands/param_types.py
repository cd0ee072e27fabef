"""The kinds of values that the options of a server take, each with a sentence for what is none of them."""

from __future__ import annotations

import math
import re
import secrets
from pathlib import Path
from urllib.parse import urlsplit

import click
from click.shell_completion import CompletionItem

from serving.bundle.manifest import MANIFEST_NAME, NAME, NAME_PROBLEM

YEAR = 31_536_000.0
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)?\Z")
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Size(click.ParamType[int]):
    """Bytes, as in 512MiB or 16GiB."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.match(str(value))
        if not match or not float(match[1]):
            self.fail(f"{value!r} is not a size; write it as 512MiB or 16GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2] or "B"])


class Number(click.FloatRange):
    """A finite number within bounds; click's own kind lets "nan" pass, and "inf" where there is no upper bound."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number; write one that is finite", param, ctx)
        return number


class Seconds(Number):
    """Seconds, up to a year: a wait without end is asked for by the option's own means, and never meant by "inf"."""

    def __init__(self, zero: bool = True) -> None:
        super().__init__(0, YEAR, min_open=not zero)


class Host(click.ParamType[str]):
    """An address to listen on. An empty one, such as an unset variable leaves, would be every interface."""

    name = "host"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        host = str(value).strip()
        if not host:
            self.fail("it is empty; write 127.0.0.1, or 0.0.0.0 for every interface", param, ctx)
        return host


class ModelName(click.ParamType[str]):
    """A name as a manifest may have, so that it is one part of a path in every protocol."""

    name = "name"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not NAME.match(str(value)):
            self.fail(f"{value!r} {NAME_PROBLEM}", param, ctx)
        return str(value)


class Origin(click.ParamType[str]):
    """A web page's origin as a browser writes it, or "*"; anything else would match no page, in silence."""

    name = "origin"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        origin = str(value)
        parts = urlsplit(origin)
        if origin == "*" or (parts.scheme and parts.netloc and origin == f"{parts.scheme}://{parts.netloc}".lower()):
            return origin
        self.fail(
            f"{value!r} is not an origin; write scheme, host and port as a browser does, such as https://example.org, "
            "or *",
            param,
            ctx,
        )


class Seed(click.ParamType[int]):
    """A whole number that begins the random numbers; -1 is a new one each time, as with vLLM and llama.cpp."""

    name = "integer"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        seed: int = click.INT.convert(value, param, ctx)  # type: ignore[arg-type]
        return secrets.randbelow(2**63) if seed == -1 else seed


class BundlePath(click.Path):
    """The folder of a bundle. Shells complete it with bundles, of dist/ too, or with folders where there are none."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        above = incomplete.rpartition("/")
        places = ["".join(above[:2])] if incomplete else ["", "dist/"]
        try:
            found = sorted(
                f"{place}{path.parent.name}"
                for place in places
                for path in Path(place or ".").glob(f"*/{MANIFEST_NAME}")
                if path.parent.name.startswith(above[2])
            )
        except OSError:
            found = []
        return [CompletionItem(each) for each in found] or [CompletionItem(incomplete, type="dir")]


class GraphName(click.ParamType[str]):
    """A graph of the command's bundle, by its name in the manifest, which shells complete."""

    name = "name"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from serving.bundle.folder import open_bundle
        from serving.errors import GPT2BundleError

        # While the option lacks its value, click leaves the words before it in `args`.
        words = [ctx.params["bundle"]] if ctx.params.get("bundle") else ctx.args
        for word in words:
            try:
                graphs = open_bundle(word, check="sizes").manifest.graphs
            except (OSError, GPT2BundleError):
                continue
            return [CompletionItem(name) for name in graphs if name.startswith(incomplete)]
        return []
