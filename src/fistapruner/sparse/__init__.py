"""Store and run pruned operators without their zeros."""
