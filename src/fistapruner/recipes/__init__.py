"""Settings of a run, how they are read, and the recipes that come with the package."""
