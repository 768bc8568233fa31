"""How much sparsity each operator gets: uniform, by outliers (OWL), or by measured error and its effect on the loss."""
