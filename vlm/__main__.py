"""`python -m vlm` is the command `vlm`."""

from vlm.cli import app

app()
