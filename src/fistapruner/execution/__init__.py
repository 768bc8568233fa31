"""Who prunes which decoder layer: this process, processes of this machine, or a cluster."""
