"""Training: stages of a run on a DeepSpeed engine. Imported as `vlm.train`; may import all of vlm but cli."""
