"""Published systems that plug into a joint of the library, one file each."""
