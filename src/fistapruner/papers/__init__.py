"""Published systems that plug into a joint of the package, one file each."""
