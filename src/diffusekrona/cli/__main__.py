"""`python -m diffusekrona.cli`."""

from . import app

app()
