"""What is measured on the dense model and decided from it: sparsities, row weights, channel order."""
