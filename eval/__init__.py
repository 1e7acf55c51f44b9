"""Evaluation of a finished run: reads a run folder, nothing else. Imported as `vlm.eval`."""
