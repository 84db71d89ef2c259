"""Imported by the server of tests.support.ranks: brings in everything that ranks use."""

from tests.support.ranks import preload

preload()
