"""Shapes are checked in every test: beartype enforces the jaxtyping annotations of `ingest`."""

from jaxtyping import install_import_hook

install_import_hook("ingest", "beartype.beartype")
