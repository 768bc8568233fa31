"""Settings of a run, how they are read, and the recipes of the package."""
