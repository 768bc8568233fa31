"""Train what pruning left, with every zero kept."""
