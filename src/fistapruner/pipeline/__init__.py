"""From a checkpoint and a recipe to a run directory: capture, the decoder layer as the unit of work, the journal."""
