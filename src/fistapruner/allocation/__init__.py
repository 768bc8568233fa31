"""What is decided on the dense model before anything is pruned: sparsities, weights of rows, order of channels."""
