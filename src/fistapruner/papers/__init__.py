"""Systems of published papers, each in one file that plugs into a joint of the package."""
