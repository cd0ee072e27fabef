"""From a bundle to tokens: the bundle's contract, the runtimes, and what talks to them."""

__version__ = "0.1.0"
