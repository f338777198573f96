"""`python -m diffusekrona`."""

from .cli import app

app()
